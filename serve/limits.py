"""What an API key may do: which concepts it may ask for, and how many pictures a minute."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from model.errors import InputError
from serve.api import ApiError

_PATTERN = re.compile(r"[a-z0-9*][a-z0-9*_-]{0,62}")
_MOST = 10**6  # pictures a minute


@dataclass(frozen=True)
class Limits:
    """Limits of one key.

    Attributes:
        concepts: patterns (`team-*`) of the concepts that it may ask for; None: all of them. The
            base alone is open to every key.
        per_minute: pictures; None: as many as the endpoint can draw.
    """

    concepts: tuple[str, ...] | None = None
    per_minute: int | None = None

    def allow(self, concept: str) -> bool:
        """Whether the key may know of a concept."""
        return self.concepts is None or any(fnmatchcase(concept, each) for each in self.concepts)


def parse_limits(words: list[str], where: str) -> Limits:
    """Reads `concepts=a,team-*` and `pictures_per_minute=60`.

    Raises InputError for anything else; its text names `where`, and shows no word.
    """
    concepts: tuple[str, ...] | None = None
    per_minute: int | None = None
    for word in words:
        name, _, value = word.partition("=")
        if name == "concepts" and all(map(_PATTERN.fullmatch, value.split(","))):
            concepts = tuple(value.split(","))
        elif name == "pictures_per_minute" and value.isdecimal() and 0 < int(value[:9]) <= _MOST:
            per_minute = int(value)
        else:
            raise InputError(
                f"{where} has a wrong limit: write concepts=ID,TEAM-* (ids or patterns by comma) "
                f"and pictures_per_minute=N (1 to {_MOST})."
            )
    return Limits(concepts, per_minute)


class Allowance:
    """Pictures that each key has left; it fills up steadily, to a minute's worth at most."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._left: dict[str, tuple[float, float]] = {}  # by key's name: pictures, and when

    def take(self, key: str, limits: Limits, pictures: int) -> None:
        """Takes pictures of a key's allowance. ApiError 429 when it does not have them."""
        if limits.per_minute is None:
            return
        now, most = self._clock(), float(limits.per_minute)
        left, at = self._left.get(key, (most, now))
        left = min(most, left + (now - at) * most / 60)
        if pictures > left:
            self._left[key] = (left, now)
            wait = math.ceil((min(pictures, most) - left) * 60 / most)
            raise ApiError(
                429,
                f"This key may have {limits.per_minute} pictures a minute: try again in "
                f"{wait} s" + (", with fewer at a time." if pictures > most else "."),
                code="rate_limit_exceeded",
                kind="rate_limit_error",
                retry_after=max(1, wait),
            )
        self._left[key] = (left - pictures, now)
