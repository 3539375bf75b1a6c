"""Work that Ctrl-C ends cleanly.

Ray takes over SIGINT and SIGTERM when it is started from the main thread, and answers them with
exits of its own. So the work runs beside the main thread, which keeps the signals, stops the
services when one comes, and waits until the work has seen it.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import TypeVar

from pipeline.progress import Event, Progress

T = TypeVar("T")
# Ray's own processes are gone after a second or two; more is a hang that nobody should wait for.
PATIENCE_SECONDS = 30.0


class TerminatedError(KeyboardInterrupt):
    """A service manager's SIGTERM: it cleans up as a person's Ctrl-C does."""


class StoppedError(Exception):
    """The work noticed that it is to stop."""


class Interruptible:
    """Runs one piece of work; `progress` is a listener that ends the work once it is to stop."""

    def __init__(self, progress: Progress) -> None:
        self._listener = progress
        self._stopping = threading.Event()

    def progress(self, event: Event) -> None:
        """Passes an event on; raises StoppedError in the work's thread after Ctrl-C."""
        if self._stopping.is_set():
            raise StoppedError
        self._listener(event)

    def run(self, work: Callable[[], T], stop: Callable[[], None]) -> T:
        """Runs `work` and returns what it returns, or raises what it raises.

        On Ctrl-C or SIGTERM calls `stop`, again and again until the work is over (it may be in the
        middle of starting something), then raises KeyboardInterrupt.
        """
        results: list[T] = []
        errors: list[BaseException] = []

        def body() -> None:
            try:
                results.append(work())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=body, name="work", daemon=True)
        try:
            thread.start()
            while thread.is_alive():
                thread.join(0.2)
        except KeyboardInterrupt:
            self._finish(thread, stop)
            raise
        if errors:
            raise errors[0]
        return results[0]

    def _finish(self, thread: threading.Thread, stop: Callable[[], None]) -> None:
        self._stopping.set()
        impatient = {signal.SIGINT: signal.SIG_IGN, signal.SIGTERM: signal.SIG_IGN}
        before = {number: signal.signal(number, action) for number, action in impatient.items()}
        try:
            waited = 0.0
            while thread.is_alive() and waited < PATIENCE_SECONDS:
                stop()
                thread.join(0.5)
                waited += 0.5
            stop()
        finally:
            for number, action in before.items():
                signal.signal(number, action)
