"""Several GPUs of one host: packs side by side, and one concept split over them by ZeRO.

    python3 tests/bench/ranks_on_gpu.py beside --gpus 1,2,4,8 --pack 4
    python3 tests/bench/ranks_on_gpu.py split --gpus 1,2 --stages 0,1,2,3

Needs no installation of the project, no network, no Ray and no MLflow (README.md). One process a
GPU. Results are written after every number of GPUs, and when the program is told to stop (SIGTERM).
Run again with the same settings, it skips the numbers of GPUs that are complete. `beside` trains a
pack on each GPU, all over the same time; `split` trains one concept, whose batch every GPU takes a
part of, and holds its losses against those of one GPU. On a CPU (`--base sd-turbo-mini`) it shows
that it works.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import torch

from components.train import ranks
from components.train.engines import start_deepspeed
from components.train.memory import release
from components.train.shards import sharded
from model.acceleration import accelerate
from pipeline import bench_measure as measure
from pipeline.bench_bases import bench_spec, build_frozen
from pipeline.bench_loops import EngineRunner, Photos

Document = dict[str, Any]
STOPPED = threading.Event()


def beside(options: argparse.Namespace, device: torch.device, gather: Path) -> Document:
    """Train a pack on this GPU alone while the others do the same; count iterations."""
    spec = bench_spec(options.base, None, options.precision, options.set)
    frozen = build_frozen(options.base, spec, spec.train.precision, device)
    accelerate(frozen, spec.train.channels_last, spec.train.compile)
    with tempfile.TemporaryDirectory() as work:
        runner = EngineRunner(spec, frozen, Photos(Path(work), frozen), options.pack)
        runner.run(options.iterations)
        meet(gather)
        cpu, began, times = cpu_seconds(), time.perf_counter(), []
        while time.perf_counter() - began < options.seconds:
            times += runner.run(options.iterations)
        spent = time.perf_counter() - began
        found = measure.summary([each / options.pack for each in times])
        found["cpu_cores"] = round((cpu_seconds() - cpu) / spent, 2)
        found["peak_gib"] = runner.peak_gib
        runner.free()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found | {"host_gib": round(peak * 1024 / measure.GIB, 2)}


def split(options: argparse.Namespace, device: torch.device, _: Path) -> Iterator[Document]:
    """Train one concept with this GPU's part of its batch, at one stage after the other."""
    (checkpointing,) = options.checkpointing
    own = [*options.set, f"train.checkpointing={str(checkpointing).lower()}"]
    own += [f"train.workers={ranks.world_size()}", f"batch_size={options.batch}"]
    spec = bench_spec(options.base, None, options.precision, own)
    frozen = build_frozen(options.base, spec, spec.train.precision, device)
    accelerate(frozen, spec.train.channels_last, spec.train.compile)
    for stage in options.stages:
        train = spec.train.model_copy(update={"zero_stage": stage})
        at_stage = spec.model_copy(update={"train": train})
        found: Document = {"stage": stage, "checkpointing": checkpointing}
        with tempfile.TemporaryDirectory() as work:
            runner = EngineRunner(at_stage, frozen, Photos(Path(work), frozen), 1)
            with sharded(frozen, stage) as runner.segment.run.shards:
                runner.run(options.iterations)
                found["losses"] = runner.meter.losses()
                release(device)
                measure.reset_peak(device)
                found |= measure.summary(runner.run(2 * options.iterations))
                peaks = ranks.gathered(runner.peak_gib)
            runner.free()
        release(device)
        yield found | {"peak_gib": max(peaks), "peaks_gib": peaks}


def child(options: argparse.Namespace) -> None:
    """Be one process: measure, and leave a line of JSON for each thing measured."""
    device = measure.find_device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    start_deepspeed(device)
    gather = options.out
    found = split(options, device, gather)
    if options.mode == "beside":
        found = iter([beside(options, device, gather)])
    with (gather / f"part-{os.environ['PLACE']}.jsonl").open("a") as file:
        for each in found:
            file.write(json.dumps(measure.environment(device) | each) + "\n")
            file.flush()
    torch.distributed.destroy_process_group()


