"""The demonstration as a whole, with a tiny base: what it shows, what it leaves, and again."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from PIL import Image

from tests.integration.pipeline.commands import run, start
from tests.integration.pipeline.processes import MARK, left_behind, marked, new_mark


@pytest.fixture
def arguments(tiny_base: Path, concepts: Path) -> list[str]:
    sets = ("train.iterations=3", "echo.rounds=0", "evaluate.prompts=1", "evaluate.seeds=1")
    return [
        "demo",
        *("--base", str(tiny_base), "--concepts", str(concepts)),
        *("--prompt", "a {} on the beach", "--prompt", "a red {}"),
        *(word for text in sets for word in ("--set", text)),
        "--json",
    ]


@pytest.mark.slow
def test_the_whole_demonstration_and_once_more(arguments: list[str], tmp_path: Path) -> None:
    mark = new_mark()
    done = run(*arguments, cwd=tmp_path, **{MARK: mark})
    assert done.code == 0, done.stderr
    assert left_behind(mark) == {}
    folder = tmp_path / "runs" / "demo"
    summary = json.loads((folder / "summary.json").read_text())
    assert done.document == summary
    assert [c["id"] for c in summary["concepts"]] == ["my-dog", "my-robot"]
    for concept in summary["concepts"]:
        assert concept["state"] == "trained" and concept["version"] == "1"
        assert len(concept["sha256"]) == 64 and concept["iterations"] == 3
        assert 0 < concept["seconds"] < summary["total_seconds"]
        assert concept["metrics"]["clip_i"] <= 1
        assert {name: len(paths) for name, paths in concept["images"].items()} == {
            "references": 3,
            "teacher_before": 4,
            "teacher_after": 4,
            "student_before": 4,
            "student_after": 4,
            "endpoint": 2,
        }
        assert len(concept["image_paths"]) == 21
        for path in concept["image_paths"]:
            with Image.open(tmp_path / path) as picture:
                assert picture.convert("L").getextrema()[0] < picture.convert("L").getextrema()[1]
    endpoint = summary["endpoint"]
    assert endpoint["n_answers"] == 4 and 0 < endpoint["latency_ms"] <= endpoint["latency_ms_max"]
    page = (folder / "report.html").read_text()
    assert page.count('src="data:image/jpeg') == 42 and 'src="http' not in page
    assert page.count("<polyline") == 2 * 2 * 6  # six losses, two concepts, raw and smoothed
    with Image.open(folder / "grid.png") as grid:
        assert grid.height > 12 * 144

    again = run(*arguments, cwd=tmp_path)
    assert again.code == 0, again.stderr
    assert [c["state"] for c in again.document["concepts"]] == ["already", "already"]
    for before, after in zip(summary["concepts"], again.document["concepts"], strict=True):
        for fact in ("version", "sha256", "seconds", "iterations", "metrics", "image_paths"):
            assert before[fact] == after[fact], fact
    assert "not again" in again.stderr


@pytest.mark.slow
def test_ctrl_c_and_failure_leave_nothing_behind(arguments: list[str], tmp_path: Path) -> None:
    mark = new_mark()
    process = start(*arguments, cwd=tmp_path, **{MARK: mark})
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if "serve: start the endpoint" in line:
                break
        assert len(marked(mark)) > 3
        os.killpg(process.pid, signal.SIGINT)  # as a terminal's Ctrl-C: Ray's processes get it too
        stdout, stderr = process.communicate(timeout=90)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    assert json.loads(stdout)["error"]["exit_code"] == 130
    assert left_behind(mark) == {}
    assert not (tmp_path / "runs" / "demo" / "summary.json").exists()

    # What was trained before the interruption is not trained again, and a failure at the end (a
    # prompt that is longer than the base reads) stops everything as well.
    failed = run(*arguments, "--prompt", "a {} " + "far " * 40, cwd=tmp_path, **{MARK: mark})
    assert failed.code == 2, failed.stderr
    assert "tokens" in failed.error and "not again" in failed.stderr
    assert left_behind(mark) == {}
