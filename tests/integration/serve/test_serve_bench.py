"""`echodistill bench serve` from outside: its document and its tables; the script for GPUs."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from pipeline import bench_serve
from pipeline.bench_serve_report import draw_report
from tests.conftest import REPOSITORY
from tests.integration.pipeline.commands import environment, run

FEW = ("--device", "cpu", "--resident", "5", "--seconds", "0", "--batches", "1,3")
HEADLINES = (
    *("images_per_s", "mixed_over_single", "plain_diffusers_images_per_s", "cold_load_ms"),
    "over_plain_diffusers",
)


def test_the_document_and_the_file(tiny_student: Path, tmp_path: Path) -> None:
    files = ("--out", "out/serve.json")
    base = ("--base", str(tiny_student.parent), "--concepts", "4", "--rank", "2")
    done = run(*("bench", "serve", *base, "--json", *FEW, *files), cwd=tmp_path)
    assert done.code == 0, done.stderr
    document = done.document
    assert json.loads((tmp_path / "out" / "serve.json").read_text()) == document
    assert all(document[name] > 0 for name in HEADLINES)
    assert document["check"]["passed"] and document["check"]["within_size"] == 0
    # The engine draws what plain diffusers draws: the two differ by round-off alone.
    assert document["check"]["plain_diffusers"] <= 1
    assert [row["batch"] for row in document["engine"]] == [3, 1]
    assert [row["concepts"] for row in document["engine"]] == [3, 1]
    assert [row["within_size"] for row in document["engine"]] == [0, 0]
    assert document["tflop_per_image"] > 0
    assert (document["resident"]["adapters"], document["resident"]["still_in_memory"]) == (5, 5)
    tables = Console(file=io.StringIO(), width=100)
    draw_report(tables, document)
    text = tables.file.getvalue()
    assert "plain diffusers" in text and "engine, eager" in text and "check passed" in text


def test_the_script_measures_a_random_base_without_ray(tmp_path: Path) -> None:
    arguments = ("--base", "sd-turbo-mini", "--concepts", "2", "--dtype", "bfloat16", *FEW)
    arguments += ("--minutes", "60", "--patience", "10")  # other tests may keep the machine busy
    script = str(REPOSITORY / "tests" / "bench" / "serve_on_gpu.py")
    watched = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: assert not {'ray', 'mlflow', 'deepspeed', 'fastapi'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", watched, script, *arguments, "--out", "out"],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "out" / "serve.json").read_text())
    assert (document["dtype"], document["resident"]["adapters"]) == ("bfloat16", 5)
    assert "engine, eager" in done.stdout
    assert "failed" not in document


def test_what_fails_or_has_no_time_left_is_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no plain diffusers today")

    monkeypatch.setattr(bench_serve, "plain_pictures", broken)
    written: list[str] = []
    settings = bench_serve.ServeBenchSettings(
        base="sd-turbo-mini", device="cpu", concepts=2, batches=(2,), resident=3, seconds=0
    )
    document = bench_serve.bench_serve(
        replace(settings, minutes=60, patience=10),
        lambda event: None,
        lambda document: written.append(json.dumps(document)),
    )
    assert {*document["failed"]} == {"check", "plain diffusers", "plain diffusers, again"}
    assert "no plain diffusers today" in document["failed"]["check"]
    assert document["images_per_s"] > 0 and document["cold_load_ms"] > 0
    assert len(written) > 5
    late = bench_serve.bench_serve(replace(settings, minutes=0), lambda event: None, lambda _: None)
    assert {*late["failed"].values()} == {"the time is used up"} and not late["engine"]
