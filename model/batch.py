"""What one iteration sees: reference views and every random draw, for a pack of concepts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from model.base_pair import BasePair
from model.packing import concept_rows
from model.randomness import generator, integer, normal, uniform
from model.schedule import LAST_STEP
from model.settings import EchoSettings, LossSettings, ViewSettings
from model.swd import SWD_PATCH, unit_directions
from model.text import Prompts, cat, tokenize
from model.views import ConceptText, View, draw_view, prepare_images


@dataclass(frozen=True, eq=False)
class EchoSample:
    """A student sample that joined a concept's references.

    Attributes:
        image: uint8 [3, S, S].
        prompt: what it was drawn for.
    """

    image: torch.Tensor
    prompt: str


@dataclass(frozen=True, eq=False)
class KnownView:
    """A reference view that the frozen networks have seen: all that training asks of it.

    Attributes:
        latents: `z` of its picture [c, h, w], float32.
        features: pooled features [d_k], one tensor a discriminator's backbone.
        mask: [1, h, w], 1 where the loss counts.
        prompt: its prompt.
    """

    latents: torch.Tensor
    features: tuple[torch.Tensor, ...]
    mask: torch.Tensor
    prompt: str


@dataclass(frozen=True, eq=False)
class ConceptData:
    """What training sees of a concept.

    Attributes:
        id: the concept's id; keys its randomness.
        text: its words.
        images: prepared reference images, uint8 [3, s, s].
        echo: student samples that joined them.
        known_views: its bank of views, when that was filled (`model.view_bank`); else empty.
        known_echo: `echo`, encoded with the bank; else empty.
    """

    id: str
    text: ConceptText
    images: tuple[torch.Tensor, ...]
    echo: tuple[EchoSample, ...] = ()
    known_views: tuple[KnownView, ...] = ()
    known_echo: tuple[KnownView, ...] = ()

    @classmethod
    def build(
        cls,
        concept_id: str,
        text: ConceptText,
        images: Sequence[torch.Tensor],
        size: int,
        views: ViewSettings,
    ) -> "ConceptData":
        """Prepare reference images (uint8 [3, H, W], any size) for views of `size` px."""
        return cls(concept_id, text, prepare_images(images, size, views))


@dataclass(frozen=True, eq=False)
class Batch:
    """A rank's rows of one iteration's batch; R = N * B.

    Attributes:
        concept: [R] long, on the CPU.
        images: `x` [R, 3, S, S] in [-1, 1]; empty [0, 3, S, S] when all of them are `known`.
        masks: `m` [R, 1, h, w].
        texts: `y`, R prompts.
        prompts: the same, tokenized.
        noise: `eps` [R, c, h, w], shared by teacher, student and alignment.
        t: [R] long, the teacher's time steps.
        t_align: [R] long, `t'`.
        directions: MS-SWD's [N, P, 3, k, k], or None when it is not used.
        n: N, the number of concepts.
        known: what the frozen networks made of `x` before, or None: latents [R, c, h, w], and
            pooled features [R, d_k], one tensor a backbone.
    """

    concept: torch.Tensor
    images: torch.Tensor
    masks: torch.Tensor
    texts: tuple[str, ...]
    prompts: Prompts
    noise: torch.Tensor
    t: torch.Tensor
    t_align: torch.Tensor
    directions: torch.Tensor | None
    n: int
    known: tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None = None


def draw_batch(
    concepts: Sequence[ConceptData],
    pair: BasePair,
    *,
    seed: int,
    iteration: int,
    items: int,
    rank: int = 0,
    views: ViewSettings,
    echo: EchoSettings,
    loss: LossSettings,
) -> Batch:
    """Draw a rank's rows of an iteration's batch, on the CPU, then move them to the pair's device.

    Item i of a concept draws from generators keyed by (seed, concept id, iteration, purpose, i)
    and by nothing else, so rank r's items r*B..(r+1)*B-1 are the rows that any other split, or one
    process with the whole batch, would draw. MS-SWD's directions are keyed by concept and
    iteration: all items share them.

    Args:
        concepts: the pack, in order.
        pair: the base pair.
        seed: the run's seed.
        iteration: counted over all stages.
        items: B, items a concept on this rank.
        rank: data parallel rank.
        views: augmentation settings.
        echo: its `share` decides how often a student sample stands in, once there are some.
        loss: its range of `t'` and whether MS-SWD is used.
    """
    concept = concept_rows(len(concepts), items)
    keys = [(c, rank * items + i) for c in concepts for i in range(items)]

    def gen(c: ConceptData, purpose: str, item: int = 0) -> torch.Generator:
        return generator(seed, c.id, iteration, purpose, item)

    drawn = [_draw_item(c, pair, seed, gen(c, "view", i), views, echo) for c, i in keys]
    seen = [view for view in drawn if isinstance(view, KnownView)]
    pictures = [view.image for view in drawn if isinstance(view, View)]
    assert not seen or not pictures, "a bank is filled for the whole pack, echo samples included"
    prompts = [
        tokenize(pair.tokenizer, [view.prompt], [c.text.token])
        for (c, _), view in zip(keys, drawn, strict=True)
    ]
    tokens = cat(prompts)
    noise = torch.stack([normal(pair.latent_shape, gen(c, "noise", i)) for c, i in keys])
    t = [integer(0, LAST_STEP, gen(c, "t", i)) for c, i in keys]
    t_align = [integer(loss.align_min_t, loss.align_max_t, gen(c, "t_align", i)) for c, i in keys]
    directions = None
    if loss.perceptual == "swd" and loss.perc_weight > 0:
        shape = (loss.swd_directions, 3, SWD_PATCH, SWD_PATCH)
        raw = torch.stack([normal(shape, gen(c, "swd")) for c in concepts])
        directions = _moved(unit_directions(raw), pair)
    return Batch(
        concept=concept,
        images=_stacked_pictures(pictures, pair),
        masks=_moved(torch.stack([view.mask for view in drawn]), pair),
        texts=tuple(view.prompt for view in drawn),
        prompts=Prompts(_moved(tokens.ids, pair), _moved(tokens.slots, pair)),
        noise=_moved(noise, pair),
        t=_moved(torch.tensor(t), pair),
        t_align=_moved(torch.tensor(t_align), pair),
        directions=directions,
        n=len(concepts),
        known=_stacked_known(seen) if seen else None,
    )


def bank_view(
    concept: ConceptData, pair: BasePair, seed: int, views: ViewSettings, place: int
) -> View:
    """Draw the view at a place of a concept's bank; the images take turns."""
    gen = generator(seed, concept.id, 0, "bank", place)
    return _view(concept, pair, place % len(concept.images), views, gen)


