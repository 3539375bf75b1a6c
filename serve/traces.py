"""OpenTelemetry traces of answered orders, when the settings ask for them.

One span an answer, with one for each stage below it; a client's `traceparent` header makes them
part of its own trace. No prompts, no keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model.errors import InputError
from serve.api import ImageResponse
from serve.orders import Painted

SERVICE = "echodistill"


def open_tracer(kind: str) -> Any:
    """A tracer that sends spans to `otlp` or `console`; None for an empty kind.

    Raises InputError when a package is missing.
    """
    if not kind:
        return None
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter

        exporter: Any = ConsoleSpanExporter
        if kind == "otlp":
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

            exporter = OTLPSpanExporter
    except ImportError as error:
        raise InputError(
            f"traces need a package that is not installed ({error.name}): install "
            "opentelemetry-sdk and opentelemetry-exporter-otlp-proto-http."
        ) from None
    provider = TracerProvider(resource=Resource.create({"service.name": SERVICE}))
    provider.add_span_processor(BatchSpanProcessor(exporter()))
    return provider.get_tracer("echodistill.serve")


def trace_answer(
    tracer: Any,
    headers: Mapping[str, str],
    answer: ImageResponse,
    painted: Painted,
    start_ns: int,
) -> None:
    """Records an answer's spans; stages follow one another from `start_ns` on."""
    from opentelemetry.trace import SpanKind, set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    span = tracer.start_span(
        "images",
        context=TraceContextTextMapPropagator().extract(headers),
        kind=SpanKind.SERVER,
        start_time=start_ns,
        attributes={
            "echodistill.model": answer.model,
            "echodistill.adapter_sha256": answer.adapter_sha256 or "",
            "echodistill.adapter_level": painted.level,
            "echodistill.steps": answer.num_inference_steps,
            "echodistill.pictures": len(answer.data),
            "echodistill.batch": max(painted.batches),
        },
    )
    inside, at = set_span_in_context(span), start_ns
    for stage, seconds in painted.seconds.items():
        part = tracer.start_span(stage, context=inside, start_time=at)
        at += int(seconds * 1e9)
        part.end(end_time=at)
    span.end(end_time=start_ns + int(answer.timing_ms["total"] * 1e6))
