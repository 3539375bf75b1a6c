"""The method as a plain loop: METHOD.md's items 1 to 5 for one concept, one after the other.

The reference that the engine is checked and timed against (`pipeline/bench.py`). Nothing is shared,
packed or kept: every loss runs the networks that it needs, keys and values are computed inside the
UNets by diffusers' own attention, and three `torch.optim.AdamW` step what is trained.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from components.spec import RunSpec, TrainSpec
from components.train.job import learning_rates
from model import losses, swd
from model.batch import Batch, ConceptData, draw_batch
from model.concept import initial_row
from model.cross_attention import base_weight
from model.discriminators import HIDDEN, DiscriminatorHeads
from model.errors import InputError
from model.identity import identity_features
from model.iteration import Frozen
from model.kv_layout import KVLayout, split
from model.schedule import LAST_STEP
from model.text import encode


@dataclass(frozen=True, eq=False)
class Pictures:
    """A latent [B, c, h, w] and the picture [B, 3, S, S] that it decodes to."""

    latents: torch.Tensor
    images: torch.Tensor


class Group:
    """What one loss trains, with its optimizer; the two calls are named as an engine's are."""

    def __init__(self, train: TrainSpec, named: Mapping[str, list[nn.Parameter]]) -> None:
        """Take lists of parameters, by the names of their learning rates."""
        self.parameters = [parameter for parameters in named.values() for parameter in parameters]
        self.clip_norm = train.clip_norm
        self.optimizer = torch.optim.AdamW(
            [{"params": parameters, "name": name} for name, parameters in named.items()],
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=train.weight_decay,
        )

    def backward(self, loss: torch.Tensor) -> None:
        """Compute the gradient of a loss."""
        self.optimizer.zero_grad()  # of another group's loss too, which may have run through here
        loss.backward()

    def step(self, rates: Mapping[str, float]) -> None:
        """Clip the gradient's norm and step, at these learning rates."""
        nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rates[group["name"]]
        self.optimizer.step()


