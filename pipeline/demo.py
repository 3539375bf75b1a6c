"""The demonstration: photos on S3 to a one-step endpoint, on this machine, with nothing given.

Everything is real but its size: an S3 server and a Ray of its own, two sample concepts trained as
one pack, the registry, the endpoint over HTTP. What is done stays done: a second demonstration
trains nothing that is registered already.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.ingest.store import put_folder
from components.spec import RunSpec
from model.errors import EchoDistillError, InputError
from pipeline.demo_endpoint import Answer, ask_endpoint
from pipeline.demo_pictures import Drawn, draw_before_and_after, loss_curves, save_references
from pipeline.demo_report import write_results
from pipeline.progress import Event, Progress, StageClock
from pipeline.run import ConceptResult, train_prefix
from pipeline.services import embedded_s3, local_ray

BUCKET = "echodistill-demo"
N_CONCEPTS = 2
# Trainer, worker and replica, whatever the machine has.
CPUS = 4
# A live subject and an object, of the samples that ship.
SAMPLES = ("fox", "teapot")
# None of these places is in the samples' photos.
BEFORE_AND_AFTER_PROMPTS = (
    "a photo of a {}",
    "a {} on the beach",
    "a {} in the snow",
    "a {} in the jungle",
)
ENDPOINT_PROMPTS = (
    "a {} with a city in the background",
    "a {} with a mountain in the background",
    "a {} on a cobblestone street",
    "a {} on top of pink fabric",
    "a {} floating on top of water",
    "a {} with the Eiffel Tower in the background",
)


@dataclass(frozen=True)
class ConceptOutcome:
    """Everything that the report shows of one concept."""

    result: ConceptResult
    references: list[Path]
    drawn: Drawn
    answers: list[Answer]
    curves: dict[str, list[tuple[int, float]]]


@dataclass(frozen=True)
class DemoOutcome:
    """What a demonstration made: the files to look at, and the summary that is in one of them."""

    folder: Path
    summary: dict[str, Any]
    results: Sequence[ConceptResult]

    @property
    def report(self) -> Path:
        """Where the report lies."""
        return self.folder / "report.html"

    @property
    def grid(self) -> Path:
        """Where the picture of all pictures lies."""
        return self.folder / "grid.png"

    @property
    def all_good(self) -> bool:
        """Whether every concept has an adapter that passed its gate."""
        return all(result.good for result in self.results)


def run_demo(
    spec: RunSpec,
    concepts: Sequence[Path],
    folder: Path,
    *,
    prompts: Sequence[str],
    echo: bool,
    progress: Progress,
) -> DemoOutcome:
    """Train the concepts, serve them, ask for pictures and write the report.

    Args:
        spec: with storage and tracking below `folder` (see `demo_settings`).
        concepts: folders of concepts, each named like its concept.
        folder: everything is written below it.
        prompts: what to ask the endpoint for; `{}` stands for the class noun.
        echo: let the workers' words through.
        progress: listens.

    Raises:
        EchoDistillError: when no concept could be trained, or a service failed.
    """
    start = time.monotonic()
    progress = clock = StageClock(progress)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as services:
        progress(Event("start", "S3", "in this process"))
        endpoint = services.enter_context(embedded_s3(BUCKET))
        progress(Event("start", "Ray", "on this machine"))
        services.enter_context(local_ray(CPUS, echo=echo))
        prefix = _upload(concepts, progress)
        progress(Event("upload", prefix, f"{len(concepts)} concepts, {endpoint}"))
        results = train_prefix(prefix, spec, progress=progress)
        good = [result for result in results if result.version is not None]
        if not good:
            reasons = "; ".join(f"{r.id}: {r.error}" for r in results)
            raise EchoDistillError(f"no concept could be trained ({reasons})")
        outcomes = _show(good, spec, folder, prompts, progress)
    progress(Event("stop", "", "Ray, endpoint and S3 have ended"))
    progress(Event("report", "", str(folder / "report.html")))
    summary = write_results(
        folder,
        spec,
        results,
        outcomes,
        total_seconds=time.monotonic() - start,
        stage_seconds=clock.seconds,
    )
    return DemoOutcome(folder, summary, results)


def _upload(concepts: Sequence[Path], progress: Progress) -> str:
    prefix = f"s3://{BUCKET}/concepts"
    for number, concept in enumerate(concepts, 1):
        put_folder(concept, f"{prefix}/{concept.name}")
        progress(Event("upload", "concepts", concept.name, number, len(concepts)))
    return prefix


def _show(
    results: Sequence[ConceptResult],
    spec: RunSpec,
    folder: Path,
    prompts: Sequence[str],
    progress: Progress,
) -> list[ConceptOutcome]:
    """Ask the endpoint for pictures; draw before and after; collect references and curves."""
    pictures = folder / "pictures"
    shutil.rmtree(pictures, ignore_errors=True)
    answers = ask_endpoint(results, spec, prompts, pictures, progress)
    drawn = draw_before_and_after(results, spec, BEFORE_AND_AFTER_PROMPTS, pictures, progress)
    outcomes = []
    for result in results:
        references = save_references(result, pictures / result.id)
        curves = loss_curves(result, spec)
        outcomes.append(
            ConceptOutcome(result, references, drawn[result.id], answers[result.id], curves)
        )
    return outcomes


def demo_concepts(folder: Path | None) -> list[Path]:
    """Choose two concepts: the first below a folder, or two of the samples that ship.

    Raises:
        InputError: when the folder holds none.
        ServiceError: when the disk is full.
    """
    if folder is None:
        from model.pocket import pocket_paths

        return [Path(pocket_paths().concepts) / name for name in SAMPLES]
    found = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    found = [path for path in found if not path.name.startswith((".", "_"))]
    if not found:
        raise InputError(f"{folder} holds no concept folders: give a folder that does")
    return found[:N_CONCEPTS]


def demo_settings(folder: Path) -> list[str]:
    """Say what the demonstration sets in the run spec: everything below its folder, one pack."""
    root = folder.resolve()
    return [
        f'train.storage_path="{root / "train"}"',
        f'tracking.uri="sqlite:///{root / "mlflow.db"}"',
        "train.keep_teacher=true",
        f"pack.size={N_CONCEPTS}",
    ]
