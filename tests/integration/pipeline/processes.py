"""Finding the processes that a command started: each inherits a mark in its environment."""

from __future__ import annotations

import time
import uuid
from pathlib import Path

MARK = "ECHODISTILL_TEST_MARK"


def new_mark() -> str:
    """A value for the environment variable MARK."""
    return uuid.uuid4().hex


def marked(mark: str) -> dict[int, str]:
    """Command lines of the living processes that inherited a mark, by process id."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
                words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if state != "Z":
                    found[int(folder.name)] = words[:200]
        except OSError:  # it ended while we looked, or is not ours
            continue
    return found


def left_behind(mark: str, patience: float = 5.0) -> dict[int, str]:
    """Marked processes that are still there after `patience` seconds."""
    deadline = time.monotonic() + patience
    while (found := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found
