"""The adapter store: registry -> disk -> memory, each adapter fetched once and verified.

Disk entries are `<cache>/adapters/<concept>/<sha256>/`, filled by an atomic rename. An adapter is
known by its concept and sha256 everywhere, never by an alias, so a moved alias can never change
what a request in flight draws.
"""

from __future__ import annotations

import errno
import logging
import shutil
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from model.adapter import Adapter, load_adapter
from model.adapter_meta import PREVIEW_FILE
from model.errors import EchoDistillError, ServiceError
from serve.engine import adapter_bytes
from serve.lru import ByteLru, SingleFlight
from serve.registry import BadVersionError, Pinned

log = logging.getLogger("echodistill.serve")
_PNG = b"\x89PNG\r\n\x1a\n"
_LARGEST_PREVIEW = 8 * 2**20  # bytes


class AdapterSource(Protocol):
    """Where adapters are copied from; see `serve.registry.Registry`."""

    def download(self, pinned: Pinned, folder: Path) -> Path:
        """Copies a version's adapter folder below `folder`; returns where it is."""


class AdapterStore:
    """Adapters of one base pair. All methods may be called from any thread.

    Args:
        source: the registry.
        cache: the cache folder; `adapters/` is made below it.
        base_hash: hash of the base pair that draws; adapters of another one are refused.
        memory_bytes: budget for adapters in memory.
        check: raises InputError for an adapter that cannot draw on this base. It is asked once,
            when an adapter is loaded, so that no request can spoil a batch that others are in.
    """

    def __init__(
        self,
        source: AdapterSource,
        cache: Path,
        *,
        base_hash: str,
        memory_bytes: int,
        check: Callable[[Adapter], None],
    ) -> None:
        self._source = source
        self._folder = cache / "adapters"
        self._base_hash = base_hash
        self._check = check
        self._lock = threading.Lock()
        self._memory: ByteLru[tuple[str, str], Adapter] = ByteLru(memory_bytes)
        self._loading: SingleFlight[tuple[str, str], tuple[Adapter, str]] = SingleFlight()

    def room(self) -> bool:
        """Whether memory has room for another adapter like those that it has."""
        with self._lock:
            each = self._memory.used // max(1, len(self._memory))
            return self._memory.used + each <= self._memory.budget

    def warm(self, pinned: Pinned) -> Adapter | None:
        """The adapter if it is in memory."""
        with self._lock:
            return self._memory.get((pinned.concept, pinned.sha256))

    def adapter(self, pinned: Pinned) -> tuple[Adapter, str]:
        """The adapter of a version, and where it was: memory, disk or registry. Blocks.

        Raises ServiceError when it cannot be fetched, BadVersionError when it belongs to another
        base, or is not what the registry's tag says.
        """
        if pinned.base_hash != self._base_hash:
            raise BadVersionError(
                f"version {pinned.version} of '{pinned.concept}' was trained on another base pair "
                "than the one this endpoint draws with: train it again on this base."
            )
        key = (pinned.concept, pinned.sha256)
        return self._loading.run(key, lambda: self._load(pinned))

    def preview(self, pinned: Pinned) -> bytes | None:
        """The PNG that came with a version's adapter; None when it has none. Blocks.

        Raises what `adapter` raises: a version that may not draw shows nothing either.
        """
        self.adapter(pinned)
        place = self._folder / pinned.concept / pinned.sha256 / PREVIEW_FILE
        try:
            with place.open("rb") as file:
                data = file.read(_LARGEST_PREVIEW + 1)
        except OSError:
            return None
        sound = data.startswith(_PNG) and len(data) <= _LARGEST_PREVIEW
        return data if sound else None

    def _load(self, pinned: Pinned) -> tuple[Adapter, str]:
        adapter = self.warm(pinned)
        if adapter is not None:
            return adapter, "memory"
        place = self._folder / pinned.concept / pinned.sha256
        adapter = self._read(pinned, place) if place.exists() else None
        level = "disk"
        if adapter is None:
            level = "registry"
            self._fetch(pinned, place)
            adapter = self._read(pinned, place)
        if adapter is None:
            raise BadVersionError(
                f"the adapter of version {pinned.version} of '{pinned.concept}' in the registry is "
                "not the one its tags tell of: register it again."
            )
        with self._lock:
            self._memory.put((pinned.concept, pinned.sha256), adapter, adapter_bytes(adapter))
        return adapter, level

    def _read(self, pinned: Pinned, place: Path) -> Adapter | None:
        """The verified adapter in `place`; None (and nothing left there) when it is not sound."""
        try:
            adapter = load_adapter(place, expected_sha256=pinned.sha256)
            self._check(adapter)
        except EchoDistillError as error:
            log.warning("adapter %s is not sound: %s", place, error)
            shutil.rmtree(place, ignore_errors=True)
            return None
        if adapter.meta["concept"]["id"] != pinned.concept:
            log.warning("adapter %s is of another concept than '%s'", place, pinned.concept)
            shutil.rmtree(place, ignore_errors=True)
            return None
        # Only the student draws, so the teacher's half takes no memory.
        return replace(adapter, teacher_delta=None)

    def _fetch(self, pinned: Pinned, place: Path) -> None:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=place.parent, prefix=".part-") as scratch:
                fetched = self._source.download(pinned, Path(scratch))
                try:
                    fetched.rename(place)
                except OSError as error:
                    # Another process on this cache was faster; its entry is verified like ours.
                    if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                        raise
        except OSError as error:
            raise ServiceError(
                f"the adapter of '{pinned.concept}' cannot be written to {place.parent} "
                f"({error.strerror}): free some disk or set another cache."
            ) from error
