"""One iteration of the method: METHOD.md's items 1 to 5 as five functions.

They compute losses per concept [N] and what the next one needs; the loop around them
(`components/train`) calls backward and step after items 1, 4 and 5. Rows of a batch are
concept-major: row r is item i of concept n.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from model import losses
from model.base_pair import BasePair
from model.batch import Batch
from model.concept import StudentWeights, TeacherWeights
from model.discriminators import Backbone, DiscriminatorHeads, Features
from model.errors import InputError
from model.identity import ImageProjection, identity_features
from model.packing import per_concept_mean, per_row
from model.schedule import LAST_STEP
from model.settings import LossSettings
from model.swd import SWD_FACTOR, ms_swd
from model.text import encode, tokenize


@dataclass(frozen=True, eq=False)
class Frozen:
    """All frozen networks.

    Attributes:
        pair: the base pair.
        backbones: `F_k`, one a discriminator.
        identity: `G`'s backbone; when it is one of `backbones`, one pass serves both.
        projection: IP-Adapter's image projection, or None.
        empty_states: text states of the empty prompt [1, L, d].
    """

    pair: BasePair
    backbones: tuple[Backbone, ...]
    identity: Backbone
    projection: ImageProjection | None
    empty_states: torch.Tensor

    @classmethod
    @torch.no_grad()
    def build(
        cls,
        pair: BasePair,
        backbones: Sequence[Backbone],
        identity: Backbone | None = None,
        projection: ImageProjection | None = None,
    ) -> "Frozen":
        """Put the frozen networks together; the first backbone serves as `G` when none is given.

        Raises:
            InputError: when there is no backbone at all.
        """
        if not backbones and identity is None:
            raise InputError("No feature backbone is given; set at least one CLIP directory.")
        empty = encode(pair.text_encoder, tokenize(pair.tokenizer, [""]))
        return cls(pair, tuple(backbones), identity or backbones[0], projection, empty)


@dataclass(frozen=True, eq=False)
class Drawn:
    """What the student drew: `z_S` [R, c, h, w] and `x_S` [R, 3, S, S], with gradient."""

    latents: torch.Tensor
    images: torch.Tensor


@dataclass(frozen=True, eq=False)
class Target:
    """The teacher's answer, without gradient.

    Attributes:
        latents: `z_T` [R, c, h, w].
        images: `x_T` [R, 3, S, S].
        weight: `abar_t'` [R].
        subject: [R, 1, S, S] in [0, 1], where the teacher's guidance acts; None unless the
            settings ask for masked identities.
    """

    latents: torch.Tensor
    images: torch.Tensor
    weight: torch.Tensor
    subject: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class StudentLoss:
    """The student's loss and its parts.

    Attributes:
        total: [N], with gradient; sum it and go backward.
        parts: each loss by name, unweighted, [N] without gradient.
        fake_features: pooled features of `x_S` [R, d_k], detached, for item 5; empty when the
            adversarial loss has no weight.
    """

    total: torch.Tensor
    parts: dict[str, torch.Tensor] = field(default_factory=dict)
    fake_features: list[torch.Tensor] = field(default_factory=list)


def teacher_loss(
    frozen: Frozen, teacher: TeacherWeights, batch: Batch, settings: LossSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Item 1: the teacher learns the concept from the reference views.

    Returns:
        `L_rec` [N], weighted, and the text states [R, L, d], detached: items 2 and 3 use them.
    """
    text_states, kv = teacher(frozen.pair.text_encoder, batch.prompts, batch.concept)
    return reconstruction_loss(frozen, kv, batch, settings), text_states.detach()


def reconstruction_loss(
    frozen: Frozen, kv: torch.Tensor, batch: Batch, settings: LossSettings
) -> torch.Tensor:
    """Item 1 from the teacher's keys and values [R, L, C_T] on: `L_rec` [N], weighted."""
    pair, schedule = frozen.pair, frozen.pair.teacher_schedule
    with torch.no_grad():
        z0 = pair.encode_images(batch.images) if batch.known is None else batch.known[0]
    z_t = schedule.add_noise(z0, batch.noise, batch.t)
    prediction = pair.denoise(pair.teacher, z_t, batch.t, kv)
    target = schedule.target(z0, batch.noise, batch.t)
    loss = losses.reconstruction(prediction, target, batch.masks)
    return settings.rec_weight * per_concept_mean(loss, batch.concept, batch.n)


