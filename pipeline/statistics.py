"""Means over concepts with their 95 % intervals (Student's t)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean and the half width of its interval; None where one value gives none."""

    mean: float
    half: float | None

    @property
    def above_zero(self) -> bool:
        """Tell whether the whole interval is over 0."""
        return self.half is not None and self.mean - self.half > 0

    def as_json(self) -> dict[str, float | None]:
        """Give mean and half width, rounded."""
        return {
            "mean": round(self.mean, 4),
            "half": None if self.half is None else round(self.half, 4),
        }


def estimate(values: Sequence[float]) -> Estimate:
    """Estimate the mean of what was measured once a concept."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Estimate(mean, None)
    from scipy.stats import t

    error = statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(mean, float(t.ppf((1 + LEVEL) / 2, len(values) - 1)) * error)


def paired(mine: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """Estimate the mean difference of two methods on the same concepts."""
    return estimate([a - b for a, b in zip(mine, theirs, strict=True)])
