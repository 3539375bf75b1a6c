"""A small HTTP proxy before a real server (S3, MLflow) that breaks answers on purpose."""

from __future__ import annotations

import http.client
import random
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>slow down</Message></Error>"
UNABLE = b"<Error><Code>NotImplemented</Code><Message>not implemented</Message></Error>"
KINDS = (
    "503",  # a gateway's page instead of an answer
    "slow",  # S3's 503 SlowDown
    "drop",  # the connection ends before the server hears of the request
    "lose",  # the server does what is asked, and its answer gets lost
    "cut",  # half of the body arrives
    "flip",  # the body arrives with a wrong bit
    "late",  # nothing comes for `late_seconds`
    "unable",  # the 501 of a store that can't do what is asked
)


def object_reads(method: str, path: str) -> bool:
    """Picks the GETs of S3 objects, not of listings."""
    return method == "GET" and "list-type" not in path and path.count("/") > 1


def everything(method: str, path: str) -> bool:
    return True


@dataclass
class Faults:
    """What to do to the answers that `only` picks: first `plan`, then by chance.

    Attributes:
        plan: names of KINDS and "ok", one an answer.
        only: which requests may be broken.
        share: how many of the rest are broken, 0 to 1, by a generator of `seed`.
        kinds: what is drawn from.
        late_seconds: how long a late answer takes.
        away: nobody is there at all.
        served: the paths of the requests that `only` picked.
        done: how often each fault happened.
    """

    plan: list[str] = field(default_factory=list)
    only: Callable[[str, str], bool] = object_reads
    share: float = 0.0
    kinds: tuple[str, ...] = ("503", "slow", "drop", "lose", "cut")
    seed: int = 0
    late_seconds: float = 5.0
    away: threading.Event = field(default_factory=threading.Event)
    served: list[str] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    closed: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._random = random.Random(self.seed)

    def next(self, method: str, path: str) -> str:
        with self._lock:
            kind = self._next(method, path)
            self.done[kind] += 1
            return kind

    def _next(self, method: str, path: str) -> str:
        if self.away.is_set():
            return "drop"
        if not self.only(method, path):
            return "ok"
        self.served.append(path)
        if self.plan:
            return self.plan.pop(0)
        return self._random.choice(self.kinds) if self._random.random() < self.share else "ok"


@contextmanager
def faulty_proxy(endpoint: str, faults: Faults, port: int = 0) -> Iterator[str]:
    """Yields the URL of a proxy to `endpoint` that applies `faults`."""
    server = _Server(("127.0.0.1", port), _handler(urlsplit(endpoint).netloc, faults))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        faults.closed.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *_: object) -> None:
        """A client that has gone away is no news."""


def _handler(upstream: str, faults: Faults) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def handle_one_request(self) -> None:
            super().handle_one_request()
            self.close_connection = True

        def _serve(self) -> None:
            fault = faults.next(self.command, self.path)
            sent = self._request_body()
            if fault in ("drop", "late"):
                if fault == "late":
                    faults.closed.wait(faults.late_seconds)
                self._hang_up()
                return
            if fault in ("503", "slow"):
                body = SLOW_DOWN if fault == "slow" else b"<html>Service Unavailable</html>"
                self._answer(503, [("Content-Type", "application/xml")], body, body)
                return
            if fault == "unable":
                self._answer(501, [("Content-Type", "application/xml")], UNABLE, UNABLE)
                return
            status, headers, body = self._ask(sent)
            if fault == "lose":
                self._hang_up()
                return
            part = body
            if fault == "cut" and body:
                part = body[: len(body) // 2]
            if fault == "flip" and body:
                part = body[:-1] + bytes([body[-1] ^ 1])
            self._answer(status, headers, body, part)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = do_PATCH = _serve

        def _hang_up(self) -> None:
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

        def _request_body(self) -> bytes:
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            while self.rfile.readline().strip():  # trailers
                pass
            return body

        def _ask(self, sent: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
            connection = http.client.HTTPConnection(upstream)
            dropped = ("accept-encoding", "transfer-encoding", "content-length", "connection")
            headers = {k: v for k, v in self.headers.items() if k.lower() not in dropped}
            if sent or self.command in ("PUT", "POST", "PATCH"):
                headers["Content-Length"] = str(len(sent))
            connection.request(self.command, self.path, body=sent or None, headers=headers)
            answer = connection.getresponse()
            body = answer.read()
            connection.close()
            hops = ("transfer-encoding", "connection")
            if self.command != "HEAD":  # whose answer tells the size of what it has not
                hops += ("content-length",)
            kept = [(k, v) for k, v in answer.getheaders() if k.lower() not in hops]
            return answer.status, kept, body

        def _answer(
            self, status: int, headers: list[tuple[str, str]], whole: bytes, part: bytes
        ) -> None:
            self.send_response_only(status)
            for name, value in headers:
                self.send_header(name, value)
            if not any(name.lower() == "content-length" for name, _ in headers):
                self.send_header("Content-Length", str(len(whole)))
            self.send_header("Connection", "close")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(part)

    return Handler
