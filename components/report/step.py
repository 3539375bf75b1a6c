"""The exit handler's step `report`: what became of a pipeline run, whatever stopped it."""

from __future__ import annotations

from components.ingest import documents
from components.spec import RunSpec
from components.steps import Say, place_of, run_document
from components.train.state import BatchStatus, BatchView
from model.errors import EchoDistillError


def report_run(
    prefix: str,
    spec: RunSpec,
    say: Say,
    *,
    storage: str = "",
    run: str = "",
    state: str = "",
    error: str = "",
    namespace: str | None = None,
) -> str:
    """Write how a pipeline run ended beside its batch, and end a RayJob that nobody watches.

    Args:
        prefix: of the concepts, as the run was given it.
        spec: the run spec.
        say: hears it, a line a concept.
        storage: as the run was given it.
        run: names the pipeline run.
        state: of the run: SUCCEEDED, FAILED or CANCELLED.
        error: why it failed, or "".
        namespace: of RayJobs; None: there are none.

    Returns:
        the report, in Markdown.
    """
    place = run_document(place_of(prefix, spec, storage), run)
    found = documents.read(place)
    status = None if found is None else BatchView(found.value["batch"]).read()
    if status is not None and namespace is not None and state != "SUCCEEDED":
        _end_rayjob(status, namespace, say)
        status = BatchView(status.batch.uri).read()
    facts = {
        "batch": None if status is None else status.batch.uri,
        "state": state,
        "error": error or None,
        "counts": {} if status is None else status.counts,
        "promoted": 0 if status is None else sum(one.promoted for one in status.concepts),
    }
    documents.write(place, facts)
    lines = [f"# {prefix}: {state.lower()}", "", *([error, ""] if error else [])]
    if status is None:
        lines.append("It ended before a batch was planned.")
    else:
        lines += _table(status)
    for line in filter(None, lines):
        say(line)
    return "\n".join(lines) + "\n"


def _table(status: BatchStatus) -> list[str]:
    """Return a row for each concept, and where there is more."""
    rows = ["| concept | state | version | champion | |", "|---|---|---|---|---|"]
    for one in status.concepts:
        told = (one.error or one.note).replace("|", "/")
        champion = "yes" if one.promoted else ""
        rows.append(f"| {one.id} | {one.state} | {one.version or ''} | {champion} | {told} |")
    return [*rows, "", f"`echodistill status {status.batch.uri} --report report.html` shows more."]


def _end_rayjob(status: BatchStatus, namespace: str, say: Say) -> None:
    """A run that failed or was stopped must not leave GPUs busy."""
    from components.train.rayjob import end_rayjob
    from components.train.rayjob_api import RayJobs

    try:
        if end_rayjob(status.batch.uri, RayJobs(namespace)):
            say("its RayJob was removed; what it had begun goes on in the next run")
    except EchoDistillError as error:  # the report is worth more
        say(f"its RayJob could not be looked at: {error}")
