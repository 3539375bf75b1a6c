"""`echodistill bench train` from outside: its document, its tables, its files, what it refuses."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from pipeline.bench_report import draw_report
from tests.conftest import REPOSITORY
from tests.integration.pipeline.commands import environment, run

FEW = ("--iterations", "1", "--warmup", "0", "--device", "cpu")
PARTS = ("teacher", "student draw", "target", "losses", "discriminators", "optimizer")


def test_the_document_and_the_files(tiny_base: Path, tmp_path: Path) -> None:
    files = ("--out", "out/bench.json", "--profile", "profile.txt")
    # Rates that fall as training goes on stand still for both loops.
    falling = ("--set", "train.cooldown=1", "--set", "train.iterations=3")
    words = ("bench", "train", "--base", str(tiny_base), "--packs", "1,3", "--json", *FEW)
    done = run(*words, *files, *falling, cwd=tmp_path)
    assert done.code == 0, done.stderr
    document = done.document
    assert json.loads((tmp_path / "out" / "bench.json").read_text()) == document
    assert document["check"]["passed"] and document["check"]["loss_error"] < 1e-3
    assert document["naive_ms"] == document["naive"][0]["ms_per_concept"] > 0
    assert [pack["size"] for pack in document["packs"]] == [1, 3]
    assert document["stopped"] is None
    for row in (*document["naive"], *document["packs"]):
        assert 0 < row["ms_per_concept_min"] <= row["ms_per_concept"] <= row["ms_per_concept_max"]
        assert row["peak_gib"] > 0 and row["tflop_per_concept"] > 0
        assert all(row["parts_ms"][part] > 0 for part in PARTS)
    naive, one, three = *document["naive"], *document["packs"]
    assert abs(three["ms_per_iteration"] - 3 * three["ms_per_concept"]) < 0.01
    # The engine runs each backbone once on the student's pictures; a pack costs each the same.
    assert one["tflop_per_concept"] < naive["tflop_per_concept"]
    assert three["tflop_per_concept"] == one["tflop_per_concept"]
    profile = (tmp_path / "profile.txt").read_text()
    assert "pack of 3, one iteration" in profile and "aten::" in profile
    tables = Console(file=io.StringIO(), width=80)
    draw_report(tables, document)
    text = tables.file.getvalue()
    assert "plain float32" in text and "pack 3 float32" in text and "agree" in text


def test_the_script_measures_a_random_base(tmp_path: Path) -> None:
    arguments = ("--base", "sd-turbo-mini", "--packs", "1", "--out", "out", *FEW)
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "tests" / "bench" / "train_on_gpu.py"), *arguments],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "out" / "bench.json").read_text())
    # The preset's precision is bf16: the plain loop is timed in both, the engine in that one.
    assert [row["precision"] for row in document["naive"]] == ["float32", "bf16"]
    assert [pack["size"] for pack in document["packs"]] == [1]
    assert "pack 1 bf16" in done.stdout
