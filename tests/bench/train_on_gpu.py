"""The whole benchmark of training on one GPU, in one go and within minutes; README.md says how.

Needs no installation of the project, no network, no Ray and no MLflow. What is measured is written
as it comes, so that a run that is cut short leaves what it had.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")


def main() -> int:
    """Run the benchmark; exit code 1 when engine and plain loop do not agree."""
    arguments = _parsed()
    began = time.monotonic()
    from rich.console import Console

    from pipeline.bench import BenchSettings, bench_train
    from pipeline.bench_report import draw_report
    from pipeline.progress import Event

    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)

    def write(document: dict[str, Any]) -> None:
        (out / "bench.json").write_text(json.dumps(document, indent=2) + "\n")

    def say(event: Event) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {event.subject}: {event.text}", flush=True)

    settings = BenchSettings(
        base=arguments.base,
        device=arguments.device,
        packs=arguments.packs,
        iterations=arguments.iterations,
        warmup=arguments.warmup,
        precision=arguments.precision,
        sets=tuple(arguments.set),
        resolution=arguments.resolution,
        profile=out / "profile.txt" if arguments.profile else None,
        seconds=60 * arguments.minutes,
    )
    document = bench_train(settings, say, write)
    with (out / "bench.txt").open("w") as file:
        draw_report(Console(file=file, width=200), document)
    print((out / "bench.txt").read_text(), flush=True)
    return 0 if document["check"]["passed"] else 1


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="sd-turbo", help="sd-turbo, sd-turbo-mini or pocket")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--packs",
        type=lambda text: tuple(int(part) for part in text.split(",")),
        help="sizes such as 1,2,4; without, up to the largest that fits",
    )
    parser.add_argument("--iterations", type=int, default=20, help="timed, for each pack size")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--precision", choices=("float32", "bf16"), help="of the engine")
    parser.add_argument("--resolution", type=int)
    parser.add_argument("--set", action="append", default=[], help="of the run spec: views.bank=64")
    parser.add_argument(
        "--minutes", type=float, default=6.0, help="after these no other pack size is begun"
    )
    parser.add_argument("--profile", action="store_true", help="also write the profiler's tables")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
