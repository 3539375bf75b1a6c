"""Whole batches by Ray on the GPUs of one host: packs side by side, one a GPU.

    python3 -m tests.bench.batch_on_gpus --gpus 1,2,4,8 --pack 4 --out runs/batch

What `echodistill submit` does, measured: for every number of GPUs a Ray head is started that has
so many, a batch of as many packs is submitted to it, its driver starts a Ray Train run a pack, and
the adapters are registered in MLflow and measured. The base is of random weights
(`random_base.py`), the photos are made up, and nothing is fetched. Results are written after every
number of GPUs; run again with the same settings, it skips those that are there. With `--device cpu
--base sd-turbo-mini` a GPU is a core, to see that it works.

`concepts_per_hour` is by the time of an iteration alone, for 1000; what a batch takes beside its
iterations is in the moments of its packs, and in `seconds`.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import psutil
import torch

from components.train.state import BatchView
from model.errors import EchoDistillError, InputError, ServiceError
from pipeline import bench_measure as measure
from pipeline.bench_bases import MINI, PRESET, RANDOM_BASES, write_photos
from pipeline.services import quiet_libraries
from tests.bench.random_base import settings_of
from tests.bench.ranks_on_gpu import Document, chart, compare, so_far
from tests.services import ray_head

ROOT = str(Path(__file__).resolve().parents[2])
LOOK_SECONDS = 1.0
PACE = "seconds_per_iteration"
WORKER = "RayTrainWorker"


def batch(options: argparse.Namespace, sets: list[str], count: int) -> Document:
    """Train a pack on each of so many GPUs, or `--rounds` of them; returns what it took."""
    work = options.out / f"gpus-{count}"
    shutil.rmtree(work, ignore_errors=True)  # what is registered would not be trained again
    photos, registry = work / "photos", f"sqlite:///{work / 'mlflow.db'}"
    size = max(64, options.resolution or 512)
    write_photos(photos, count * options.rounds * options.pack, size)
    gpus = visible_gpus()[:count] if options.device == "cuda" else []
    with cluster(options.out, count, gpus) as address, Watch(gpus) as watch:
        command = [sys.executable, "-m", "pipeline.cli.entry", "submit", str(photos), "--wait"]
        command += ["--base", PRESET, "--storage", str(work / "storage"), "--json"]
        command += ["--tracking-uri", registry, "--address", address, "--waiting", str(count)]
        for each in sets:
            command += ["--set", each]
        began = time.time()
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=work)
        seconds = time.time() - began
    found = json.loads(done.stdout or "{}")
    if "counts" not in found:
        raise ServiceError(f"the batch was not taken: {found.get('error', 'see above')}")
    row: Document = {"gpus": count, "concepts": len(found["concepts"]), "seconds": seconds}
    row["states"] = found["counts"]
    packs = row["processes"] = list(packs_of(found, began))
    if len(packs) < count * options.rounds or set(row["states"]) != {"trained"}:
        return row
    rate = statistics.mean(3600 / pack["ms"] for pack in packs)
    row["concepts_per_hour"] = round(count * rate, 2)
    # While every GPU trains its first pack.
    first = sorted(packs, key=lambda pack: pack["starts"])[:count]
    begun = max(pack["starts"] for pack in first)
    ended = min(pack["last_iteration"] for pack in first)
    row["host"] = watch.during(began + begun, began + ended)
    return row


def packs_of(found: Document, began: float) -> Iterator[Document]:
    """Give what the MLflow runs of each pack say that was trained to its end.

    That is ms an iteration and concept, and the seconds since the submission at which the base was
    loaded, the first and the last block of iterations ended, and adapters were written and logged.
    """
    import mlflow

    client = mlflow.MlflowClient(found["registry"])
    states = {one["id"]: one for one in found["concepts"]}
    for ids in BatchView(found["uri"]).batch.packs:
        runs = [client.get_run(states[name]["run_id"]) for name in ids if states[name]["run_id"]]
        if len(runs) < len(ids) or not all(run.info.end_time for run in runs):
            continue
        paces = client.get_metric_history(runs[0].info.run_id, PACE)
        if len(paces) < 2:
            continue
        # The first block has what starts lazily in it.
        yield measure.summary([one.value / len(ids) for one in paces[1:]]) | {
            "concepts": len(ids),
            "starts": round(runs[0].info.start_time / 1e3 - began, 1),
            "first_block": round(paces[0].timestamp / 1e3 - began, 1),
            "last_iteration": round(paces[-1].timestamp / 1e3 - began, 1),
            "trained": round(max(run.info.end_time for run in runs) / 1e3 - began, 1),
            "seconds": [states[name]["seconds"] for name in ids],
            "sha256": [states[name]["sha256"] for name in ids],
            "losses": {k: v for k, v in runs[0].data.metrics.items() if k.startswith("loss/")},
        }


def visible_gpus() -> list[str]:
    """Give the GPUs that this process may use, as nvidia-smi and CUDA name them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(n) for n in range(torch.cuda.device_count())]


