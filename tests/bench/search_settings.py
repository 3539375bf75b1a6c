"""Tries settings of the pocket preset on the sample concepts, and says what `compare` says of each.

Needs no Ray and no MLflow: it runs on a bare machine with a GPU. A file names the variants, one a
line: a name, then what `--set` takes.

    preset
    faster-token  train.token_lr=5e-3
    more-identity loss.id_weight=0.05 train.iterations=150

    python -m tests.bench.search_settings variants.txt --out runs/search --seconds 500

What is trained and measured is kept below `--out`, so that the same command goes on. Variants that
differ in their seed are named `name~1 seed=1`; `--against preset` averages these, and says how far
every variant is from that one on the same concepts, with half of a 95 % interval.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

FIGURES = ("identity", "identity_independent", "text", "truth")


def main() -> int:
    """Try the variants that have not been tried; exit code 1 when one did not train."""
    given = _parsed()
    began, longest = time.monotonic(), 0.0
    given.out.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name, sets in _variants(given.variants):
        place = given.out / f"{name}.json"
        if place.exists():
            continue
        start = time.monotonic()
        if start - began + longest > given.seconds:
            print("no time for more", flush=True)
            break
        try:
            found = _try(given, sets)
        except Exception as error:  # whatever it is: the next variant may do
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
            failed += 1
            continue
        longest = max(longest, time.monotonic() - start)
        found |= {"sets": list(sets), "seconds": round(time.monotonic() - start, 1)}
        place.write_text(json.dumps(found, indent=1) + "\n")
        print(_line(name, found), flush=True)
    print(_table(given))
    if given.against:
        print(_differences(given))
    return 1 if failed else 0


def _parsed() -> Any:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variants", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/search"))
    parser.add_argument("--methods", default="student_base,echodistill,echodistill_teacher")
    parser.add_argument("--concepts", help="a folder of them; default: the samples that ship")
    parser.add_argument("--limit", type=int, help="only so many concepts, spread")
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--pack", type=int, default=12)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seconds", type=float, default=500)
    parser.add_argument("--against", help="a variant that the others are held against")
    parser.add_argument("--grid", action="store_true", help="keep a grid of pictures of each")
    return parser.parse_args()


def _variants(path: Path) -> list[tuple[str, list[str]]]:
    lines = [line.split("#")[0].split() for line in path.read_text().splitlines()]
    return [(words[0], words[1:]) for words in lines if words]


def _try(given: Any, sets: list[str]) -> dict[str, Any]:
    from components.spec import resolve_spec
    from components.train.alone import train_alone
    from pipeline.compare import ask, compare, load_concepts
    from pipeline.compare_report import document, write_grid
    from pipeline.methods import choose
    from pipeline.progress import silent

    storage = f'train.storage_path="{given.out.resolve() / "train"}"'
    own = [storage, f"pack.size={given.pack}", f"train.device={given.device}"]
    # On two workers and on one the same to the last bit is not what is asked here.
    spec = resolve_spec("pocket", None, [*own, "train.items_at_once=null", *sets])
    concepts = load_concepts(given.concepts, given.limit)
    found = compare(
        concepts,
        choose(given.methods),
        spec,
        ask(concepts, given.prompts, given.seeds, spec.loss.guidance),
        progress=silent,
        cluster=nullcontext,
        train=train_alone,
    )
    if given.grid:
        write_grid(found, given.out / f"{len(list(given.out.glob('*.png'))):03d}.png")
    return document(found, spec, intervals=len(concepts) > 2)


def _line(name: str, found: dict[str, Any]) -> str:
    words = [f"{name:<24}"]
    for method in found["methods"]:
        values = [method[figure] for figure in FIGURES if method[figure] is not None]
        words.append(" ".join([method["name"], *(f"{value:.3f}" for value in values)]))
    return " | ".join([*words, f"{found['seconds']:.0f} s"])


def _table(given: Any) -> str:
    lines = [f"identity, identity by the judge, text, distance to the truth ({given.out})"]
    for path in sorted(given.out.glob("*.json")):
        lines.append(_line(path.stem, json.loads(path.read_text())))
    return "\n".join(lines)


def _differences(given: Any) -> str:
    from pipeline.statistics import paired

    trainings: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(given.out.glob("*.json")):
        trainings.setdefault(path.stem.partition("~")[0], []).append(json.loads(path.read_text()))
    if given.against not in trainings:
        return f"{given.against} has not been measured"
    lines = [f"less {given.against}: identity, identity by the judge, text, distance to the truth"]
    theirs = {name: by_concept(each) for name, each in trainings.items()}
    base = theirs.pop(given.against)
    for name, mine in theirs.items():
        for method in (each for each in base if each in mine):
            words = []
            for place in range(len(FIGURES)):
                pairs = [(mine[method][c][place], base[method][c][place]) for c in base[method]]
                found = paired(*zip(*pairs, strict=True))
                words.append(f"{found.mean:+.3f} ± {found.half or 0:.3f}")
            lines.append(f"{name:<24} | {method} {' '.join(words)}")
    return "\n".join(lines)


def by_concept(trainings: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Give a variant's figures by method and concept, each the mean over its trainings."""
    found: dict[str, dict[str, list[list[float]]]] = {}
    for document in trainings:
        for method in document["methods"]:
            for concept, figures in method["by_concept"].items():
                row = [figures[name] for name in FIGURES]
                if None not in row:
                    found.setdefault(method["name"], {}).setdefault(concept, []).append(row)
    return {
        method: {
            concept: [sum(column) / len(rows) for column in zip(*rows, strict=True)]
            for concept, rows in concepts.items()
        }
        for method, concepts in found.items()
    }


if __name__ == "__main__":
    sys.exit(main())
