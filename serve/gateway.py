"""The HTTP face: routes, limits and the queue, around anything that paints.

No Ray here: `make_http` takes the painter as an object with three coroutines, so the same
application runs inside Ray Serve and inside a test.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import math
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from serve.api import (
    LARGEST_SEED,
    ApiError,
    ConceptCard,
    ErrorBody,
    ImageDatum,
    ImageRequest,
    ImageResponse,
    ModelList,
    busy,
    no_version,
    parse_model,
    unknown_model,
    validation_error,
)
from serve.auth import ApiKeys
from serve.guard import App, Guard, error_response, our_fault
from serve.limits import Allowance, Limits
from serve.metrics import CONTENT_TYPE_LATEST, Metrics
from serve.orders import Order, Painted, PainterClient, Shown
from serve.page import add_page
from serve.settings import ServeSettings
from serve.traces import open_tracer, trace_answer

IMAGES_PATH = "/v1/images/generations"
LONGEST_RETRY = 60
PAGE = 1000  # models in one answer


class Queue:
    """Counts pictures accepted and not yet answered, and refuses those over the limit."""

    def __init__(self, limit: int, metrics: Metrics) -> None:
        self.pending = 0
        self._limit = limit
        self._metrics = metrics
        self._seconds_each = 0.1  # a running mean, once there are answers

    @contextmanager
    def place(self, pictures: int) -> Iterator[None]:
        """Holds a place for `pictures`; ApiError 429 when there is none."""
        if self.pending + pictures > self._limit:
            wait = math.ceil(self.pending * self._seconds_each)
            raise busy(
                f"The queue is full ({self.pending} pictures wait): try again in a moment.",
                status=429,
                retry_after=min(max(wait, 1), LONGEST_RETRY),
            )
        self._add(pictures)
        start, ahead = time.perf_counter(), self.pending
        try:
            yield
            spent = (time.perf_counter() - start) / ahead
            self._seconds_each += 0.1 * (spent - self._seconds_each)
        finally:
            self._add(-pictures)

    def _add(self, pictures: int) -> None:
        self.pending += pictures
        self._metrics.pending.set(self.pending)


def make_http(painter: PainterClient, settings: ServeSettings, keys: ApiKeys) -> App:
    """The whole ASGI application over a painter."""
    metrics = Metrics()
    app = FastAPI(
        title="EchoDistill",
        description="One-step pictures of personal concepts, in the shape of the OpenAI API.",
        # The usual documentation pages load scripts from other hosts; the document itself stays.
        docs_url=None,
        redoc_url=None,
        responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}},
    )
    _add_error_shapes(app)
    _add_images(app, painter, settings, metrics, keys)
    _add_lists(app, painter, keys)
    _add_facts(app, painter, metrics)
    add_page(app)
    return Guard(
        app,
        keys=keys,
        max_body=settings.max_body,
        metrics=metrics,
        access_log=_access_log(settings),
        routes=frozenset(route.path for route in app.routes if hasattr(route, "path")),
    )


def _add_error_shapes(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def _refusal(_: Request, error: ApiError) -> JSONResponse:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def _wrong_body(_: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(validation_error(error.errors()))

    @app.exception_handler(Exception)
    async def _our_fault(request: Request, _: Exception) -> JSONResponse:
        # Starlette raises it once more after this answer; the guard puts it in the log.
        return error_response(our_fault(request.state.facts["request_id"]))

    @app.exception_handler(HTTPException)
    async def _wrong_route(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 404:
            message, code = f"There is no {request.method} route here.", "unknown_url"
        elif error.status_code == 405:
            message, code = f"This route does not take {request.method}.", "method_not_allowed"
        else:
            message, code = "The request could not be read.", "invalid_request"
        response = error_response(ApiError(error.status_code, message, code=code))
        response.headers.update(error.headers or {})
        return response


def _add_images(
    app: FastAPI,
    painter: PainterClient,
    settings: ServeSettings,
    metrics: Metrics,
    keys: ApiKeys,
) -> None:
    queue = Queue(settings.max_queue, metrics)
    allowance = Allowance()
    tracer = open_tracer(settings.traces)

    @app.post(IMAGES_PATH, response_model=ImageResponse)
    async def create_images(body: ImageRequest, request: Request) -> Response:
        """Draws pictures of a concept, or with the bare base."""
        start, start_ns = time.perf_counter(), time.time_ns()
        order = _order(body, settings)
        facts = request.state.facts
        limits = _limits(request, keys)
        wanted = parse_model(order.model, settings.base)
        if wanted.concept is not None and not limits.allow(wanted.concept):
            # As if it were not there: who may not use a concept need not learn of it.
            raise no_version(wanted)
        allowance.take(facts.get("key") or "", limits, order.n)
        facts.update(
            n=order.n, steps=order.steps, seed=order.seed, output_format=order.output_format
        )
        with queue.place(order.n):
            try:
                async with asyncio.timeout(settings.request_seconds):
                    painted = await painter.paint(order)
            except TimeoutError:
                raise busy(
                    "The pictures took too long: try again later.", status=503, retry_after=10
                ) from None
        if isinstance(painted, ApiError):
            raise painted
        metrics.answered(painted, order.steps)
        answer = _answer(order, painted, time.perf_counter() - start)
        facts.update(
            model=answer.model,
            version=answer.version,
            adapter_sha256=answer.adapter_sha256,
            batches=painted.batches,
        )
        if tracer is not None:
            trace_answer(tracer, request.headers, answer, painted, start_ns)
        # Validated when it was made: not validated once more, as these bodies are megabytes.
        return Response(
            answer.model_dump_json(), media_type="application/json", headers=_headers(answer)
        )


def _add_lists(app: FastAPI, painter: PainterClient, keys: ApiKeys) -> None:
    @app.get("/v1/models")
    async def list_models(
        request: Request,
        limit: Annotated[int, Query(ge=1, le=PAGE)] = PAGE,
        after: Annotated[str | None, Query(max_length=160)] = None,
    ) -> ModelList:
        """The base, and every concept that has a champion, by id; in pages."""
        page = await painter.models(Shown(_limits(request, keys), limit, after))
        if isinstance(page, ApiError):
            raise page
        return page

    @app.get("/v1/concepts/{concept_id}")
    async def show_concept(concept_id: str, request: Request) -> ConceptCard:
        """A concept's words and versions."""
        if not _limits(request, keys).allow(concept_id):
            raise unknown_model(concept_id, "no such concept is registered")
        card = await painter.concept(concept_id)
        if isinstance(card, ApiError):
            raise card
        return card

    @app.get("/v1/concepts/{concept_id}/preview", response_class=Response)
    async def show_preview(concept_id: str, request: Request) -> Response:
        """The PNG that came with the concept's champion."""
        if not _limits(request, keys).allow(concept_id):
            raise unknown_model(concept_id, "no such concept has a champion")
        picture = await painter.preview(concept_id)
        if isinstance(picture, ApiError):
            raise picture
        return Response(picture, media_type="image/png", headers={"cache-control": "no-cache"})


