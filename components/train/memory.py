"""When memory does not do: telling such an error, and giving back what can be."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable

import torch

from components.spec import AUTO_PACK_ON_CPU

log = logging.getLogger(__name__)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Tell an allocation that failed, torch's own or one inside a library, from other errors."""
    words = ("out of memory", "ALLOC_FAILED", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def fitting(one: int, two: int, room: int, most: int) -> int:
    """Tell how many concepts fit together, from what packs of one and of two take.

    What a pack takes grows by the same for every concept. A tenth of the room stays free, for what
    memory in pieces wastes.

    Args:
        one: bytes at the peak of an iteration of one concept.
        two: of two concepts.
        room: bytes there are.
        most: how many are wanted.
    """
    each = max(1, two - one)
    return max(1, min(most, 1 + (room * 9 // 10 - one) // each))


def measured_pack(most: int, device: torch.device, try_out: Callable[[int], None]) -> int:
    """Tell how many of `most` concepts to train together: what memory holds, or CPUs gain from.

    Args:
        most: concepts there are.
        device: that they train on.
        try_out: does an iteration of so many of them, to be forgotten.
    """
    if device.type != "cuda":
        return min(most, AUTO_PACK_ON_CPU)
    if most < 2:
        return most

    def peak(concepts: int) -> int:
        torch.cuda.reset_peak_memory_stats(device)
        try_out(concepts)
        return torch.cuda.max_memory_allocated(device)

    one, two = peak(1), peak(2)
    room = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    found = fitting(one, two, room, most)
    log.info("%d of %d concepts at a time: each takes %d MiB", found, most, (two - one) >> 20)
    return found


def release(device: torch.device) -> None:
    """Give back the memory of what nobody refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
