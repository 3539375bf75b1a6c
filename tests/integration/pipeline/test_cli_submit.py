"""`echodistill submit`, `status`, `logs`, `cancel` and `retry`, on a Ray started as a cluster."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from PIL import Image

from components.ingest import documents
from components.train.claims import LEASE, LEASE_SECONDS, Lease
from components.train.state import BatchView
from tests.faults import Faults, faulty_proxy
from tests.integration.pipeline.commands import environment, run, run_here
from tests.integration.pipeline.processes import MARK, marked, new_mark
from tests.manifests.rendered import containers, sets
from tests.services import ray_head
from tests.unit.pipeline.test_batch import planned

QUICK = ("--set", "train.iterations=2", "--set", "echo.rounds=0", "--set", "evaluate.prompts=1")
SLOW = ("--set", "train.iterations=100000", "--set", "train.checkpoint_seconds=0")


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Dashboard and agent of a Ray of two CPUs that wants the session's token, by `ray start`."""
    home = tmp_path_factory.mktemp("cluster")
    mark = new_mark()
    words = ("--num-cpus", "2", "--object-store-memory", str(100 * 2**20))
    own = environment(home, **{MARK: mark})
    try:
        with ray_head(own, home / "head.log", *words) as (dashboard, agent, _):
            yield dashboard, agent
    finally:
        for pid in marked(mark):
            with suppress(psutil.NoSuchProcess):  # it has just ended
                psutil.Process(pid).kill()


@pytest.fixture(scope="module")
def cluster(head: tuple[str, str]) -> str:
    return head[0]


def wait_for(condition: Callable[[Any], bool], *words: str, cwd: Path) -> Any:
    """Ask for the status until it is such; gives the document."""
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        done = run_here("status", *words, "--json", cwd=cwd)
        if done.code in (0, 1) and condition(done.document):
            return done.document
        time.sleep(0.2)  # what is waited for wants the processors, too
    raise AssertionError(done.stdout + done.stderr)


def asks_for_a_job(method: str, path: str) -> bool:
    return method == "GET" and path.startswith("/api/jobs/") and path != "/api/jobs/"


def by_id(document: Any) -> dict[str, Any]:
    return {one["id"]: one for one in document["concepts"]}


@pytest.mark.slow
def test_a_batch_with_broken_folders(
    cluster: str, tiny_base: Path, concepts: Path, tmp_path: Path
) -> None:
    for name in ("no-photos", "no-noun", "no-picture"):
        (concepts / name).mkdir()
    (concepts / "no-photos" / "concept.yaml").write_text("class_noun: dog\n")
    Image.new("RGB", (80, 80)).save(concepts / "no-noun" / "0.png")
    (concepts / "no-picture" / "0.png").write_bytes(b"no picture")
    (concepts / "no-picture" / "concept.yaml").write_text("class_noun: dog\n")
    words = ("submit", str(concepts), "--base", str(tiny_base), *QUICK, "--json")
    there = ("--address", cluster)

    # What is wrong is told before anything is submitted.
    refused = run_here(*words, *there, "--strict", cwd=tmp_path)
    assert refused.code == 1, refused.stderr
    assert refused.document["batch"] is None and refused.document["counts"] == {"invalid": 3}
    refused = run(*words, *there, cwd=tmp_path, RAY_AUTH_TOKEN="wrong" * 8)
    assert refused.code == 2 and "RAY_AUTH_TOKEN" in refused.error, refused.stderr
    refused = run_here(*words, "--address", "http://127.0.0.1:9", cwd=tmp_path)
    assert refused.code == 3 and "--address" in refused.error, refused.stderr
    assert run_here("status", cwd=tmp_path).code == 2

    # Two are done, three are named; the storage alone tells it again.
    done = run(*words, *there, "--wait", cwd=tmp_path)
    assert done.code == 1, done.stderr
    found = by_id(done.document)
    assert done.document["counts"] == {"invalid": 3, "trained": 2}
    for name in ("my-dog", "my-robot"):
        assert (found[name]["version"], found[name]["error"]) == ("1", None)
        assert len(found[name]["digest"]) == 64 and found[name]["seconds"] > 0
    for name in ("no-photos", "no-noun", "no-picture"):
        assert found[name]["state"] == "invalid" and found[name]["error"]
    status = run("status", "--json", cwd=tmp_path, RAY_AUTH_TOKEN="")
    assert status.code == 1 and status.document == done.document
    table = run_here("status", done.document["batch"], cwd=tmp_path)
    assert "my-robot" in table.stdout and "2 trained" in table.stdout
    logs = run_here("logs", "my-dog", *there, cwd=tmp_path)
    assert "register" in logs.stdout and "my-robot register" not in logs.stdout
    assert all("my-dog" in line for line in logs.stdout.splitlines())

    # Nothing is trained twice, and what was trained is where other commands look for it. Who waits
    # is not put off by a head that does not answer for a moment.
    faults = Faults(plan=["drop", "503"], only=asks_for_a_job)
    with faulty_proxy(cluster, faults) as proxy:
        again = run(*words, "--address", proxy, "--wait", cwd=tmp_path)
    assert again.code == 1 and again.document["counts"] == {"already": 2, "invalid": 3}
    assert not faults.plan and again.stderr.count("goes on by itself") == 1, again.stderr
    assert again.document["batch"] != done.document["batch"]
    # The last one is meant where none is named, and there is nothing to try again.
    nothing = run_here("retry", "--failed", *there, "--json", cwd=tmp_path)
    assert nothing.code == 1 and nothing.document["batch"] == again.document["batch"]
    assert "nothing is left to do" in nothing.stderr
    assert nothing.document["job"] == again.document["job"]
    picture = run_here("generate", "my-dog", "a dog on the beach", "--json", cwd=tmp_path)
    assert picture.code == 0 and picture.document["sha256"] == found["my-dog"]["sha256"]


