"""The demonstration's results as files: report.html, grid.png and summary.json."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.evaluate.tags import BEFORE
from components.ingest.cache import replacing
from components.spec import RunSpec
from model.names import METRICS
from pipeline.figures import LOSSES
from pipeline.report import (
    ConceptSection,
    Picture,
    Report,
    Row,
    picture_grid,
    write_report,
)
from pipeline.run import ConceptResult

if TYPE_CHECKING:
    from pipeline.demo import ConceptOutcome


def write_results(
    folder: Path,
    spec: RunSpec,
    results: Sequence[ConceptResult],
    outcomes: Sequence[ConceptOutcome],
    *,
    total_seconds: float,
    stage_seconds: dict[str, float],
) -> dict[str, Any]:
    """Write the three files, each whole or not at all; returns what summary.json says."""
    summary = _summary(results, outcomes)
    summary["total_seconds"] = round(total_seconds, 1)
    summary["stage_seconds"] = {name: round(value, 1) for name, value in stage_seconds.items()}
    write_report(_report(spec, outcomes, summary), folder / "report.html")
    rows = [
        Row(f"{outcome.result.id}: {row.title}", row.pictures)
        for outcome in outcomes
        for row in _rows(outcome)
    ]
    picture_grid(rows, folder / "grid.png")
    with replacing(folder / "summary.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def _summary(
    results: Sequence[ConceptResult], outcomes: Sequence[ConceptOutcome]
) -> dict[str, Any]:
    groups = {outcome.result.id: _image_paths(outcome) for outcome in outcomes}
    latencies = [answer.milliseconds for outcome in outcomes for answer in outcome.answers]
    return {
        "concepts": [_concept(result, groups.get(result.id, {})) for result in results],
        "endpoint": {
            "n_answers": len(latencies),
            "latency_ms": round(statistics.median(latencies), 1),
            "latency_ms_first": round(latencies[0], 1),
            "latency_ms_max": round(max(latencies), 1),
        },
        # A concept's seconds are its share of its pack's.
        "training_seconds": round(sum(result.seconds for result in results), 1),
        "cpus": os.cpu_count(),
    }


def _concept(result: ConceptResult, images: dict[str, list[str]]) -> dict[str, Any]:
    """Give one concept's facts: all its pictures in one list, and the same by what they show."""
    every = [path for paths in images.values() for path in paths]
    return result.as_json() | {"image_paths": every, "images": images}


def _image_paths(outcome: ConceptOutcome) -> dict[str, list[str]]:
    drawn = outcome.drawn
    groups = {
        "references": outcome.references,
        "teacher_before": drawn.teacher_before,
        "teacher_after": drawn.teacher_after,
        "student_before": drawn.student_before,
        "student_after": drawn.student_after,
        "endpoint": [answer.path for answer in outcome.answers],
    }
    return {name: [str(path) for path in paths] for name, paths in groups.items()}


def _rows(outcome: ConceptOutcome) -> list[Row]:
    drawn = outcome.drawn

    def row(title: str, paths: Sequence[Path], captions: Sequence[str]) -> Row:
        # No paths: the teacher's adapter was not kept.
        pictures = (Picture(p, c) for p, c in zip(paths, captions if paths else (), strict=True))
        return Row(title, tuple(pictures))

    plain = [words.replace(f"{_token(outcome)} ", "") for words in drawn.words]
    rows = [
        row("References", outcome.references, [p.stem for p in outcome.references]),
        row("Teacher before, many steps", drawn.teacher_before, plain),
        row("Teacher after, many steps", drawn.teacher_after, drawn.words),
        row("Student before, one step", drawn.student_before, plain),
        row("Student after, one step", drawn.student_after, drawn.words),
        row(
            "Endpoint over HTTP, one step",
            [answer.path for answer in outcome.answers],
            [answer.prompt for answer in outcome.answers],
        ),
    ]
    return [row for row in rows if row.pictures]


def _token(outcome: ConceptOutcome) -> str:
    assert outcome.result.concept is not None
    return outcome.result.concept.token


def _section(outcome: ConceptOutcome) -> ConceptSection:
    result = outcome.result
    assert result.concept is not None
    concept = result.concept
    named = {LOSSES.get(name, name): points for name, points in outcome.curves.items()}
    metrics = {
        title: (result.metrics.get(BEFORE + name), result.metrics.get(name))
        for name, title in METRICS.items()
        if name in result.metrics
    }
    champion = "champion" if result.promoted else "candidate"
    return ConceptSection(
        id=result.id,
        subtitle=f"{concept.token} {concept.class_noun}, {len(concept.images)} photos",
        facts=(
            ("version", f"{result.version} ({champion})"),
            ("adapter sha256", (result.sha256 or "")[:16]),
            ("iterations", str(result.iterations)),
            ("training", f"{result.seconds:.0f} s, its share of the pack"),
        ),
        rows=tuple(_rows(outcome)),
        metrics=metrics,
        curves=named,
        note=result.note,
    )


def _report(spec: RunSpec, outcomes: Sequence[ConceptOutcome], summary: dict[str, Any]) -> Report:
    endpoint = summary["endpoint"]
    return Report(
        title="EchoDistill: photos to a one-step endpoint",
        introduction=(
            "Two concepts were uploaded to S3, trained together (teacher and one-step student, end "
            "to end), registered, measured, promoted and served. The endpoint drew its pictures "
            "over HTTP, in one network evaluation each."
        ),
        facts=(
            ("base pair", spec.base.name),
            ("whole demonstration", f"{summary['total_seconds']:.0f} s"),
            ("training of both", f"{summary['training_seconds']:.0f} s"),
            ("endpoint", f"{endpoint['n_answers']} answers"),
            ("median latency", f"{endpoint['latency_ms']:.0f} ms"),
            ("machine", f"{os.cpu_count()} CPUs, {platform.machine()}"),
        ),
        sections=tuple(_section(outcome) for outcome in outcomes),
        footnotes=(
            f"Metrics: {spec.evaluate.prompts} prompts, {spec.evaluate.seeds} seeds, features of "
            f"{spec.base.metric_clip} and {spec.base.metric_dino}; they are not comparable with "
            'those of other feature models. "Before" is the base asked for the class noun alone.',
            "The pictures of a column were drawn from one seed, before and after.",
        ),
    )
