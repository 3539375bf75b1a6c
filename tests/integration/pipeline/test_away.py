"""MLflow away while a batch is trained: nothing is lost, nothing is trained twice."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from components.train.state import BatchView
from pipeline.drive import drive
from pipeline.progress import Event
from tests.conftest import S3Bucket
from tests.faults import Faults, everything, faulty_proxy
from tests.integration.pipeline.test_driver import planned, states, until

QUICK: dict[str, Any] = {
    "look_seconds": 0.3,
    "held_seconds": 0.5,
    "away_seconds": 0.5,
    "patience_seconds": 1.0,
}


@pytest.mark.slow
def test_what_is_trained_while_mlflow_is_away_is_registered_later_and_not_trained_again(
    tiny_base: Path,
    concepts: Path,
    tmp_path: Path,
    mlflow_server: str,
    s3_bucket: S3Bucket,
    ray_cluster: None,
) -> None:
    prefix = s3_bucket.upload_folder(concepts, "photos")
    faults, events = Faults(only=everything), list[Event]()
    # Blocks of two iterations, each with a checkpoint.
    sets = ("train.iterations=20", "train.checkpoint_seconds=0", "tracking.log_every=2")
    with faulty_proxy(mlflow_server, faults) as proxy:
        batch = planned(prefix, tiny_base, tmp_path, *sets, f"tracking.uri={proxy}")
        stop = threading.Event()
        driving = threading.Thread(
            target=drive, args=(batch.uri, events.append, stop), kwargs=QUICK, daemon=True
        )
        driving.start()
        until(batch, lambda status: status.concepts[0].iteration >= 2, driving)
        faults.away.set()
        status = until(batch, lambda status: status.counts == {"waiting": 2}, driving)
        assert all("waits for the registry" in one.note for one in status.concepts)
        assert all("did not answer" in one.note and proxy in one.note for one in status.concepts)

        # Whoever stops waiting loses nothing: the next driver finds the adapters.
        stop.set()
        driving.join(60)
        assert not driving.is_alive() and BatchView(batch.uri).read().state == "cancelled"
        runs = written(s3_bucket)
        faults.away.clear()
        found = drive(batch.uri, events.append, threading.Event(), **QUICK)
        assert states(found) == {"my-dog": "trained", "my-robot": "trained"}, found
        assert all(one.good and one.iteration == 20 for one in found.values())
    assert written(s3_bucket) == runs, "it was only registered"

    # MLflow has been told what it missed.
    client = MlflowClient(mlflow_server, mlflow_server)
    for name in found:
        (version,) = client.search_model_versions(f"name = 'echodistill.{name}'")
        assert version.tags["adapter_sha256"] == found[name].sha256
        run = client.get_run(version.run_id)
        assert run.info.status == "FINISHED" and run.data.params["concept_digest"]
        history = client.get_metric_history(version.run_id, "loss/rec")
        assert sorted(point.step for point in history) == list(range(1, 21))
        assert "adapter" in {file.path for file in client.list_artifacts(version.run_id)}


def written(bucket: S3Bucket) -> set[str]:
    """The checkpoints in a bucket's storage, by the names of their manifests."""
    pages = bucket.client.get_paginator("list_objects_v2").paginate(Bucket=bucket.name)
    keys = {found["Key"] for page in pages for found in page["Contents"]}
    return {key for key in keys if key.endswith("manifest.json")}
