"""The folder for temporary files: whoever works in it has ended when it is gone."""

import subprocess
import sys

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
