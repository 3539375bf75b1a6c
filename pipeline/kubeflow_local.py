"""The Kubeflow pipeline on this machine: each step in a process of its own (kfp.local)."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import secrets
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from components.ingest import documents
from components.spec import RunSpec
from components.steps import LAST_WORDS, run_document
from components.train.batch import storage_for
from components.train.state import BatchStatus, BatchView
from model import errors
from model.errors import EchoDistillError
from pipeline.kubeflow import Settings, build
from pipeline.progress import Event, Progress
from pipeline.services import local_ray

RUNS = Path("runs/pipeline")  # what the steps give out: artifacts, by run and step
_LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ (\w+): (.*)")
_COUNT = re.compile(r"([a-z0-9][a-z0-9_-]*): (\d+)/(\d+) (.*)")
_RUNNER = "kfp.dsl.executor_main"  # in the command line of every step


def run_here(
    prefix: str, spec: RunSpec, progress: Progress, *, cpus: int, storage: str | None = None
) -> tuple[str, BatchStatus]:
    """Run every step of the pipeline on this machine; the training on a local Ray.

    Args:
        prefix: a folder or s3:// prefix of concepts.
        spec: the resolved run spec.
        progress: hears what the steps say.
        cpus: that a pack's workers ask Ray for at once.
        storage: where batches are kept; by default the spec's, or in the prefix's bucket.

    Returns:
        the run's name, and how the concepts of its batch ended.

    Raises:
        EchoDistillError: what the step that failed raised, of the same kind.
    """
    run = f"local-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    folder = (RUNS / run).resolve()
    folder.mkdir(parents=True)
    place = storage_for(prefix, spec, storage)
    settings = Settings(spec, backend="local", storage=place, run=run, in_cluster=False)
    progress(Event("ray", "", "start or connect"))
    with local_ray(cpus), _ray_for_steps(), _variable(LAST_WORDS, str(folder / "error.json")):
        _run(settings, prefix, folder, progress)
    found = documents.read(run_document(place, run))
    if found is None:
        raise EchoDistillError(f"the run {run} left no report in {place}: see {folder}")
    return run, BatchView(found.value["batch"]).read()


def end_steps() -> None:
    """End the steps that this process runs; whoever waits for one hears of it."""
    import psutil

    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if _RUNNER in " ".join(process.cmdline()):
                process.terminate()


def _run(settings: Settings, prefix: str, folder: Path, progress: Progress) -> None:
    from kfp import local

    logging.getLogger().setLevel(logging.WARNING)  # kfp tells of every step at length
    local.init(
        local.SubprocessRunner(use_venv=False),
        pipeline_root=str(folder),
        workspace_root=str(folder / "workspace"),
    )
    with warnings.catch_warnings(), contextlib.redirect_stdout(_Lines(progress)):
        warnings.simplefilter("ignore")  # of images and resources, which mean nothing here
        try:
            build(settings)(prefix=prefix)
        except RuntimeError as error:
            raise _last_words(folder, error) from error


class _Lines(io.TextIOBase):
    """Passes what the steps say on as events, line by line."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._rest = ""

    def write(self, text: str) -> int:
        """Hear a piece of what is said."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._tell(line)
        return len(text)

    def _tell(self, line: str) -> None:
        said = _LINE.search(line)
        if said is None:  # a library's
            os.write(1, f"{line}\n".encode())
            return
        stage, text = said.groups()
        counted = _COUNT.fullmatch(text)
        if counted:
            name, done, total, rest = counted.groups()
            self._progress(Event(stage, name, rest, int(done), int(total)))
        else:
            self._progress(Event(stage, "", text))


def _last_words(folder: Path, error: RuntimeError) -> EchoDistillError:
    """Return the error that the step which failed has left, of the same kind."""
    place = folder / "error.json"
    if not place.is_file():
        return EchoDistillError(f"{str(error).splitlines()[0]} What it said is in the log")
    words = json.loads(place.read_text())
    kinds = (errors.InputError, errors.ServiceError)
    kind = {each.exit_code: each for each in kinds}.get(words["exit_code"], EchoDistillError)
    return kind(f"{words['error']} (the step {words['step']})")


@contextmanager
def _ray_for_steps() -> Iterator[None]:
    """Lead the steps to the Ray that this process is connected to."""
    import ray

    with _variable("RAY_ADDRESS", ray.get_runtime_context().gcs_address):
        yield


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before
