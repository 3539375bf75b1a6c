"""Work that signals end: its result, its error, and its clean-up."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from pipeline.cli import interruptible
from pipeline.cli.interruptible import Interruptible, TerminatedError, abandoned
from pipeline.progress import Event, silent


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


def test_work_that_will_not_end_is_left_even_when_stopping_it_hangs() -> None:
    never = threading.Event()

    def work() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        never.wait()

    def stop() -> None:
        never.wait()

    job = Interruptible(silent)
    job.patience = 0.2
    try:
        with pytest.raises(TerminatedError):
            job.run(work, stop)
        assert abandoned()
    finally:
        never.set()


def test_services_that_died_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interruptible, "HURRY_SECONDS", 0.2)
    never = threading.Event()
    services: list[subprocess.Popen[bytes]] = []  # who forgets one may take its exit status

    def work() -> None:
        services.append(subprocess.Popen(["sleep", "600"]))
        services[0].kill()  # as a signal to the whole group does
        os.kill(os.getpid(), signal.SIGINT)
        never.wait()

    job = Interruptible(silent)
    job.patience = 3600.0
    try:
        with pytest.raises(KeyboardInterrupt):
            job.run(work, lambda: None)
    finally:
        never.set()
        services[0].wait()


HANGS = """
import subprocess, threading
from pipeline.scratch import end_at_once, scratch_folder

def work():
    with scratch_folder() as folder:
        words = "sleep 600 & echo $!; exec sleep 600"
        child = subprocess.Popen(["sh", "-c", words], stdout=subprocess.PIPE, text=True)
        orphan = child.stdout.readline().strip()
        child.kill()
        child.wait()
        other = subprocess.Popen(["sleep", "600"])
        print(folder, orphan, other.pid, flush=True)
        begun.set()
        threading.Event().wait()

begun = threading.Event()
threading.Thread(target=work, daemon=True).start()
begun.wait()
end_at_once(130)
"""


def test_the_end_at_once_leaves_no_process_and_no_file() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 130, done.stderr
    folder, *processes = done.stdout.split()
    assert not Path(folder).exists()
    for number in map(int, processes):
        with contextlib.suppress(psutil.NoSuchProcess):
            assert psutil.Process(number).status() == psutil.STATUS_ZOMBIE
