"""`echodistill train`: concepts in, registered one-step adapters out."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.interruptible import Interruptible
from pipeline.cli.options import Base, Debug, Json, Prefix, Report, Sets, SpecFile, TrackingUri
from pipeline.cli.output import Output, tell_more
from pipeline.figures import money
from pipeline.progress import Event

if TYPE_CHECKING:
    from rich.console import Console

    from components.spec import RunSpec
    from pipeline.run import ConceptResult

LOG = Path("runs/logs/train.txt")


def train(
    context: typer.Context,
    prefix: Prefix,
    base: Base = None,
    spec: SpecFile = None,
    sets: Sets = None,
    force: Annotated[
        bool, typer.Option("--force", help="Train concepts again that are registered already.")
    ] = False,
    report: Report = None,
    tracking_uri: TrackingUri = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Train concepts, register their adapters, evaluate and promote them.

    Concepts that were trained with the same images, settings and base are not trained again.
    Exit code 1 when a concept is not valid, failed or did not pass the gate against its champion;
    the others are done all the same. Ctrl-C or SIGTERM stops everything (exit code 130); run it
    again to go on.
    """
    output: Output = context.obj
    resolved = _resolve(base, spec, sets or [], tracking_uri)
    from pipeline.batch_report import check_place, told_of_training, write_batch_report
    from pipeline.run import train_prefix
    from pipeline.services import abort_training, local_ray
    from pipeline.tracking import tracking_uri as registry_of

    if report is not None:
        check_place(report)

    job = Interruptible(output)

    def cluster() -> AbstractContextManager[None]:
        job.progress(Event("ray", "", "start or connect"))
        return local_ray(cpus=cpus_at_once(resolved), echo=output.debug)

    def work() -> list[ConceptResult]:
        results = train_prefix(
            prefix, resolved, force=force, progress=job.progress, cluster=cluster
        )
        if report is not None:
            registry = registry_of(spec=resolved)
            write_batch_report(told_of_training(prefix, resolved, registry, results), report)
            job.progress(Event("report", "", str(report)))
        return results

    with output.noise_to(LOG):
        results = job.run(work, abort_training)
    document = {"concepts": [one.as_json() for one in results]}
    output.finish(document, lambda console: _draw(console, results))
    raise typer.Exit(0 if all(one.good for one in results) else 1)


def _resolve(
    base: str | None, file: Path | None, sets: list[str], tracking_uri: str | None
) -> RunSpec:
    from components.spec import resolve_spec
    from pipeline.base import base_settings

    preset, own = base_settings(base)
    if tracking_uri:
        own.append(f'tracking.uri="{tracking_uri}"')
    return resolve_spec(preset, file, [*own, *sets])


def cpus_at_once(spec: RunSpec) -> int:
    """CPUs that one pack's workers ask Ray for at once, and one for what goes beside them."""
    return spec.train.workers * (spec.train.cpus_per_worker or 1) + 1


def _draw(console: Console, results: list[ConceptResult]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    priced = any(one.cost is not None for one in results)
    cost = ["cost"] if priced else []
    for name in ("concept", "state", "version", "sha256", "seconds", *cost):
        right = name in ("seconds", "cost")
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for one in results:
        good = one.state in ("trained", "already")
        table.add_row(
            Text(one.id),
            Text(one.state, style="" if good else "red"),
            one.version or "",
            (one.sha256 or "")[:12],
            f"{one.seconds:.0f}" if one.seconds else "",
            *([money(one.cost)] if priced else []),
        )
    console.print(table)
    tell_more(console, results)
