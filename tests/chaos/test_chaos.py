"""The chaos test in its short form: each kind of fault once (`make chaos` has the long one)."""

from __future__ import annotations

import math
import os
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.chaos.chaos import KINDS, Plan, Report, chaos, table
from tests.chaos.checks import problems


@pytest.mark.parametrize(("apart", "agrees"), [(0.0, True), (0.1, False), (math.nan, False)])
def test_only_a_small_difference_is_agreement(apart: float, agrees: bool) -> None:
    report = Report(1.0, [], {"dog": "trained"}, {"dog": 1}, {"dog": apart}, 1)
    plan = Plan(concepts=1, faults=0, pack=1, iterations=1)
    assert (problems(plan, report) == []) is agrees


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_batch_under_faults_ends_as_if_nothing_had_happened(
    tmp_path: Path, mlflow_server: str
) -> None:
    plan = Plan(concepts=3, faults=len(KINDS), pack=3, iterations=60)
    with patch.dict(os.environ):  # Ray's client notes the address of the cluster there
        report = chaos(plan, tmp_path, mlflow_server, lambda line: print(line, flush=True))
    print(table(report))
    assert {each.kind for each in report.happened} == set(KINDS)
    assert problems(plan, report) == []
