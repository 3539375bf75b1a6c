"""Batches on a Ray, driven in this process: what is done once, what goes on, what is left out.

The stories are long because every training run costs ten seconds to start.
"""

from __future__ import annotations

import os
import platform
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image

from components.ingest import documents
from components.ingest.concept_folder import check_prefix
from components.train.base_hash import base_hash
from components.train.batch import (
    Batch,
    at_storage,
    plan_batch,
    save_batch,
    storage_for,
    upload_photos,
)
from components.train.claims import LEASE
from components.train.state import BatchStatus, BatchView, ConceptState
from pipeline.drive import drive
from pipeline.parent_run import BATCH_TAG
from pipeline.progress import Event, silent
from tests.conftest import S3Bucket
from tests.integration.pipeline.test_run import spec_for

QUICK: dict[str, Any] = {"look_seconds": 0.3, "held_seconds": 0.5}


def planned(prefix: str, base: Path, folder: Path, *sets: str, **options: Any) -> Batch:
    spec = spec_for(base, folder, *sets)
    # As if nothing was said about storage: beside the photos.
    unset = spec.model_copy(
        update={"train": spec.train.model_copy(update={"storage_path": "runs/train"})}
    )
    base_hash(spec)  # models can't be loaded by two threads at once, as drivers here would
    spec = at_storage(spec, storage_for(prefix, unset, None if "s3:" in prefix else str(folder)))
    batch, concepts = plan_batch(prefix, check_prefix(prefix), spec, registry="", **options)
    save_batch(batch, upload_photos(concepts, batch.storage))
    return batch


def driven(batch: Batch, **options: Any) -> dict[str, ConceptState]:
    return drive(batch.uri, silent, threading.Event(), **QUICK, **options)


def states(found: dict[str, ConceptState]) -> dict[str, str]:
    return {name: one.state for name, one in found.items()}


def versions(tracking_uri: str, concept: str) -> list[int]:
    client = MlflowClient(tracking_uri, tracking_uri)
    found = client.search_model_versions(f"name = 'echodistill.{concept}'")
    return sorted(int(version.version) for version in found)


def until(
    batch: Batch, condition: Callable[[BatchStatus], bool], driving: threading.Thread
) -> BatchStatus:
    """Wait until a batch's status is such; fails when its driver ends before."""
    view = BatchView(batch.uri)
    while True:
        alive = driving.is_alive()
        status = view.read()
        if condition(status):
            return status
        assert alive, status.as_json()
        time.sleep(0.1)


@pytest.mark.slow
def test_batches_on_s3_do_what_is_not_done_and_only_once(
    tiny_base: Path,
    concepts: Path,
    tmp_path: Path,
    tracking_uri: str,
    s3_bucket: S3Bucket,
    ray_cluster: None,
) -> None:
    (concepts / "no-photos").mkdir()
    (concepts / "no-photos" / "concept.yaml").write_text("class_noun: dog\n")
    (concepts / "no-noun").mkdir()
    Image.new("RGB", (80, 80)).save(concepts / "no-noun" / "0.png")
    (concepts / "no-picture").mkdir()
    (concepts / "no-picture" / "0.png").write_bytes(b"no picture")
    (concepts / "no-picture" / "concept.yaml").write_text("class_noun: dog\n")
    prefix = s3_bucket.upload_folder(concepts, "photos")

    # Two submissions at once, of the same concepts: each is trained by one of them.
    one, two = (planned(prefix, tiny_base, tmp_path, "pack.size=1") for _ in range(2))
    assert one.storage == f"{s3_bucket.uri}/.echodistill"
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(driven, (one, two)))
    for name in ("my-dog", "my-robot"):
        assert sorted(each[name].state for each in both) == ["already", "trained"], both
        assert versions(tracking_uri, name) == [1]
        assert both[0][name].digest == both[1][name].digest
        runs = [b for b in (one, two) for n in range(2) if f"{b.run_name(n)}/" in names(s3_bucket)]
        assert len(runs) == 2, "a digest was trained by both"
    for found in both:
        assert states(found)["no-photos"] == states(found)["no-picture"] == "invalid"
        assert "class noun" in (found["no-noun"].error or "")
    status = BatchView(one.uri).read()
    assert status.state == "done" and {c.id: c for c in status.concepts} == both[0]
    assert [c.good for c in status.concepts] == [True, True, False, False, False]

    # Each batch has a run of its own, above those of the concepts that it trained.
    for batch, result in zip((one, two), both, strict=True):
        run = parent(tracking_uri, batch)
        trained = [each for each in result.values() if each.state == "trained"]
        assert run.info.status == "FINISHED" and run.data.metrics["concepts/invalid"] == 3
        assert run.data.metrics["concepts/trained"] == len(trained)
        assert run.data.metrics["seconds"] == pytest.approx(sum(c.seconds for c in trained))
        client = MlflowClient(tracking_uri)
        for each in trained:
            own = client.get_run(str(each.run_id)).data.tags
            assert own["mlflow.parentRunId"] == run.info.run_id
            assert each.worker == platform.node() or not each.worker  # too quick to be seen
        assert {"report.html", "spec.yaml"} <= {
            item.path for item in client.list_artifacts(run.info.run_id)
        }

    # Another photo makes another digest, of that one concept.
    Image.new("RGB", (80, 80), "red").save(concepts / "my-dog" / "99.png")
    s3_bucket.upload_folder(concepts, "photos")
    third = planned(prefix, tiny_base, tmp_path, "pack.size=1")
    found = driven(third)
    assert states(found)["my-dog"] == "trained" and states(found)["my-robot"] == "already"
    assert found["my-dog"].version == "2" and found["my-robot"].version == "1"
    # Once more, the same batch and a new one: nobody starts anything.
    begun = names(s3_bucket)
    assert driven(third) == found
    again = driven(planned(prefix, tiny_base, tmp_path))
    assert states(again)["my-dog"] == states(again)["my-robot"] == "already"
    assert names(s3_bucket) == begun


