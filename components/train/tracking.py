"""MLflow tracking of a training run, from one thread that training never waits for.

What is to be logged goes into a queue. When the tracking server is away the queue's head is tried
again until it is back; training goes on meanwhile. What the queue holds goes into each checkpoint
(see `components/train/delivery.py`), so that nothing is lost with the worker or at the end.
"""

from __future__ import annotations

import base64
import io
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from components.ingest import store
from components.ingest.concept_folder import Concept
from components.register.connection import hide_password
from components.spec import RunSpec
from components.train.delivery import Delivery, Entry, TrackingSettings, is_hopeless

if TYPE_CHECKING:  # it takes seconds, and who only asks for the settings needs none
    import torch

_FIRST_WAIT, _LONGEST_WAIT = 1.0, 20.0  # seconds between two tries
_LAST_SECONDS = 60.0  # that the queue gets at the end, and when the last try failed:
_LAST_SECONDS_AWAY = 3.0

log = logging.getLogger(__name__)


def resolve_tracking(spec: RunSpec) -> TrackingSettings | None:
    """Say where a spec's runs are tracked, or None when tracking is off.

    The URI is `tracking.uri`, else `MLFLOW_TRACKING_URI`, else a SQLite file beside the runs (for
    runs on S3, where runs of this folder are by default).
    """
    if not spec.tracking.enabled:
        return None
    uri = spec.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        storage = spec.train.storage_path
        folder = Path("runs/train") if store.is_s3(storage) else store.local_path(storage)
        uri = f"sqlite:///{folder.resolve() / 'mlflow.db'}"
    scheme, separator, path = uri.partition(":///")
    if scheme == "sqlite" and separator:  # workers run in another folder
        uri = f"sqlite:///{Path(path).resolve()}"
    return TrackingSettings(uri, spec.tracking.experiment)


def without_password(spec: RunSpec) -> RunSpec:
    """Return a spec as MLflow is told of it: without the password in its own URI."""
    if spec.tracking.uri is None:
        return spec
    tracking = spec.tracking.model_copy(update={"uri": hide_password(spec.tracking.uri)})
    return spec.model_copy(update={"tracking": tracking})


class Tracker:
    """One MLflow run for each concept of a pack; none of its methods waits or raises.

    Runs are found again by name, so that training that goes on after a restart logs to the
    same ones.
    """

    def __init__(
        self, settings: TrackingSettings, run_name: str, unlogged: Iterable[Entry] = ()
    ) -> None:
        """Start the thread.

        Args:
            settings: where to log.
            run_name: the training run's.
            unlogged: what an earlier worker of the run could not deliver.
        """
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        os.environ.setdefault("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
        self._uri = settings.uri
        self._run_name = run_name
        self._delivery = Delivery(settings)
        # The adapter, and the end, come anew from the one that goes on.
        self._entries = deque(e for e in unlogged if e["what"] not in ("folder", "end"))
        self._changed = threading.Condition()
        self._deadline: float | None = None
        self._warned = False
        self._away = False
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def start(self, concept_id: str, params: Mapping[str, Any], spec_text: str) -> None:
        """Make or find the concept's run; log parameters and the resolved spec."""
        plain = {name: str(value) for name, value in params.items()}
        self._add("start", concept_id, params=plain, spec=spec_text)

    def log_dataset(self, concept: Concept) -> None:
        """Log which photos the concept's run is trained on."""
        self._add("dataset", concept.id, facts=asdict(concept))

    def log(self, concept_id: str, values: Mapping[int, Mapping[str, float]]) -> None:
        """Log metrics by iteration and name."""
        moment = int(time.time() * 1000)
        rows = [(iteration, dict(row)) for iteration, row in values.items()]
        self._add("metrics", concept_id, rows=rows, moment=moment)

    def log_picture(self, concept_id: str, name: str, picture: torch.Tensor) -> None:
        """Log a uint8 picture [3, H, W] as the artifact `name`, e.g. samples/000100.png."""
        self._add("picture", concept_id, name=name, png=base64.b64encode(png(picture)).decode())

    def log_folder(self, concept_id: str, folder: Path, name: str) -> None:
        """Log a folder as the artifact folder `name`; it must stay there until `close`."""
        self._add("folder", concept_id, folder=str(folder), name=name)

    def finish(self, concept_id: str, error: str | None) -> None:
        """End the concept's run, as failed when there is an error."""
        self._add("end", concept_id, error=error)

    def unlogged(self) -> list[Entry]:
        """Return what is not delivered yet, in order."""
        with self._changed:
            return list(self._entries)

    def close(self, seconds: float | None = None) -> dict[str, str]:
        """Give the queue so many seconds at most; return the MLflow run ids by concept."""
        if seconds is None:
            seconds = _LAST_SECONDS_AWAY if self._away else _LAST_SECONDS
        with self._changed:
            self._deadline = time.monotonic() + seconds
            self._changed.notify()
        self._thread.join(seconds + 1.0)
        left = len(self.unlogged())
        if left:
            log.warning(
                "tracking at %s stayed away: %d entries are kept in the checkpoint",
                hide_password(self._uri),
                left,
            )
        return dict(self._delivery.runs)

    def _add(self, what: str, concept_id: str, **facts: Any) -> None:
        entry = {"what": what, "run": self._run_name, "concept": concept_id, **facts}
        with self._changed:
            self._entries.append(entry)
            self._changed.notify()

    def _work(self) -> None:
        wait = _FIRST_WAIT
        while True:
            with self._changed:
                while not self._entries and self._deadline is None:
                    self._changed.wait()
                if not self._entries or self._is_late():
                    return
                entry = self._entries[0]
            try:
                self._delivery.deliver(entry)
                self._away = False
            except Exception as error:  # whatever goes wrong with tracking, training goes on
                if not self._leave_out(entry["what"], error):
                    self._away = True
                    with self._changed:
                        self._changed.wait(min(wait, self._seconds_left()))
                    wait = min(2 * wait, _LONGEST_WAIT)
                    continue
            wait = _FIRST_WAIT
            with self._changed:
                self._entries.popleft()

    def _is_late(self) -> bool:
        return self._deadline is not None and time.monotonic() > self._deadline

    def _seconds_left(self) -> float:
        return _LONGEST_WAIT if self._deadline is None else self._deadline - time.monotonic()

    def _leave_out(self, what: str, error: Exception) -> bool:
        """Warn, and tell whether trying the same again can't help."""
        hopeless = is_hopeless(error)
        if hopeless or not self._warned:
            then = "this entry is left out" if hopeless else "training goes on, trying again"
            log.warning("tracking (%s) failed: %s; %s", what, _first_line(error), then)
            self._warned = True
        return hopeless


def png(picture: torch.Tensor) -> bytes:
    """Encode a uint8 picture [3, H, W] as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).cpu().numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
