"""`echodistill compare` as a user runs it, on a tiny base."""

from __future__ import annotations

from pathlib import Path

from tests.integration.pipeline.commands import run, run_here

WORDS = ("--methods", "student_base,custom_diffusion,echodistill", "--json")
SETS = ("train.iterations=2", "echo.samples=2", "train.teacher_lr=3e-3", "train.student_lr=3e-3")
SIZES = ("--prompts", "2", "--seeds", "1", *(word for each in SETS for word in ("--set", each)))


def test_compare_trains_once_and_measures_every_method(
    tiny_base: Path, concepts: Path, tmp_path: Path
) -> None:
    words = ("compare", str(concepts), "--base", str(tiny_base), *WORDS, *SIZES)
    done = run(*words, cwd=tmp_path)
    assert done.code == 0, done.stderr
    rows = {row["name"]: row for row in done.document["methods"]}
    assert list(rows) == WORDS[1].split(",")
    for row in rows.values():
        assert -1 <= row["identity"] <= 1 and -1 <= row["identity_independent"] <= 1
        assert row["truth"] is None and row["failed"] == {}
    assert [row["seconds"] > 0 for row in rows.values()] == [False, True, True]
    figures = {tuple(row[name] for name in ("identity", "text")) for row in rows.values()}
    assert len(figures) == len(rows)
    assert (tmp_path / "runs/compare/grid.png").is_file()

    again = run(*words, cwd=tmp_path)
    assert again.code == 0, again.stderr
    assert "train:" not in again.stderr and "ray:" not in again.stderr
    for row in again.document["methods"]:
        assert row["seconds"] == 0 and row["by_concept"] == rows[row["name"]]["by_concept"]


def test_a_method_that_is_not_known(concepts: Path, tmp_path: Path) -> None:
    done = run_here("compare", str(concepts), "--methods", "dreambooth", "--json", cwd=tmp_path)
    assert done.code == 2 and "there is no method 'dreambooth'" in done.error
