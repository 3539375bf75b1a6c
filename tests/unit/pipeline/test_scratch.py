"""The folder for temporary files: whoever works in it has ended when it is gone."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from pipeline.scratch import scratch_folder

# It says that it runs, and then waits for an end that never comes.
WAIT = "import sys, time; print('ready', flush=True); time.sleep(600)"
# A long title is written over the environment.
TITLED = f"from ray._raylet import setproctitle; setproctitle('x' * 9000); {WAIT}"


@pytest.mark.parametrize("program", [WAIT, TITLED])
def test_who_works_in_the_folder_is_ended_with_it(program: str) -> None:
    with scratch_folder() as folder:
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=log, text=True
            )
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        named = psutil.Process(process.pid).environ().get("TMPDIR") == str(folder)
        assert named == (program == WAIT)
    assert process.wait(timeout=10) == -9
    assert not folder.exists()


OWNER = f"""
import subprocess, sys, time
from pipeline.scratch import scratch_folder
with scratch_folder() as folder:
    child = subprocess.Popen([sys.executable, "-c", {WAIT!r}], stdout=subprocess.PIPE)
    child.stdout.readline()
    print(folder, child.pid, flush=True)
    time.sleep(600)
"""


def test_what_a_killed_owner_left_is_ended_by_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(prefix="t-") as parent:  # short, for sockets lie in it
        monkeypatch.setattr(tempfile, "tempdir", parent)
        environment = {**os.environ, "TMPDIR": parent}
        command = [sys.executable, "-c", OWNER]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=environment
        ) as process:
            assert process.stdout is not None
            folder, child = process.stdout.readline().split()
            with scratch_folder():
                assert Path(folder).is_dir() and psutil.pid_exists(int(child))
            process.kill()
        assert psutil.pid_exists(int(child))
        with scratch_folder():
            assert not Path(folder).exists()
            assert not running(int(child))


def running(pid: int) -> bool:
    """Tell a process that works from one that is gone, or dead and not yet buried."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
