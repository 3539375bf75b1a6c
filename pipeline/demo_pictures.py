"""What the demonstration shows beside the endpoint's answers: before and after, and curves."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

from components.ingest.concept_folder import load_images
from components.ingest.store import resolve_model
from components.register.registry import fetch_adapter, get_version
from components.spec import RunSpec
from model.adapter import load_adapter, prompt_for
from model.base_pair import load_base_pair
from model.sampler import draw, draw_teacher
from model.views import square
from pipeline.curves import curves_of
from pipeline.progress import Event, Progress
from pipeline.run import ConceptResult
from pipeline.tracking import tracking_uri

if TYPE_CHECKING:
    from model.adapter import Adapter
    from model.base_pair import BasePair

SHOWN_REFERENCES = 6


@dataclass(frozen=True)
class Drawn:
    """Pictures under the same prompts and seeds. `words` are those of the adapted networks."""

    words: tuple[str, ...]
    teacher_before: list[Path]
    teacher_after: list[Path]
    student_before: list[Path]
    student_after: list[Path]


def draw_before_and_after(
    results: Sequence[ConceptResult],
    spec: RunSpec,
    prompts: Sequence[str],
    folder: Path,
    progress: Progress,
) -> dict[str, Drawn]:
    """Draw teacher and student with and without each adapter; returns pictures by concept id.

    Prompts hold `{}` for the class noun; without an adapter that is all they say of the subject.
    """
    base = spec.base
    teacher, student = resolve_model(base.teacher), resolve_model(base.student)
    pair = load_base_pair(teacher, student, name=base.name, resolution=spec.resolution)
    drawn = {}
    for number, result in enumerate(results, 1):
        progress(Event("draw", "", f"{result.id}, before and after", number, len(results)))
        drawn[result.id] = _draw(pair, result, spec, prompts, folder / result.id)
    return drawn


def _draw(
    pair: BasePair, result: ConceptResult, spec: RunSpec, prompts: Sequence[str], folder: Path
) -> Drawn:
    assert result.concept is not None and result.version is not None
    registry = tracking_uri(spec=spec)
    version = get_version(result.id, result.version, tracking_uri=registry)
    assert version is not None
    with tempfile.TemporaryDirectory(prefix="echodistill-demo-") as scratch:
        adapter = load_adapter(fetch_adapter(version, Path(scratch), tracking_uri=registry))
    plain = [prompt.format(result.concept.class_noun) for prompt in prompts]
    words = [prompt_for(adapter.meta, prompt) for prompt in plain]
    seeds = range(len(prompts))
    bare: list[Adapter | None] = [None] * len(prompts)
    own: list[Adapter | None] = [adapter] * len(prompts)
    after = draw_teacher(pair, own, words, seeds) if adapter.teacher_delta is not None else None
    return Drawn(
        tuple(words),
        _save(draw_teacher(pair, bare, plain, seeds), folder, "teacher-before"),
        [] if after is None else _save(after, folder, "teacher-after"),
        _save(draw(pair, bare, plain, seeds), folder, "student-before"),
        _save(draw(pair, own, words, seeds), folder, "student-after"),
    )


def _save(pictures: Iterable[torch.Tensor], folder: Path, name: str) -> list[Path]:
    """Write pictures uint8 [3, S, S] as PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, picture in enumerate(pictures):
        paths.append(folder / f"{name}-{index}.png")
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(paths[-1])
    return paths


def save_references(result: ConceptResult, folder: Path, side: int = 256) -> list[Path]:
    """Write the central squares of a concept's photos, as the method sees them."""
    assert result.concept is not None
    images = load_images(result.concept, shorter_side=side)[:SHOWN_REFERENCES]
    return _save([square(image, side) for image in images], folder, "reference")


def loss_curves(result: ConceptResult, spec: RunSpec) -> dict[str, list[tuple[int, float]]]:
    """Read a concept's losses back from its MLflow run: (iteration, value) by name."""
    return {} if result.run_id is None else curves_of(result.run_id, tracking_uri(spec=spec))
