"""Work that signals end: its result, its error, and its clean-up."""

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import psutil
import pytest

from pipeline.cli import interruptible
from pipeline.cli.interruptible import Interruptible, TerminatedError, abandoned
from pipeline.progress import Event, silent
from pipeline.scratch import scratch_folder


def test_what_the_work_returns_or_raises_comes_out() -> None:
    assert Interruptible(silent).run(lambda: 7, lambda: None) == 7

    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        Interruptible(silent).run(fail, lambda: None)


@pytest.mark.parametrize(
    ("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, TerminatedError)]
)
def test_a_signal_lets_the_work_clean_up_however_often_it_comes(
    number: signal.Signals, kind: type[BaseException]
) -> None:
    freed = threading.Event()
    cleaned: list[str] = []

    def work() -> None:
        os.kill(os.getpid(), number)
        freed.wait(10)
        os.kill(os.getpid(), number)
        time.sleep(0.3)
        cleaned.append("cleaned")

    before = signal.getsignal(number)
    with pytest.raises(kind) as caught:
        Interruptible(silent).run(work, freed.set)
    assert type(caught.value) is kind
    assert cleaned == ["cleaned"]
    assert signal.getsignal(number) is before


def test_work_that_only_reports_is_ended_at_its_next_report() -> None:
    heard: list[Event] = []
    job = Interruptible(heard.append)

    def work() -> None:
        for step in range(1000):
            job.progress(Event("work", str(step)))
            if step == 3:
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)

    with pytest.raises(KeyboardInterrupt):
        job.run(work, lambda: None)
    assert 4 <= len(heard) < 20


def test_a_process_that_will_not_end_is_killed() -> None:
    cleaned: list[int | None] = []

    def work() -> None:
        child = subprocess.Popen(["sleep", "600"])
        os.kill(os.getpid(), signal.SIGINT)
        cleaned.append(child.wait())

    job = Interruptible(silent)
    job.patience = 0.2
    with pytest.raises(KeyboardInterrupt):
        job.run(work, lambda: None)
    assert cleaned == [-signal.SIGKILL]


def test_work_that_waits_for_what_died_is_left_and_its_scratch_removed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(interruptible, "HURRY_SECONDS", 0.2)
    folders: list[Path] = []
    orphans: list[int] = []
    never = threading.Event()
    blocked = threading.Event()  # stops that hang do not keep anybody

    def work() -> None:
        with scratch_folder() as folder:
            folders.append(folder)
            words = "sleep 600 & echo $!; exec sleep 600"
            child = subprocess.Popen(["sh", "-c", words], stdout=subprocess.PIPE, text=True)
            assert child.stdout is not None
            orphans.append(int(child.stdout.readline()))
            child.kill()  # as a signal to the whole group does
            os.kill(os.getpid(), signal.SIGTERM)
            never.wait()

    job = Interruptible(silent)
    job.patience = 600.0
    try:
        with pytest.raises(TerminatedError):
            job.run(work, lambda: (blocked.wait(), None)[1])
        assert abandoned()
        assert not folders[0].exists()
        assert not psutil.pid_exists(orphans[0]) or (
            psutil.Process(orphans[0]).status() == psutil.STATUS_ZOMBIE
        )
    finally:
        never.set()
        blocked.set()
    while abandoned():  # the work ends, and gives the temporary folder back
        time.sleep(0.01)
    assert "TMPDIR" not in os.environ or os.environ["TMPDIR"] != str(folders[0])
