"""When a worker keeps a checkpoint (on a real cluster `make chaos` takes spot nodes away), what it
tells MLflow of the spec, and how workers fail to load.
"""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import ray.train
import torch

from components.ingest.concept_folder import Concept
from components.spec import resolve_spec
from components.train import ranks, worker
from components.train.job import BasePaths, PackJob
from components.train.members import Member
from components.train.worker import RayWatcher
from model.errors import AwayError, EchoDistillError
from tests.unit.train.ranks import on_ranks


def watcher(seconds: float) -> RayWatcher:
    spec = resolve_spec("pocket", None, [f"train.checkpoint_seconds={seconds}"])
    job: Any = SimpleNamespace(spec=spec, tracking=None)
    run: Any = None
    return RayWatcher(job, run, [])


def load_what_one_rank_cannot(where: str) -> tuple[str, str]:
    """Loads while S3 is away for rank 1; returns what this rank hears."""

    def broken(*_: Any) -> Any:
        if ranks.rank():
            raise AwayError("s3 is out of reach")
        return SimpleNamespace()

    def members(*_: Any) -> list[Member]:  # loading them takes words between the ranks
        ranks.gathered((None, []))
        return []

    spec = resolve_spec("pocket")
    job = PackJob(spec, (), BasePaths.from_spec(spec), "pack", None)
    parts = {
        "load_frozen": lambda *_: SimpleNamespace(),
        "accelerate": lambda *_: None,
        "_own_checkpoint": nullcontext,
        "load_members": members,
        where: broken,
    }
    with ExitStack() as stack:
        for name, part in parts.items():
            stack.enter_context(patch.object(worker, name, part))
        try:
            worker.load(job, torch.device("cpu"))
        except EchoDistillError as error:
            return type(error).__name__, str(error)
    raise AssertionError("it was loaded")


@pytest.mark.parametrize("where", ["load_frozen", "load_members"])
def test_what_one_worker_cannot_load_every_worker_hears_of(where: str) -> None:
    heard = on_ranks(2, load_what_one_rank_cannot, where)
    assert heard == [("AwayError", "s3 is out of reach")] * 2


def test_mlflow_is_not_told_its_own_password(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    class Recorder:
        def start(self, *facts: Any) -> None:
            told.append(facts)

        def log_dataset(self, concept: Concept) -> None:
            pass

    monkeypatch.setattr(ranks, "rank", lambda: 0)
    spec = resolve_spec("pocket", None, ["tracking.uri=https://me:secret@mlflow.example"])
    fox = Member(Concept("fox", "fox", "<new1>", "fox", True, ()), "digest")
    job: Any = SimpleNamespace(spec=spec, tracking=None, board=None)
    run: Any = SimpleNamespace(members=[fox])
    one = RayWatcher(job, run, [])
    recorder: Any = Recorder()
    one._tracker = recorder
    one.begin()
    assert "https://mlflow.example" in str(told) and "secret" not in str(told)


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
