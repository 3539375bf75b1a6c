"""A batch under faults: workers, packs, drivers and nodes are killed, S3 and MLflow break.

Which fault comes when, and what it hits, is drawn from a seed. A fault comes as soon as the batch
has got on by its share since the last one, so that all of them meet a batch at work.
"""

from __future__ import annotations

import itertools
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import numpy as np
from mlflow import MlflowClient
from moto.server import ThreadedMotoServer
from PIL import Image

from components.ingest.concept_folder import Concept
from components.register.registry import fetch_adapter, get_version
from components.spec import resolve_spec
from components.train.batch import Batch
from components.train.state import BatchStatus, BatchView
from model.errors import InputError, ServiceError
from model.names import CANDIDATE
from pipeline.base import base_settings
from pipeline.jobs import Jobs
from pipeline.progress import silent
from pipeline.submit import check, retry, submit
from tests.chaos.nodes import Nodes
from tests.chaos.undisturbed import differences, train_undisturbed
from tests.faults import Faults, everything, faulty_proxy
from tests.tiny import build_tiny_pair
from tests.unit.train.ranks import on_ranks

KINDS = ("worker", "S3", "MLflow", "node", "driver", "spot")
# Only when asked for: one takes a lease's time, or the whole cluster, the other takes minutes.
MORE = ("head", "outage")
BUCKET = "chaos"
PATIENCE = 300.0  # seconds without any progress after which it is given up
NODES, CPUS = 2, 1
_LEASE_LOOK = 0.5
_ASKED_SECONDS = 45.0  # that a driver takes at most to begin after it was asked for
_OUTAGE = 150  # seconds
_WARNED = 3  # seconds between a spot node's warning and its end


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    concepts: int
    faults: int
    pack: int
    iterations: int
    kinds: tuple[str, ...] = KINDS
    seed: int = 7
    restarts: int = 50  # of a pack; the default of the run spec is too few for so many faults


@dataclass
class Happened:
    """One fault: when, what, and what it hit."""

    second: float
    kind: str
    what: str
    reached: int
    cost: float = 0.0


@dataclass
class Report:
    """What became of the batch."""

    seconds: float
    happened: list[Happened]
    states: dict[str, str]
    versions: dict[str, int]
    apart: dict[str, float]
    drivers: int
    errors: dict[str, str] = field(default_factory=dict)
    answers: dict[str, dict[str, int]] = field(default_factory=dict)


