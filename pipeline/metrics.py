"""What a batch tells Prometheus: counts, losses and cost, through Ray's exporter on every node.

Of bounded cardinality: no concept ids. Ray puts `ray_` before each name.
"""

from __future__ import annotations

from collections import Counter as Count
from collections.abc import Collection
from statistics import fmean
from typing import get_args

from components.train.state import ConceptState, State
from pipeline.run import ConceptResult


class BatchMetrics:
    """The metrics of one driver; each is the whole batch's.

    What only grows is told as a gauge as well: a counter of Ray's can't say 0, and to Prometheus
    the first number of a series is no increase, so concepts that end together would be lost.
    """

    def __init__(self) -> None:
        from ray.util.metrics import Gauge

        self._ended = Gauge(
            "echodistill_concepts_total",
            "Concepts that came to their end, by how (trained, already, failed)",
            tag_keys=("state",),
        )
        self._took = {
            "seconds": Gauge(
                "echodistill_training_seconds_total",
                "Training time of ended concepts; of a pack's, each has its share",
            ),
            "gpu_seconds": Gauge(
                "echodistill_gpu_seconds_total", "GPU time of ended concepts; 0 on CPUs"
            ),
            "cost": Gauge(
                "echodistill_cost_total",
                "Cost of that, in the currency of the run spec's cost.gpu_hour",
            ),
        }
        self._counts, self._sums = Count[str](), dict.fromkeys(self._took, 0.0)
        for state in ("trained", "already", "failed"):
            self._ended.set(0, {"state": state})
        for gauge in self._took.values():
            gauge.set(0)
        self._now = Gauge(
            "echodistill_concepts_now",
            "Concepts of the batch by what they are at",
            tag_keys=("state",),
        )
        self._loss = Gauge(
            "echodistill_loss", "Mean loss of the concepts that are trained", tag_keys=("name",)
        )
        self._progress = Gauge(
            "echodistill_progress", "Iterations done of all that the batch needs, from 0 to 1"
        )

    def ended(self, result: ConceptResult) -> None:
        """Count a concept that came to its end."""
        self._counts[result.state] += 1
        self._ended.set(self._counts[result.state], {"state": result.state})
        if result.state != "trained":  # what an earlier run took is not taken once more
            return
        for name, gauge in self._took.items():
            self._sums[name] += getattr(result, name) or 0.0
            gauge.set(self._sums[name])

    def now(self, states: Collection[ConceptState]) -> None:
        """Tell what all concepts are at."""
        counts = Count(one.state for one in states)
        for state in get_args(State):
            self._now.set(counts[state], {"state": state})
        training = [one for one in states if one.state == "training"]
        for name in {name for one in training for name in one.loss}:
            values = [one.loss[name] for one in training if name in one.loss]
            self._loss.set(fmean(values), {"name": name})
        shares = [
            1.0 if one.over else one.iteration / one.iterations if one.iterations else 0.0
            for one in states
        ]
        self._progress.set(fmean(shares) if shares else 1.0)