@contextmanager
def cluster(out: Path, count: int, gpus: list[str]) -> Iterator[str]:
    """Start a Ray head that has these GPUs, or so many cores; yields its address."""
    environment = dict(os.environ)
    words = ["--num-gpus", "0", "--num-cpus", str(count)]
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        words = ["--num-gpus", str(count)]
    words += ["--disable-usage-stats", "--object-store-memory", str(512 * 2**20)]
    with ray_head(environment, out / f"ray-{count}.log", *words) as (address, _, folder):
        try:
            yield address
        finally:
            for told in folder.glob("session_2*/logs/job-driver-*.log"):
                shutil.copy(told, out / f"driver-{count}.log")


class Watch(threading.Thread):
    """Looks at the host once a second: cores and memory of the packs' workers and of the rest."""

    def __init__(self, gpus: list[str]) -> None:
        super().__init__(daemon=True)
        self._visible = gpus
        self._over = threading.Event()
        self._looks: list[tuple[float, dict[str, tuple[float, float, int]], list[float]]] = []

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            self._looks.append((time.time(), self._processes(), self._gpus()))

    def during(self, begin: float, end: float) -> Document:
        """Say what was used between two moments: a worker's and the rest's cores and memory."""
        looks = [look for look in self._looks if begin <= look[0] <= end]
        looks = [look for look in looks if len(look[2]) == len(self._visible)]
        if len(looks) < 2:
            return {"looks": len(looks)}
        found: Document = {"looks": len(looks)}
        seconds = looks[-1][0] - looks[0][0]
        for kind in ("workers", "others"):
            first, last = looks[0][1][kind], looks[-1][1][kind]
            found[kind] = {
                "processes": last[2],
                "cores": round((last[0] - first[0]) / seconds, 2),
                "gib": round(max(look[1][kind][1] for look in looks) / measure.GIB, 2),
            }
        if self._visible:
            gpus = zip(*(look[2] for look in looks), strict=True)
            found["gpu_gib"] = [round(max(each) / 1024, 1) for each in gpus]
        return found

    def _processes(self) -> dict[str, tuple[float, float, int]]:
        """Sum seconds of cores, resident memory and number of what was started, by kind.

        Pages that several processes share are counted once in each.
        """
        sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0])
        for process in psutil.Process().children(recursive=True):
            try:
                with process.oneshot():
                    words = " ".join(process.cmdline())
                    times, memory = process.cpu_times(), process.memory_info().rss
            except psutil.Error:
                continue
            entry = sums["workers" if WORKER in words else "others"]
            entry[0] += times.user + times.system
            entry[1] += memory
            entry[2] += 1
        return {kind: (a, b, int(n)) for kind in ("workers", "others") for a, b, n in [sums[kind]]}

    def _gpus(self) -> list[float]:
        """Give each GPU's memory in use, MiB; nothing when nvidia-smi does not tell."""
        if not self._visible:
            return []
        command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        try:
            told = subprocess.check_output([*command, "-i", ",".join(self._visible)], text=True)
            return [float(line) for line in told.split()]
        except (OSError, subprocess.CalledProcessError, ValueError):
            return []


