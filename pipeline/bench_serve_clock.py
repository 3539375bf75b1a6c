"""How drawing is timed: images a second to files, calls one after the other, calls in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from pipeline import bench_measure as measure
from serve.pictures import encode_picture

ENCODERS = 4  # threads, as the endpoint has
LEAST = 3  # repetitions of whatever is timed


class Clock:
    """Times what draws, for so many seconds each; the first call never counts."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._pool = ThreadPoolExecutor(ENCODERS)

    def rate(self, draw: Callable[[], Iterable[np.ndarray]], size: int) -> dict[str, Any]:
        """Images a second to JPEG files, encoded while the next batch of `size` is drawn."""
        draw()
        files: list[Future[bytes]] = []
        count, began = 0, time.perf_counter()
        while count < LEAST or time.perf_counter() - began < self._seconds:
            files += [self._pool.submit(encode_picture, each, "jpeg") for each in draw()]
            count += 1
        for file in files:
            file.result()
        spent = time.perf_counter() - began
        return {"images_per_s": round(count * size / spent, 3), "repeated": count}

    def each(self, call: Callable[[], Any]) -> dict[str, float]:
        """Milliseconds of a call."""
        return self.in_turns([call])[0]

    def in_turns(self, given: Iterable[Callable[[], Any]]) -> list[dict[str, float]]:
        """Milliseconds of calls in turns: what else the machine does touches all of them alike."""
        calls = list(given)
        for call in calls:
            call()
        found: list[list[float]] = [[] for _ in calls]
        while len(found[0]) < LEAST or sum(map(sum, found)) < self._seconds:
            for call, times in zip(calls, found, strict=True):
                began = time.perf_counter()
                call()
                times.append(time.perf_counter() - began)
        return [measure.summary(times) for times in found]
