"""What the ranks of one run agree on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed

from model import errors
from model.errors import EchoDistillError

T = TypeVar("T")


def rank() -> int:
    """Return this process's place among the ranks."""
    return torch.distributed.get_rank()


def world_size() -> int:
    """Return the number of ranks."""
    return torch.distributed.get_world_size()


def from_first(value: T) -> T:
    """Return rank 0's value on every rank."""
    box: list[Any] = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def mean(values: torch.Tensor) -> torch.Tensor:
    """Average a tensor over the ranks."""
    if world_size() > 1:
        torch.distributed.all_reduce(values)
        values = values / world_size()
    return values


def gathered(value: T) -> list[T]:
    """Return every rank's value, by rank."""
    box: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(box, value)
    return box


def all_or_none(action: Callable[[], T]) -> T:
    """Do something that may meet an error of the user's, on every rank or on none.

    Without this a rank that goes on would wait for ever for one that gave up.

    Raises:
        EchoDistillError: on every rank what the first rank that met one did, of the same class.

    """
    result, met = None, None
    try:
        result = action()
    except EchoDistillError as error:
        met = (type(error).__name__, str(error))
    first = next((each for each in gathered(met) if each is not None), None)
    if first is not None:
        raise getattr(errors, first[0], EchoDistillError)(first[1])
    assert result is not None
    return result
