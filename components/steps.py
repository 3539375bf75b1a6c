"""What the steps of the Kubeflow pipeline have in common: words, errors, where things are.

A step is a function over a batch, which it is given by its URI and whose documents it reads and
writes: whoever is started again finds there what is done.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from components.ingest import store
from components.spec import RunSpec, resolve_spec
from components.train.batch import Batch, storage_for
from model.errors import EchoDistillError, InputError

Say = Callable[[str], None]

LAST_WORDS = "ECHODISTILL_LAST_WORDS"  # variable: the file that a failing step leaves its error in
_KUBERNETES = "/dev/termination-log"  # what `kubectl describe pod` shows of a container that ended


@contextmanager
def step(name: str) -> Iterator[Say]:
    """Give what a step says lines with; an error of ours ends the process with one sentence.

    The exit code is the error's, as on the command line.
    """

    def say(text: str) -> None:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        print(f"{stamp} {name}: {text}", flush=True)

    try:
        with _terminable():
            yield say
    except EchoDistillError as error:
        say(f"error: {error}")
        words = {"step": name, "error": str(error), "exit_code": error.exit_code}
        with suppress(OSError):  # neither in a pod nor in a local run
            Path(os.environ.get(LAST_WORDS, _KUBERNETES)).write_text(json.dumps(words))
        raise SystemExit(error.exit_code) from None


@contextmanager
def _terminable() -> Iterator[None]:
    """Make an exception of SIGTERM, so that whoever holds a lease gives it back."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def spec_of(text: str) -> RunSpec:
    """Return the run spec that a pipeline's parameter holds as YAML.

    Raises:
        InputError: when it is wrong.
    """
    with tempfile.TemporaryDirectory(prefix="echodistill-spec-") as folder:
        path = Path(folder) / "spec"
        path.write_text(text, encoding="utf-8")
        return resolve_spec(None, path)


def place_of(prefix: str, spec: RunSpec, storage: str) -> str:
    """Return where batches are kept: as given, else ECHODISTILL_STORAGE, else as the spec says."""
    return storage_for(prefix, spec, storage or os.environ.get("ECHODISTILL_STORAGE") or None)


def run_document(storage: str, run: str) -> str:
    """Return where a pipeline run says which batch is its own: its exit handler looks there."""
    return store.join(storage, f"pipelines/{run}.json")


def registry_of(batch: Batch) -> str:
    """Return the MLflow URI where a batch's adapters are registered.

    The run spec's, else MLFLOW_TRACKING_URI, else what the batch was planned with.

    Raises:
        InputError: when the run spec turns tracking off.
    """
    from components.train.tracking import resolve_tracking

    if batch.registry:
        os.environ.setdefault("MLFLOW_TRACKING_URI", batch.registry)
    found = resolve_tracking(batch.spec)
    if found is None:
        raise InputError(
            "tracking.enabled is false, but adapters live in the tracking server's registry: leave "
            "it on"
        )
    return found.uri
