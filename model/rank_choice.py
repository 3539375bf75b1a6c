"""The rank that an adapter is stored in: as low as its pictures allow, measured by drawing them.

What ranks cost on the pocket pair, for its sample concepts dog, robot and teapot, trained with an
earlier preset and `--set adapter.rank=full` (`echodistill export dog --format diffusers --rank 8
-o DIR` measures one):

| rank | bytes of the deltas | weights off by | pictures off by, levels of 255 |
| --- | --- | --- | --- |
| 2 | 18 176 | 50, 52, 57 % | 4.4, 7.3, 2.8 |
| 4 | 36 352 | 35, 36, 40 % | 1.9, 2.0, 1.1 |
| 8 | 72 704 | 23, 24, 27 % | 1.3, 0.9, 0.3 |
| 16 | 145 408 | 14, 15, 17 % | 0.5, 0.3, 0.1 |
| 32 | 290 816 | 8, 9, 10 % | 0.1, 0.1, 0.1 |
| whole | 712 704 | | |

Without their deltas the same pictures are off by 32, 27 and 42 levels. So `auto` with its default
bound of half a level takes 16, 16 and 8 here.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch

from model.adapter import Adapter
from model.base_pair import BasePair
from model.low_rank import Decomposition, weight_error, whole
from model.sampler import draw, draw_teacher

Rank = Literal["auto", "full"] | int
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""The ranks that `auto` looks at, from the lowest up."""

ERROR_PROMPTS = (
    "a photo of a {}",
    "a photo of a {} on the beach",
    "a photo of a {} in the snow",
    "a painting of a red {}",
)
"""What errors are measured on, each with its place as its seed."""

TEACHER_STEPS = 5
"""The teacher's error is measured on pictures of so few steps, with guidance as ever."""

_Draw = Callable[..., torch.Tensor]


def with_rank(pair: BasePair, adapter: Adapter, rank: Rank, max_picture_error: float) -> Adapter:
    """Give an adapter whose deltas are stored in a rank, and which says how far off that is.

    Args:
        pair: the base pair that draws.
        adapter: what to store; a teacher that it has is treated alike, by pictures of its own.
        rank: `auto` is the lowest of `RANKS` that keeps the picture error within the bound and
            takes less room than whole deltas do; when there is none, and with `full`, the deltas
            are whole. A number is taken as it is.
        max_picture_error: the bound of `auto` on `picture_error`, in levels of 255.

    Returns:
        the adapter with other deltas, and with `rank`, `rank_error` and the teacher's in `meta`.
        A rank is None where the deltas are whole.

    Raises:
        InputError: when the adapter was made for another base.
    """
    delta, facts = _stored(pair, adapter, "kv_delta", draw, rank, max_picture_error)
    found = replace(adapter, kv_delta=delta, meta={**adapter.meta, **facts})
    if adapter.teacher_delta is None:
        return found
    draws = partial(draw_teacher, steps=TEACHER_STEPS)
    delta, facts = _stored(pair, adapter, "teacher_delta", draws, rank, max_picture_error)
    facts = {f"teacher_{name}": value for name, value in facts.items()}
    return replace(found, teacher_delta=delta, meta={**found.meta, **facts})


def error_pictures(pair: BasePair, adapter: Adapter, draws: _Draw = draw) -> torch.Tensor:
    """Draw the pictures that errors are measured on: uint8 [R, 3, S, S]."""
    phrase = f"{' '.join(adapter.tokens)} {adapter.meta['concept']['class_noun']}"
    prompts = [prompt.format(phrase) for prompt in ERROR_PROMPTS]
    return draws(pair, [adapter] * len(prompts), prompts, range(len(prompts)))


def picture_error(pictures: torch.Tensor, others: torch.Tensor) -> float:
    """Measure the mean absolute difference of the picture that differs most, in levels of 255.

    Args:
        pictures: uint8 [R, 3, S, S].
        others: the same of the other adapter.
    """
    return float((pictures.float() - others.float()).abs().flatten(1).mean(1).max())


def _stored(
    pair: BasePair, adapter: Adapter, which: str, draws: _Draw, rank: Rank, bound: float
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Give the deltas `which` of an adapter in a rank, and what `meta` says of them."""
    exact = whole(getattr(adapter, which))
    tried: dict[int, tuple[dict[str, torch.Tensor], dict[str, Any]]] = {}

    def keeps_bound(r: int) -> bool:
        parts = decomposition.at_rank(r)
        changes: dict[str, Any] = {which: parts}
        drawn = error_pictures(pair, replace(adapter, **changes), draws)
        error = {"weights": weight_error(exact, parts), "pictures": picture_error(pictures, drawn)}
        tried[r] = parts, {"rank": r, "rank_error": error}
        return error["pictures"] <= bound

    chosen = None
    if rank != "full":
        # Compared where they are drawn: on a CPU errors would take longer than pictures on a GPU.
        exact = {name: each.to(pair.device) for name, each in exact.items()}
        decomposition = Decomposition.of(exact)
        pictures = error_pictures(pair, adapter, draws)
        if rank == "auto":
            room = sum(delta.numel() for delta in exact.values())
            ranks = [each for each in RANKS if decomposition.numbers(each) < room]
            # The error falls as the rank grows: a few drawings find the first that keeps it.
            first = bisect_left(ranks, True, key=keeps_bound)
            chosen = ranks[first] if first < len(ranks) else None
        else:
            keeps_bound(rank)
            chosen = rank
    if chosen is None:
        parts = {name: delta.half() for name, delta in exact.items()}
        facts: dict[str, Any] = {"rank": None, "rank_error": None}
    else:
        parts, facts = tried[chosen]
    return {name: part.cpu() for name, part in parts.items()}, facts