def echo_view(sample: EchoSample, pair: BasePair) -> View:
    """Give a student sample as a view: as it is, all of it counts."""
    _, height, width = pair.latent_shape
    return View(sample.image.float() / 127.5 - 1, torch.ones(1, height, width), sample.prompt)


def _draw_item(
    concept: ConceptData,
    pair: BasePair,
    seed: int,
    gen: torch.Generator,
    views: ViewSettings,
    echo: EchoSettings,
) -> View | KnownView:
    """Draw what one item shows: a view of a reference image, or a student sample as it is."""
    if concept.echo and uniform(gen) < echo.share:
        place = integer(0, len(concept.echo) - 1, gen)
        return (
            concept.known_echo[place]
            if concept.known_echo
            else echo_view(concept.echo[place], pair)
        )
    if views.bank is not None:
        place = integer(0, views.bank - 1, gen)
        if concept.known_views:
            return concept.known_views[place]
        return bank_view(concept, pair, seed, views, place)
    return _view(concept, pair, integer(0, len(concept.images) - 1, gen), views, gen)


def _view(
    concept: ConceptData, pair: BasePair, index: int, views: ViewSettings, gen: torch.Generator
) -> View:
    caption = concept.text.caption(index)
    image, text = concept.images[index], concept.text
    return draw_view(image, text, pair.resolution, views, gen, factor=pair.factor, caption=caption)


def _stacked_pictures(pictures: Sequence[torch.Tensor], pair: BasePair) -> torch.Tensor:
    if not pictures:
        return torch.empty(0, 3, pair.resolution, pair.resolution, device=pair.device)
    return _moved(torch.stack(list(pictures)), pair)


def _stacked_known(
    seen: Sequence[KnownView],
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    features = zip(*(view.features for view in seen), strict=True)
    return torch.stack([v.latents for v in seen]), tuple(torch.stack(each) for each in features)


def _moved(tensor: torch.Tensor, pair: BasePair) -> torch.Tensor:
    """Copy to the pair's device; a GPU is given the copy in its turn, and nobody waits for it."""
    if pair.device.type != "cuda":
        return tensor.to(pair.device)
    return tensor.pin_memory().to(pair.device, non_blocking=True)
