"""Processes that only lead others do not load the networks' libraries, which takes seconds each."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {"torch", "diffusers", "transformers", "deepspeed", "mlflow", "ray"}


@pytest.mark.parametrize(
    "module",
    [
        "pipeline.drive",
        "pipeline.pack_run",
        "pipeline.submit",
        "components.train.entry",
        # What they refuse, they refuse at once.
        "pipeline.generate",
        "pipeline.evaluate",
        "pipeline.methods",
    ],
)
def test_a_driver_and_its_packs_load_no_networks(module: str) -> None:
    code = f"import {module}, sys; print(*sys.modules)"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    loaded = set(answer.stdout.split())
    assert module in loaded and not HEAVY & loaded
