"""What a run's last checkpoint leaves to its caller: results, adapters, what was not logged."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.ingest import store
from components.ingest.cache import cache_root, disk_error
from components.train.delivery import UNLOGGED, read_unlogged
from components.train.job import ADAPTERS, RESULTS, TrainedConcept
from model.errors import DISK_FULL, EchoDistillError, InputError


def adapters_folder(storage: str, run_name: str) -> Path:
    """Return where the adapters of a run are put on this machine."""
    root = cache_root() / "runs" if store.is_s3(storage) else store.local_path(storage)
    return root / run_name / ADAPTERS


def finished(checkpoint: str, digests: Mapping[str, str], out: Path) -> dict[str, TrainedConcept]:
    """Take over the concepts that a run has trained to their ends, without any worker.

    Args:
        checkpoint: URI of the run's last one.
        digests: of the concepts that are wanted, by id.
        out: the adapters go to `<out>/<concept id>`.

    Returns:
        those that the checkpoint holds an adapter of, under the same digest, by id.

    Raises:
        InputError: when the checkpoint is not whole.
        ServiceError: when the storage is out of reach, or the disk is full.

    """
    try:
        return _finished(checkpoint, digests, out)
    except OSError as error:
        raise _disk_error(error, out) from error


def _finished(checkpoint: str, digests: Mapping[str, str], out: Path) -> dict[str, TrainedConcept]:
    entry = store.find(store.join(checkpoint, RESULTS))
    try:
        written = json.loads(store.fetch(entry).read_text()) if entry else {}
        there = [name for name, facts in written.items() if _is(facts, digests.get(name))]
        if not there:
            return {}
        wanted = (RESULTS, UNLOGGED, *(f"{ADAPTERS}/{name}/" for name in there))
        with store.fetched_folder(checkpoint, lambda name: name.startswith(wanted)) as folder:
            if not all((folder / ADAPTERS / name).is_dir() for name in there):
                raise InputError(f"{checkpoint} is not whole: it has no adapter of a result")
            return {made.id: made for made in read_results(folder, there, out)}
    except ValueError as error:  # it was just being written
        raise InputError(f"{checkpoint} is not whole: {error}") from error


def _disk_error(error: OSError, where: Path) -> EchoDistillError:
    """Say what broke a copy; that of a whole folder tells its files' errors in words only."""
    full = (code for code in DISK_FULL if os.strerror(code) in str(error))
    code = error.errno or next(full, None)
    return disk_error(OSError(code, os.strerror(code)) if code else error, where)


def _is(facts: Mapping[str, Any], digest: str | None) -> bool:
    return facts["state"] == "trained" and facts["digest"] == digest


def read_results(folder: Path, ids: Sequence[str], out: Path) -> list[TrainedConcept]:
    """Read the results of concepts from a checkpoint's folder and put their adapters in place."""
    written = json.loads((folder / RESULTS).read_text())
    unlogged = read_unlogged(folder)
    results = []
    for name in ids:
        facts, source = written[name], folder / ADAPTERS / name
        place = _place(source, out / name) if facts["state"] == "trained" else None
        mine = tuple(entry for entry in unlogged if entry["concept"] == name)
        results.append(TrainedConcept(id=name, adapter_dir=place, unlogged=mine, **facts))
    return results


def _place(source: Path, target: Path) -> Path:
    """Copy a folder to its place; it appears there whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        shutil.copytree(source, work / "new")
        if target.exists():
            os.rename(target, work / "old")
        os.rename(work / "new", target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target