def meet(gather: Path) -> None:
    """Wait until every process of this run is here."""
    (gather / f"here-{os.environ['PLACE']}").touch()
    while len(list(gather.glob("here-*"))) < int(os.environ["PLACES"]):
        time.sleep(0.01)


def cpu_seconds() -> float:
    """Give what this process has had of the host's cores."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


@contextmanager
def processes(
    options: argparse.Namespace, count: int, gather: Path, more: list[str]
) -> Iterator[None]:
    """Start so many of this program, joined (`split`) or each for itself; wait for them after."""
    started = []
    joined = options.mode == "split"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    for place in range(count):
        environment = {
            "PLACE": str(place),
            "PLACES": str(count),
            "RANK": str(place if joined else 0),
            "LOCAL_RANK": str(place),
            "WORLD_SIZE": str(count if joined else 1),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port if joined else port + place),
        }
        command = [sys.executable, __file__, *sys.argv[1:], "--child", "--out", str(gather)]
        command += ["--batch", str(options.batch), *more]
        started.append(subprocess.Popen(command, env={**os.environ, **environment}))
    try:
        yield
        while any(each.poll() is None for each in started) and not STOPPED.is_set():
            time.sleep(0.2)
            if any(each.poll() for each in started):
                break  # the others would wait for it for ever
    finally:
        for each in started:
            each.kill()
            each.wait()


def measured(options: argparse.Namespace, count: int, more: list[str]) -> list[list[Document]]:
    """Give what each process of a run has measured."""
    with tempfile.TemporaryDirectory() as work:
        with processes(options, count, Path(work), more):
            pass
        files = sorted(Path(work).glob("part-*.jsonl"))
        return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def together(options: argparse.Namespace, document: Document, count: int) -> None:
    """Measure on so many GPUs, and put it into the document."""
    rows = document["rows"]
    if options.mode == "beside":
        each = [part[0] for part in measured(options, count, []) if part]
        row: Document = {"gpus": count, "processes": each}
        if len(each) == count:
            row["concepts_per_hour"] = round(sum(3600 / one["ms"] for one in each), 2)
        rows.append(row)
    else:
        # DeepSpeed keeps networks that it had in parts until the process ends.
        for checkpointing in options.checkpointing:
            switch = "on" if checkpointing else "off"
            parts = measured(options, count, ["--checkpointing", switch])
            rows += [{"gpus": count, **found} for found in (parts[0] if parts else [])]
    rows.sort(key=lambda row: row["gpus"])
    compare(rows)


def compare(rows: list[Document]) -> None:
    """Hold every row against one GPU's, at stage 0 and the same checkpointing (`split`), if any."""
    single = [row for row in rows if row["gpus"] == 1]
    for row in rows:
        if "processes" in row:
            alone = next((one for one in single if "concepts_per_hour" in one), None)
            if alone is not None and "concepts_per_hour" in row:
                row["over_one"] = round(row["concepts_per_hour"] / alone["concepts_per_hour"], 3)
            continue
        key = (0, row["checkpointing"])
        alone = next((one for one in single if (one["stage"], one["checkpointing"]) == key), None)
        if alone is not None:
            row["speedup"] = round(alone["ms"] / row["ms"], 3)
            row["loss_error"] = max(
                abs(row["losses"][name] - value) / max(abs(value), 1e-3)
                for name, value in alone["losses"].items()
            )


