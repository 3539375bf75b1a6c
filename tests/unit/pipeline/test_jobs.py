"""A cluster's address before anything is sent there, and a cluster that has only just started."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest

from model.errors import InputError, ServiceError
from pipeline import jobs
from pipeline.jobs import Jobs

# What Ray answers while no node can run a driver.
NO_AGENT = "No available agent to submit job, please try again later."
BATCH: Any = SimpleNamespace(id="photos-1", uri="/batches/photos-1")


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # `Jobs` sets it; this takes that back
    monkeypatch.setattr(jobs.time, "sleep", lambda _: None)


@contextmanager
def head(answers: list[tuple[int, str]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yields the address of a Jobs API that gives these answers, and what was submitted to it."""
    submitted: list[dict[str, Any]] = []

    class Api(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            version = {"version": "4", "ray_version": "2", "ray_commit": "0", "session_name": ""}
            self._say(200, json.dumps(version if self.path == "/api/version" else []))

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            submitted.append(json.loads(self.rfile.read(length)))
            self._say(*answers.pop(0))

        def _say(self, status: int, text: str) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", submitted
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    "address", ["foo:bar", "http://127.0.0.1:99999", "ftp://head:8265", "http://[::1", "a..b:8265"]
)
def test_an_address_that_is_none_is_a_wrong_setting(address: str) -> None:
    with pytest.raises(InputError, match="must be http://host:port"):
        Jobs(address)


def test_a_cluster_that_has_just_started_is_asked_again() -> None:
    taken = json.dumps({"job_id": "1", "submission_id": "photos-1-j1"})
    with head([(500, NO_AGENT), (500, NO_AGENT), (200, taken)]) as (address, submitted):
        assert Jobs(address).submit(BATCH) == "photos-1-j1"
    assert [each["submission_id"] for each in submitted] == ["photos-1-j1"] * 3


def test_other_errors_and_a_start_that_takes_too_long_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with head([(500, "no such runtime environment")]) as (address, submitted):
        with pytest.raises(ServiceError, match="no such runtime environment"):
            Jobs(address).submit(BATCH)
        assert len(submitted) == 1
    monkeypatch.setattr(jobs, "START_SECONDS", -1.0)
    with (
        head([(500, NO_AGENT)]) as (address, _),
        pytest.raises(ServiceError, match="No available agent"),
    ):
        Jobs(address).submit(BATCH)