def _add_facts(app: FastAPI, painter: PainterClient, metrics: Metrics) -> None:
    @app.get("/healthz")
    async def health() -> dict[str, Any]:
        """200 while pictures can be drawn, shown by one that was."""
        try:
            return await painter.health()
        except ApiError:
            raise
        except Exception:
            logging.getLogger("echodistill.serve").exception("the painter is not well")
            raise busy("Pictures cannot be drawn now.", status=503, retry_after=10) from None

    @app.get("/metrics")
    async def prometheus() -> Response:
        """Counters and latencies for Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _limits(request: Request, keys: ApiKeys) -> Limits:
    """What the request's key may do."""
    return keys.limits.get(request.state.facts.get("key") or "", Limits())


def _order(body: ImageRequest, settings: ServeSettings) -> Order:
    """The request with defaults filled in; ApiError 400 when it is over a limit."""
    n = 1 if body.n is None else body.n
    if n > settings.max_n:
        raise _over("n", f"at most {settings.max_n} pictures a request")
    if len(body.prompt) > settings.max_prompt:
        raise _over("prompt", f"at most {settings.max_prompt} characters")
    seed = secrets.randbelow(2**31) if body.seed is None else body.seed
    if seed + n - 1 > LARGEST_SEED:
        raise _over("seed", f"picture i has seed + i, which must not pass {LARGEST_SEED}")
    return Order(
        model=body.model,
        prompt=body.prompt,
        n=n,
        seed=seed,
        steps=body.num_inference_steps or 1,
        size=body.size,
        output_format=body.output_format or "png",
    )


def _over(param: str, limit: str) -> ApiError:
    return ApiError(
        400, f"Invalid value for '{param}': {limit}.", code="invalid_value", param=param
    )


def _answer(order: Order, painted: Painted, total: float) -> ImageResponse:
    pinned = painted.pinned
    return ImageResponse(
        created=int(time.time()),
        data=[
            ImageDatum(
                b64_json=base64.b64encode(file).decode(),
                revised_prompt=painted.prompt,
                seed=order.seed + i,
            )
            for i, file in enumerate(painted.files)
        ],
        output_format=order.output_format,
        size=painted.size,
        model=painted.base if pinned is None else f"{pinned.concept}@{pinned.version}",
        base=painted.base,
        concept=None if pinned is None else pinned.concept,
        version=None if pinned is None else pinned.version,
        adapter_sha256=None if pinned is None else pinned.sha256,
        num_inference_steps=order.steps,
        timing_ms={
            name: round(seconds * 1000, 2)
            for name, seconds in {**painted.seconds, "total": total}.items()
        },
    )


def _headers(answer: ImageResponse) -> dict[str, str]:
    """The answer's origin and timing once more, for who does not read bodies."""
    facts = {
        "model": answer.model,
        "base": answer.base,
        "concept": answer.concept,
        "version": answer.version,
        "adapter-sha256": answer.adapter_sha256,
        "seeds": ",".join(str(item.seed) for item in answer.data),
    }
    headers = {f"x-echodistill-{name}": text for name, text in facts.items() if text is not None}
    stages = (f"{name};dur={ms}" for name, ms in answer.timing_ms.items())
    return {**headers, "server-timing": ", ".join(stages)}


def _access_log(settings: ServeSettings) -> logging.Logger:
    """A logger of bare lines to the settings' file or standard error."""
    logger = logging.Logger("echodistill.access", logging.INFO)
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    if settings.access_log is not None:
        settings.access_log.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(settings.access_log, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    return logger
