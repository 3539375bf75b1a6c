"""When a worker keeps a checkpoint; on a real cluster `make chaos` takes spot nodes away."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import ray.train

from components.spec import resolve_spec
from components.train import ranks
from components.train.worker import RayWatcher


def watcher(seconds: float) -> RayWatcher:
    spec = resolve_spec("pocket", None, [f"train.checkpoint_seconds={seconds}"])
    job: Any = SimpleNamespace(spec=spec, tracking=None)
    run: Any = None
    return RayWatcher(job, run, [])


def test_a_checkpoint_is_due_by_the_clock_and_once_at_each_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[Any] = [None]
    monkeypatch.setattr(ranks, "rank", lambda: 0)
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: said[-1])
    assert watcher(0).wants_checkpoint()

    one = watcher(100_000)
    assert not one.wants_checkpoint()
    said.append({"node": "a"})
    assert one.wants_checkpoint()
    assert not one.wants_checkpoint(), "one checkpoint a warning"
    said.append({"node": "b"})
    assert one.wants_checkpoint()
    said.append(None)
    assert not one.wants_checkpoint()
