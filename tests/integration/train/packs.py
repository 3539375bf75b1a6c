"""Tiny packs: the spec, the concepts, and training them on this rank without Ray."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from components.ingest.concept_folder import Concept, check_prefix
from components.spec import RunSpec, resolve_spec
from components.train.checkpoint import ConceptState
from components.train.graphs import Record
from components.train.job import BasePaths, PackJob
from components.train.loop import Run, Watcher, train_members
from components.train.members import Member, go_on, load_members
from components.train.worker import load_frozen
from model.iteration import Frozen

_frozen: dict[Any, Frozen] = {}
ITERATIONS = 5  # four of the main stage, one of the echo stage


def tiny_spec(paths: Any, *sets: str) -> RunSpec:
    """The pocket preset on the tiny pair: a few iterations, one echo round of one iteration."""
    base = [
        "base.name=tiny",
        f"base.teacher={paths.teacher}",
        f"base.student={paths.student}",
        f"base.identity={paths.clip}",
        f"base.backbones=[{paths.clip},{paths.dino}]",
        "resolution=32",
        "method.follow=1",
        "train.iterations=4",
        "train.cooldown=0.25",
        "train.sample_every=3",
        "train.cpus_per_worker=1",
        "train.checkpoint_seconds=1000",
        "tracking.log_every=2",
        "echo.samples=4",
    ]
    return resolve_spec("pocket", None, [*base, *sets])


def write_concepts(folder: Path) -> None:
    """Writes the two concepts dog and robot: three coloured pictures each."""
    for n, concept_id in enumerate(("dog", "robot")):
        place = folder / concept_id
        place.mkdir(parents=True)
        gen = torch.Generator().manual_seed(n)
        for i in range(3):
            colours = torch.rand(1, 3, 6, 5, generator=gen)
            picture = torch.nn.functional.interpolate(colours, size=(96, 80), mode="bilinear")[0]
            pixels = (picture.permute(1, 2, 0) * 255).to(torch.uint8)
            Image.fromarray(pixels.numpy()).save(place / f"{i}.png")
        facts = f"class_noun: {concept_id}\ninitializer: {concept_id}\n"
        (place / "concept.yaml").write_text(facts)


def checked_concepts(folder: Path) -> list[Concept]:
    checked = check_prefix(str(folder))
    assert [one.problems for one in checked] == [()] * len(checked)
    return [one.concept for one in checked if one.concept is not None]


def trained(
    spec: RunSpec,
    concepts: Sequence[Concept],
    start: dict[str, ConceptState] | None = None,
    watcher: Watcher | None = None,
    ahead: bool | None = None,
    record: Record | None = None,
) -> Run:
    """Trains a pack on this rank, from the given states where there are some."""
    frozen, members = loaded(spec, concepts)
    for member in members:
        if start and member.concept.id in start:
            go_on(member, start[member.concept.id])
    run = Run(spec, frozen, members, watcher or Watcher(), ahead, record)
    train_members(run)
    return run


def loaded(
    spec: RunSpec,
    concepts: Sequence[Concept],
    checkpoint: Path | None = None,
    given: tuple[str, ...] = (),
) -> tuple[Frozen, list[Member]]:
    """Loads the frozen networks (once a process) and the pack's members, as a worker does."""
    job = PackJob(spec, tuple(concepts), BasePaths.from_spec(spec), "test", None, given)
    dtype = torch.bfloat16 if spec.train.precision == "bf16" else torch.float32
    sparing = spec.train.checkpointing
    key = (job.bases, dtype, sparing)
    if key not in _frozen:
        _frozen[key] = load_frozen(job.bases, dtype, torch.device("cpu"), spec.resolution, sparing)
    return _frozen[key], load_members(job, _frozen[key], checkpoint)


def states(run: Run) -> dict[str, ConceptState]:
    return {member.concept.id: member.state for member in run.members if member.state}


def weights(state: ConceptState, moments: bool = False) -> dict[str, torch.Tensor]:
    """What training moved, by group and name."""
    return {
        f"{group}.{name}": tensor
        for group, tensors in state.groups.items()
        for name, tensor in tensors.items()
        if moments or not name.startswith("exp_avg")
    }


def assert_close(
    found: ConceptState, expected: ConceptState, start: ConceptState, part: float = 1e-3
) -> None:
    """Asserts that no weight differs by more than `part` of its tensor's largest movement.

    Heads are not of the adapter, and a few of their gradients are nearly zero, where Adam enlarges
    round-off by as much as the processor gives: they are held to it as a whole, by lengths.
    """
    mine, theirs, first = weights(found), weights(expected), weights(start)
    assert mine.keys() == theirs.keys()
    assert found.iteration == expected.iteration
    for name, value in theirs.items():
        size = torch.linalg.vector_norm if name.startswith("heads.") else _largest
        moved, error = size(value - first[name]), size(mine[name] - value)
        assert moved > 0, name
        assert error <= part * moved, (name, float(error), float(moved))


def _largest(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.abs().max()


def assert_equal(found: ConceptState, expected: ConceptState) -> None:
    """Asserts that two states are the same bit for bit, moments and echo samples included."""
    mine, theirs = weights(found, moments=True), weights(expected, moments=True)
    assert mine.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(mine[name], theirs[name])] == []
    assert found.iteration == expected.iteration
    assert found.echo_prompts == expected.echo_prompts
    if expected.echo_images is None:
        assert found.echo_images is None
    else:
        assert found.echo_images is not None
        assert torch.equal(found.echo_images, expected.echo_images)
