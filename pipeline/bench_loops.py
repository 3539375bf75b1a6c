"""The two loops of a benchmark, the plain one and the engine, run and timed in the same way."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from components.spec import RunSpec
from components.train import loop
from components.train.job import BasePaths, PackJob
from components.train.loop import Block, Run, Segment, Watcher
from components.train.members import Member, load_members
from components.train.naive import NaiveLoop
from model.batch import ConceptData
from model.echo import echo_round
from model.iteration import Frozen
from pipeline import bench_measure as measure
from pipeline.bench_bases import write_photos

CHECK_ITERATIONS = 2
LOSS_TOLERANCE = 1e-3
LOSS_FLOOR = 1e-3  # 1 - cosine of two pictures that hardly differ has few right digits
MOVE_TOLERANCE = 2e-2
_FOREVER = 10**6  # iterations of the main stage: no echo round begins, no rate falls while timed
# Iterations between two looks at the clock. A GPU runs behind the program, and training waits for
# it once a block, so waiting after every iteration would measure something else.
_BLOCK = {"cpu": 1, "cuda": 5}

Calls = Iterable[tuple[Any, str, str]]


@dataclass(frozen=True)
class Photos:
    """Where made-up concepts are written, and the frozen networks that they are prepared for."""

    folder: Path
    frozen: Frozen

    def members(self, spec: RunSpec, count: int) -> list[Member]:
        """Load so many concepts as a worker does, each at its start."""
        size = math.ceil(spec.resolution * spec.views.crop_max)
        concepts = write_photos(self.folder, count, size)
        job = PackJob(spec, tuple(concepts), BasePaths.from_spec(spec), "bench", None)
        return load_members(job, self.frozen, None)


class Runner(Protocol):
    """A loop that goes on from where it is.

    Attributes:
        concepts: that train together.
    """

    concepts: int

    @property
    def peak_gib(self) -> float:
        """Give the largest memory in use since the reset, as of the end of the last run."""

    def run(self, iterations: int) -> list[float]:
        """Do at least so many iterations; returns seconds per iteration, one number a block."""

    def calls(self) -> Calls:
        """Give the functions that make up an iteration, for `Parts.watching`."""

    def profile(self) -> str:
        """Do a few iterations under the torch profiler; returns the table."""

    def echo_ms(self) -> float | None:
        """Time one echo round's drawing for one concept; None where the loop has no such stage."""


class NaiveRunner:
    """The plain loop on the first of the concepts."""

    concepts = 1

    def __init__(self, spec: RunSpec, frozen: Frozen, photos: Photos) -> None:
        """Build the loop."""
        spec = _timed_spec(spec, frozen.pair.device)
        member = photos.members(spec, 1)[0]
        self.loop = NaiveLoop(spec, frozen, _data(member), member.concept.initializer)
        self.device = frozen.pair.device
        self.losses: list[dict[str, torch.Tensor]] = []
        self._iteration = 0
        self._peak_gib = 0.0

    @property
    def peak_gib(self) -> float:
        """Give the largest memory in use."""
        return self._peak_gib

    def run(self, iterations: int) -> list[float]:
        """Do iterations, in blocks as the engine does."""
        seconds, block = [], _BLOCK[self.device.type]
        for first in range(0, iterations, block):
            size = min(block, iterations - first)
            began = time.perf_counter()
            self.losses = [self.loop.iterate(self._iteration + i) for i in range(size)]
            measure.wait(self.device)
            seconds.append((time.perf_counter() - began) / size)
            self._iteration += size
        self._peak_gib = measure.peak_gib(self.device)
        return seconds

    def calls(self) -> Calls:
        """Give the loop's own functions."""
        one = self.loop
        yield from ((one, name, part) for name, part in {"draw": "views", **_ITEMS}.items())
        yield from _steps(one.of_teacher, one.of_student, one.of_heads)

    def profile(self) -> str:
        """Profile one iteration."""
        profile = measure.Profile(self.device)
        self.run(1)
        return profile.stop()

    def echo_ms(self) -> float | None:
        """None: METHOD.md's items 1 to 5 are all that it has."""
        return None


