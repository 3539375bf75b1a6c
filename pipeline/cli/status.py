"""`echodistill status` and `logs`: what a batch is at; the former needs no cluster."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.options import Address, BatchName, Debug, Json, Report, Storage, TrackingUri
from pipeline.cli.output import Output, tell_more
from pipeline.figures import money

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

    from components.train.batch import Batch
    from components.train.state import BatchStatus, ConceptState

LOG = Path("runs/logs/status.txt")
LAST = Path("runs/last-batch.txt")  # the URI of the batch that was submitted here last
WATCH_SECONDS = 3.0
_GOOD = ("trained", "already", "training", "queued", "waiting")


def status(
    context: typer.Context,
    batch: BatchName = None,
    storage: Storage = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Draw it anew until the batch is over.")
    ] = False,
    report: Report = None,
    tracking_uri: TrackingUri = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what the concepts of a batch are at, from the storage alone.

    Without a name: the batch that was submitted last from this folder. Exit code 1 when a concept
    is not valid, failed, or did not pass the gate.
    """
    output: Output = context.obj
    from components.train.state import BatchView

    view = BatchView(_uri(batch, storage))
    found = view.read()
    if watch:
        found = _watch(output, view, found)
    if report is not None:
        _write_report(output, found, report, tracking_uri)
    show(output, found)
    raise typer.Exit(exit_code(found))


def exit_code(found: BatchStatus) -> int:
    """Return 1 when something is wrong with a batch so far, else 0."""
    stays = any(one.state == "trained" and not one.promoted for one in found.concepts)
    return 1 if stays or found.error or any(one.error for one in found.concepts) else 0


def logs(
    context: typer.Context,
    concept: Annotated[
        str | None, typer.Argument(metavar="CONCEPT", help="Only the lines that name it.")
    ] = None,
    batch: Annotated[
        str | None, typer.Option("--batch", help="Its id or URI; the newest by default.")
    ] = None,
    address: Address = None,
    storage: Storage = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a batch's driver and packs said; the cluster keeps it."""
    output: Output = context.obj
    from pipeline.jobs import DEFAULT_ADDRESS, Jobs

    found = named_batch(batch, storage)
    if concept is not None and concept not in found.concept_ids:
        from model.errors import InputError

        raise InputError(f"the batch {found.id} has no concept {concept}: echodistill status")
    lines = Jobs(address or DEFAULT_ADDRESS).logs(found).splitlines()
    if concept is not None:
        name = re.compile(rf"(?<![\w-]){re.escape(concept)}(?![\w-])")
        lines = [line for line in lines if name.search(line)]
    document = {"batch": found.id, "concept": concept, "lines": lines}

    def human(console: Console) -> None:
        for line in lines:
            console.print(line, markup=False, soft_wrap=True)

    output.finish(document, human)


def remember(batch: Batch) -> None:
    """Keep a batch as the one that is meant where none is named."""
    with suppress(OSError):  # it can be named all the same
        LAST.parent.mkdir(parents=True, exist_ok=True)
        LAST.write_text(batch.uri + "\n", encoding="utf-8")


def named_batch(given: str | None, storage: str | None) -> Batch:
    """Load the batch that a command names."""
    from components.train.batch import load_batch

    return load_batch(_uri(given, storage))


def show(output: Output, found: BatchStatus, job: str | None = None) -> None:
    """Write a status: a table, or one document."""
    document = found.as_json()
    if job is not None:
        document["job"] = job

    def human(console: Console) -> None:
        draw(console, found.concepts)
        console.print(_summary(found), markup=False, soft_wrap=True)
        if found.counts.get("failed"):
            again = f"echodistill retry {found.batch.uri} --failed   # tries the failed ones again"
            console.print(again, markup=False, soft_wrap=True)
        elif found.over and found.state != "done":
            again = f"echodistill retry {found.batch.uri}   # goes on where it was"
            console.print(again, markup=False, soft_wrap=True)
        elif found.state == "queued":
            why = f"echodistill logs --batch {found.batch.uri}   # if it stays so: why"
            console.print(why, markup=False, soft_wrap=True)
        if found.error:
            console.print(f"error: {found.error}", markup=False, soft_wrap=True)

    output.finish(document, human)


def draw(console: Console, concepts: Sequence[ConceptState]) -> None:
    """Draw concepts as a table."""
    console.print(_table(concepts))
    tell_more(console, concepts)


def _write_report(output: Output, found: BatchStatus, path: Path, tracking_uri: str | None) -> None:
    from pipeline.batch_report import check_place, told_of, write_batch_report
    from pipeline.tracking import registry_to_read

    check_place(path)
    registry = registry_to_read(tracking_uri or found.registry or found.batch.registry)
    with output.noise_to(LOG):
        write_batch_report(told_of(found, registry), path)
    output.say(f"{path}   # the report")


def _uri(given: str | None, storage: str | None) -> str:
    from components.ingest import store
    from components.spec import TrainSpec
    from components.train.batch import find_batch

    if given is None and storage is None and LAST.is_file():
        return LAST.read_text(encoding="utf-8").strip()
    return find_batch(given, store.absolute(storage or TrainSpec().storage_path))


def _summary(found: BatchStatus) -> str:
    counts = ", ".join(f"{count} {state}" for state, count in found.counts.items())
    return f"batch {found.batch.id} ({found.state}): {counts}\n  {found.batch.uri}"


def _table(concepts: Sequence[ConceptState]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    priced = any(one.cost is not None for one in concepts)
    cost = ["cost"] if priced else []
    for name in (
        "concept",
        "state",
        "iteration",
        "loss",
        "seconds",
        *cost,
        "worker",
        "version",
    ):
        right = name in ("iteration", "seconds", "cost", "version")
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for one in concepts:
        iteration = f"{one.iteration}/{one.iterations}" if one.iterations else ""
        table.add_row(
            Text(one.id),
            Text(one.state, style="" if one.state in _GOOD else "red"),
            iteration,
            one.losses,
            f"{one.seconds:.0f}" if one.seconds else "",
            *([money(one.cost)] if priced else []),
            one.worker,
            one.version or "",
        )
    return table


def _watch(output: Output, view: object, found: BatchStatus) -> BatchStatus:
    """Draw a status anew until the batch is over: what moves first, as much as fits."""
    from rich.live import Live

    from components.train.state import BatchView

    assert isinstance(view, BatchView)
    if output.as_json or not output.console.is_terminal:
        while not found.over:
            time.sleep(WATCH_SECONDS)
            found = view.read()
        return found
    with Live(console=output.console, auto_refresh=False, transient=True) as live:
        while not found.over:
            live.update(_glance(found, output.console.height), refresh=True)
            time.sleep(WATCH_SECONDS)
            found = view.read()
    return found


def _glance(found: BatchStatus, height: int) -> RenderableType:
    from rich.console import Group

    order = {"training": 0, "failed": 1, "waiting": 2, "interrupted": 3}
    rows = sorted(found.concepts, key=lambda one: order.get(one.state, 4))[: max(height - 5, 3)]
    return Group(_table(rows), _summary(found))
