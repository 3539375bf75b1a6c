"""Compares the methods on the sample concepts, a process a training, beside each other on all GPUs.

What `echodistill compare` does one after the other, without Ray and MLflow:

    python -m tests.bench.compare_on_gpus --out runs/compare --trainings 2 --prompts 10 --seeds 4

Prints every method's figures (means and half of a 95 % interval over concepts; a concept's is the
mean over its trainings), how far they are from EchoDistill's on the same concepts, and how much of
the way from class noun to teacher each training goes. What is measured is kept below `--out`, so
the same command goes on; with `--only-table` nothing is run. `--set` changes the preset.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.methods import FULL, METHODS, choose
from pipeline.statistics import estimate, paired
from tests.bench.search_settings import FIGURES, by_concept

Figures = dict[str, dict[str, list[float]]]  # by method and concept, in the order of FIGURES
_JUDGE = FIGURES.index("identity_independent")


def main() -> int:
    """Run what is missing, print the tables; exit code 1 when something broke."""
    given = _parsed()
    broke = 0
    if not given.only_table:
        from model.pocket import pocket_paths

        pocket_paths()  # unpacked here once, and not by every process
        jobs = list(_jobs(given))
        with ThreadPoolExecutor(len(jobs)) as pool:
            broke = sum(pool.map(lambda each: _run(given, *each), jobs))
    print(_tables(given.out))
    return 1 if broke else 0


def _parsed() -> Any:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    parser.add_argument("--methods", help="some of them; by default all")
    parser.add_argument("--trainings", type=int, default=2, help="with the seeds 0, 1, ...")
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=4, help="of the pictures")
    parser.add_argument("--concepts", help="a folder of them; default: the samples that ship")
    parser.add_argument("--limit", type=int, help="only so many concepts, spread")
    parser.add_argument("--pack", type=int, default=12)
    parser.add_argument("--gpus", type=int, default=1, help="0: on the CPU")
    parser.add_argument("--seconds", type=float, default=1800, help="after which all end")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--only-table", action="store_true")
    return parser.parse_args()


def _jobs(given: Any) -> Any:
    """Yield the name, methods, settings and GPU of every training; methods of one run share it."""
    runs: dict[str, list[str]] = {}
    for method in choose(given.methods):
        runs.setdefault(method.run, []).append(method.name)
    for number, (seed, run) in enumerate((s, r) for s in range(given.trainings) for r in runs):
        gpu = str(number % given.gpus) if given.gpus else ""
        yield f"{run or 'base'}~{seed}", runs[run], [f"seed={seed}", *given.set], gpu


def _run(given: Any, name: str, methods: list[str], sets: list[str], gpu: str) -> bool:
    """Train and measure; tells whether it broke, of which a file beside the results says more."""
    place = given.out / name
    place.mkdir(parents=True, exist_ok=True)
    (place / "variant.txt").write_text(f"{name} {' '.join(sets)}\n")
    command = [sys.executable, "-m", "tests.bench.search_settings", f"{place}/variant.txt"]
    command += ["--out", str(place), "--methods", ",".join(methods), "--grid"]
    for option in ("concepts", "prompts", "seeds", "limit", "pack"):
        if getattr(given, option) is not None:
            command += [f"--{option}", str(getattr(given, option))]
    command += ["--device", "cuda" if gpu else "cpu"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
    start = time.monotonic()
    with (place / "log.txt").open("w") as log:
        try:
            ended = subprocess.run(
                command, env=environment, stdout=log, stderr=log, timeout=given.seconds, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            ended = -1
    how = "" if ended == 0 else f", and broke: see {place}/log.txt"
    print(f"{name}: {time.monotonic() - start:.0f} s{how}", flush=True)
    return ended != 0


def _tables(out: Path) -> str:
    documents: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(out.glob("*/*.json")):
        documents.setdefault(path.stem.rpartition("~")[2], []).append(json.loads(path.read_text()))
    found = by_concept([each for every in documents.values() for each in every])
    lines = ["| method | steps | CLIP | judge | text | truth |", "| --- | ---: |" + " ---: |" * 4]
    for method in (each for each in METHODS if each.name in found):
        columns = zip(*found[method.name].values(), strict=True)
        figures = " | ".join(_told(estimate(column), "") for column in columns)
        lines.append(f"| {method.words} | {method.steps} | {figures} |")
    for against in (each for each in (FULL, "echodistill_teacher") if each in found):
        lines.append(f"less {against}, on the same concepts:")
        for name in (each for each in found if each != against):
            lines.append(f"  {name}: {_differences(found[name], found[against])}")
    for seed, every in documents.items():
        lines.append(f"seed {seed}: {_way(by_concept(every))}")
    return "\n".join(lines)


def _told(one: Any, sign: str = "+") -> str:
    half = "" if one.half is None else f" ± {one.half:.3f}"
    return f"{one.mean:{sign}.3f}{half}"


def _differences(mine: dict[str, list[float]], theirs: dict[str, list[float]]) -> str:
    both = [concept for concept in theirs if concept in mine]
    columns = [([mine[c][n] for c in both], [theirs[c][n] for c in both]) for n in range(4)]
    return ", ".join(_told(paired(*pair)) for pair in columns)


def _way(found: Figures) -> str:
    """Say how much of the way from class noun to teacher one step goes, by the judge."""
    means = {
        name: estimate([figures[_JUDGE] for figures in found[name].values()]).mean
        for name in ("student_base", "teacher", FULL)
        if name in found
    }
    if len(means) < 3:
        return "not all of student_base, teacher and echodistill were measured"
    way = (means[FULL] - means["student_base"]) / (means["teacher"] - means["student_base"])
    return f"{way:.0%} of the way from class noun to teacher, by the judge"


if __name__ == "__main__":
    sys.exit(main())
