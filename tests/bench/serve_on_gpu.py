"""The engine of the endpoint measured on one GPU, in one go; SERVE.md says how.

Needs no installation of the project, no network, and Ray and MLflow for `--clients` alone, which
asks the whole endpoint over HTTP too. What is measured is written as it comes, what is worth most
first, and what fails or takes too long is passed over.
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

# Ways of running the networks; what is compiled comes last, since it takes minutes.
ON_GPU = ("eager", "graphs", "graphs:channels_last", "graphs:channels_last:benchmark", "compile")


def main() -> int:
    """Run the benchmark; exit code 1 when other requests change a picture."""
    arguments = _parsed()
    began = time.monotonic()
    from pipeline.services import quiet_libraries

    quiet_libraries()
    from rich.console import Console

    from model.errors import EchoDistillError
    from pipeline.bench_measure import find_device
    from pipeline.bench_serve import ServeBenchSettings, bench_serve
    from pipeline.bench_serve_report import draw_report
    from pipeline.progress import Event

    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)

    def write(document: dict[str, Any]) -> None:
        (out / "serve.json").write_text(json.dumps(document, indent=2) + "\n")

    def say(event: Event) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {event.subject}: {event.text}", flush=True)

    settings = ServeBenchSettings(
        base=arguments.base,
        device=arguments.device,
        concepts=arguments.concepts,
        batches=arguments.batches,
        clients=arguments.clients,
        dtype=arguments.dtype,
        speeds=arguments.speeds
        or (ON_GPU if find_device(arguments.device).type == "cuda" else None),
        channels_last=arguments.channels_last,
        rank=arguments.rank,
        resident=arguments.resident,
        seconds=arguments.seconds,
        minutes=arguments.minutes,
        patience=arguments.patience,
    )
    document = bench_serve(settings, say, write)
    if settings.clients and document["images_per_s"]:
        from pipeline.bench_serve_http import bench_http

        try:
            bench_http(settings, say, document, write)
        except EchoDistillError as error:  # what the engine gave is worth its report all the same
            document["failed"] = {**document.get("failed", {}), "http": str(error)}
            write(document)
    with (out / "serve.txt").open("w") as file:
        draw_report(Console(file=file, width=120), document)
    print((out / "serve.txt").read_text(), flush=True)
    check = document["check"]
    return 0 if check is not None and check["passed"] else 1


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="sd-turbo", help="sd-turbo, sd-turbo-mini or pocket")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--concepts", type=int, default=32, help="different ones in a batch")
    parser.add_argument(
        "--batches",
        type=lambda text: tuple(int(part) for part in text.split(",")),
        help="sizes such as 1,8,32",
    )
    parser.add_argument(
        "--clients",
        type=lambda text: tuple(int(part) for part in text.split(",")),
        default=(),
        help="also ask the endpoint over HTTP, so many at a time (needs Ray and MLflow)",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument(
        "--speeds",
        type=lambda text: tuple(text.split(",")),
        help="of eager,graphs,compile, each perhaps with :channels_last or :benchmark behind it; "
        "without, all that may be fast on a GPU",
    )
    parser.add_argument("--channels-last", action="store_true", help="also where not compiled")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--resident", type=int, default=1000, help="adapters kept at once")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--minutes", type=float, default=7.0, help="for all but --clients")
    parser.add_argument("--patience", type=float, default=1.0, help="factor on each part's seconds")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
