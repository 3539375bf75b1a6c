"""The benchmark of large batches still runs: it drives a batch by the parts of its driver."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.batch_scale import measure, seconds


@pytest.mark.usefixtures("tracking_uri")  # a database that is there: making one takes seconds
def test_a_small_batch_is_measured_stage_by_stage(tmp_path: Path) -> None:
    measure(8, True, tmp_path)
    assert len(seconds) == 6 and all(value >= 0 for value in seconds.values())
