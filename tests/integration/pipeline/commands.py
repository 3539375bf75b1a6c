"""Running the command as a person or program does, in a process of its own or in this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from pipeline.cli import main
from pipeline.cli.output import Output

HIDDEN = ("AWS_", "MLFLOW_", "RAY_ADDRESS", "ECHODISTILL_SERVE_")


@dataclass(frozen=True)
class Finished:
    """What a command left behind."""

    code: int
    stdout: str
    stderr: str

    @property
    def document(self) -> Any:
        """The one JSON document on stdout; fails when there is anything else."""
        return json.loads(self.stdout)

    @property
    def error(self) -> str:
        """The one sentence on stderr that starts with "error:"."""
        lines = [line for line in self.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.stderr
        return lines[0].removeprefix("error: ")


def environment(folder: Path, **extra: str) -> dict[str, str]:
    """An environment without this machine's credentials and services, its home in `folder`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(HIDDEN)}
    return kept | {"HOME": str(folder), "AWS_EC2_METADATA_DISABLED": "true"} | extra


def start(*arguments: str, cwd: Path, **env: str) -> subprocess.Popen[str]:
    """Start `echodistill` in `cwd`, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli.entry", *arguments],
        cwd=cwd,
        env=environment(cwd, **env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )


def run(*arguments: str, cwd: Path, timeout: float = 240, **env: str) -> Finished:
    """Run `echodistill` in `cwd` to its end."""
    process = start(*arguments, cwd=cwd, **env)
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return Finished(process.returncode, stdout, stderr)


def run_here(*arguments: str, cwd: Path, **env: str) -> Finished:
    """Run `echodistill` as `run` does, in this process: it need not load all libraries again.

    For commands that start no cluster, where not the process but what it says is tested.
    """
    with tempfile.TemporaryDirectory() as scratch:
        paths = [Path(scratch) / name for name in ("stdout", "stderr")]
        with (
            patch.dict(os.environ, environment(cwd, **env), clear=True),
            chdir(cwd),
            _descriptors_to(*paths),
        ):
            output = Output(as_json="--json" in arguments)
            code = main.run([*arguments], output)
        return Finished(code, *(path.read_text(encoding="utf-8") for path in paths))


@contextmanager
def _descriptors_to(stdout: Path, stderr: Path) -> Iterator[None]:
    """Lead descriptors 1 and 2, and what Python writes to them, to files."""
    saved = os.dup(1), os.dup(2)
    with (
        stdout.open("a") as out,
        stderr.open("a") as err,
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        try:
            yield
        finally:
            for number, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, number)
                os.close(copy)