def student_draw(
    frozen: Frozen, student: StudentWeights, text_states: torch.Tensor, batch: Batch
) -> Drawn:
    """Item 2: the student draws in one step from the base's start, with gradient."""
    encoder = frozen.pair.text_encoder
    kv = student(encoder, batch.prompts, batch.concept, text_states.detach())
    return drawn_with(frozen, kv, batch)


def drawn_with(frozen: Frozen, kv: torch.Tensor, batch: Batch) -> Drawn:
    """Item 2 from the student's keys and values [R, L, C_S] on."""
    pair, schedule = frozen.pair, frozen.pair.student_schedule
    start = batch.noise * schedule.start_scale(1)
    t = torch.full_like(batch.t, LAST_STEP)
    prediction = pair.denoise(pair.student, start, t, kv)
    z_s = schedule.x0(prediction, start, t)
    return Drawn(z_s, pair.decode(z_s))


@torch.no_grad()
def alignment_target(
    frozen: Frozen,
    teacher: TeacherWeights,
    text_states: torch.Tensor,
    drawn: Drawn,
    batch: Batch,
    settings: LossSettings,
) -> Target:
    """Item 3: the teacher answers the student's picture, re-noised to `t'`, with guidance."""
    kv = guidance_keys_values(frozen, teacher, text_states, batch)
    return answered_with(frozen, kv, drawn, batch, settings)


@torch.no_grad()
def guidance_keys_values(
    frozen: Frozen, teacher: TeacherWeights, text_states: torch.Tensor, batch: Batch
) -> torch.Tensor:
    """Give the teacher's keys and values of the empty prompt, then of the prompts [2R, L, C_T]."""
    encoder = frozen.pair.text_encoder
    _, kv = teacher(encoder, None, batch.concept, text_states)
    empty = frozen.empty_states.expand(batch.n, -1, -1)
    _, kv_empty = teacher(encoder, None, torch.arange(batch.n), empty)
    return torch.cat([per_row(kv_empty, batch.concept), kv])


@torch.no_grad()
def answered_with(
    frozen: Frozen, kv: torch.Tensor, drawn: Drawn, batch: Batch, settings: LossSettings
) -> Target:
    """Item 3 from the guidance's keys and values [2R, L, C_T] on."""
    pair, schedule = frozen.pair, frozen.pair.teacher_schedule
    t = batch.t_align
    z_t = schedule.add_noise(drawn.latents.detach(), batch.noise, t)
    both = pair.denoise(pair.teacher, torch.cat([z_t, z_t]), torch.cat([t, t]), kv)
    uncond, cond = both.chunk(2)
    z_target = schedule.x0(uncond + settings.guidance * (cond - uncond), z_t, t)
    if settings.guidance_rescale:
        calm = _with_colours_of(schedule.x0(cond, z_t, t), z_target)
        z_target = z_target.lerp(calm, settings.guidance_rescale)
    subject = _subject(cond - uncond, pair.resolution) if settings.masked_id else None
    return Target(z_target, pair.decode(z_target), schedule.weight(t), subject)


