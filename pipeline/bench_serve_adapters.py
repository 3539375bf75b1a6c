"""Many adapters loaded from disk and kept, as a replica of the endpoint does it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.adapter import Adapter
from pipeline import bench_measure as measure
from pipeline.bench_serve_parts import write_adapters
from serve.engine import Engine, adapter_bytes
from serve.registry import Pinned
from serve.store import AdapterStore

PLENTY = 2**40  # bytes: nothing is thrown out while it is measured


@dataclass(frozen=True)
class Loaded:
    """What was loaded.

    Attributes:
        adapters: all of them.
        load_ms: median and spread of one, from disk, checked, to the device.
        still_in_memory: how many are there at the end.
    """

    adapters: list[Adapter]
    load_ms: dict[str, float]
    still_in_memory: int

    def document(self) -> dict[str, Any]:
        """Give the figures."""
        size = sum(adapter_bytes(adapter) for adapter in self.adapters)
        return {
            "adapters": len(self.adapters),
            "bytes": size,
            "bytes_each": size // len(self.adapters),
            "load_ms": self.load_ms,
            "still_in_memory": self.still_in_memory,
        }


def load_adapters(engine: Engine, cache: Path, count: int, rank: int, first: int) -> Loaded:
    """Write so many made-up adapters, have the system forget them, load one after the other.

    Args:
        engine: puts them on its device.
        cache: of the endpoint.
        count: how many.
        rank: of each.
        first: number of the first one's concept.
    """
    pair = engine.pair
    pinned = list(write_adapters(cache, pair, count, rank, first))
    _forget(cache)
    store = AdapterStore(
        _Nowhere(), cache, base_hash=pair.hash, memory_bytes=PLENTY, check=engine.check
    )
    seconds, kept = [], []
    for each in pinned:
        began = time.perf_counter()
        adapter, level = store.adapter(each)
        engine.prepare(adapter)
        measure.wait(pair.device)
        seconds.append(time.perf_counter() - began)
        kept.append(adapter)
        assert level == "disk", level
    warm = sum(store.warm(each) is not None for each in pinned)
    return Loaded(kept, measure.summary(seconds), warm)


class _Nowhere:
    """A registry that is never asked: what is measured lies on the disk."""

    def download(self, pinned: Pinned, folder: Path) -> Path:
        raise AssertionError(f"{pinned} is not where it was written")


def _forget(folder: Path) -> None:
    """Have the system read a folder's files from disk again, where it can be asked to."""
    if not hasattr(os, "posix_fadvise"):
        return
    os.sync()  # what is not on the disk yet would stay
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(file)
