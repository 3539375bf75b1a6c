"""Two small tools of the caches: a byte budget, and one call at a time for each key."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class ByteLru(Generic[Key, Value]):
    """The most recently used values that fit a byte budget. Not safe between threads by itself."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.used = 0
        self._entries: OrderedDict[Key, tuple[Value, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Key) -> bool:
        return key in self._entries

    def get(self, key: Key) -> Value | None:
        """The value, which is now the most recently used; None when it is not here."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return entry[0]

    def put(self, key: Key, value: Value, size: int) -> None:
        """Keeps a value of `size` bytes, unless it alone is over the budget."""
        if key in self._entries:
            self.used -= self._entries.pop(key)[1]
        if size > self.budget:
            return
        self._entries[key] = (value, size)
        self.used += size
        while self.used > self.budget:
            self.used -= self._entries.popitem(last=False)[1][1]


class SingleFlight(Generic[Key, Value]):
    """Runs one call per key at a time; who asks meanwhile waits for that call's outcome."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._flights: dict[Key, Future[Value]] = {}

    def run(self, key: Key, call: Callable[[], Value]) -> Value:
        """The value of `call()`, or of a call with the same key that is on its way already."""
        with self._lock:
            flight = self._flights.get(key)
            mine = flight is None
            if flight is None:
                flight = self._flights[key] = Future()
        if mine:
            try:
                flight.set_result(call())
            except BaseException as error:
                flight.set_exception(error)
            finally:
                with self._lock:
                    del self._flights[key]
        return flight.result()
