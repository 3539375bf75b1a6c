"""What a training run is given and gives back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from components.ingest.concept_folder import Concept
from components.spec import RunSpec, spec_digest
from components.train.delivery import Entry, TrackingSettings

# What a checkpoint folder holds; adapters and results only in a run's last one.
STATES = "states"
MANIFEST = "manifest.json"  # of each concept's state
ADAPTERS = "adapters"
RESULTS = "pack.json"


@dataclass(frozen=True)
class BasePaths:
    """Where the frozen models are: each a path, s3:// URI, hub id or `pocket:<part>`."""

    name: str
    teacher: str
    student: str
    identity: str
    backbones: tuple[str, ...]
    image_projection: str | None = None

    @classmethod
    def from_spec(cls, spec: RunSpec) -> BasePaths:
        """Take the references of a run spec."""
        base = spec.base
        return cls(
            name=base.name,
            teacher=base.teacher,
            student=base.student,
            identity=base.identity,
            backbones=base.backbones,
            image_projection=base.image_projection,
        )


@dataclass(frozen=True)
class PackJob:
    """What every worker of a run is given.

    Attributes:
        spec: the resolved run spec.
        concepts: the members of the pack.
        bases: the frozen models.
        run_name: of the Ray Train run.
        tracking: where to log, or None.
        states: folders or URIs of checkpoints of other runs to go on from.
        board: handle of the progress actor.
        base: hash of the frozen models for the concepts' digests (`base_hash`); by default the
            pair's alone.

    """

    spec: RunSpec
    concepts: tuple[Concept, ...]
    bases: BasePaths
    run_name: str
    tracking: TrackingSettings | None
    states: tuple[str, ...] = ()
    board: Any = None
    base: str = ""


@dataclass(frozen=True)
class TrainedConcept:
    """The result of one concept.

    Attributes:
        id: the concept's id.
        state: `trained` or `failed`.
        adapter_dir: the adapter's folder on this machine, or None when it failed.
        sha256: of the adapter, or None.
        digest: of concept, spec and base.
        seconds: training time, its share of the pack's, over all attempts, without loading.
        gpu_seconds: its share of the GPUs' time in that; 0 on CPUs.
        cost: of those, or None without a price (`cost.gpu_hour`).
        iterations: iterations done.
        losses: the last losses by name.
        error: why it failed, or None.
        run_id: its MLflow run, or None.
        unlogged: what its MLflow run still has to be told (see `delivery.py`).

    """

    id: str
    state: str
    adapter_dir: Path | None = None
    sha256: str | None = None
    digest: str = ""
    seconds: float = 0.0
    gpu_seconds: float = 0.0
    cost: float | None = None
    iterations: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    run_id: str | None = None
    unlogged: tuple[Entry, ...] = ()


def pack_name(spec: RunSpec, concepts: Sequence[Concept]) -> str:
    """Name a run after its content, so that the same pack under the same spec resumes."""
    models = spec.base.model_dump(mode="json")
    content = [spec_digest(spec), models, *sorted(concept.digest for concept in concepts)]
    return "pack-" + hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]


def total_iterations(spec: RunSpec) -> int:
    """Count the iterations of the main stage and all echo rounds."""
    return main_iterations(spec) + spec.echo.rounds * echo_iterations(spec)


def main_iterations(spec: RunSpec) -> int:
    """Count the iterations of the main stage; one after the other, each network has its own."""
    return spec.train.iterations * (2 if spec.method.order == "sequential" else 1)


def echo_iterations(spec: RunSpec) -> int:
    """Count the iterations of one echo round; a student that learns nothing has none to give."""
    if spec.method.order == "teacher":
        return 0
    return round(spec.train.iterations * spec.echo.iterations_share)


def taking_part(spec: RunSpec, iteration: int) -> tuple[bool, bool]:
    """Tell whether an iteration has the teacher's item 1, and items 2 to 5."""
    order = spec.method.order
    if order == "sequential" and iteration < main_iterations(spec):
        return iteration < spec.train.iterations, iteration >= spec.train.iterations
    return True, order != "teacher"


def steps_done(spec: RunSpec, iteration: int) -> tuple[int, int]:
    """Count the optimizer steps of the teacher, and of student and heads, before an iteration."""
    if spec.method.order == "teacher":
        return iteration, 0
    if spec.method.order == "together":
        return iteration, iteration
    alone = spec.train.iterations
    echo = max(0, iteration - 2 * alone)
    return min(iteration, alone) + echo, min(max(0, iteration - alone), alone) + echo


def learning_rates(spec: RunSpec, iteration: int) -> dict[str, dict[str, float]]:
    """Return an iteration's learning rates by network and parameter; "" stands for all of them."""
    train = spec.train
    done, of = steps_done(spec, iteration), steps_done(spec, total_iterations(spec))
    teacher, rest = (
        _rate_factor(n, total, train.cooldown) for n, total in zip(done, of, strict=True)
    )
    scale = spec.batch_size if train.scale_lr else 1
    token = train.token_lr * scale
    return {
        "teacher": {"kv": teacher * (train.teacher_lr * scale), "rows": teacher * token},
        "student": {"kv": rest * (train.student_lr * scale), "rows": rest * token},
        "heads": {"": rest * train.head_lr},
    }


def _rate_factor(done: int, total: int, cooldown: float) -> float:
    length = cooldown * total
    return 1.0 if done <= total - length else max(0, total - done) / length


def next_boundary(spec: RunSpec, iteration: int) -> int:
    """Return the next iteration at which a block ends, which is after `iteration`."""
    steps = [spec.tracking.log_every]
    if spec.train.sample_every:
        steps.append(spec.train.sample_every)
    ends = [(iteration // step + 1) * step for step in steps]
    for end in (spec.train.iterations, main_iterations(spec)):
        if iteration < end:
            ends.append(end)
    into = iteration - main_iterations(spec)
    if into >= 0 and echo_iterations(spec):
        ends.append(iteration + echo_iterations(spec) - into % echo_iterations(spec))
    return min(ends)


def is_picture_time(spec: RunSpec, iteration: int) -> bool:
    """Tell whether sample pictures are drawn after so many iterations."""
    every = spec.train.sample_every
    return bool(every) and iteration % every == 0