class NaiveLoop:
    """One concept in training.

    With bf16 networks the trained matrices stay float32 and the UNets run under autocast.

    Attributes:
        teacher: UNet `T` of its own; its cross-attention K/V matrices train.
        student: UNet `S`, the same.
        rows: [1, d] parameter, the token's embedding row.
        heads: the discriminator heads `h_k`.
    """

    def __init__(self, spec: RunSpec, frozen: Frozen, data: ConceptData, initializer: str) -> None:
        """Start at the base, with the draws that the engine starts from.

        Raises:
            InputError: for `loss.masked_id`, which this loop leaves out.
        """
        if spec.loss.masked_id:
            raise InputError("The plain loop has no loss.masked_id; leave it off.")
        pair, train = frozen.pair, spec.train
        self.spec, self.frozen, self.data = spec, frozen, data
        self.teacher = _own_unet(pair.teacher, pair.teacher_layout, pair.teacher_kv)
        self.student = _own_unet(pair.student, pair.student_layout, pair.student_kv)
        self.rows = nn.Parameter(initial_row(pair, initializer)[None].clone())
        self.heads = _heads(frozen, data.id, spec.seed)
        self.of_teacher = Group(train, {"kv": _trained(self.teacher), "rows": [self.rows]})
        self.of_student = Group(train, {"kv": _trained(self.student)})
        self.of_heads = Group(train, {"": list(self.heads.parameters())})

    def iterate(self, iteration: int) -> dict[str, torch.Tensor]:
        """Do one iteration; returns the losses by name, scalars without gradient."""
        settings = self.spec.loss
        rates = learning_rates(self.spec, iteration)
        batch = self.draw(iteration)
        rec, text_states = self.teacher_loss(batch)
        self.of_teacher.backward(rec)
        followed = _trained(self.teacher) if self.spec.method.follow else []
        before = [each.detach().clone() for each in followed]
        self.of_teacher.step(rates["teacher"])
        for mine, theirs, old in zip(_trained(self.student), followed, before, strict=False):
            mine.data += self.spec.method.follow * (theirs.detach() - old)
        drawn = self.student_draw(text_states, batch)
        target = self.alignment_target(text_states, drawn, batch)
        parts = self.student_loss(drawn, target, batch)
        weighted = [getattr(settings, f"{name}_weight") * part for name, part in parts.items()]
        self.of_student.backward(torch.stack(weighted).sum())
        self.of_student.step(rates["student"])
        parts["rec"] = rec
        if settings.adv_weight:
            parts["disc"] = self.discriminator_loss(drawn, batch)
            self.of_heads.backward(parts["disc"])
            self.of_heads.step(rates["heads"])
        return {name: part.detach() for name, part in parts.items()}

    def draw(self, iteration: int) -> Batch:
        """Draw the batch that the engine draws for this concept and iteration."""
        spec = self.spec
        return draw_batch(
            [self.data],
            self.frozen.pair,
            seed=spec.seed,
            iteration=iteration,
            items=spec.batch_size,
            views=spec.views,
            echo=spec.echo,
            loss=spec.loss,
        )

    def teacher_loss(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Item 1: `L_rec`, weighted, and the text states [B, L, d], detached."""
        pair, schedule = self.frozen.pair, self.frozen.pair.teacher_schedule
        with torch.no_grad():
            z0 = pair.encode_images(batch.images)
        z_t = schedule.add_noise(z0, batch.noise, batch.t)
        rows = self.rows.expand(len(batch.prompts), -1, -1)
        text_states = encode(pair.text_encoder, batch.prompts, rows)
        prediction = self._denoise(self.teacher, z_t, batch.t, text_states)
        target = schedule.target(z0, batch.noise, batch.t)
        squares = (batch.masks * (prediction - target) ** 2).sum(dim=(1, 2, 3))
        loss = (squares / batch.masks.sum(dim=(1, 2, 3))).mean()
        return self.spec.loss.rec_weight * loss, text_states.detach()

    def student_draw(self, text_states: torch.Tensor, batch: Batch) -> Pictures:
        """Item 2: `z_S` in one step from the base's start, and `x_S`; with gradient."""
        pair, schedule = self.frozen.pair, self.frozen.pair.student_schedule
        t = torch.full_like(batch.t, LAST_STEP)
        start = batch.noise * schedule.start_scale(1)
        z_s = schedule.x0(self._denoise(self.student, start, t, text_states), start, t)
        return Pictures(z_s, pair.decode(z_s))

    @torch.no_grad()
    def alignment_target(
        self, text_states: torch.Tensor, drawn: Pictures, batch: Batch
    ) -> Pictures:
        """Item 3: the teacher's guided answer `z_T`, `x_T` to the student's latent at `t'`."""
        pair, schedule = self.frozen.pair, self.frozen.pair.teacher_schedule
        t = batch.t_align
        z_t = schedule.add_noise(drawn.latents.detach(), batch.noise, t)
        empty = self.frozen.empty_states.expand(len(batch.prompts), -1, -1)
        both = self._denoise(
            self.teacher, torch.cat([z_t, z_t]), torch.cat([t, t]), torch.cat([empty, text_states])
        )
        uncond, cond = both.chunk(2)
        z_target = schedule.x0(uncond + self.spec.loss.guidance * (cond - uncond), z_t, t)
        share = self.spec.loss.guidance_rescale
        if share:
            plain = schedule.x0(cond, z_t, t)
            for row in range(len(plain)):
                for channel in range(plain.shape[1]):
                    guided, like = z_target[row, channel], plain[row, channel]
                    calm = (guided - guided.mean()) / guided.std() * like.std() + like.mean()
                    z_target[row, channel] = (1 - share) * guided + share * calm
        return Pictures(z_target, pair.decode(z_target))

    def student_loss(
        self, drawn: Pictures, target: Pictures, batch: Batch
    ) -> dict[str, torch.Tensor]:
        """Items 3 and 4: the alignment losses and `L_adv` by name, unweighted scalars."""
        settings, frozen = self.spec.loss, self.frozen
        weight = frozen.pair.teacher_schedule.weight(batch.t_align)
        parts: dict[str, torch.Tensor] = {}
        if settings.mse_weight:
            squares = ((drawn.latents - target.latents) ** 2).mean(dim=(1, 2, 3))
            parts["mse"] = (0.5 * weight * squares).mean()
        if settings.id_weight:
            g_s = identity_features(frozen.identity(drawn.images), frozen.projection)
            with torch.no_grad():
                g_t = identity_features(frozen.identity(target.images), frozen.projection)
            cosine = F.cosine_similarity(g_s, g_t, dim=-1).reshape(len(weight), -1).mean(dim=1)
            parts["id"] = (weight * (1 - cosine)).mean()
        if settings.perc_weight:
            parts["perc"] = (weight * self._perceptual(drawn, target, batch)).mean()
        if settings.adv_weight:
            parts["adv"] = self._judge(drawn.images, losses.REAL)
        return parts

    def discriminator_loss(self, drawn: Pictures, batch: Batch) -> torch.Tensor:
        """Item 5: `L_D`, the reference views real and the student's pictures fake."""
        real = self._judge(batch.images, losses.REAL)
        return 0.5 * (real + self._judge(drawn.images.detach(), losses.FAKE))

    def weights(self) -> dict[str, torch.Tensor]:
        """Give the adapter as it stands: K/V matrices [C, d] and the token's row [1, d], copies."""
        pair = self.frozen.pair
        return {
            "teacher.kv": base_weight(self.teacher, pair.teacher_layout),
            "teacher.rows": self.rows.detach().clone(),
            "student.kv": base_weight(self.student, pair.student_layout),
        }

    def _denoise(
        self, unet: Any, z_t: torch.Tensor, t: torch.Tensor, text_states: torch.Tensor
    ) -> torch.Tensor:
        pair = self.frozen.pair
        mixed = pair.dtype == torch.bfloat16
        with torch.autocast(pair.device.type, dtype=torch.bfloat16, enabled=mixed):
            out = unet(z_t.to(pair.dtype), t, encoder_hidden_states=text_states)
        return out.sample.float()

    def _perceptual(self, drawn: Pictures, target: Pictures, batch: Batch) -> torch.Tensor:
        """Give the distance of the two pictures: [B]."""
        if batch.directions is not None:
            return swd.SWD_FACTOR * ms_swd(drawn.images, target.images, batch.directions[0])
        backbone = (*self.frozen.backbones, self.frozen.identity)[0]
        with torch.no_grad():
            theirs = backbone(target.images).layers
        return losses.lpips(backbone(drawn.images).layers, theirs)

    def _judge(self, images: torch.Tensor, label: int) -> torch.Tensor:
        """Sum the heads' cross-entropy for a label, the mean over pictures; a scalar."""
        labels = torch.full((len(images),), label, device=images.device)
        terms = [
            F.cross_entropy(head(backbone.features(images)), labels)
            for head, backbone in zip(self.heads, self.frozen.backbones, strict=True)
        ]
        return torch.stack(terms).sum()


def ms_swd(x: torch.Tensor, y: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """Multi-scale sliced Wasserstein distance of pictures [B, 3, S, S] in CIELAB: [B].

    Args:
        x: pictures in [-1, 1].
        y: the target's.
        directions: [P, 3, k, k] of unit norm.
    """
    taps = x.new_tensor([1, 4, 6, 4, 1]) / 16
    blur = torch.outer(taps, taps).expand(3, 1, 5, 5)
    a, b = swd.cielab(x), swd.cielab(y)
    distances = []
    for _ in range(swd.SWD_SCALES):
        if a.shape[-1] < directions.shape[-1]:
            break
        of_a, of_b = (F.conv2d(each, directions).flatten(2).sort().values for each in (a, b))
        distances.append((of_a - of_b).abs().mean(dim=(1, 2)))
        a, b = (
            F.conv2d(F.pad(each, (2, 2, 2, 2), mode="reflect"), blur, stride=2, groups=3)
            for each in (a, b)
        )
    return torch.stack(distances).mean(dim=0)


def _own_unet(unet: nn.Module, layout: KVLayout, kv: torch.Tensor) -> Any:
    """Copy a frozen UNet, with diffusers' own attention; only its K/V matrices train, float32."""
    from diffusers.models.attention_processor import AttnProcessor2_0

    own: Any = copy.deepcopy(unet)
    own.set_attn_processor(AttnProcessor2_0())
    parameters = dict(own.named_parameters())
    for name, start in split(layout, kv).items():
        parameters[name].data = start.detach().float().clone()
        parameters[name].requires_grad_(True)
    return own


def _trained(unet: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]


def _heads(frozen: Frozen, concept_id: str, seed: int) -> nn.ModuleList:
    """Make ordinary heads with the start values that the engine draws for this concept."""
    dims: Sequence[int] = [backbone.dim for backbone in frozen.backbones]
    made = []
    for head in DiscriminatorHeads(dims, [concept_id], seed).heads:
        start: Any = head
        layers = nn.Sequential(
            nn.Linear(start.w1.shape[2], HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2)
        )
        values = (start.w1, start.b1, start.w2, start.b2)
        for parameter, value in zip(layers.parameters(), values, strict=True):
            parameter.data.copy_(value.detach()[0])
        made.append(layers)
    return nn.ModuleList(made).to(frozen.pair.device)
