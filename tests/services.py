"""Real servers as processes, for tests: `mlflow server`, and moto's S3."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import requests


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