class EngineRunner:
    """The engine on a pack of concepts."""

    def __init__(self, spec: RunSpec, frozen: Frozen, photos: Photos, concepts: int) -> None:
        """Build the engines."""
        self.spec = _timed_spec(spec, frozen.pair.device)
        self.frozen = frozen
        self.concepts = concepts
        self.members = photos.members(self.spec, concepts)
        self.meter = _Meter(frozen.pair.device)
        self._iteration = 0
        self.segment = Segment(Run(self.spec, frozen, self.members, self.meter), self.members)

    @property
    def peak_gib(self) -> float:
        """Give the largest memory in use, before the states were gathered."""
        return self.meter.peak_gib

    def run(self, iterations: int) -> list[float]:
        """Do iterations, up to the end of a block when there are more than one."""
        stop = self._iteration + iterations
        if iterations > 1:
            block = self.spec.tracking.log_every
            stop = math.ceil(stop / block) * block
        self.meter.blocks.clear()
        self.segment.train(self._iteration, stop)
        self._iteration = stop
        return [block.seconds / len(block.values) for block in self.meter.blocks]

    def calls(self) -> Calls:
        """Give what the training loop calls, and the engines."""
        named = {"draw_batch": "views", "clip_per_concept": "optimizer", **_ITEMS}
        yield from ((loop, name, part) for name, part in named.items())
        yield from _steps(self.segment.teacher, self.segment.student, self.segment.heads)

    def profile(self) -> str:
        """Profile one iteration, without the gathering of states that follows it here."""
        self.meter.profile = measure.Profile(self.frozen.pair.device)
        self.run(1)
        self.meter.profile = None
        return self.meter.table

    def echo_ms(self) -> float | None:
        """Draw an echo round of the first concept twice; the second one counts."""
        spec, segment, device = self.spec, self.segment, self.frozen.pair.device
        if not spec.echo.rounds:
            return 0.0
        seconds = 0.0
        for _ in range(2):
            measure.wait(device)
            began = time.perf_counter()
            echo_round(
                self.frozen,
                segment.teacher.module,
                segment.student.module,
                [_data(self.members[0])],
                spec.echo,
                seed=spec.seed,
                iteration=0,
            )
            measure.wait(device)
            seconds = time.perf_counter() - began
        return 1e3 * seconds

    def free(self) -> None:
        """Take the engines down."""
        self.segment.free()


def compared(spec: RunSpec, frozen: Frozen, photos: Photos) -> dict[str, Any]:
    """Train one concept for a few iterations with both loops, in float32 without TF32.

    Returns:
        the largest relative error of a loss, that of the weights' movement, and whether both are
        small enough.
    """
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    # One pass over all items, as the plain loop does it.
    train = spec.train.model_copy(update={"items_at_once": None})
    spec = spec.model_copy(update={"train": train})
    engine: EngineRunner | None = None
    try:
        naive = NaiveRunner(spec, frozen, photos)
        engine = EngineRunner(spec, frozen, photos, 1)
        start = naive.loop.weights()
        expected, found = [], []
        for _ in range(CHECK_ITERATIONS):
            naive.run(1)
            engine.run(1)
            expected.append({name: float(value) for name, value in naive.losses[0].items()})
            found.append(engine.meter.losses())
        state = engine.members[0].state
        assert state is not None
        moved = {
            name: error
            for name, before in start.items()
            for error in [_move_error(before, naive.loop.weights()[name], _weight(state, name))]
        }
    finally:
        torch.backends.cudnn.allow_tf32 = allowed
        if engine is not None:
            engine.free()
    losses = {
        name: max(
            abs(mine[name] - value) / max(abs(value), LOSS_FLOOR)
            for mine, value in zip(found, (each[name] for each in expected), strict=True)
        )
        for name in expected[0]
    }
    worst, move = max(losses.values()), max(moved.values())
    return {
        "iterations": CHECK_ITERATIONS,
        "loss_error": worst,
        "loss_errors": losses,
        "move_error": move,
        "move_errors": moved,
        "passed": worst <= LOSS_TOLERANCE and move <= MOVE_TOLERANCE,
    }


class _Meter(Watcher):
    """Keeps the blocks of a segment, and looks at the memory before states are gathered."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.blocks: list[Block] = []
        self.peak_gib = 0.0
        self.profile: measure.Profile | None = None
        self.table = ""

    def block(self, members: list[Member], block: Block) -> None:
        if self.profile is not None:
            self.table = self.profile.stop()
        self.blocks.append(block)
        self.peak_gib = measure.peak_gib(self.device)

    def losses(self) -> dict[str, float]:
        """Give the last block's losses of the first concept."""
        return loop.block_losses(self.blocks[-1], 0)


# The functions of METHOD.md's items, named alike in both loops.
_ITEMS = {
    "teacher_loss": "teacher",
    "student_draw": "student draw",
    "alignment_target": "target",
    "student_loss": "losses",
    "discriminator_loss": "discriminators",
}


def _steps(teacher: Any, student: Any, heads: Any) -> Calls:
    """Give the backward passes and steps of the three groups."""
    yield teacher, "backward", "teacher"
    yield student, "backward", "student backward"
    yield heads, "backward", "discriminators"
    yield from ((group, "step", "optimizer") for group in (teacher, student, heads))


def _timed_spec(spec: RunSpec, device: torch.device) -> RunSpec:
    """Leave out of a spec what would come between the iterations."""
    train = spec.train.model_copy(update={"iterations": _FOREVER, "sample_every": 0})
    tracking = spec.tracking.model_copy(update={"log_every": _BLOCK[device.type]})
    return spec.model_copy(update={"train": train, "tracking": tracking})


def _data(member: Member) -> ConceptData:
    assert member.data is not None, member.error
    return member.data


def _weight(state: Any, name: str) -> torch.Tensor:
    group, part = name.split(".")
    return state.groups[group][part]


def _move_error(start: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> float:
    """Give the norm of the difference of two movements over that of the second: 0 when equal."""
    mine, theirs = (value.cpu() - start.cpu() for value in (a, b))
    return float((mine - theirs).norm() / theirs.norm().clamp_min(1e-30))
