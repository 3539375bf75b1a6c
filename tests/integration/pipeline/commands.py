"""Running the command as a person or program does: in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
