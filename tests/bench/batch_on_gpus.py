"""Whole batches by Ray on the GPUs of one host: packs side by side, one a GPU.

    python3 -m tests.bench.batch_on_gpus --gpus 1,2,4,8 --pack 4 --out runs/batch

What `echodistill submit` does, measured: for every number of GPUs a Ray head is started that has
so many, a batch of as many packs is submitted to it, its driver starts a Ray Train run a pack, and
the adapters are registered in MLflow and measured. The base is of random weights
(`random_base.py`), the photos are made up, and nothing is fetched. Results are written after every
number of GPUs; run again with the same settings, it skips those that are there. With `--device cpu
--base sd-turbo-mini` a GPU is a core, to see that it works.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import psutil
import torch

from components.train.state import BatchView
from model.errors import ServiceError
from pipeline import bench_measure as measure
from pipeline.bench_bases import MINI, PRESET, RANDOM_BASES, write_photos
from pipeline.jobs import Jobs
from pipeline.services import quiet_libraries
from tests.bench.random_base import settings_of
from tests.bench.ranks_on_gpu import Document, chart, compare, numbers, so_far

LOOK_SECONDS = 1.0
START_SECONDS = 120.0
PACE = "seconds_per_iteration"
WORKER = "RayTrainWorker"


def batch(options: argparse.Namespace, sets: list[str], count: int) -> Document:
    """Train a pack on each of so many GPUs, or `--rounds` of them; returns what it took."""
    work = options.out / f"gpus-{count}"
    shutil.rmtree(work, ignore_errors=True)  # what is registered would not be trained again
    size = max(64, options.resolution or 512)
    photos = work / "photos"
    write_photos(photos, count * options.rounds * options.pack, size)
    with cluster(options, count) as address, Watch(options.device) as watch:
        command = [sys.executable, "-m", "pipeline.cli.entry", "submit", str(photos), "--wait"]
        command += ["--base", PRESET, "--storage", str(work / "storage"), "--json"]
        command += ["--address", address, "--waiting", str(count)]
        for each in sets:
            command += ["--set", each]
        began = time.time()
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=Path.cwd())
        seconds = time.time() - began
    found = json.loads(done.stdout)
    if "concepts" not in found:
        sys.exit(f"the batch was not taken: {found}")
    row: Document = {"gpus": count, "concepts": len(found["concepts"]), "seconds": seconds}
    row["states"] = found.get("counts", found)
    packs = [pack for pack in packs_of(found, began) if pack]
    row["processes"] = packs
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
    """Give what each pack's MLflow runs say: ms an iteration and concept, and when it was where."""
    import mlflow

    client = mlflow.MlflowClient(found["registry"])
    states = {one["id"]: one for one in found["concepts"]}
    for ids in BatchView(found["uri"]).batch.packs:
        runs = [client.get_run(states[name]["run_id"]) for name in ids if states[name]["run_id"]]
        if len(runs) < len(ids):
            yield {}
            continue
        paces = client.get_metric_history(runs[0].info.run_id, PACE)
        # The first block has what starts lazily in it, and those of echo begin with a round.
        ms = [1e3 * one.value / len(ids) for one in paces[1:]]
        moments = [one.timestamp / 1e3 - began for one in paces]
        yield measure.summary([one / 1e3 for one in ms]) | {
            "concepts": len(ids),
            "starts": round(runs[0].info.start_time / 1e3 - began, 1),
            "last_iteration": round(moments[-1], 1),
            "trained": round(max(run.info.end_time for run in runs) / 1e3 - began, 1),
            "seconds": [states[name]["seconds"] for name in ids],
            "sha256": [states[name]["sha256"] for name in ids],
            "losses": {k: v for k, v in runs[0].data.metrics.items() if k.startswith("loss/")},
        }


