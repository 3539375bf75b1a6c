"""A small HTTP server that speaks the Kubernetes API for RayJobs, for tests.

It keeps the objects as an API server does (versions, conflicts, deletion, watches over chunks), and
plays the operator from a script: every watch that is opened takes the next step. So nothing happens
by the clock, and whoever watches badly hears nothing.
"""

from __future__ import annotations

import json
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

PLACE = "/apis/ray.io/v1/namespaces/"
BREAK = "break"  # the connection breaks in the middle of an event
END = "end"  # the watch ends without an event
EXPIRED = "expired"  # an event of the kind ERROR: the version is too old
GONE = "gone"  # somebody deletes the object

Step = dict[str, Any] | str | Callable[[], Any]
"""A status that the operator writes, one of the words above, or what is called first."""


@dataclass
class KubernetesApi:
    """The server's state, and what a test says of it.

    Attributes:
        url: where it listens.
        jobs: the RayJobs by namespace and name.
        script: the operator's steps, taken one a watch.
        faults: answers to give before the real one: method, status, headers.
        asked: methods and paths of all requests.
        made: every object as it was created.
    """

    url: str = ""
    jobs: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    script: deque[Step] = field(default_factory=deque)
    faults: deque[tuple[str, int, dict[str, str]]] = field(default_factory=deque)
    asked: list[tuple[str, str]] = field(default_factory=list)
    made: list[dict[str, Any]] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)
    version: int = 1

    def put(self, namespace: str, job: dict[str, Any]) -> dict[str, Any]:
        """Store an object under a new version."""
        self.version += 1
        meta = {"uid": uuid.uuid4().hex, **job["metadata"], "resourceVersion": str(self.version)}
        kept = {**job, "metadata": {**meta, "namespace": namespace}}
        self.jobs[namespace, meta["name"]] = kept
        return kept

    def count(self, method: str) -> int:
        """Return how many requests of a method there were."""
        return sum(each == method for each, _ in self.asked)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    api: KubernetesApi

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_DELETE(self) -> None:
        self._answer()

    def _answer(self) -> None:
        api, parts = self.api, urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        watch = query.get("watch", "").lower() == "true"
        with api.lock:
            api.asked.append(("WATCH" if watch else self.command, parts.path))
            for fault in api.faults:
                if fault[0] == ("WATCH" if watch else self.command):
                    api.faults.remove(fault)
                    self._status(fault[1], "try again", fault[2])
                    return
        if not parts.path.startswith(PLACE):
            self._status(404, "the server could not find the requested resource")
            return
        namespace, _, name = parts.path.removeprefix(PLACE).partition("/rayjobs")
        name = name.strip("/")
        if watch:
            self._watch(namespace, query)
        elif self.command == "POST":
            self._create(namespace, json.loads(body))
        else:
            self._read_or_delete(namespace, name)

    def _create(self, namespace: str, job: dict[str, Any]) -> None:
        api = self.api
        with api.lock:
            name = job.get("metadata", {}).get("name", "")
            if job.get("kind") != "RayJob" or not 0 < len(name) <= 47:
                self._status(422, f"RayJob {name!r} is invalid")
            elif (namespace, name) in api.jobs:
                self._status(409, f"rayjobs.ray.io {name!r} already exists")
            else:
                api.made.append(job)
                self._send(201, api.put(namespace, job))

    def _read_or_delete(self, namespace: str, name: str) -> None:
        api = self.api
        with api.lock:
            job = api.jobs.get((namespace, name))
            if job is None:
                self._status(404, f"rayjobs.ray.io {name!r} not found")
            elif self.command == "DELETE":
                # It stays until its finalizers are done, which the next watch sees.
                stamped = {**job["metadata"], "deletionTimestamp": "2026-01-01T00:00:00Z"}
                self._send(200, api.put(namespace, {**job, "metadata": stamped}))
            else:
                self._send(200, job)

    def _watch(self, namespace: str, query: dict[str, str]) -> None:
        api = self.api
        name = query["fieldSelector"].removeprefix("metadata.name=")
        job = api.jobs.get((namespace, name))
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if job is not None and job["metadata"].get("deletionTimestamp"):
            step: Step = GONE
        elif job is not None and int(query["resourceVersion"]) < int(
            job["metadata"]["resourceVersion"]
        ):
            self._event("MODIFIED", job)  # it changed since it was read
            return
        else:
            step = api.script.popleft() if api.script else END
        if callable(step):
            step = step() or END
        if step == BREAK:
            self._chunk(b'{"type": "MODIFIED", "obj')
            self.wfile.flush()
            self.connection.close()
            self.close_connection = True
        elif step == EXPIRED:
            status = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old"}
            self._event("ERROR", status)
        elif step == GONE and job is not None:
            del api.jobs[namespace, name]
            self._event("DELETED", job)
        elif isinstance(step, dict) and job is not None:
            status = {**job.get("status", {}), **step}
            self._event("MODIFIED", api.put(namespace, {**job, "status": status}))
        else:
            self._chunk(b"")

    def _event(self, kind: str, job: dict[str, Any]) -> None:
        self._chunk(json.dumps({"type": kind, "object": job}).encode() + b"\n")
        self._chunk(b"")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def _status(self, code: int, message: str, headers: dict[str, str] | None = None) -> None:
        self._send(code, {"kind": "Status", "code": code, "message": message}, headers)

    def _send(self, code: int, document: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(document).encode()
        self.send_response(code)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def kubernetes_api() -> Iterator[KubernetesApi]:
    """Yield a server that runs in a thread of this process."""
    api = KubernetesApi()
    handler = type("Handler", (_Handler,), {"api": api})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    api.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield api
    finally:
        server.shutdown()
        server.server_close()
