"""What every request passes before and after its route: key, size, log line, last line of defence.

A plain ASGI layer around the FastAPI application, so that nothing, not even a bug in a route,
answers in another shape than OpenAI's or shows a traceback.
"""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse

from serve.api import ApiError, server_error
from serve.auth import ApiKeys
from serve.metrics import Metrics
from serve.page import PAGE_PATHS

log = logging.getLogger("echodistill.serve")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

# The page holds nothing of anybody's; what it asks for needs the key.
OPEN_PATHS = ("/healthz", *PAGE_PATHS)
LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def error_response(error: ApiError) -> JSONResponse:
    """An OpenAI error object as an HTTP answer."""
    return JSONResponse(error.body(), error.status, headers=error.headers())


def our_fault(request_id: str) -> ApiError:
    """What a client is told of an error of ours: where to find it in the log."""
    return server_error(f"Something went wrong here (request {request_id}).")


class Guard:
    """ASGI middleware.

    Args:
        app: the application inside.
        keys: who may draw; with no keys, only this machine may (its name in the Host header).
        max_body: largest request body in bytes.
        metrics: where requests are counted.
        access_log: takes one JSON line a request; never a prompt.
        routes: paths that are counted by their own name.
    """

    def __init__(
        self,
        app: App,
        *,
        keys: ApiKeys,
        max_body: int,
        metrics: Metrics,
        access_log: logging.Logger,
        routes: frozenset[str],
    ) -> None:
        self._app = app
        self._keys = keys
        self._max_body = max_body
        self._metrics = metrics
        self._access_log = access_log
        self._routes = routes

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answers one HTTP request; anything else (lifespan) goes straight through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        headers = Headers(scope=scope)
        given = headers.get("x-request-id")
        known = given is not None and _REQUEST_ID.fullmatch(given)
        request_id = str(given) if known else uuid.uuid4().hex
        # Routes add what they know to this; it becomes the log line.
        facts: dict[str, Any] = {"request_id": request_id}
        scope.setdefault("state", {})["facts"] = facts
        status = 0

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if given is None:  # Ray's proxy gives every request an id, and returns that
                    MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._answer(scope, headers, receive, send_marked)
        except Exception:
            log.exception("request %s failed", request_id)
            if status == 0:
                await error_response(our_fault(request_id))(scope, receive, send_marked)
        finally:
            # Without a status the client went away before there was an answer (499, as nginx).
            self._record(scope, facts, status or 499, time.perf_counter() - start)

    async def _answer(
        self, scope: MutableMapping[str, Any], headers: Headers, receive: Receive, send: Send
    ) -> None:
        try:
            if scope["path"] not in OPEN_PATHS:
                self._check_host(headers.get("host", ""))
                scope["state"]["facts"]["key"] = self._keys.owner(headers.get("authorization"))
            receive = await self._bounded(headers, receive)
        except ApiError as error:
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check_host(self, host: str) -> None:
        # Without keys only this machine may ask. A web page that a user of it visits could reach
        # the endpoint through a name of its own (DNS rebinding); the Host header gives it away.
        name = re.sub(r":\d+$", "", host)
        if not self._keys.required and name not in LOCAL_NAMES:
            raise ApiError(
                403,
                "This endpoint has no API keys, so it answers under a name of this machine only.",
                code="host_refused",
            )

    async def _bounded(self, headers: Headers, receive: Receive) -> Receive:
        """Reads the whole body, up to the limit, and gives it back as one message."""
        too_large = ApiError(
            413, f"The request is over {self._max_body} bytes.", code="request_too_large"
        )
        declared = headers.get("content-length", "0")
        if not declared.isdecimal() or int(declared[:20]) > self._max_body:
            raise too_large
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                break
            body += message.get("body", b"")
            if len(body) > self._max_body:
                raise too_large
            more = message.get("more_body", False)
        replayed = False

        async def replay() -> Message:
            nonlocal replayed
            if not replayed:
                replayed = True
                return {"type": "http.request", "body": bytes(body), "more_body": False}
            return await receive()

        return replay

    def _record(
        self, scope: MutableMapping[str, Any], facts: dict[str, Any], status: int, seconds: float
    ) -> None:
        route = scope["path"] if scope["path"] in self._routes else "other"
        self._metrics.requests.labels(route, str(status)).inc()
        self._metrics.latency.labels(route).observe(seconds)
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "method": scope["method"],
            "route": route,
            "status": status,
            "ms": round(seconds * 1000, 1),
            **facts,
        }
        self._access_log.info(json.dumps(line))
