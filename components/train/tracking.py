"""MLflow tracking of a training run, from one thread that training never waits for.

What is to be logged goes into a queue. When the tracking server is away the queue's head is tried
again until it is back; training goes on meanwhile. At the end the queue gets a bounded time.
"""

from __future__ import annotations

import io
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from components.ingest import store
from components.spec import RunSpec

RUN_KEY_TAG = "echodistill.run_key"
CONCEPT_TAG = "echodistill.concept"
_BATCH = 1000  # MLflow takes at most so many metrics in one call
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 20.0  # seconds between two tries
_HOPELESS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "PERMISSION_DENIED", "UNAUTHENTICATED"}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrackingSettings:
    """Where runs are tracked: an absolute MLflow tracking URI and the experiment's name."""

    uri: str
    experiment: str


def resolve_tracking(spec: RunSpec) -> TrackingSettings | None:
    """Say where a spec's runs are tracked, or None when tracking is off.

    The URI is `tracking.uri`, else `MLFLOW_TRACKING_URI`, else a SQLite file beside the runs.
    """
    if not spec.tracking.enabled:
        return None
    uri = spec.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        storage = spec.train.storage_path
        folder = Path("runs") if store.is_s3(storage) else store.local_path(storage)
        uri = f"sqlite:///{folder.resolve() / 'mlflow.db'}"
    scheme, separator, path = uri.partition(":///")
    if scheme == "sqlite" and separator:  # workers run in another folder
        uri = f"sqlite:///{Path(path).resolve()}"
    return TrackingSettings(uri, spec.tracking.experiment)


class Tracker:
    """One MLflow run for each concept of a pack; none of its methods waits or raises.

    Runs are found again by name, so that training that goes on after a restart logs to the
    same ones.
    """

    def __init__(self, settings: TrackingSettings, run_name: str) -> None:
        """Start the thread; `run_name` is the training run's."""
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        os.environ.setdefault("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
        self._settings = settings
        self._run_name = run_name
        self._runs: dict[str, str] = {}
        self._client: Any = None
        self._jobs: deque[tuple[str, Callable[[], None]]] = deque()
        self._changed = threading.Condition()
        self._deadline: float | None = None
        self._warned = False
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def start(self, concept_id: str, params: Mapping[str, Any], spec_text: str) -> None:
        """Make or find the concept's run; log parameters and the resolved spec."""
        self._add("start", lambda: self._start(concept_id, params, spec_text))

    def log(self, concept_id: str, values: Mapping[int, Mapping[str, float]]) -> None:
        """Log metrics by iteration and name."""
        moment = int(time.time() * 1000)
        self._add("metrics", lambda: self._log(concept_id, values, moment))

    def log_picture(self, concept_id: str, name: str, picture: torch.Tensor) -> None:
        """Log a uint8 picture [3, H, W] as the artifact `name`, e.g. samples/000100.png."""
        data = png(picture)

        def send() -> None:
            image = Image.open(io.BytesIO(data))
            self._api().log_image(self._runs[concept_id], image, artifact_file=name)

        self._add("picture", send)

    def log_folder(self, concept_id: str, folder: Path, name: str) -> None:
        """Log a folder as the artifact folder `name`; it must stay there until `close`."""
        self._add(
            "folder",
            lambda: self._api().log_artifacts(self._runs[concept_id], str(folder), name),
        )

    def finish(self, concept_id: str, error: str | None) -> None:
        """End the concept's run, as failed when there is an error."""

        def end() -> None:
            run_id = self._runs[concept_id]
            if error is not None:
                self._api().set_tag(run_id, "echodistill.error", error[:5000])
            self._api().set_terminated(run_id, "FINISHED" if error is None else "FAILED")

        self._add("end", end)

    def close(self, seconds: float = 60.0) -> dict[str, str]:
        """Give the queue so many seconds at most; return the MLflow run ids by concept."""
        with self._changed:
            self._deadline = time.monotonic() + seconds
            self._changed.notify()
        self._thread.join(seconds + 1.0)
        if self._jobs or self._thread.is_alive():
            log.warning(
                "tracking at %s stayed away: %d entries were not logged",
                self._settings.uri,
                max(1, len(self._jobs)),
            )
        return dict(self._runs)

    def _add(self, what: str, job: Callable[[], None]) -> None:
        with self._changed:
            self._jobs.append((what, job))
            self._changed.notify()

    def _work(self) -> None:
        wait = _FIRST_WAIT
        while True:
            with self._changed:
                while not self._jobs and self._deadline is None:
                    self._changed.wait()
                if not self._jobs or self._is_late():
                    return
                what, job = self._jobs[0]
            try:
                job()
            except Exception as error:  # whatever goes wrong with tracking, training goes on
                if not self._is_hopeless(what, error):
                    with self._changed:
                        self._changed.wait(min(wait, self._seconds_left()))
                    wait = min(2 * wait, _LONGEST_WAIT)
                    continue
            wait = _FIRST_WAIT
            with self._changed:
                self._jobs.popleft()

    def _is_late(self) -> bool:
        return self._deadline is not None and time.monotonic() > self._deadline

    def _seconds_left(self) -> float:
        return _LONGEST_WAIT if self._deadline is None else self._deadline - time.monotonic()

    def _is_hopeless(self, what: str, error: Exception) -> bool:
        """Warn, and tell whether trying the same again can't help."""
        hopeless = getattr(error, "error_code", None) in _HOPELESS or isinstance(error, KeyError)
        if hopeless or not self._warned:
            then = "this entry is left out" if hopeless else "training goes on, trying again"
            log.warning("tracking (%s) failed: %s; %s", what, _first_line(error), then)
            self._warned = True
        return hopeless

    def _api(self) -> Any:
        if self._client is None:
            from mlflow import MlflowClient

            self._client = MlflowClient(self._settings.uri, self._settings.uri)
        return self._client

    def _start(self, concept_id: str, params: Mapping[str, Any], spec_text: str) -> None:
        api = self._api()
        experiment = self._experiment()
        key = f"{self._run_name}/{concept_id}"
        found = api.search_runs([experiment], f"tags.`{RUN_KEY_TAG}` = '{key}'", max_results=1)
        if found:
            run = found[0]
            api.update_run(run.info.run_id, status="RUNNING")
        else:
            tags = {RUN_KEY_TAG: key, CONCEPT_TAG: concept_id}
            run = api.create_run(experiment, run_name=f"{concept_id}", tags=tags)
        from mlflow.entities import Param

        known = run.data.params
        fresh = [Param(k, str(v)[:6000]) for k, v in params.items() if k not in known]
        api.log_batch(run.info.run_id, params=fresh)
        api.log_text(run.info.run_id, spec_text, "spec.yaml")
        self._runs[concept_id] = run.info.run_id

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

    def _log(self, concept_id: str, values: Mapping[int, Mapping[str, float]], moment: int) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(name, float(value), moment, iteration)
            for iteration, row in values.items()
            for name, value in row.items()
        ]
        for start in range(0, len(metrics), _BATCH):
            self._api().log_batch(self._runs[concept_id], metrics=metrics[start : start + _BATCH])


def png(picture: torch.Tensor) -> bytes:
    """Encode a uint8 picture [3, H, W] as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).cpu().numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
