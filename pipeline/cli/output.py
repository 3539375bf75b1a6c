"""Where the words of a command go: one JSON document or tables to stdout, everything else aside.

Ray, DeepSpeed and MLflow write to stdout from C++ and from child processes, so redirecting
`sys.stdout` is not enough: the file descriptors themselves are moved. The command keeps private
copies of the real ones; while services run, descriptors 1 and 2 lead to a log file. With `--json`
descriptor 1 leads to stderr before and after.
"""

from __future__ import annotations

import json
import os
import select
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from pipeline.progress import Event

if TYPE_CHECKING:
    from components.train.state import ConceptState
    from pipeline.run import ConceptResult


class Output:
    """The voice of one command.

    With `as_json` nothing but `finish`'s document ever reaches stdout; events and errors are lines
    on stderr. Without it events are progress bars on a terminal and lines elsewhere.
    """

    def __init__(self, *, as_json: bool = False, debug: bool = False) -> None:
        self.as_json = as_json
        self.debug = debug
        self.document: Any = None
        self._stdout: TextIO = os.fdopen(os.dup(1), "w", encoding="utf-8")
        self._stderr: TextIO = os.fdopen(os.dup(2), "w", encoding="utf-8")
        if as_json:
            sys.stdout.flush()
            os.dup2(2, 1)
        self.console = Console(file=self._stderr if as_json else self._stdout, highlight=False)
        self.errors = Console(file=self._stderr, highlight=False, soft_wrap=True)
        self._bars: Progress | None = None
        self._tasks: dict[tuple[str, str], TaskID] = {}
        self._said: dict[tuple[str, str], datetime] = {}

    def __call__(self, event: Event) -> None:
        """Renders an event: `Output` is a listener of `pipeline.progress`."""
        counted = event.done is not None and event.total
        if self._bars is not None and counted:
            self._draw_bar(event)
        elif not counted or self._is_due(event):
            self._write_line(event)

    def say(self, text: str) -> None:
        """One line for a person; to stderr with `--json`. Rich markup is not interpreted."""
        self.console.print(text, markup=False, soft_wrap=True)

    def finish(self, document: Any, human: Callable[[Console], None] | None = None) -> None:
        """The result: the document with `--json`, else what `human` draws on the console."""
        self.document = document
        if self.as_json:
            json.dump(document, self._stdout, indent=2, ensure_ascii=False)
            self._stdout.write("\n")
        elif human is not None:
            human(self.console)
        self._stdout.flush()

    def fail(self, message: str, code: int) -> None:
        """One sentence on stderr, and with `--json` a document too unless one was written."""
        with suppress(BrokenPipeError, SystemExit):  # rich makes an exit of a pipe that broke
            # Not as markup: what is wrong may hold brackets.
            self.errors.print(f"error: {message}", style="bold red", markup=False)
        with suppress(BrokenPipeError):
            if self.as_json and self.document is None:
                self.finish({"error": {"message": message, "exit_code": code}})

    def unread(self) -> bool:
        """Whether who read stdout or stderr is gone, as after `| head`."""
        poll = select.poll()
        for stream in (self._stdout, self._stderr):
            poll.register(stream, 0)  # that nobody reads is always told
        return bool(poll.poll(0))

    @contextmanager
    def noise_to(self, log: Path | None) -> Iterator[None]:
        """Leads what libraries and child processes write on descriptors 1 and 2 to a log file.

        With `--debug` they stay where they are (with `--json`, on stderr).
        Progress bars are drawn inside.
        """
        aside = None if self.debug else log
        saved: tuple[int, int] | None = None
        if aside is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            saved = os.dup(1), os.dup(2)
            target = _open_log(aside)
            os.dup2(target, 1)
            os.dup2(target, 2)
            os.close(target)
        try:
            with self._progress_bars():
                yield
        finally:
            if saved is not None:
                sys.stdout.flush()
                sys.stderr.flush()
                for number, copy in zip((1, 2), saved, strict=True):
                    os.dup2(copy, number)
                    os.close(copy)

    @contextmanager
    def _progress_bars(self) -> Iterator[None]:
        if self.as_json or not self.console.is_terminal:
            yield
            return
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=self.console,
            redirect_stdout=False,
            redirect_stderr=False,
        ) as bars:
            self._bars = bars
            try:
                yield
            finally:
                self._bars = None
                self._tasks.clear()

    def _draw_bar(self, event: Event) -> None:
        assert self._bars is not None
        key = (event.stage, event.subject)
        if key not in self._tasks:
            label = f"{event.stage} {event.subject}".strip()
            self._tasks[key] = self._bars.add_task(label, total=event.total, note="")
        self._bars.update(
            self._tasks[key], completed=event.done, total=event.total, note=event.text
        )

    def _is_due(self, event: Event) -> bool:
        """Counted events come often: a line at the first, the last and every ten seconds."""
        key, now = (event.stage, event.subject), datetime.now(UTC)
        last = self._said.get(key)
        due = last is None or event.done == event.total or (now - last).total_seconds() >= 10
        if due:
            self._said[key] = now
        return due

    def _write_line(self, event: Event) -> None:
        count = f"{event.done}/{event.total}" if event.done is not None and event.total else ""
        words = " ".join(part for part in (event.subject, count, event.text) if part)
        if self.as_json:
            stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            self._stderr.write(f"{stamp} {event.stage}: {words}\n")
            self._stderr.flush()
        else:
            self.console.print(f"{event.stage:>9}  {words}", markup=False, soft_wrap=True)


def tell_more(console: Console, concepts: Sequence[ConceptState | ConceptResult]) -> None:
    """Write below a table what has no room in it: each error, and what is odd about a success."""
    for one in concepts:
        # "already" says all that its note does.
        told = one.error or ("" if one.state == "already" else one.note)
        if told:
            name = f"{one.id}: "
            console.print(name + told.removeprefix(name), markup=False, soft_wrap=True)


def _open_log(path: Path) -> int:
    """Open a log to append to; where none can be written, what it would hold is dropped."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError:
        return os.open(os.devnull, os.O_WRONLY)
