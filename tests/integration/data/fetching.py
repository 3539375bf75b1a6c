"""What a process of its own does in a test; importing this loads no torch."""

from __future__ import annotations

from pathlib import Path

from components.ingest import store
from components.ingest.cache import file_sha256


def fetch_and_hash(arguments: tuple[store.Entry, Path]) -> tuple[Path, str]:
    path = store.fetch(*arguments)
    return path, file_sha256(path)
