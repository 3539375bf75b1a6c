"""One folder for the temporary files of a local Ray, by which its processes are found again.

Who ends in a hurry (a signal to every process at once, a start that nobody waits for) can't leave
the cleaning to those who made the files: they may be dead, or wait for somebody who is.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TextIO

if TYPE_CHECKING:
    import psutil

# Sockets have paths of at most 107 characters, of which Ray takes 63 and the folder's name 21.
_LONGEST_PARENT = 20
_open: set[Path] = set()
_PREFIX, _OWNER = "echodistill-", "owner"


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """The temporary folder of this process and of those that it starts, for the time of the block.

    Processes that are started inside carry its name in TMPDIR.
    """
    parent, before = tempfile.gettempdir(), (tempfile.tempdir, os.environ.get("TMPDIR"))
    short = len(parent) <= _LONGEST_PARENT or not os.access("/tmp", os.W_OK)
    place = parent if short else "/tmp"
    _clear_abandoned(Path(place))
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
    owner = _lock(folder)
    _open.add(folder)
    tempfile.tempdir = os.environ["TMPDIR"] = str(folder)
    try:
        yield folder
    finally:
        owner.close()
        tempfile.tempdir, variable = before
        if variable is None:
            os.environ.pop("TMPDIR", None)
        else:
            os.environ["TMPDIR"] = variable
        _clear(folder)
        _open.discard(folder)


def _lock(folder: Path) -> TextIO:
    """Mark a folder as in use for as long as this process lives, however it ends."""
    file = (folder / "new").open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    os.rename(folder / "new", folder / _OWNER)  # locked from the moment at which it can be seen
    return file


def _clear_abandoned(parent: Path) -> None:
    """End and remove what an owner left that was killed."""
    for mark in parent.glob(f"{_PREFIX}*/{_OWNER}"):
        with contextlib.suppress(OSError), mark.open("a") as file:  # in use, or somebody else's
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _clear(mark.parent)


def end_at_once(code: int) -> NoReturn:
    """Become a process that kills what this one started, removes its scratch folders and exits.

    A thread that hangs in a library ends so, even one that holds Python's lock until what it waits
    for comes, or is dead for half a minute.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # whoever read it may be gone
            stream.flush()
    # -P: the folder of this file is no place to import from.
    folders = [str(folder) for folder in _open]
    os.execv(sys.executable, [sys.executable, "-P", __file__, str(code), *folders])


def _remove_leftovers(folders: Sequence[Path]) -> None:
    """Kill every process below this one and in its scratch folders; remove the folders."""
    import psutil

    _kill(psutil.Process().children(recursive=True))
    for folder in folders:
        _clear(folder)


def services_died() -> bool:
    """Whether one of the processes that this one started is dead, and nobody has noticed."""
    import psutil

    return not all(_lives(child) for child in psutil.Process().children())


def _inside(folder: Path) -> list[psutil.Process]:
    """The processes that carry a folder's name, those whose parent died too.

    A process that gives itself a title may write over its environment, as Ray's agents do; those
    are known by the files that they hold open.
    """
    import psutil

    found, real = [], folder.resolve()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and (
                process.environ().get("TMPDIR") == str(folder)
                or any(Path(file.path).is_relative_to(real) for file in process.open_files())
            ):
                found.append(process)
    return found


def _lives(process: psutil.Process) -> bool:
    import psutil

    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _kill(processes: list[psutil.Process]) -> None:
    """Kill processes and give them a moment to be gone.

    They are not waited for: the exit status belongs to whoever started a process.
    """
    import psutil

    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
    deadline = time.monotonic() + 3
    while any(_lives(process) for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)


def _clear(folder: Path) -> None:
    """Kill what runs in a folder and remove it, again while processes are still being born."""
    for _ in range(25):
        inside = _inside(folder)
        _kill(inside)
        shutil.rmtree(folder, ignore_errors=True)
        if not inside and not folder.exists():
            break
        time.sleep(0.1)


if __name__ == "__main__":
    _remove_leftovers([Path(name) for name in sys.argv[2:]])
    sys.exit(int(sys.argv[1]))
