"""What aliases point to: believed for a moment, kept while the registry is away.

An answer of the registry is used again for `alias_seconds`. Then it is asked anew, in a thread of
its own: who has an older answer waits `registry_seconds` at most, and not at all once the registry
is known to be away, so that a dead or slow registry never stops the drawing. What is often asked
for is asked anew ahead of time, so that nobody waits for it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from typing import Any, Protocol

from model.errors import ServiceError
from serve.registry import Listed, Pinned, VersionFacts

log = logging.getLogger("echodistill.serve")
ANSWERS_KEPT = 100_000
AHEAD = 0.5  # of the time for which an answer is believed
_LISTING = ("", "")  # the key under which the list of concepts is remembered
_VERSIONS = "\0versions"  # the pointer under which a concept's versions are: no alias is called so


class VersionSource(Protocol):
    """Where versions are looked up; see `serve.registry.Registry`."""

    def find(self, concept: str, pointer: str) -> Pinned | None:
        """The version that a pointer names now."""

    def concepts(self) -> list[Listed]:
        """Every concept with a champion."""

    def versions(self, concept: str) -> list[VersionFacts] | None:
        """Every version of a concept."""


@dataclass(frozen=True)
class _Answer:
    value: Any
    at: float  # seconds of the clock


class Pointers:
    """The registry's answers, remembered. All methods may be called from any thread."""

    def __init__(
        self,
        source: VersionSource,
        *,
        alias_seconds: float,
        registry_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.registry_away = False
        self._source = source
        self._alias_seconds = alias_seconds
        self._registry_seconds = registry_seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._answers: OrderedDict[tuple[str, str], _Answer] = OrderedDict()
        self._asking: dict[tuple[str, str], Future[Any]] = {}
        self._threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="registry")

    def close(self) -> None:
        """Lets the threads go."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def known(self, concept: str, pointer: str) -> Pinned | None:
        """What `resolve` would say without asking the registry; None when it would have to ask.

        An answer that will be old soon is asked for anew, and nobody waits for that.
        """
        key = (concept, pointer)
        answer = self._remembered(key)
        if answer is None or self._old(answer):
            return None
        if self._clock() - answer.at >= self._alias_seconds * AHEAD and not self.registry_away:
            self._start(key, lambda: self._source.find(concept, pointer))
        return answer.value

    def resolve(self, concept: str, pointer: str) -> Pinned | None:
        """The version that an alias or number points to; None when there is none. Blocks.

        Raises ServiceError when the registry is away and never told, and what the source raises
        for a version that cannot be served.
        """
        return self._ask((concept, pointer), lambda: self._source.find(concept, pointer))

    def concepts(self) -> list[Listed]:
        """Every concept with a champion, by id. Raises ServiceError as `resolve` does."""
        return self._ask(_LISTING, self._source.concepts)

    def versions(self, concept: str) -> list[VersionFacts] | None:
        """Every version of a concept, the newest first; None when there is no such concept.

        Raises ServiceError as `resolve` does.
        """
        return self._ask((concept, _VERSIONS), lambda: self._source.versions(concept))

    def _ask(self, key: tuple[str, str], call: Callable[[], Any]) -> Any:
        answer = self._remembered(key)
        if answer is not None and not self._old(answer):
            return answer.value
        # "There is none" is no older answer worth keeping when the registry cannot be asked.
        fallback = answer is not None and answer.value is not None
        patience = None
        if fallback:
            patience = 0.0 if self.registry_away else self._registry_seconds
        asking = self._start(key, call)
        try:
            return asking.result(patience)
        except FutureTimeout:
            with self._lock:
                if self._asking.get(key) is asking:  # it did not come back this very moment
                    self._set_away(True)
        except ServiceError:
            if not fallback:
                raise
        assert answer is not None
        return answer.value

    def _start(self, key: tuple[str, str], call: Callable[[], Any]) -> Future[Any]:
        with self._lock:
            asking = self._asking.get(key)
            if asking is None:
                asking = self._threads.submit(self._answer, key, call)
                self._asking[key] = asking
            return asking

    def _answer(self, key: tuple[str, str], call: Callable[[], Any]) -> Any:
        at = self._clock()
        try:
            value = call()
        except BaseException as error:
            with self._lock:
                del self._asking[key]
                if isinstance(error, ServiceError):
                    self._set_away(True)
                    self._renew(key)
            raise
        with self._lock:
            del self._asking[key]
            self._set_away(False)
            self._keep(key, _Answer(value, at))
        return value

    def _renew(self, key: tuple[str, str]) -> None:
        """Believes an older answer for another while, so that a dead registry is asked seldom."""
        answer = self._answers.get(key)
        if answer is not None and answer.value is not None:
            self._keep(key, _Answer(answer.value, self._clock()))

    def _keep(self, key: tuple[str, str], answer: _Answer) -> None:
        self._answers[key] = answer
        self._answers.move_to_end(key)
        while len(self._answers) > ANSWERS_KEPT:
            self._answers.popitem(last=False)

    def _remembered(self, key: tuple[str, str]) -> _Answer | None:
        with self._lock:
            return self._answers.get(key)

    def _old(self, answer: _Answer) -> bool:
        return self._clock() - answer.at >= self._alias_seconds

    def _set_away(self, away: bool) -> None:
        if away != self.registry_away:
            log.warning("the registry is %s", "away: what is known goes on" if away else "back")
        self.registry_away = away