def test_a_batch_that_another_cluster_drives_is_left_to_it(cluster: str, tmp_path: Path) -> None:
    batch = planned(tmp_path, "fox")
    lease = Lease(batch.uri, "elsewhere-j1")
    for command in ("cancel", "retry"):
        refused = run_here(command, batch.uri, "--address", cluster, "--json", cwd=tmp_path)
        assert refused.code == 2 and "job elsewhere-j1" in refused.error, refused.stderr
        assert BatchView(batch.uri).read().state == "running"
    lease.end("done")
    # One that died is known by its lease: a cancelled batch of it is cancelled, wherever.
    dead = {"holder": "x", "job": "elsewhere-j1", "ended": None}
    dead |= {"beat": time.time() - 99, "expires": time.time() - 1}
    documents.write(f"{batch.uri}/{LEASE}", dead)
    done = run_here("cancel", batch.uri, "--address", cluster, "--json", cwd=tmp_path)
    assert done.code == 0 and done.document["state"] == "cancelled", done.stderr


@pytest.mark.slow
def test_cancelled_killed_and_gone_on(
    cluster: str, tiny_base: Path, concepts: Path, tmp_path: Path
) -> None:
    there = ("--address", cluster)
    words = ("submit", str(concepts / "my-dog"), "--base", str(tiny_base), *QUICK, *SLOW, "--json")
    begun = run(*words, *there, cwd=tmp_path)
    assert begun.code == 0, begun.stderr
    batch = begun.document["uri"]
    first = wait_for(lambda found: by_id(found)["my-dog"]["iteration"] > 0, batch, cwd=tmp_path)
    assert first["state"] == "running" and by_id(first)["my-dog"]["state"] == "training"
    refused = run_here("retry", batch, *there, "--json", cwd=tmp_path)
    assert refused.code == 2 and "is being worked on" in refused.error

    cancelled = run("cancel", batch, *there, "--json", cwd=tmp_path)
    assert cancelled.code == 0, cancelled.stderr
    assert cancelled.document["state"] == "cancelled"
    assert cancelled.document["counts"] == {"cancelled": 1}
    reached = by_id(cancelled.document)["my-dog"]["iteration"]

    # It goes on where it was, until its driver is killed: the state has no author any more.
    retried = run("retry", batch, *there, "--json", cwd=tmp_path)
    assert retried.code == 0, retried.stderr
    assert retried.document["job"] != begun.document["job"]
    assert retried.document["state"] in ("queued", "running")
    wait_for(
        lambda found: found["state"] == "running" and by_id(found)["my-dog"]["iteration"] > reached,
        batch,
        cwd=tmp_path,
    )
    drivers = [
        process
        for process in psutil.process_iter(["cmdline", "environ"])
        if "pipeline.drive" in (process.info["cmdline"] or []) and batch in process.info["cmdline"]
    ]
    for process in drivers:
        os.kill(process.pid, signal.SIGKILL)
    assert drivers
    retried = run_here("retry", batch, *there, "--json", cwd=tmp_path)
    deadline = time.monotonic() + LEASE_SECONDS + 30
    while retried.code and time.monotonic() < deadline:  # until Ray notices its death
        retried = run_here("retry", batch, *there, "--json", cwd=tmp_path)
    assert retried.code == 0, retried.stderr
    wait_for(lambda found: found["state"] == "running", batch, cwd=tmp_path)
    assert run("cancel", batch, *there, cwd=tmp_path).code == 0


def test_the_probes_of_the_manifests_want_no_token(head: tuple[str, str]) -> None:
    """The kubelet has none: with one wanted, no Ray pod would ever be ready."""
    dashboard, agent = head
    gets = [
        container[probe]["httpGet"]
        for manifest in sets()["prod"]
        for _, container in containers(manifest)
        for probe in ("startupProbe", "livenessProbe", "readinessProbe")
        if "httpGet" in container.get(probe, {})
    ]
    asked = {(get["port"], get["path"]) for get in gets if get["port"] in ("dashboard", 52365)}
    assert {port for port, _ in asked} == {"dashboard", 52365}
    for port, path in asked:
        url, deadline = (dashboard if port == "dashboard" else agent) + path, time.monotonic() + 60
        while (answer := _asked(url)) != 200:  # the agent comes a little later than its head
            assert time.monotonic() < deadline, f"{url}: {answer}"
            time.sleep(0.5)
    assert _asked(f"{dashboard}/api/jobs/") == 401  # everything else does


def _asked(url: str) -> int | None:
    try:
        return requests.get(url, timeout=10).status_code
    except requests.ConnectionError:
        return None
