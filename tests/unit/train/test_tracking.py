"""Tracking logs to MLflow and never holds training up."""

from __future__ import annotations

import json
import socket

import mlflow
import pytest
import torch
from mlflow import MlflowClient

from components.ingest.concept_folder import check_prefix, load_images
from components.spec import resolve_spec
from components.train.delivery import deliver_late, read_unlogged, write_unlogged
from components.train.lineage import source_of, trained_on
from components.train.tracking import Tracker, TrackingSettings, resolve_tracking
from tests.unit.data.pictures import concept_folder


def test_a_run_holds_everything_and_is_found_again(tracking_uri, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter.json").write_text("{}")
    settings = TrackingSettings(tracking_uri, "some experiment")
    picture = torch.randint(0, 256, (3, 8, 12), dtype=torch.uint8)
    ids = []
    for attempt in (0, 1):  # the second one is a restart
        tracker = Tracker(settings, "pack-1")
        tracker.start("dog", {"train.iterations": 20, "workers": attempt}, "seed: 0\n")
        tracker.log("dog", {10 * attempt + i: {"loss/rec": 1.0 / (1 + i)} for i in range(10)})
        tracker.log_picture("dog", "samples/000010.png", picture)
        tracker.log_folder("dog", folder, "adapter")
        tracker.finish("dog", "loss is not finite" if attempt else None)
        ids.append(tracker.close()["dog"])
    assert ids[0] == ids[1]
    client = MlflowClient(tracking_uri)
    run = client.get_run(ids[0])
    assert run.info.status == "FAILED" and "not finite" in run.data.tags["echodistill.error"]
    assert run.data.params == {"train.iterations": "20", "workers": "0"}
    history = client.get_metric_history(ids[0], "loss/rec")
    assert sorted(m.step for m in history) == list(range(20))
    stored = {f.path for f in client.list_artifacts(ids[0])}
    assert {"adapter", "samples", "spec.yaml"} <= stored
    assert mlflow.get_experiment_by_name("some experiment") is not None


def test_a_server_that_is_away_neither_stops_nor_breaks_training(caplog):
    with socket.socket() as taken:  # a port where nobody answers
        taken.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{taken.getsockname()[1]}"
        tracker = Tracker(TrackingSettings(uri, "x"), "pack-1")
        tracker.start("dog", {}, "")
        for i in range(100):
            tracker.log("dog", {i: {"loss/rec": 1.0}})
        assert tracker.close(seconds=0.5) == {}
        assert len(tracker.unlogged()) == 101
    assert "101 entries are kept in the checkpoint" in caplog.text


def test_what_stayed_unlogged_is_delivered_by_a_worker_or_whoever_registers(tracking_uri, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter.json").write_text("{}")
    picture = torch.randint(0, 256, (3, 8, 12), dtype=torch.uint8)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        away = TrackingSettings(f"http://127.0.0.1:{taken.getsockname()[1]}", "x")
        tracker = Tracker(away, "pack-1")
        tracker.start("dog", {"seed": 3}, "seed: 3\n")
        tracker.log("dog", {n: {"loss/rec": 1.0 / n} for n in (1, 2)})
        tracker.close(seconds=0.1)
    write_unlogged(tmp_path, tracker.unlogged())
    # The next worker of the run takes them over, and is cut off too.
    there = TrackingSettings(tracking_uri, "x")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        tracker = Tracker(away, "pack-1", read_unlogged(tmp_path))
        tracker.start("dog", {"seed": 3}, "seed: 3\n")
        tracker.log("dog", {3: {"loss/rec": 0.25}})
        tracker.log_picture("dog", "samples/3.png", picture)
        tracker.log_folder("dog", tmp_path / "gone", "adapter")
        tracker.finish("dog", None)
        assert tracker.close(seconds=0.1) == {}
    write_unlogged(tmp_path, tracker.unlogged())
    for _ in range(2):  # twice does no harm
        run_id = deliver_late(there, read_unlogged(tmp_path), folder)
    assert run_id is not None
    client = MlflowClient(tracking_uri)
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED" and run.data.params == {"seed": "3"}
    history = client.get_metric_history(run_id, "loss/rec")
    assert sorted((m.step, m.value) for m in history) == [(1, 1.0), (2, 0.5), (3, 0.25)]
    assert {"adapter", "samples", "spec.yaml"} <= {f.path for f in client.list_artifacts(run_id)}
    # A worker that goes on delivers what it was left, but the end.
    tracker = Tracker(there, "pack-2", [{**e, "run": "pack-2"} for e in read_unlogged(tmp_path)])
    run_id = tracker.close()["dog"]
    assert client.get_run(run_id).info.status == "RUNNING"
    assert len(client.get_metric_history(run_id, "loss/rec")) == 3


def test_what_could_not_be_logged_is_logged_when_the_server_is_back(tracking_uri, monkeypatch):
    monkeypatch.setattr("components.train.tracking._FIRST_WAIT", 0.01)
    tracker = Tracker(TrackingSettings(tracking_uri, "x"), "pack-1")
    real, calls = tracker._delivery._experiment, []

    def away_twice() -> str:
        calls.append(1)
        if len(calls) < 3:
            raise ConnectionError("refused")
        return real()

    monkeypatch.setattr(tracker._delivery, "_experiment", away_twice)
    tracker.start("dog", {}, "")
    tracker.log("dog", {3: {"loss/rec": 0.5}})
    run_id = tracker.close()["dog"]
    assert len(calls) == 3
    assert MlflowClient(tracking_uri).get_run(run_id).data.metrics == {"loss/rec": 0.5}


@pytest.mark.parametrize("given", [None, "sqlite:///some/where.db"])
def test_the_default_is_a_file_beside_the_runs(tmp_path, monkeypatch, given):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    sets = ["train.storage_path=out", *([f"tracking.uri={given}"] if given else [])]
    settings = resolve_tracking(resolve_spec("pocket", None, sets))
    expected = tmp_path / ("some/where.db" if given else "out/mlflow.db")
    assert settings is not None and settings.uri == f"sqlite:///{expected}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://there:5000")
    settings = resolve_tracking(resolve_spec("pocket", None, sets))
    assert settings is not None and (settings.uri == "http://there:5000") is (given is None)
    assert resolve_tracking(resolve_spec("pocket", None, ["tracking.enabled=false"])) is None


def test_a_run_names_its_photos_and_its_parent(tracking_uri, tmp_path, s3_bucket):
    photos = tmp_path / "photos"
    concept_folder(photos, "tiny-dog")
    local = check_prefix(str(photos))[0].concept
    there = check_prefix(s3_bucket.upload_folder(photos, "photos"))[0].concept
    assert local is not None and there is not None and local.digest == there.digest
    client = MlflowClient(tracking_uri)
    for name, concept in (("a", local), ("b", there), ("a", local)):  # the last one is a restart
        tracker = Tracker(TrackingSettings(tracking_uri, "x", parent="batch"), name)
        tracker.start(concept.id, {}, "")
        tracker.log_dataset(concept)
        run = client.get_run(tracker.close()[concept.id])
        assert run.data.tags["mlflow.parentRunId"] == "batch"
        (logged,) = run.inputs.dataset_inputs
        source = json.loads(logged.dataset.source)["uri"]
        place = photos if concept is local else f"{s3_bucket.uri}/photos"
        assert source == source_of(concept) == f"{place}/tiny-dog"
        read = trained_on(run)
        assert read is not None and read.digest == concept.digest
        assert [i.uri for i in read.images] == [i.uri for i in concept.images]
        assert len(load_images(read)) == len(concept.images)  # from where they are, by their sha256
    nameless = client.create_run(run.info.experiment_id)
    assert trained_on(client.get_run(nameless.info.run_id)) is None
