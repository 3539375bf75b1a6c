"""The benchmark over several GPUs: what it keeps and what it holds against what."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from tests.bench import ranks_on_gpu as bench


def row(gpus: int, stage: int, ms: float, loss: float = 1.0) -> bench.Document:
    return {
        "gpus": gpus,
        "stage": stage,
        "checkpointing": False,
        "ms": ms,
        "peak_gib": 1.0,
        "losses": {"rec": loss},
    }


def test_every_row_is_held_against_one_gpus_whatever_came_first() -> None:
    rows = [row(2, 0, 60.0, 1.1), row(1, 0, 100.0), row(1, 3, 200.0)]
    bench.compare(rows)
    assert [each["speedup"] for each in rows] == [1.667, 1.0, 0.5]
    assert [round(each["loss_error"], 6) for each in rows] == [0.1, 0.0, 0.0]
    beside = [
        {"gpus": 1, "processes": []},  # its process failed
        {"gpus": 2, "processes": [], "concepts_per_hour": 60.0},
    ]
    bench.compare(beside)
    assert not any("over_one" in each for each in beside)
    beside[0]["concepts_per_hour"] = 31.0
    bench.compare(beside)
    assert [each["over_one"] for each in beside] == [1.0, 1.935]


def test_what_is_complete_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []

    def measure(
        options: argparse.Namespace, count: int, more: list[str]
    ) -> list[list[bench.Document]]:
        assert more == ["--checkpointing", "off"]
        measured.append(count)
        rows = [row(count, stage, 100.0 / count) for stage in options.stages]
        found = rows[:1] if measured == [1, 2] else rows  # the first time two GPUs are cut short
        return [[{k: v for k, v in each.items() if k != "gpus"} for each in found]]

    def run(*more: str) -> int:
        words = ["ranks", "split", "--stages", "0,3", "--checkpointing", "off", "--batch", "2"]
        monkeypatch.setattr("sys.argv", [*words, "--out", str(tmp_path), *more])
        return bench.main()

    monkeypatch.setattr(bench, "measured", measure)
    monkeypatch.setattr(bench.signal, "signal", lambda *_: None)
    assert run("--gpus", "1,2") == 1 and measured == [1, 2]
    assert run("--gpus", "1,2") == 0 and measured == [1, 2, 2]
    assert run("--gpus", "1,2") == 0 and measured == [1, 2, 2]
    kept = json.loads((tmp_path / "split.json").read_text())["rows"]
    assert [(each["gpus"], each["speedup"]) for each in kept] == [
        (1, 1.0),
        (1, 1.0),
        (2, 2),
        (2, 2),
    ]
    with pytest.raises(SystemExit, match="other settings"):
        run("--gpus", "1", "--iterations", "9")