def table(document: Document) -> str:
    """Lay the document out for a person."""
    lines = []
    for row in document["rows"]:
        if "processes" in row:
            ms = " ".join(f"{each['ms']:.1f}" for each in row["processes"])
            peaks = " ".join(f"{each['peak_gib']:.1f}" for each in row["processes"])
            lines.append(
                f"{row['gpus']} GPUs: {row.get('concepts_per_hour')} concepts of 1000 iterations "
                f"an hour, {row.get('over_one')} of one GPU; ms {ms}; GiB {peaks}"
            )
            continue
        lines.append(
            f"{row['gpus']} GPUs, stage {row['stage']}, checkpointing {row['checkpointing']}: "
            f"{row['ms']:.1f} ms, {row.get('speedup', 1):.2f}x, {row['peak_gib']:.2f} GiB, "
            f"losses off by {row.get('loss_error', 0):.1e}"
        )
    return "\n".join(lines)


def chart(document: Document) -> str:
    """Draw packs side by side, as Mermaid that GitHub shows."""
    rows = [row for row in document["rows"] if "over_one" in row]
    rates = [row["concepts_per_hour"] for row in rows]
    whole = [round(rates[0] * row["gpus"], 2) for row in rows]
    return "\n".join(
        (
            "xychart-beta",
            '    title "Packs side by side; the line is one GPU times their number"',
            f"    x-axis GPUs {json.dumps([str(row['gpus']) for row in rows])}",
            f'    y-axis "concepts an hour" 0 --> {max(rates + whole)}',
            f"    bar {rates}",
            f"    line {whole}",
        )
    )


def main() -> int:
    """Measure on one number of GPUs after the other; exit code 1 when a process failed."""
    options = _parsed()
    if options.child:
        child(options)
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: STOPPED.set())
    path = options.out / f"{options.mode}.json"
    document = so_far(options, path)
    for count in options.gpus:
        if not _whole(options, document, count) and not STOPPED.is_set():
            document["rows"] = [row for row in document["rows"] if row["gpus"] != count]
            together(options, document, count)
            path.write_text(json.dumps(document, indent=2) + "\n")
        print(table(document), flush=True)
    if any("over_one" in row for row in document["rows"]):
        path.with_suffix(".mmd").write_text(chart(document) + "\n")
    return 0 if all(_whole(options, document, count) for count in options.gpus) else 1


def _whole(options: argparse.Namespace, document: Document, count: int) -> bool:
    """Tell whether all that is asked for so many GPUs is measured."""
    rows = [row for row in document["rows"] if row["gpus"] == count]
    if options.mode == "beside":
        return any("concepts_per_hour" in row for row in rows)
    return len(rows) == len(options.stages) * len(options.checkpointing)


def so_far(options: argparse.Namespace, path: Path) -> Document:
    """Give what is measured already with these settings, or an empty document."""
    apart = ("out", "child", "gpus")
    settings = {name: value for name, value in vars(options).items() if name not in apart}
    if not path.exists():
        return {"settings": settings, "rows": []}
    document: Document = json.loads(path.read_text())
    if document["settings"] != settings:
        sys.exit(f"{path} was measured with other settings: give another --out")
    return document


def _parsed() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    def switches(text: str) -> list[bool]:
        return [{"on": True, "off": False}[part] for part in text.split(",")]

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("mode", choices=("beside", "split"))
    parser.add_argument("--gpus", type=numbers, default=[1, 2])
    parser.add_argument("--base", default="sd-turbo", help="sd-turbo or sd-turbo-mini")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--precision", default="bf16", choices=("float32", "bf16"))
    parser.add_argument("--set", action="append", default=[], help="of the run spec")
    parser.add_argument("--iterations", type=int, default=5, help="warm up; split: then twice")
    parser.add_argument("--seconds", type=float, default=20, help="of beside")
    parser.add_argument("--pack", type=int, default=4, help="of beside")
    parser.add_argument("--stages", type=numbers, default=[0, 1, 2, 3], help="of split")
    parser.add_argument("--checkpointing", type=switches, default=[False, True], help="off,on")
    parser.add_argument("--batch", type=int, help="of split; the most GPUs, and at least 2")
    parser.add_argument("--out", type=Path, default=Path("runs/ranks"))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.batch = options.batch or max(2, *options.gpus)
    return options


if __name__ == "__main__":
    sys.exit(main())
