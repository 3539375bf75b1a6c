"""The chaos test in its short form: each kind of fault once (`make chaos` has the long one)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.chaos import KINDS, Plan, chaos, table
from tests.chaos.checks import problems


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_batch_under_faults_ends_as_if_nothing_had_happened(
    tmp_path: Path, mlflow_server: str
) -> None:
    plan = Plan(concepts=3, faults=len(KINDS), pack=3, iterations=60)
    report = chaos(plan, tmp_path, mlflow_server, lambda line: print(line, flush=True))
    print(table(report))
    assert {each.kind for each in report.happened} == set(KINDS)
    assert problems(plan, report) == []
