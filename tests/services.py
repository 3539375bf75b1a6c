"""Real servers as processes, for tests: `mlflow server`, moto's S3, and the head of a Ray."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import requests

_given: set[int] = set()


def free_port() -> int:
    """Gives a port that is free now, and was not given before."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = int(server.getsockname()[1])
        if port not in _given:
            _given.add(port)
            return port


def kill_tree(process: subprocess.Popen[bytes]) -> int:
    """Kill a process with all that it has started; gives their number."""
    count = 0
    with suppress(psutil.Error):
        processes = psutil.Process(process.pid).children(recursive=True)
        for each in (psutil.Process(process.pid), *processes):
            with suppress(psutil.Error):
                each.kill()
                count += 1
    process.wait(20)
    return count


@contextmanager
def ray_head(
    environment: Mapping[str, str], log: Path, *words: str
) -> Iterator[tuple[str, str, Path]]:
    """Yields the URLs of a head's dashboard and agent, and its folder; `words` go to `ray start`.

    It is killed at the end: asked to end, it would wait for the actors that are left.
    """
    gcs, dashboard, agent = (str(free_port()) for _ in range(3))
    ray = "from ray.scripts.scripts import main; main()"  # as `ray`, wherever it is installed
    command = [
        *(sys.executable, "-c", ray, "start", "--head", "--block", "--port", gcs, *words),
        *("--dashboard-host", "127.0.0.1", "--dashboard-port", dashboard),
        *("--dashboard-agent-listen-port", agent),
    ]
    # Its actors look their cluster up by RAY_ADDRESS: there may be others on this machine.
    own = {**environment, "RAY_ADDRESS": f"127.0.0.1:{gcs}"}
    with (
        tempfile.TemporaryDirectory(  # sockets have short paths
            prefix="ray-", dir="/tmp", ignore_cleanup_errors=True
        ) as scratch,
        log.open("w") as output,
    ):
        head = subprocess.Popen(
            [*command, "--temp-dir", scratch], env=own, stdout=output, stderr=output
        )
        try:
            deadline = time.monotonic() + 120
            while socket.socket().connect_ex(("127.0.0.1", int(dashboard))):
                assert head.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
            yield f"http://127.0.0.1:{dashboard}", f"http://127.0.0.1:{agent}", Path(scratch)
        finally:
            kill_tree(head)


@contextmanager
def mlflow_process(database: Path, folder: Path) -> Iterator[str]:
    """Yields the URL of a server over a SQLite file; artifacts and the log go to `folder`."""
    log = folder / "log.txt"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", "0"]
    command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{database}"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    try:
        yield _url_in(log, process, r"running on (http://127\.0\.0\.1:[1-9]\d*)", "/health")
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(20)


@contextmanager
def moto_process(folder: Path) -> Iterator[str]:
    """Yields the URL of an S3 server in a process of its own; the log goes to `folder`."""
    log = folder / "log.txt"
    command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", "0"]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        yield _url_in(log, process, r"(http://127\.0\.0\.1:[1-9]\d*)", "/moto-api/")
    finally:
        process.kill()
        process.wait()


def _url_in(log: Path, process: subprocess.Popen[bytes], words: str, health: str) -> str:
    """Wait until a server has written its URL to its log, and answers there."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        found = re.search(words, log.read_text())
        if found:
            try:
                if requests.get(f"{found[1]}{health}", timeout=2).ok:
                    return found[1]
            except requests.ConnectionError:
                pass
        time.sleep(0.2)
    raise AssertionError(log.read_text())
