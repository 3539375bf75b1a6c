"""The report of a batch: every concept with its pictures, figures, time and cost, in one HTML file.

It is made from the batch's states and the registry, so that neither the cluster nor the photos
have to be there any more; what can't be fetched is left out.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from components.evaluate.tags import BEFORE, MODELS_TAG, PROTOCOL_TAG
from components.ingest.cache import disk_error
from components.ingest.concept_folder import Concept
from components.register.connection import hide_password
from components.register.registry import RegisteredVersion, find_versions, get_version
from components.spec import RunSpec, spec_digest
from components.train.batch import load_concepts
from components.train.state import BatchStatus, ConceptState
from model.errors import InputError
from model.names import METRICS
from pipeline.curves import curves_of
from pipeline.figures import LOSSES, money
from pipeline.report import (
    ConceptSection,
    Report,
    Row,
    Summary,
    write_report,
)
from pipeline.report_pictures import pictures_of

if TYPE_CHECKING:
    from pipeline.run import ConceptResult

SHOWN = 60  # concepts with pictures; of more the page would become too large to open
_CURVES = 6  # concepts whose losses can be told apart by colour
_AT_ONCE = 8

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Told:
    """What a report tells of.

    Attributes:
        name: of the batch.
        prefix: where its concepts came from.
        state: of the batch, in a word.
        spec: the resolved run spec.
        states: of all concepts.
        concepts: the valid ones, by id, whose photos may still be there.
        registry: MLflow URI.
        place: the folder of the batch's documents, or "".
    """

    name: str
    prefix: str
    state: str
    spec: RunSpec
    states: Sequence[ConceptState]
    concepts: Mapping[str, Concept]
    registry: str
    place: str = ""


def told_of(status: BatchStatus, registry: str) -> Told:
    """Return what there is to tell of a submitted batch.

    Raises:
        ServiceError: when its storage is out of reach.
    """
    batch = status.batch
    return Told(
        name=batch.id,
        prefix=batch.prefix,
        state=status.state,
        spec=batch.spec,
        states=status.concepts,
        concepts=load_concepts(batch),
        registry=registry,
        place=batch.uri,
    )


def check_place(path: Path) -> None:
    """Make a report's folder, before hours are spent on what it will tell.

    Raises:
        InputError: when no file can be there.
    """
    if path.is_dir():
        raise InputError(f"--report {path} is a folder: name a file in it, such as report.html")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, path.parent) from error


def told_of_training(
    prefix: str, spec: RunSpec, registry: str, results: Iterable[ConceptResult]
) -> Told:
    """Return what there is to tell of a training on this machine."""
    every = list(results)
    return Told(
        name=prefix.rstrip("/").rpartition("/")[2] or prefix,
        prefix=prefix,
        state="done",
        spec=spec,
        states=[result.as_state() for result in every],
        concepts={result.id: result.concept for result in every if result.concept is not None},
        registry=registry,
    )


def write_batch_report(told: Told, path: Path) -> None:
    """Write a batch's report, whole or not at all.

    Raises:
        ServiceError: when the registry is out of reach or the disk is full.
    """
    versions = _versions(told)
    order = {"failed": 0, "trained": 1, "interrupted": 2, "training": 3, "already": 4}
    worth = [one for one in told.states if one.state in order]
    shown = sorted(worth, key=lambda one: order[one.state])[:SHOWN]
    with tempfile.TemporaryDirectory(prefix="echodistill-report-") as scratch:

        def section(one: ConceptState) -> ConceptSection:
            version = versions.get(one.id)
            rows = pictures_of(
                one, version, told.concepts.get(one.id), told.registry, Path(scratch) / one.id
            )
            curves = _curves(one, told.registry) if len(shown) <= _CURVES else {}
            return _section(one, version, told.concepts.get(one.id), rows, curves)

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            sections = tuple(pool.map(section, shown))
        write_report(_report(told, versions, sections, len(worth) - len(shown)), path)


def _versions(told: Told) -> dict[str, RegisteredVersion]:
    """Find the registered versions of a batch's concepts, many at once."""
    wanted = {one.id: one for one in told.states if one.version}
    digests = {name: one.digest for name, one in wanted.items() if one.digest}
    found = find_versions(digests, spec_digest(told.spec), tracking_uri=told.registry)
    versions = {name: version for name, (version, _) in found.items()}
    for name, one in wanted.items():
        if name not in versions or str(versions[name].version) != one.version:
            version = get_version(name, str(one.version), tracking_uri=told.registry)
            if version is not None:
                versions[name] = version
    return versions


def _curves(one: ConceptState, registry: str) -> dict[str, list[tuple[int, float]]]:
    if one.run_id is None:
        return {}
    try:
        curves = curves_of(one.run_id, registry)
    except Exception as error:  # a report without curves is better than none
        log.warning("the losses of %s can't be read: %s", one.id, error)
        return {}
    return {LOSSES.get(name, name): points for name, points in curves.items()}


