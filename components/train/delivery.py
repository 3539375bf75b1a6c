"""What a training run has to say to MLflow: plain entries, delivered one by one.

An entry is a dictionary that JSON can write, so that what could not be delivered while the server
was away is kept in the run's checkpoints, and delivered by whoever meets the server next.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from components.ingest.concept_folder import Concept, ReferenceImage
from components.register.connection import is_refusal
from components.train.lineage import dataset_input

RUN_KEY_TAG = "echodistill.run_key"
CONCEPT_TAG = "echodistill.concept"
UNLOGGED = "tracking.json"  # of a checkpoint folder: the entries that were not delivered
_BATCH = 1000  # MLflow takes at most so many metrics in one call
_HOPELESS = {
    "INVALID_PARAMETER_VALUE",
    "BAD_REQUEST",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
    "ENDPOINT_NOT_FOUND",
}

Entry = Mapping[str, Any]
"""`what` (a method of Delivery), `run` (the training run's name), `concept`, and its arguments."""


@dataclass(frozen=True)
class TrackingSettings:
    """Where runs are tracked.

    Attributes:
        uri: an absolute MLflow tracking URI.
        experiment: the experiment's name.
        parent: the id of the run that the concepts' runs are shown below, or None.
    """

    uri: str
    experiment: str
    parent: str | None = None


class Delivery:
    """Delivers entries; each may be delivered twice without harm.

    Runs are found again by name, so that whoever delivers logs to the same ones.

    Attributes:
        runs: the MLflow run ids that are known, by concept id.
    """

    def __init__(self, settings: TrackingSettings) -> None:
        self.runs: dict[str, str] = {}
        self._settings = settings
        self._client: Any = None

    def deliver(self, entry: Entry) -> None:
        """Deliver one entry; raises whatever MLflow does."""
        facts = dict(entry)
        what, run, concept = (str(facts.pop(name)) for name in ("what", "run", "concept"))
        if concept not in self.runs:
            self.runs[concept] = self._find_run(f"{run}/{concept}", concept)
        getattr(self, what)(self.runs[concept], **facts)

    def start(self, run_id: str, params: Mapping[str, Any], spec: str) -> None:
        """Begin a run, or go on with it; what it has been told before stays."""
        from mlflow.entities import Param

        api = self._api()
        api.update_run(run_id, status="RUNNING")
        if self._settings.parent:  # another than before, when it goes on in another batch
            api.set_tag(run_id, "mlflow.parentRunId", self._settings.parent)
        known = api.get_run(run_id).data.params
        fresh = [Param(k, str(v)[:6000]) for k, v in params.items() if k not in known]
        api.log_batch(run_id, params=fresh)
        api.log_text(run_id, spec, "spec.yaml")

    def dataset(self, run_id: str, facts: Mapping[str, Any]) -> None:
        """Log the photos of a concept, which is given as a dictionary."""
        images = tuple(ReferenceImage(**image) for image in facts["images"])
        concept = Concept(**{**facts, "images": images})
        self._api().log_inputs(run_id, datasets=[dataset_input(concept)])

    def metrics(self, run_id: str, rows: Sequence[Any], moment: int) -> None:
        """Log rows of an iteration and its values by name."""
        from mlflow.entities import Metric

        metrics = [
            Metric(name, float(value), moment, int(iteration))
            for iteration, row in rows
            for name, value in row.items()
        ]
        for start in range(0, len(metrics), _BATCH):
            self._api().log_batch(run_id, metrics=metrics[start : start + _BATCH])

    def picture(self, run_id: str, name: str, png: str) -> None:
        """Log a PNG that is written in base64."""
        image = Image.open(io.BytesIO(base64.b64decode(png)))
        self._api().log_image(run_id, image, artifact_file=name)

    def folder(self, run_id: str, folder: str, name: str) -> None:
        """Log a folder as the artifact folder `name`."""
        self._api().log_artifacts(run_id, folder, name)

    def end(self, run_id: str, error: str | None) -> None:
        """End a run, as failed when there is an error."""
        if error is not None:
            self._api().set_tag(run_id, "echodistill.error", error[:5000])
        self._api().set_terminated(run_id, "FINISHED" if error is None else "FAILED")

    def _api(self) -> Any:
        if self._client is None:
            from mlflow import MlflowClient

            self._client = MlflowClient(self._settings.uri, self._settings.uri)
        return self._client

    def _find_run(self, key: str, concept: str) -> str:
        """Return the id of the run of this key, made when it is missing."""
        api, experiment = self._api(), self._experiment()
        found = api.search_runs([experiment], f"tags.`{RUN_KEY_TAG}` = '{key}'", max_results=1)
        if found:
            return str(found[0].info.run_id)
        tags = {RUN_KEY_TAG: key, CONCEPT_TAG: concept}
        if self._settings.parent:
            tags["mlflow.parentRunId"] = self._settings.parent
        return str(api.create_run(experiment, run_name=concept, tags=tags).info.run_id)

    def _experiment(self) -> str:
        api, name = self._api(), self._settings.experiment
        found = api.get_experiment_by_name(name)
        if found is None:
            try:
                return str(api.create_experiment(name, artifact_location=self._artifacts()))
            except Exception:
                found = api.get_experiment_by_name(name)  # another process made it just now
                if found is None:
                    raise
        return str(found.experiment_id)

    def _artifacts(self) -> str | None:
        """Say where a SQLite file's artifacts go: beside it, not into the worker's folder."""
        scheme, _, path = self._settings.uri.partition(":///")
        return str(Path(path).parent / "mlartifacts") if scheme == "sqlite" else None


def is_hopeless(error: Exception) -> bool:
    """Tell whether trying the same again can't help."""
    if is_refusal(error) or getattr(error, "error_code", None) in _HOPELESS:
        return True
    return isinstance(error, AttributeError | FileNotFoundError | KeyError | TypeError | ValueError)


def deliver_late(settings: TrackingSettings, entries: Iterable[Entry], adapter: Path) -> str | None:
    """Deliver what a concept's run could not while the server was away; returns the MLflow run.

    Args:
        settings: where to.
        entries: of one concept, in order; those that can't be delivered ever are left out.
        adapter: the concept's folder, for the entry of a folder.

    Raises whatever MLflow does while the server is still away.
    """
    delivery = Delivery(settings)
    for entry in entries:
        try:
            there = {"folder": str(adapter)} if entry["what"] == "folder" else {}
            delivery.deliver({**entry, **there})
        except Exception as error:
            if not is_hopeless(error):
                raise
    return next(iter(delivery.runs.values()), None)


def write_unlogged(folder: Path, entries: Sequence[Entry]) -> None:
    """Write undelivered entries into a checkpoint folder; nothing when there are none."""
    if entries:
        (folder / UNLOGGED).write_text(json.dumps(entries))


def read_unlogged(folder: Path) -> list[Entry]:
    """Read the entries that were not delivered when a checkpoint was made, if that is whole."""
    try:
        found: list[Entry] = json.loads((folder / UNLOGGED).read_text())
    except (FileNotFoundError, ValueError):
        return []
    return found