def parent(tracking_uri: str, batch: Batch) -> Run:
    """The one run of a batch."""
    client = MlflowClient(tracking_uri)
    query = f"tags.`{BATCH_TAG}` = '{batch.uri}'"
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()], query)
    return run


def names(bucket: S3Bucket) -> set[str]:
    """The folders of runs in a bucket's storage."""
    answer = bucket.client.list_objects_v2(
        Bucket=bucket.name, Prefix=".echodistill/", Delimiter="/"
    )
    every = {each["Prefix"].split("/", 1)[1] for each in answer["CommonPrefixes"]}
    return every - {"batches/", "claims/", "photos/"}


@pytest.mark.slow
def test_what_was_begun_goes_on_whoever_died(
    tiny_base: Path, concepts: Path, tmp_path: Path, tracking_uri: str, ray_cluster: None
) -> None:
    # Pictures every few iterations make blocks of as many, each with a checkpoint.
    slow = ("train.iterations=60", "train.checkpoint_seconds=0", "train.sample_every=5")
    first = planned(str(concepts), tiny_base, tmp_path, *slow)
    stop, events = threading.Event(), list[Event]()
    driving = threading.Thread(
        target=drive, args=(first.uri, events.append, stop), kwargs=QUICK, daemon=True
    )
    driving.start()
    until(first, lambda status: status.concepts[0].iteration >= 10, driving)

    # The pack's process is killed: the same driver goes on.
    from ray import get_runtime_context
    from ray.util.state import list_actors

    (actor,) = list_actors(
        get_runtime_context().gcs_address,
        filters=[("class_name", "=", "PackRun"), ("state", "=", "ALIVE")],
        detail=True,
    )
    os.kill(actor.pid, signal.SIGKILL)
    until(first, lambda status: any("once more" in e.text for e in events), driving)
    status = until(first, lambda status: status.concepts[0].iteration >= 30, driving)

    # Cancelled: the state says so without a cluster, and everything is free at once.
    stop.set()
    driving.join(60)
    assert not driving.is_alive()
    status = BatchView(first.uri).read()
    assert status.state == "cancelled" and status.counts == {"cancelled": 2}
    assert parent(tracking_uri, first).info.status == "KILLED"
    assert versions(tracking_uri, "my-dog") == []
    reached = min(one.iteration for one in status.concepts)

    # Submitted again, in other packs, and a photo is lost: that one fails, the other goes on.
    second = planned(str(concepts), tiny_base, tmp_path, *slow, "pack.size=1")
    photos = documents.read(f"{second.uri}/concepts.json")
    assert photos is not None
    lost = Path(photos.value["my-robot"]["images"][0]["path"])
    content = lost.read_bytes()
    lost.unlink()
    found = driven(second)
    assert states(found) == {"my-dog": "trained", "my-robot": "failed"}
    assert lost.name in (found["my-robot"].error or "")
    assert first_step(tracking_uri, "my-dog") > reached - 10
    assert versions(tracking_uri, "my-dog") == [1]

    # Once more what failed, when it is mended; a driver that was killed left its lease behind.
    lost.write_bytes(content)
    assert states(driven(second)) == states(found), "what failed waits for --failed"
    documents.write(
        f"{second.uri}/{LEASE}",
        {"holder": "dead", "job": "j", "ended": None, "beat": 0.0, "expires": time.time() - 1},
    )
    found = driven(second, failed=True)
    assert states(found) == {"my-dog": "trained", "my-robot": "trained"}
    assert all(one.good and one.iteration == 60 for one in found.values())
    run = parent(tracking_uri, second)  # the same one for all its drivers
    assert run.info.status == "FINISHED" and run.data.metrics["concepts/trained"] == 2
    assert run.data.metrics["concepts/failed"] == 0
    assert first_step(tracking_uri, "my-robot") > reached - 10
    assert versions(tracking_uri, "my-dog") == versions(tracking_uri, "my-robot") == [1]


def first_step(tracking_uri: str, concept: str) -> int:
    """The first iteration that the run of a concept's champion logged."""
    client = MlflowClient(tracking_uri, tracking_uri)
    version = client.get_model_version_by_alias(f"echodistill.{concept}", "champion")
    history = client.get_metric_history(version.run_id, "loss/rec")
    return min(point.step for point in history)