def table(document: Document) -> str:
    """Lay the document out for a person."""
    lines = []
    for row in document["rows"]:
        packs = row["processes"]
        ms = " ".join(f"{pack['ms']:.1f}" for pack in packs)
        lines.append(
            f"{row['gpus']} GPUs: by iterations alone {row.get('concepts_per_hour')} concepts of "
            f"1000 an hour, {row.get('over_one')} of one GPU; {row['states']} in "
            f"{row['seconds']:.0f} s; ms {ms}"
        )
        names = ("starts", "first_block", "last_iteration", "trained")
        lines += ["  " + ", ".join(f"{each} at {pack[each]} s" for each in names) for pack in packs]
        lines.append(f"  {json.dumps(row.get('host'))}")
    return "\n".join(lines)


def main() -> int:
    """Measure on one number of GPUs after the other; exit code 1 when a batch failed."""
    options = _parsed()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to stop"))
    try:
        return _measure(options)
    except (EchoDistillError, AssertionError) as error:  # the latter where Ray does not start
        sys.exit(f"error: {error}")


def _measure(options: argparse.Namespace) -> int:
    quiet_libraries()
    # Once: Ray reads it once. And whatever is started imports this checkout.
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (ROOT, os.environ.get("PYTHONPATH"))))
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "batch.json"
    device = measure.find_device(options.device)
    options.device = device.type
    if device.type == "cuda" and torch.cuda.device_count() < max(options.gpus):
        raise InputError(f"--gpus {max(options.gpus)}: there are {torch.cuda.device_count()}")
    document = so_far(options, path)
    document |= measure.environment(device)
    began = time.monotonic()
    base = options.out / "base"
    # In a process of its own, which gives the GPU's memory back.
    command = [sys.executable, "-m", "tests.bench.random_base", str(base), "--base", options.base]
    if subprocess.run([*command, "--device", options.device]).returncode:
        return 1
    document.setdefault("base_seconds", round(time.monotonic() - began, 1))
    sets = settings_of(base, options.base)
    sets += [f"train.device={options.device}", f"pack.size={options.pack}"]
    sets += [f"train.iterations={options.iterations}", "tracking.log_every=5"]
    if options.resolution:
        sets.append(f"resolution={options.resolution}")
    if options.device == "cpu":
        sets += ["train.precision=float32", "train.cpus_per_worker=1"]
    for count in options.gpus:
        if not _whole(document, count):
            document["rows"] = [row for row in document["rows"] if row["gpus"] != count]
            document["rows"].append(batch(options, [*sets, *options.set], count))
            document["rows"].sort(key=lambda row: row["gpus"])
            compare(document["rows"])
            path.write_text(json.dumps(document) + "\n")
        print(table(document), flush=True)
    if any("over_one" in row for row in document["rows"]):
        path.with_suffix(".mmd").write_text(chart(document) + "\n")
    return 0 if all(_whole(document, count) for count in options.gpus) else 1


def _whole(document: Document, count: int) -> bool:
    """Tell whether so many GPUs are measured."""
    rows = [row for row in document["rows"] if row["gpus"] == count]
    return any("concepts_per_hour" in row for row in rows)


def _parsed() -> argparse.Namespace:
    def positive(text: str) -> int:
        if int(text) < 1:
            raise ValueError(text)
        return int(text)

    def numbers(text: str) -> list[int]:
        return [positive(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpus", type=numbers, default=[1, 2])
    parser.add_argument("--base", default=PRESET, choices=sorted(RANDOM_BASES))
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--set", action="append", default=[], help="of the run spec")
    parser.add_argument("--pack", type=positive, default=4, help="concepts a pack")
    parser.add_argument("--rounds", type=positive, default=1, help="packs a GPU, in turn")
    parser.add_argument("--iterations", type=positive, default=60, help="of the main stage")
    parser.add_argument("--out", type=Path, default=Path("runs/batch"))
    options = parser.parse_args()
    options.resolution = 64 if options.base == MINI else None
    if options.iterations < 10:
        parser.error("--iterations: give 10 or more, the first five are not counted")
    return options


if __name__ == "__main__":
    sys.exit(main())
