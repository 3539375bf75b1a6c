"""A batch's own MLflow run, below which the runs of its concepts are shown.

It tells of the batch and decides nothing: whatever goes wrong with it costs no concept.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from components.ingest.concept_folder import Concept
from components.register.connection import connect, experiment_id, reaching
from components.spec import RunSpec, spec_digest, spec_yaml
from components.train.batch import Batch
from components.train.delivery import RUN_KEY_TAG
from components.train.state import BatchView, ConceptState, State
from components.train.tracking import without_password
from model.errors import EchoDistillError
from pipeline.batch_report import Told, told_of, told_of_training, write_batch_report

if TYPE_CHECKING:
    from pipeline.run import ConceptResult

BATCH_TAG = "echodistill.batch"  # the folder of the batch's documents
REPORT = "report.html"
_AGAIN_SECONDS = 60.0  # before a server that was away is asked for the run again
Ended = Literal["FINISHED", "FAILED", "KILLED"]

log = logging.getLogger(__name__)


class ParentRun:
    """One run a batch, found again by its key, so that a batch that goes on has the same one."""

    def __init__(
        self,
        key: str,
        name: str,
        spec: RunSpec,
        registry: str,
        facts: Mapping[str, Any],
        place: str,
    ) -> None:
        """Make nothing yet.

        Args:
            key: what it is found again by.
            name: that it is shown under.
            spec: the resolved run spec.
            registry: MLflow URI.
            facts: its parameters.
            place: the folder of the batch's documents, or "".
        """
        self._key = f"batch/{key}"
        self._name = name
        self._spec = spec
        self._registry = registry
        self._facts = dict(facts) | {"base": spec.base.name, "spec_digest": spec_digest(spec)}
        self._tags = {RUN_KEY_TAG: self._key} | ({BATCH_TAG: place} if place else {})
        self._id: str | None = None
        self._not_before = 0.0

    def begin(self) -> str | None:
        """Make or find the run; returns its id, or None while the server is away."""
        if self._id is None and time.monotonic() >= self._not_before:
            self._not_before = time.monotonic() + _AGAIN_SECONDS
            self._tried(self._begin)
        return self._id

    def end(
        self, how: Ended, states: Sequence[ConceptState], told: Callable[[], Told] | None = None
    ) -> None:
        """Write counts, time and cost, and the report if there is something `told`; end it."""
        self._not_before = 0.0
        if self.begin() is None:
            return
        self._tried(lambda: self._count(states))
        if told is not None:
            self._tried(lambda: self._report(told()))
        self._tried(lambda: self._client().set_terminated(self._id, how))

    def _tried(self, what: Callable[[], None]) -> None:
        try:
            with reaching(self._registry):
                what()
        except Exception as error:
            log.warning("the batch's own run in MLflow: %s", error)

    def _client(self) -> Any:
        return connect(self._registry)

    def _begin(self) -> None:
        from mlflow.entities import Param

        client = self._client()
        experiment = experiment_id(client, self._registry, self._spec.tracking.experiment)
        query = f"tags.`{RUN_KEY_TAG}` = '{self._key}'"
        found = client.search_runs([experiment], query, max_results=1)
        if found:
            run = found[0]
            client.update_run(run.info.run_id, status="RUNNING")
        else:
            run = client.create_run(experiment, run_name=self._name, tags=self._tags)
            params = [Param(name, str(value)[:6000]) for name, value in self._facts.items()]
            client.log_batch(run.info.run_id, params=params)
            client.log_text(run.info.run_id, spec_yaml(without_password(self._spec)), "spec.yaml")
        self._id = str(run.info.run_id)

    def _count(self, states: Sequence[ConceptState]) -> None:
        from mlflow.entities import Metric

        own = [one for one in states if one.state in ("trained", "failed")]
        already = [one for one in states if one.state == "already"]
        if already:  # some may have been trained before this batch was interrupted
            children = self._children()
            own += [one for one in already if one.run_id in children]
        figures: dict[str, float] = {
            f"concepts/{state}": sum(one.state == state for one in states)
            for state in get_args(State)
        }
        figures["concepts/promoted"] = sum(one.promoted for one in states)
        figures["seconds"] = sum(one.seconds for one in own)
        figures["gpu_seconds"] = sum(one.gpu_seconds for one in own)
        costs = [one.cost for one in own if one.cost is not None]
        if costs:
            figures["cost"] = sum(costs)
        now = int(time.time() * 1000)
        metrics = [Metric(name, float(value), now, 0) for name, value in figures.items()]
        self._client().log_batch(self._id, metrics=metrics)

    def _children(self) -> set[str]:
        from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

        client, found, token = self._client(), set[str](), None
        experiment = client.get_run(self._id).info.experiment_id
        query = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{self._id}'"
        while True:
            page = client.search_runs([experiment], query, page_token=token)
            found |= {run.info.run_id for run in page}
            token = page.token
            if not token:
                return found

    def _report(self, told: Told) -> None:
        with tempfile.TemporaryDirectory(prefix="echodistill-report-") as scratch:
            path = Path(scratch) / REPORT
            write_batch_report(told, path)
            self._client().log_artifact(self._id, str(path))


@contextmanager
def parent_of_training(
    prefix: str,
    spec: RunSpec,
    registry: str,
    concepts: Mapping[str, Concept],
    results: Mapping[str, ConceptResult],
    *,
    force: bool,
) -> Iterator[str | None]:
    """Give the id of the run of a local training, None for one concept; end it with the block.

    The same concepts under the same spec go on in the same run, `force` begins another.

    Args:
        prefix: where the concepts came from.
        spec: the resolved run spec.
        registry: MLflow URI.
        concepts: the valid ones, by id.
        results: of the concepts, by id, which the block fills.
        force: whether they are trained anew.
    """
    if len(concepts) < 2:
        yield None
        return
    content = [spec_digest(spec), *sorted(concept.digest for concept in concepts.values())]
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]
    if force:
        key += f"-{time.strftime('%Y%m%d-%H%M%S')}"
    facts = {"prefix": prefix, "concepts": len(concepts), "force": force}
    name = told_of_training(prefix, spec, registry, []).name
    parent = ParentRun(key, name, spec, registry, facts, "")
    try:
        yield parent.begin()
    except BaseException:
        parent.end("KILLED", [result.as_state() for result in results.values()])
        raise
    told = told_of_training(prefix, spec, registry, results.values())
    parent.end("FINISHED", told.states, lambda: told)


def parent_of_batch(batch: Batch, registry: str) -> ParentRun:
    """Return the run of a submitted batch."""
    facts = {
        "prefix": batch.prefix,
        "concepts": len(batch.concept_ids),
        "packs": len(batch.packs),
        "force": batch.force,
    }
    return ParentRun(batch.id, batch.id, batch.spec, registry, facts, batch.uri)


def end_with_batch(parent: ParentRun, uri: str, registry: str) -> None:
    """End a submitted batch's run as its documents say; nothing while a driver works on it."""
    try:
        status = BatchView(uri).read()
    except EchoDistillError as error:
        log.warning("the end of the batch can't be told to MLflow: %s", error)
        return
    if not status.over:
        return
    if status.state == "done":
        parent.end("FINISHED", status.concepts, lambda: told_of(status, registry))
    else:
        parent.end("KILLED" if status.state == "cancelled" else "FAILED", status.concepts)