def student_loss(
    frozen: Frozen,
    heads: DiscriminatorHeads,
    drawn: Drawn,
    target: Target,
    batch: Batch,
    settings: LossSettings,
) -> StudentLoss:
    """Items 3 and 4: the student against the teacher's answer and the discriminators.

    The heads must be frozen (`requires_grad_(False)`) while this is computed and stepped.
    A loss of weight 0 is not computed. Each backbone sees `x_S` once.
    """
    features, wanted = _PerBackbone(drawn.images), _PerBackbone(target.images)
    rows: dict[str, torch.Tensor] = {}
    if settings.mse_weight:
        rows["mse"] = losses.alignment_mse(drawn.latents, target.latents, target.weight)
    if settings.id_weight:
        rows["id"] = _identity_loss(frozen, features, wanted, target)
    if settings.perc_weight:
        rows["perc"] = _perceptual_loss(frozen, features, wanted, target, batch, settings)
    fake_features: list[torch.Tensor] = []
    if settings.adv_weight:
        fakes = [features(backbone).pooled for backbone in frozen.backbones]
        rows["adv"] = losses.adversarial(heads(fakes, batch.concept))
        fake_features = [fake.detach() for fake in fakes]
    parts = {name: per_concept_mean(r, batch.concept, batch.n) for name, r in rows.items()}
    total = drawn.latents.new_zeros(batch.n)
    for name, part in parts.items():
        total = total + getattr(settings, f"{name}_weight") * part
    detached = {name: part.detach() for name, part in parts.items()}
    return StudentLoss(total, detached, fake_features)


def discriminator_loss(
    frozen: Frozen,
    heads: DiscriminatorHeads,
    batch: Batch,
    fake_features: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Item 5: the heads tell the reference views from the student's pictures: `L_D` [N]."""
    if batch.known is None:
        with torch.no_grad():
            reals = [backbone.features(batch.images) for backbone in frozen.backbones]
    else:
        reals = list(batch.known[1])
    real, fake = heads(reals, batch.concept), heads(fake_features, batch.concept)
    return per_concept_mean(losses.discriminator(real, fake), batch.concept, batch.n)


class _PerBackbone:
    """Features of one batch of pictures, each backbone's computed once, when asked for."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images
        self._known: dict[int, Features] = {}

    def __call__(self, backbone: Backbone) -> Features:
        if id(backbone) not in self._known:
            with torch.set_grad_enabled(self.images.requires_grad):
                self._known[id(backbone)] = backbone(self.images)
        return self._known[id(backbone)]


def _identity_loss(
    frozen: Frozen,
    mine: _PerBackbone,
    theirs: _PerBackbone,
    target: Target,
) -> torch.Tensor:
    if target.subject is not None:
        mine, theirs = (_PerBackbone(each.images * target.subject) for each in (mine, theirs))
    g_s, g_t = (
        identity_features(each(frozen.identity), frozen.projection) for each in (mine, theirs)
    )
    return losses.identity(g_s, g_t, target.weight)


def _perceptual_loss(
    frozen: Frozen,
    mine: _PerBackbone,
    theirs: _PerBackbone,
    target: Target,
    batch: Batch,
    settings: LossSettings,
) -> torch.Tensor:
    if batch.directions is not None:
        pictures = mine.images, theirs.images
        distance = ms_swd(*pictures, batch.directions, bins=settings.swd_bins)
        return SWD_FACTOR * target.weight * distance
    backbone = (*frozen.backbones, frozen.identity)[0]
    return target.weight * losses.lpips(mine(backbone).layers, theirs(backbone).layers)


def _with_colours_of(plain: torch.Tensor, guided: torch.Tensor) -> torch.Tensor:
    """Give guided latents [R, c, h, w] the mean and the spread of plain ones, in every channel."""
    spread, mean = torch.var_mean(plain, dim=(2, 3), keepdim=True)
    own_spread, own_mean = torch.var_mean(guided, dim=(2, 3), keepdim=True)
    return mean + (guided - own_mean) * (spread / own_spread.clamp_min(1e-6)).sqrt()


def _subject(guidance: torch.Tensor, size: int) -> torch.Tensor:
    """Give where guidance acts: its size [R, 1, S, S], smoothed, 1 at the strongest places."""
    strength = F.avg_pool2d(guidance.abs().mean(dim=1, keepdim=True), 3, stride=1, padding=1)
    peak = strength.flatten(1).quantile(0.9, dim=1).view(-1, 1, 1, 1).clamp_min(1e-6)
    return F.interpolate((strength / peak).clamp(0, 1), size=(size, size), mode="bilinear")
