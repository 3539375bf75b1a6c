"""What a run says while it goes on: small events, rendered by whoever listens."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """One thing that happened.

    `stage` is one word ("check", "train", "register", "evaluate", "promote", "serve", ...),
    `subject` a concept id or a pack's name, `done` of `total` a count of iterations, files or
    pictures when the stage can be counted, and `text` a sentence without a full stop.
    """

    stage: str
    subject: str = ""
    text: str = ""
    done: int | None = None
    total: int | None = None


Progress = Callable[[Event], None]


class StageClock:
    """Passes events on and adds up the seconds between the first event of one stage and the next.

    `seconds` holds them by stage, in the order in which the stages were first heard of.
    """

    def __init__(self, listener: Progress, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds: dict[str, float] = {}
        self._listener = listener
        self._clock = clock
        self._stage = ""
        self._since = clock()

    def __call__(self, event: Event) -> None:
        """Hear an event."""
        now = self._clock()
        if event.stage != self._stage:
            if self._stage:
                self.seconds[self._stage] += now - self._since
            self.seconds.setdefault(event.stage, 0.0)
            self._stage, self._since = event.stage, now
        self._listener(event)


def silent(event: Event) -> None:
    """Listens and says nothing."""
