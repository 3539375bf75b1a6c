"""Work that Ctrl-C ends cleanly.

Ray takes over SIGINT and SIGTERM when it is started from the main thread, and answers them with
exits of its own. So the work runs beside the main thread, which keeps the signals. When one comes,
what the work waits for is ended, and the work takes down what it started, as after an error.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

from pipeline.progress import Event, Progress
from pipeline.scratch import services_died

T = TypeVar("T")
SIGNALS = (signal.SIGINT, signal.SIGTERM)
THREAD = "work"
# Ray's end takes two seconds. Who sends SIGTERM often sends SIGKILL ten seconds later.
PATIENCE_SECONDS = 8.0
HURRY_SECONDS = 3.0  # for work that is waited for in vain


class TerminatedError(KeyboardInterrupt):
    """A service manager's SIGTERM: it cleans up as a person's Ctrl-C does."""


class StoppedError(Exception):
    """The work noticed that it is to stop."""


class Interruptible:
    """Runs one piece of work; `progress` is a listener that ends the work once it is to stop."""

    def __init__(self, progress: Progress) -> None:
        self._listener = progress
        self._stopping = threading.Event()
        self._received: list[int] = []
        self.patience = PATIENCE_SECONDS

    def progress(self, event: Event) -> None:
        """Passes an event on; raises StoppedError in the work's thread after Ctrl-C."""
        if self._stopping.is_set():
            raise StoppedError
        self._listener(event)

    def run(self, work: Callable[[], T], stop: Callable[[], None]) -> T:
        """Runs `work` and returns what it returns, or raises what it raises.

        On Ctrl-C or SIGTERM calls `stop`, again and again until the work is over (it may be in the
        middle of starting something), then raises KeyboardInterrupt. `stop` ends what the work may
        be waiting for and leaves the rest to it. Work that is not over after `patience` seconds is
        left as it is (`abandoned`).
        """
        results: list[T] = []
        errors: list[BaseException] = []

        def body() -> None:
            try:
                results.append(work())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=body, name=THREAD, daemon=True)
        before = {number: signal.getsignal(number) for number in SIGNALS}
        try:
            self._listen()
            thread.start()
            while thread.is_alive() and not self._received:
                thread.join(0.2)
                self._listen()
            if self._received:
                self._finish(thread, stop)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self._received:
            raise KeyboardInterrupt if self._received[0] == signal.SIGINT else TerminatedError
        if errors:
            raise errors[0]
        return results[0]

    def _listen(self) -> None:
        """Put our handlers in place, again after Ray's C++ part, whose own abort the process."""
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # Only noted: a second Ctrl-C must not cut the clean-up of the first one short.
        self._received.append(number)

    def _finish(self, thread: threading.Thread, stop: Callable[[], None]) -> None:
        self._stopping.set()
        end = time.monotonic() + self.patience
        call: threading.Thread | None = None
        while thread.is_alive() and time.monotonic() < end:
            # A signal to a whole group ends Ray too, and a call to a Ray that died waits a minute.
            if services_died():
                end = min(end, time.monotonic() + HURRY_SECONDS)
            if call is None or not call.is_alive():
                call = threading.Thread(target=stop, name=THREAD, daemon=True)
                call.start()
            thread.join(0.5)
            self._listen()


def abandoned() -> bool:
    """Whether work goes on that nobody waits for; `end_at_once` ends it and what it started."""
    return any(thread.name == THREAD for thread in threading.enumerate())
