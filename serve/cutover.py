"""Moved aliases: the version before draws until the new one is loaded, then no more.

So nobody waits for a load that an alias's move has caused, and from one request to the next the
concept has changed. The version before may draw for `seconds` at most, counted from when the alias
was last known to name it: where nobody has asked for longer, the first who does waits for the load.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from serve.registry import Pinned

KEPT = 100_000


@dataclass(frozen=True)
class _Served:
    pinned: Pinned
    at: float  # when the alias was last known to name it


class CutOver:
    """What each alias draws with. For one thread (the painter's event loop)."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._served: OrderedDict[tuple[str, str], _Served] = OrderedDict()

    def serves(self, concept: str, pointer: str, pinned: Pinned) -> None:
        """Notes that the alias names a version that is loaded."""
        key = (concept, pointer)
        self._served[key] = _Served(pinned, self._clock())
        self._served.move_to_end(key)
        if len(self._served) > KEPT:
            self._served.popitem(last=False)

    def before(self, concept: str, pointer: str, pinned: Pinned) -> Pinned | None:
        """The version that may still draw while `pinned`, which the alias names now, is loaded."""
        served = self._served.get((concept, pointer))
        if served is None or served.pinned == pinned:
            return None
        return served.pinned if self._clock() - served.at < self._seconds else None
