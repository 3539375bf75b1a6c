"""A batch's own MLflow run: found again, counted over all its drivers, and in nobody's way."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from components.ingest.concept_folder import Concept
from components.spec import resolve_spec
from components.train.state import ConceptState
from components.train.tracking import Tracker, TrackingSettings
from pipeline.batch_report import Told
from pipeline.parent_run import ParentRun, parent_of_training
from pipeline.run import ConceptResult

SPEC = resolve_spec("pocket", None, ["cost.gpu_hour=2"])


def run_for(registry: str, key: str = "b-1") -> ParentRun:
    return ParentRun(key, "photos", SPEC, registry, {"packs": 2}, "there")


def test_the_same_batch_goes_on_in_the_same_run(tracking_uri: str, tmp_path: Path) -> None:
    first = run_for(tracking_uri).begin()
    again = run_for(tracking_uri)
    assert first is not None and again.begin() == again.begin() == first
    assert run_for(tracking_uri, "b-2").begin() != first
    client = MlflowClient(tracking_uri)

    # A concept of an earlier driver of this batch counts, one of another batch does not.
    tracker = Tracker(TrackingSettings(tracking_uri, SPEC.tracking.experiment, first), "pack")
    tracker.start("a", {}, "")
    own = tracker.close()["a"]
    states = [
        ConceptState("a", "already", seconds=1.0, gpu_seconds=10.0, cost=0.5, run_id=own),
        ConceptState("b", "already", seconds=2.0, gpu_seconds=20.0, cost=0.25, run_id="other"),
        ConceptState("c", "trained", seconds=4.0, gpu_seconds=40.0, cost=0.125, promoted=True),
        ConceptState("d", "failed", seconds=8.0, error="it broke"),
    ]

    def told() -> Told:
        raise OSError("a report that can't be made")

    again.end("FINISHED", states, told)
    run = client.get_run(first)
    assert run.info.status == "FINISHED" and run.data.params["packs"] == "2"
    assert run.data.tags["echodistill.batch"] == "there"
    figures = run.data.metrics
    assert (figures["seconds"], figures["gpu_seconds"], figures["cost"]) == (13.0, 50.0, 0.625)
    counts = {name.partition("/")[2]: int(n) for name, n in figures.items() if "/" in name and n}
    assert counts == {"already": 2, "trained": 1, "failed": 1, "promoted": 1}


def test_a_server_that_is_away_is_in_nobodys_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        run = run_for(f"http://127.0.0.1:{taken.getsockname()[1]}")
        assert run.begin() is None
        run.end("FINISHED", [])


def test_a_training_that_was_stopped_says_so(tracking_uri: str) -> None:
    concepts = {name: Concept(name, "dog", "<new1>", "dog", True, ()) for name in "ab"}
    results: dict[str, ConceptResult] = {}

    def training(only: str = "ab", force: bool = False) -> Any:
        some = {name: concepts[name] for name in only}
        return parent_of_training("x/photos", SPEC, tracking_uri, some, results, force=force)

    with pytest.raises(KeyboardInterrupt), training() as parent:
        results["a"] = ConceptResult("a", "failed", seconds=3.0, error="no")
        raise KeyboardInterrupt
    run = MlflowClient(tracking_uri).get_run(str(parent))
    assert run.info.status == "KILLED" and run.info.run_name == "photos"
    assert run.data.metrics["concepts/failed"] == 1 and run.data.metrics["seconds"] == 3.0
    with training() as again, training(force=True) as anew, training("a") as alone:
        assert again == parent and anew not in (None, parent) and alone is None
