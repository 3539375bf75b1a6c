"""A small HTTP proxy before the S3 server that breaks chosen answers on purpose."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


@dataclass
class Faults:
    """What to do to the next answers for objects: a list of "cut", "flip", "503" and "ok"."""

    plan: list[str] = field(default_factory=list)
    served: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def next(self, path: str) -> str:
        with self.lock:
            self.served.append(path)
            return self.plan.pop(0) if self.plan else "ok"


@contextmanager
def faulty_proxy(endpoint: str, faults: Faults) -> Iterator[str]:
    """Yield the URL of a proxy to ``endpoint`` that applies ``faults`` to GETs of objects."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(endpoint, faults))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(endpoint: str, faults: Faults) -> Callable[..., BaseHTTPRequestHandler]:
    upstream = urlsplit(endpoint).netloc

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            answer, _ = self._ask()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                self.send_header(name, value)
            self.end_headers()

        def do_GET(self) -> None:
            is_object = "list-type" not in self.path and self.path.count("/") > 1
            fault = faults.next(self.path) if is_object else "ok"
            answer, body = self._ask()
            if fault == "503":
                self.send_response(503)
                body = b"<Error><Code>SlowDown</Code><Message>slow down</Message></Error>"
                kept = []
            else:
                self.send_response(answer.status)
                dropped = ("content-length", "transfer-encoding", "connection")
                kept = [(k, v) for k, v in answer.getheaders() if k.lower() not in dropped]
            for name, value in kept:
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Connection", "close")
            self.end_headers()
            if fault == "cut":
                body = body[: len(body) // 2]
            if fault == "flip":
                body = body[:-1] + bytes([body[-1] ^ 1])
            self.wfile.write(body)
            self.close_connection = True

        def _ask(self) -> tuple[http.client.HTTPResponse, bytes]:
            connection = http.client.HTTPConnection(upstream)
            headers = {k: v for k, v in self.headers.items() if k.lower() != "accept-encoding"}
            connection.request(self.command, self.path, headers=headers)
            answer = connection.getresponse()
            body = answer.read()
            connection.close()
            return answer, body

    return Handler
