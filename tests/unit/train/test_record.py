"""Ray Train's record of a run's checkpoints, and what a kill leaves of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from components.train.delivery import read_unlogged
from components.train.finished import finished
from components.train.record import last_checkpoint, mend_record
from model.errors import InputError


def test_a_record_that_is_not_whole_is_written_anew(tmp_path: Path) -> None:
    run, storage = tmp_path / "run", str(tmp_path)
    mend_record(storage, "run")  # nothing is there to be mended
    assert not run.exists() and last_checkpoint(storage, "run") is None
    for name in ("checkpoint_2026-11-30_10", "checkpoint_2026-11-30_11", "adapters"):
        (run / name).mkdir(parents=True)
    record = run / "checkpoint_manager_snapshot.json"
    record.write_text('{"ray_version": "2')
    with pytest.raises(InputError, match="is not JSON"):
        last_checkpoint(storage, "run")
    mend_record(storage, "run")
    assert last_checkpoint(storage, "run") == f"{run}/checkpoint_2026-11-30_11"
    mended = record.read_text()
    mend_record(storage, "run")
    assert record.read_text() == mended


def test_a_checkpoint_that_is_half_written_is_not_taken_over(tmp_path: Path) -> None:
    place = tmp_path / "checkpoint_1"
    place.mkdir()
    result = {"state": "trained", "digest": "d"}
    for text in ('{"fox": {"sta', json.dumps({"fox": result})):  # and its adapter is not there
        (place / "pack.json").write_text(text)
        with pytest.raises(InputError, match="is not whole"):
            finished(str(place), {"fox": "d"}, tmp_path / "out")
    (place / "tracking.json").write_text("[{")
    assert read_unlogged(place) == []
