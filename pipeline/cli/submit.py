"""`echodistill submit`, `retry` and `cancel`: batches for a Ray cluster."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from pipeline.cli.interruptible import Interruptible
from pipeline.cli.options import (
    Address,
    Base,
    BatchName,
    Debug,
    Json,
    Prefix,
    Sets,
    SpecFile,
    Storage,
    TrackingUri,
)
from pipeline.cli.output import Output
from pipeline.cli.status import draw, exit_code, named_batch, remember, show
from pipeline.cli.train import _resolve

if TYPE_CHECKING:
    from components.train.batch import Batch
    from components.train.state import BatchStatus
    from pipeline.jobs import Jobs
    from pipeline.submit import Checked

LOG = Path("runs/logs/submit.txt")
Wait = Annotated[
    bool,
    typer.Option("--wait", help="Stay until the batch is over; Ctrl-C cancels it."),
]
Env = Annotated[
    list[str] | None,
    typer.Option(
        "--env",
        metavar="NAME[=VALUE]",
        help="A variable for the job (the cluster's dashboard shows it); repeatable.",
    ),
]


def submit(
    context: typer.Context,
    prefix: Prefix,
    base: Base = None,
    spec: SpecFile = None,
    sets: Sets = None,
    address: Address = None,
    storage: Storage = None,
    wait: Wait = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Submit nothing when a concept is not valid.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Train concepts again that are registered already.")
    ] = False,
    waiting: Annotated[
        int,
        typer.Option(min=1, help="Packs that wait for room at a time (what an autoscaler sees)."),
    ] = 2,
    plan: Annotated[
        bool,
        typer.Option("--plan", help="Only write the batch: a RayJob drives it (infra/README.md)."),
    ] = False,
    env: Env = None,
    tracking_uri: TrackingUri = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Check concepts, plan packs and submit them as one job of a Ray cluster.

    Concepts that are not valid are listed and left out. What is registered already is not trained
    again, and what was begun goes on. Exit code 1 when a concept is not valid, or, with --wait,
    failed or did not pass the gate.
    """
    output: Output = context.obj
    if plan and (wait or env):
        raise typer.BadParameter("--plan only writes the batch: leave out --wait and --env")
    resolved = _resolve(base, spec, sets or [], tracking_uri)
    environment = _environment(env)
    from pipeline import submit as batches
    from pipeline.services import quiet_libraries

    quiet_libraries()
    with output.noise_to(LOG):
        checked = batches.check(prefix, resolved, output)
        if strict and checked.invalid or len(checked.invalid) == len(checked.concepts):
            _refuse(output, checked)
        if plan:
            planned = batches.plan(checked, output, storage=storage, force=force, waiting=waiting)
            remember(planned)
            _end_planned(output, planned)
        jobs = _jobs(address)
        batch, job = batches.submit(
            checked,
            jobs,
            output,
            storage=storage,
            force=force,
            waiting=waiting,
            environment=environment,
        )
        remember(batch)
        _end(output, batch, jobs, job, wait)


def retry(
    context: typer.Context,
    batch: BatchName = None,
    failed: Annotated[
        bool, typer.Option("--failed", help="Try those again that failed, too.")
    ] = False,
    address: Address = None,
    storage: Storage = None,
    wait: Wait = False,
    env: Env = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Go on with a batch that was cancelled or interrupted; what is done stays done."""
    output: Output = context.obj
    from pipeline import submit as batches

    found = named_batch(batch, storage)
    with output.noise_to(LOG):
        _end_if_done(output, found, failed)
        jobs = _jobs(address)
        job = batches.retry(found, jobs, failed=failed, environment=_environment(env))
        _end(output, found, jobs, job, wait)


def cancel(
    context: typer.Context,
    batch: BatchName = None,
    address: Address = None,
    storage: Storage = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Stop a batch. What is trained stays; what was begun can go on (`retry`, or submit again)."""
    output: Output = context.obj
    from components.train.state import BatchView

    found = named_batch(batch, storage)
    _jobs(address).cancel(found)
    show(output, BatchView(found.uri).read())


def _jobs(address: str | None) -> Jobs:
    from pipeline.jobs import DEFAULT_ADDRESS, Jobs

    return Jobs(address or DEFAULT_ADDRESS)


def _environment(env: list[str] | None) -> dict[str, str]:
    found = {}
    for text in env or []:
        name, equals, value = text.partition("=")
        if not name or (not equals and name not in os.environ):
            from model.errors import InputError

            wrong = f"{name} is not set here: write {name}=value" if name else "needs NAME=value"
            raise InputError(f"--env {wrong}")
        found[name] = value if equals else os.environ[name]
    return found


def _refuse(output: Output, checked: Checked) -> None:
    """Say why nothing was submitted, and end."""
    from components.train.state import ConceptState

    states = [
        ConceptState(name, "invalid", error="; ".join(problems))
        for name, problems in checked.invalid.items()
    ]
    document: dict[str, Any] = {
        "batch": None,
        "state": "refused",
        "counts": {"invalid": len(states)},
        "concepts": [one.as_json() for one in states],
    }
    output.finish(document, lambda console: draw(console, states))
    output.say("nothing was submitted")
    raise typer.Exit(1)


def _end_if_done(output: Output, batch: Batch, failed: bool) -> None:
    """Show a batch that has nothing left to do, and end."""
    from components.train.state import BatchView

    status = BatchView(batch.uri).read()
    if not all(one.over and not (failed and one.state == "failed") for one in status.concepts):
        return
    show(output, status)
    output.say("nothing is left to do")
    raise typer.Exit(exit_code(status))


def _end_planned(output: Output, batch: Batch) -> NoReturn:
    """Show a batch that nobody drives yet."""
    from components.train.state import BatchView

    show(output, BatchView(batch.uri).read())
    output.say(f"the batch is written and waits for its driver: {batch.uri}")
    raise typer.Exit(1 if batch.invalid else 0)


def _end(output: Output, batch: Batch, jobs: Jobs, job: str, wait: bool) -> None:
    """Show the batch: as it ends, or as it begins."""
    from components.train.state import BatchView
    from pipeline import submit as batches

    view = BatchView(batch.uri)
    if not wait:
        status = view.read()
        show(output, status, job=job)
        output.say(f"echodistill status {batch.uri} --watch   # how it goes on")
        raise typer.Exit(1 if batch.invalid else 0)
    task = Interruptible(output)

    def work() -> BatchStatus:
        return batches.wait(view, jobs, job, task.progress)

    try:
        status = task.run(work, lambda: None)
    except KeyboardInterrupt:
        jobs.cancel(batch)
        raise
    show(output, status, job=job)
    raise typer.Exit(0 if all(one.good for one in status.concepts) else 1)