def _section(
    one: ConceptState,
    version: RegisteredVersion | None,
    concept: Concept | None,
    rows: tuple[Row, ...],
    curves: dict[str, list[tuple[int, float]]],
) -> ConceptSection:
    figures = version.metrics if version else {}
    facts = [
        ("state", one.state),
        ("version", f"{one.version} ({_standing(one)})" if one.version else "–"),
        ("adapter sha256", (one.sha256 or "–")[:16]),
        ("iterations", str(one.iteration)),
        ("training", f"{one.seconds:.0f} s, its share of the pack"),
        ("GPUs", f"{one.gpu_seconds:.0f} s"),
        ("cost", money(one.cost)),
        ("trained on", one.worker),
        ("MLflow run", one.run_id or ""),
    ]
    subtitle = ""
    if concept is not None:
        subtitle = f"{concept.token} {concept.class_noun}, {len(concept.images)} photos"
    return ConceptSection(
        id=one.id,
        subtitle=subtitle,
        facts=tuple((label, value) for label, value in facts if value),
        rows=rows,
        metrics={
            title: (figures.get(BEFORE + name), figures.get(name))
            for name, title in METRICS.items()
            if name in figures
        },
        curves=curves,
        note=_why(one),
    )


def _why(one: ConceptState) -> str:
    """Say what is wrong and what to do, or what a person should know."""
    return "; ".join(part for part in (one.error, one.note) if part)


def _standing(one: ConceptState) -> str:
    return "champion" if one.promoted else "candidate"


def _report(
    told: Told,
    versions: Mapping[str, RegisteredVersion],
    sections: tuple[ConceptSection, ...],
    left_out: int,
) -> Report:
    spec, done = told.spec, [one for one in told.states if one.state in ("trained", "failed")]
    price = spec.cost.gpu_hour
    costs = [one.cost for one in done if one.cost is not None]
    counts: dict[str, int] = {}
    for one in told.states:
        counts[one.state] = counts.get(one.state, 0) + 1
    measured = {
        (version.tags.get(MODELS_TAG, ""), version.tags.get(PROTOCOL_TAG, ""))
        for version in versions.values()
        if version.metrics
    }
    facts = [
        ("state", told.state),
        ("concepts", ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))),
        ("base pair", spec.base.name),
        ("photos", told.prefix),
        ("training", f"{sum(one.seconds for one in done):.0f} s"),
        ("GPUs", f"{sum(one.gpu_seconds for one in done):.0f} s"),
        ("cost", money(sum(costs) if costs else None)),
        ("price of a GPU-hour", "not set" if price is None else f"{price:g}"),
        ("run spec", spec_digest(spec)[:12]),
        ("registry", hide_password(told.registry)),
        ("documents", told.place),
    ]
    return Report(
        title=f"EchoDistill: {told.name}",
        introduction=(
            "What became of a batch of concepts: teacher and one-step student trained together on "
            "each concept's photos, the student's adapter registered, measured and put to the gate."
        ),
        facts=tuple((label, value) for label, value in facts if value),
        sections=sections,
        footnotes=_footnotes(measured, left_out),
        summary=_summary(told.states, versions, alike=len(measured) < 2),
        failures=tuple((one.id, _why(one)) for one in told.states if one.error),
    )


def _footnotes(measured: set[tuple[str, str]], left_out: int) -> tuple[str, ...]:
    notes = []
    if left_out:
        notes.append(
            f"{left_out} more concepts are in the table only; the registry has their pictures."
        )
    for models, protocol in sorted(measured):
        notes.append(
            f"Metrics: {protocol} (prompts x seeds), features of {models}. Figures of other "
            'features or prompts are not comparable. "Before" is the base asked for the class noun.'
        )
    if len(measured) > 1:
        notes.append("The table has no metrics, for not all were measured alike.")
    notes.append(
        "Training seconds are a concept's share of its pack's, without loading and measuring; GPU "
        "seconds count every GPU of the pack."
    )
    return tuple(notes)


def _summary(
    states: Sequence[ConceptState], versions: Mapping[str, RegisteredVersion], *, alike: bool
) -> Summary:
    figures = METRICS if alike else {}
    priced = any(one.cost is not None for one in states)
    rows = []
    for one in states:
        known = versions[one.id].metrics if one.id in versions else {}
        rows.append(
            (
                one.id,
                one.state,
                f"{one.version} ({_standing(one)})" if one.version else "–",
                *(f"{known[name]:.3f}" if name in known else "–" for name in figures),
                f"{one.seconds:.0f}" if one.seconds else "–",
                f"{one.gpu_seconds:.0f}" if one.gpu_seconds else "–",
                *([money(one.cost)] if priced else []),
            )
        )
    titles = ("concept", "state", "version", *figures.values(), "seconds", "GPU seconds")
    return Summary((*titles, "cost") if priced else titles, tuple(rows))
