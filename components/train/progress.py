"""Live progress: what rank 0 says while it trains reaches the caller through a small actor."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

_PERIOD = 0.5  # seconds between two looks at the board


@dataclass(frozen=True)
class TrainEvent:
    """What one concept is at.

    Attributes:
        concept_id: the concept's id.
        iteration: iterations done, counted over all stages.
        iterations: of how many.
        stage: `load`, `main`, `echo`, `done` or `failed`.
        losses: means over the iterations since the last event, by name.
        seconds_per_iteration: of the whole pack; 0 when not known.
        text: what happened, or "".
        worker: the machine that trains it (of several, the first worker's).

    """

    concept_id: str
    iteration: int
    iterations: int
    stage: str
    losses: dict[str, float] = field(default_factory=dict)
    seconds_per_iteration: float = 0.0
    text: str = ""
    worker: str = ""


class _Board:
    """The actor: a list that one side fills and the other empties."""

    def __init__(self) -> None:
        self._events: list[TrainEvent] = []
        self._fatal: tuple[str, str] | None = None

    def put(self, events: list[TrainEvent]) -> None:
        self._events += events

    def take(self) -> list[TrainEvent]:
        events, self._events = self._events, []
        return events

    def fail(self, kind: str, message: str) -> None:
        self._fatal = (kind, message)

    def fatal(self) -> tuple[str, str] | None:
        return self._fatal


def make_board() -> Any:
    """Start the actor, on this process's node; it ends when its last handle goes."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # On another node it could die alone, and the workers would find nobody to talk to.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "max_restarts": 0, "scheduling_strategy": here}
    return ray.remote(_Board).options(**options).remote()


@contextmanager
def relayed(board: Any, progress: Callable[[TrainEvent], None] | None) -> Iterator[None]:
    """Hand the board's events to `progress`, in order, from a thread, while the block runs."""
    if progress is None:
        yield
        return
    import ray

    stop = threading.Event()

    def relay() -> None:
        last = False
        while not last:
            last = stop.wait(_PERIOD)  # once more after the end, for what came last
            try:
                events = ray.get(board.take.remote(), timeout=10)
            except Exception:  # the cluster is going down: there is nothing left to tell
                return
            for event in events:
                progress(event)

    thread = threading.Thread(target=relay, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(15.0)