class Chaos:
    """The batch, its cluster and its services."""

    def __init__(self, plan: Plan, nodes: Nodes, s3: Faults, mlflow: Faults) -> None:
        self._plan = plan
        self._nodes = nodes
        self._s3, self._mlflow = s3, mlflow
        self._random = random.Random(plan.seed)
        rounds = itertools.chain.from_iterable(self._shuffled() for _ in itertools.count())
        self.kinds = list(itertools.islice(rounds, plan.faults))
        self.happened: list[Happened] = []
        self.drivers = 1

    def run(self, batch: Batch, jobs: Jobs, job: str, say: Callable[[str], None]) -> BatchStatus:
        """Take the batch to its end."""
        view, began = BatchView(batch.uri), time.monotonic()
        moved = asked = began
        best: dict[str, int] = {}
        total = self._plan.concepts * self._plan.iterations
        step = 0.85 * total / (len(self.kinds) + 1)
        while True:
            status = view.read()
            for one in status.concepts:
                done = self._plan.iterations if one.over else one.iteration
                if done > best.get(one.id, -1):
                    best[one.id], moved = done, time.monotonic()
            reached = sum(best.values())
            # After a head's restart Ray may know the dead driver's job as running for ever.
            lost = status.state == "interrupted" and time.monotonic() - asked > _ASKED_SECONDS
            if _is_over(jobs, job) or lost:
                if status.state == "done":
                    return status
                job = self._again(batch, jobs)
                moved = asked = time.monotonic()
            count = len(self.happened)
            if count < len(self.kinds) and reached >= step * (count + 1):
                what = self._strike(self.kinds[count], batch)
                if what:
                    second = round(time.monotonic() - began, 1)
                    self.happened.append(Happened(second, self.kinds[count], what, reached))
                    say(f"{second:6.1f} s  {reached:4d}/{total}  {self.kinds[count]:<7} {what}")
                    moved = time.monotonic()
            if time.monotonic() - moved > PATIENCE:
                words = (status.as_json(), self._nodes.status(), jobs.logs(batch)[-8000:])
                raise AssertionError("\n".join(map(str, words)))
            time.sleep(_LEASE_LOOK)

    def _shuffled(self) -> list[str]:
        kinds = list(self._plan.kinds)
        self._random.shuffle(kinds)
        return kinds

    def _again(self, batch: Batch, jobs: Jobs) -> str:
        self.drivers += 1
        while True:
            try:
                return retry(batch, jobs, failed=False)
            except (InputError, ServiceError):  # the killed one is not known to be dead yet
                time.sleep(_LEASE_LOOK)

    def _strike(self, kind: str, batch: Batch) -> str | None:
        """Let a fault happen; None when there is nothing yet that it could hit."""
        if kind == "worker":
            title = self._random.choice(("RayTrainWorker", "PackRun"))
            hit = self._nodes.kill_process("ray::", title)
            return f"killed {title} (process {hit})" if hit else None
        if kind == "driver":
            hit = self._nodes.kill_process("pipeline.drive", batch.uri)
            return f"killed (process {hit})" if hit else None
        if kind == "node":
            if not self._nodes.has_process("ray::RayTrainWorker"):
                return None
            count = self._nodes.kill_node(self._random.randrange(NODES))
            if not count:  # the last one has gone, and its successor is still coming
                return None
            self._nodes.add(CPUS)
            return f"killed a node of {count} processes; another came"
        if kind == "head":
            lost = self._nodes.restart_head()
            for _ in range(lost):
                self._nodes.add(CPUS)
            kept = "its nodes stayed" if self._nodes.keeps_state else "all nodes went with it"
            return f"killed and started again; {kept}"
        if kind == "spot":
            node = self._nodes.warn_node(_WARNED, "ray::RayTrainWorker")
            if node is None:
                return None
            time.sleep(_WARNED)
            self._nodes.take_away(node)
            self._nodes.add(CPUS)
            return f"warned of a node's end {_WARNED} s before; another came"
        if kind == "outage":  # more than all restarts of a run and all tries of a request last
            if not self._nodes.has_process("ray::RayTrainWorker"):
                return None
            self._s3.away.set()
            time.sleep(_OUTAGE)
            self._s3.away.clear()
            return f"S3 was away for {_OUTAGE} s"
        faults = self._s3 if kind == "S3" else self._mlflow
        if self._random.random() < 0.4:
            seconds = self._random.uniform(4, 8)
            faults.away.set()
            threading.Timer(seconds, faults.away.clear).start()
            return f"away for {seconds:.1f} s"
        kinds = ("503", "slow", "drop", "lose", "cut")
        burst = [self._random.choice(kinds) for _ in range(self._random.randrange(4, 9))]
        faults.plan += burst
        return f"breaks {len(burst)} answers: {', '.join(burst)}"


def _is_over(jobs: Jobs, job: str) -> bool:
    """Tell whether a job has ended, or nobody knows of it any more."""
    try:
        return jobs.state(job)[0] in ("STOPPED", "SUCCEEDED", "FAILED")
    except ServiceError as error:  # else the head is starting again
        return "does not exist" in str(error)


def chaos(plan: Plan, folder: Path, mlflow_url: str, say: Callable[[str], None]) -> Report:
    """Train a batch under faults and compare it with what undisturbed training gives.

    Args:
        plan: how much of everything.
        folder: for all that is written; empty.
        mlflow_url: of a server that knows none of the concepts.
        say: hears of each fault.
    """
    base, photos = folder / "tiny", folder / "photos"
    build_tiny_pair(base)
    _write_photos(photos, plan.concepts)
    with services(folder, mlflow_url) as places:
        preset, own = base_settings(str(base))
        spec = resolve_spec(preset, None, [*own, *_settings(plan, places.mlflow_proxy)])
        began = time.monotonic()
        runner = Chaos(plan, places.nodes, places.s3, places.mlflow)
        for _ in range(NODES):
            places.nodes.add(CPUS)
        places.nodes.wait()
        jobs = Jobs(places.nodes.dashboard)
        checked = check(str(photos), spec, silent)
        concepts = [one.concept for one in checked.concepts if one.concept]
        storage = f"s3://{BUCKET}/storage"
        batch, job = submit(checked, jobs, silent, storage=storage)
        status = runner.run(batch, jobs, job, say)
        seconds = time.monotonic() - began
        if not all(one.good for one in status.concepts):  # what is said of it, before it is gone
            say(jobs.logs(batch))
        found = _fetched(status, mlflow_url, folder / "found")
        on_ranks(1, train_undisturbed, spec, _packs(batch, concepts), str(folder / "undisturbed"))
        return Report(
            seconds=seconds,
            happened=runner.happened,
            states={one.id: one.state for one in status.concepts},
            errors={one.id: one.error for one in status.concepts if one.error},
            versions=found,
            apart=differences(spec, concepts, folder / "found", folder / "undisturbed"),
            drivers=runner.drivers,
            answers={"S3": dict(places.s3.done), "MLflow": dict(places.mlflow.done)},
        )


