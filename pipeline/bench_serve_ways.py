"""The ways of running the networks that a benchmark of serving compares."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch

from model.base_pair import BasePair
from model.errors import InputError
from serve.fast import Speed, quicken

CHANNELS_LAST, BENCHMARK = "channels_last", "benchmark"


@dataclass(frozen=True)
class Way:
    """One way, by a name such as `graphs:channels_last`.

    Attributes:
        name: the speed and what else is switched on.
        speed: of `serve.fast`.
        channels_last: convolutions as NHWC.
        benchmark: cuDNN tries its convolutions out and keeps the fastest, for every shape.
    """

    name: str
    speed: Speed
    channels_last: bool = False
    benchmark: bool = False

    def pair(self, pair: BasePair) -> BasePair:
        """Give a pair that runs so; the one given stays as it is."""
        if self.channels_last or pair.device.type == "cuda":  # what `quicken` changes in place
            student, vae = copy.deepcopy(pair.student), copy.deepcopy(pair.vae)
            pair = replace(pair, student=student, vae=vae)
        return quicken(pair, self.speed, channels_last=self.channels_last)

    @contextmanager
    def on(self) -> Iterator[None]:
        """Have torch's own switches as this way needs them while the block runs."""
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = self.benchmark
        try:
            yield
        finally:
            torch.backends.cudnn.benchmark = before


def ways_of(names: Sequence[str], channels_last: bool) -> list[Way]:
    """Read names of ways.

    Args:
        names: a speed each, with `:channels_last` or `:benchmark` behind it.
        channels_last: for all; what is compiled for a GPU always has it.

    Raises:
        InputError: for a name that there is no such way of.
    """
    ways = []
    for name in names:
        speed, *switches = name.split(":")
        if speed not in get_args(Speed):
            known = ", ".join(get_args(Speed))
            raise InputError(f"there is no speed {speed!r}: give {known}")
        unknown = {*switches} - {CHANNELS_LAST, BENCHMARK}
        if unknown:
            raise InputError(
                f"a speed has no {min(unknown)!r}: give {CHANNELS_LAST} or {BENCHMARK} behind it"
            )
        chosen: Any = speed
        last = channels_last or CHANNELS_LAST in switches
        ways.append(Way(name, chosen, last, BENCHMARK in switches))
    return ways
