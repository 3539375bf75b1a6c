"""What a run says while it goes on: small events, rendered by whoever listens."""

from __future__ import annotations

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


def silent(event: Event) -> None:
    """Listens and says nothing."""