@contextmanager
def cluster(options: argparse.Namespace, count: int) -> Iterator[str]:
    """Start a Ray head that has so many GPUs; yields its address."""
    ports = [free_port() for _ in range(3)]
    cores = os.cpu_count() or 1
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    environment = dict(os.environ)
    resources = ["--num-gpus", "0", "--num-cpus", str(max(cores, count))]
    if options.device == "cuda":
        # By hand, so that a host of eight has two where two are measured.
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(count)))
        resources = ["--num-gpus", str(count), "--num-cpus", str(cores)]
    ray = "from ray.scripts.scripts import main; main()"  # as `ray`, wherever it is installed
    command = [sys.executable, "-c", ray, "start", "--head", "--block"]
    command += ["--port", str(ports[0]), "--dashboard-port", str(ports[1]), *resources]
    command += ["--dashboard-agent-listen-port", str(ports[2])]
    command += ["--dashboard-host", "127.0.0.1", "--disable-usage-stats"]
    command += ["--object-store-memory", str(512 * 2**20)]
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        log = (options.out / f"ray-{count}.log").open("w")
        head = subprocess.Popen(
            [*command, "--temp-dir", folder], env=environment, stdout=log, stderr=log
        )
        try:
            address = f"http://127.0.0.1:{ports[1]}"
            wait_for(address, head)
            yield address
        finally:
            # Asked to end it would wait for the actors that are left.
            with suppress(psutil.NoSuchProcess):
                for each in psutil.Process(head.pid).children(recursive=True):
                    with suppress(psutil.NoSuchProcess):
                        each.kill()
            head.kill()
            head.wait()
            for told in Path(folder).glob("session_2*/logs/job-driver-*.log"):
                shutil.copy(told, options.out / f"driver-{count}.log")


def wait_for(address: str, head: subprocess.Popen[bytes]) -> None:
    """Wait until the Jobs API answers."""
    deadline = time.monotonic() + START_SECONDS
    while head.poll() is None and time.monotonic() < deadline:
        try:
            Jobs(address)
            return
        except ServiceError:
            time.sleep(0.5)
    sys.exit(f"Ray did not start at {address}: see ray-*.log")


def free_port() -> int:
    """Give a port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Watch(threading.Thread):
    """Looks at the host once a second: cores and memory of the packs' workers and of the rest."""

    def __init__(self, device: str) -> None:
        super().__init__(daemon=True)
        self._device = device
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
        if looks[0][2]:
            gpus = zip(*(look[2] for look in looks), strict=True)
            found["gpu_gib"] = [round(max(each) / 1024, 1) for each in gpus]
        return found

    def _processes(self) -> dict[str, tuple[float, float, int]]:
        """Sum seconds of cores, resident memory and number over Ray's processes, by kind."""
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
        """Give each GPU's memory in use, MiB."""
        if self._device != "cuda":
            return []
        command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        told = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        return [float(line) for line in told.stdout.split()]


def table(document: Document) -> str:
    """Lay the document out for a person."""
    lines = []
    for row in document["rows"]:
        packs = row["processes"]
        ms = " ".join(f"{pack['ms']:.1f}" for pack in packs if pack)
        lines.append(
            f"{row['gpus']} GPUs: {row.get('concepts_per_hour')} concepts of 1000 iterations an "
            f"hour, {row.get('over_one')} of one GPU; {row['states']} in {row['seconds']:.0f} s; "
            f"ms {ms}"
        )
        for pack in packs:
            if pack:
                names = ("starts", "last_iteration", "trained")
                lines.append("  " + ", ".join(f"{name} at {pack[name]} s" for name in names))
        lines.append(f"  {json.dumps(row.get('host'))}")
    return "\n".join(lines)


def main() -> int:
    """Measure on one number of GPUs after the other; exit code 1 when a batch failed."""
    options = _parsed()
    quiet_libraries()
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "batch.json"
    device = measure.find_device(options.device)
    options.device = device.type
    if device.type == "cuda" and torch.cuda.device_count() < max(options.gpus):
        sys.exit(f"--gpus {max(options.gpus)}: this host has {torch.cuda.device_count()}")
    document = so_far(options, path)
    document |= measure.environment(device)
    began = time.monotonic()
    base = options.out / "base"
    # In a process of its own, which gives the GPU's memory back.
    command = [sys.executable, "-m", "tests.bench.random_base", str(base), "--base", options.base]
    subprocess.run([*command, "--device", options.device], check=True)
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
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpus", type=numbers, default=[1, 2])
    parser.add_argument("--base", default=PRESET, choices=sorted(RANDOM_BASES))
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--set", action="append", default=[], help="of the run spec")
    parser.add_argument("--pack", type=int, default=4, help="concepts a pack")
    parser.add_argument("--rounds", type=int, default=1, help="packs a GPU, one after the other")
    parser.add_argument("--iterations", type=int, default=60, help="of the main stage")
    parser.add_argument("--out", type=Path, default=Path("runs/batch"))
    options = parser.parse_args()
    options.resolution = 64 if options.base == MINI else None
    return options


if __name__ == "__main__":
    sys.exit(main())