def _write_photos(folder: Path, count: int) -> None:
    colours = np.random.default_rng(1)
    for n in range(count):
        place = folder / f"concept-{n:02d}"
        place.mkdir(parents=True)
        (place / "concept.yaml").write_text("class_noun: dog\n")
        for i in range(3):
            picture = Image.fromarray(colours.integers(0, 256, (6, 5, 3), dtype=np.uint8))
            picture.resize((80, 96), Image.Resampling.BILINEAR).save(place / f"{i}.png")


def _settings(plan: Plan, tracking: str) -> tuple[str, ...]:
    return (
        f"train.iterations={plan.iterations}",
        "echo.rounds=0",
        "evaluate.prompts=1",
        "evaluate.seeds=1",
        "train.checkpoint_seconds=0",  # at the end of each block
        "train.sample_every=0",
        "train.cpus_per_worker=1",  # so many threads: more would sum in another order
        "tracking.log_every=4",
        f"train.max_failures={plan.restarts}",
        f"pack.size={plan.pack}",
        f"tracking.uri={tracking}",
    )


def _packs(batch: Batch, concepts: list[Concept]) -> list[tuple[Concept, ...]]:
    by_id = {concept.id: concept for concept in concepts}
    return [tuple(by_id[name] for name in pack) for pack in batch.packs]


def _fetched(status: BatchStatus, registry: str, folder: Path) -> dict[str, int]:
    """Fetch every concept's adapter from the registry; returns how many versions each has."""
    client = MlflowClient(registry, registry)
    counts = {}
    for one in status.concepts:
        versions = client.search_model_versions(f"name = 'echodistill.{one.id}'")
        counts[one.id] = len(versions)
        version = get_version(one.id, CANDIDATE, tracking_uri=registry)
        if version is not None:
            place = fetch_adapter(version, folder / f".{one.id}", tracking_uri=registry)
            place.rename(folder / one.id)
    return counts


@dataclass
class Places:
    """The services, and the proxies before them."""

    nodes: Nodes
    s3: Faults
    mlflow: Faults
    mlflow_proxy: str


@contextmanager
def services(folder: Path, mlflow_url: str) -> Iterator[Places]:
    """Start S3, proxies and the cluster; this process talks to S3 and MLflow directly."""
    s3, mlflow = Faults(only=everything), Faults(only=everything)
    with ExitStack() as stack:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request otherwise
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        stack.callback(server.stop)
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        keys = {
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        stack.enter_context(_environment({**keys, "AWS_ENDPOINT_URL": endpoint}))
        boto3.session.Session().client("s3", endpoint_url=endpoint).create_bucket(Bucket=BUCKET)
        s3_proxy = stack.enter_context(faulty_proxy(endpoint, s3))
        mlflow_proxy = stack.enter_context(faulty_proxy(mlflow_url, mlflow))
        there = {
            **os.environ,
            # As a user has them, whatever the tests around say: the faults come at that pace.
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "2",
            "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
            "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER": "1.0",
            "AWS_ENDPOINT_URL": s3_proxy,
            "ECHODISTILL_CACHE": str(folder / "cache"),
            "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        }
        nodes = Nodes(there, folder / "nodes")
        stack.callback(nodes.stop)
        yield Places(nodes, s3, mlflow, mlflow_proxy)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before: dict[str, Any] = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def table(report: Report) -> str:
    """Say what happened, for a person."""
    lines = [f"{'second':>7}  {'done':>5}  {'fault':<7} what"]
    lines += [f"{h.second:7.1f}  {h.reached:5d}  {h.kind:<7} {h.what}" for h in report.happened]
    equal = sum(apart == 0 for apart in report.apart.values())
    lines += [
        "",
        f"{len(report.happened)} faults, {report.drivers} drivers, {report.seconds:.0f} s",
        f"states: {report.states}",
        f"versions: {report.versions}",
        f"broken answers: {report.answers}",
        f"adapters equal to undisturbed ones: {equal} of {len(report.apart)} in every byte, all "
        f"within {max(report.apart.values()):.1e} of the largest movement",
    ]
    return "\n".join(lines)
