"""Prometheus metrics of one gateway process, of bounded cardinality: no concept ids, no prompts."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from serve.orders import Painted

__all__ = ["CONTENT_TYPE_LATEST", "Metrics"]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_BATCHES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counters and latencies; each instance has a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "echodistill_requests",
            "HTTP requests by route and status",
            ["route", "status"],
            registry=self._registry,
        )
        self.latency = Histogram(
            "echodistill_request_seconds",
            "Time from request to answer",
            ["route"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.stages = Histogram(
            "echodistill_stage_seconds",
            "Time in each stage of an answered order",
            ["stage"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.pictures = Counter(
            "echodistill_pictures",
            "Pictures answered, by steps",
            ["steps"],
            registry=self._registry,
        )
        self.batches = Histogram(
            "echodistill_batch_size",
            "Pictures in the forward of each answered picture",
            buckets=_BATCHES,
            registry=self._registry,
        )
        self.mixes = Histogram(
            "echodistill_batch_adapters",
            "Different adapters in the batch of each answered picture",
            buckets=_BATCHES,
            registry=self._registry,
        )
        self.keys_values = Counter(
            "echodistill_keys_values",
            "Answered pictures by whether their keys and values were kept from before",
            ["found"],
            registry=self._registry,
        )
        self.device_bytes = Gauge(
            "echodistill_device_bytes",
            "GPU memory that tensors took in the replica that answered last",
            registry=self._registry,
        )
        self.adapters = Counter(
            "echodistill_adapters",
            "Answered orders by where their adapter was found (none: the base drew)",
            ["level"],
            registry=self._registry,
        )
        self.pending = Gauge(
            "echodistill_pending_pictures",
            "Pictures accepted and not yet answered",
            registry=self._registry,
        )

    def answered(self, painted: Painted, steps: int) -> None:
        """Counts an answered order."""
        self.pictures.labels(str(steps)).inc(len(painted.files))
        self.adapters.labels(painted.level).inc()
        for stage, seconds in painted.seconds.items():
            self.stages.labels(stage).observe(seconds)
        for batch in painted.batches:
            self.batches.observe(batch)
        for mix in painted.mixes:
            self.mixes.observe(mix)
        self.keys_values.labels("yes").inc(painted.kept)
        self.keys_values.labels("no").inc(len(painted.files) - painted.kept)
        if painted.device_bytes is not None:
            self.device_bytes.set(painted.device_bytes)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)
