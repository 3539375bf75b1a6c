"""A driver whose storage is away as it begins: it waits, and can be cancelled meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import pipeline.drive
from components.ingest import documents, s3
from components.register import connection
from components.train.batch import Batch, at_storage, plan_batch, save_batch
from components.train.state import PACKS, BatchView, ConceptState, as_facts
from model.errors import ServiceError
from pipeline.drive import drive, main
from pipeline.progress import Event
from tests.conftest import S3Bucket
from tests.faults import Faults, everything, faulty_proxy
from tests.unit.pipeline.test_batch import checked, spec_at

DONE = ConceptState("a", "trained", version="1", promoted=True)


@pytest.fixture
def faults(s3_bucket: S3Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    """What to do to the answers of S3, each of which is asked for once."""
    monkeypatch.setattr(s3, "REQUEST_ATTEMPTS", 0)
    monkeypatch.setattr(connection, "_FIRST_PAUSE", 0.01)
    found = Faults(only=everything)
    with faulty_proxy(s3_bucket.endpoint, found) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)
        yield found


@pytest.fixture
def batch(faults: Faults, s3_bucket: S3Bucket, tmp_path: Path, tracking_uri: str) -> Batch:
    """A batch of which nothing is left to do."""
    spec = at_storage(spec_at(tmp_path), s3_bucket.uri)
    planned, concepts = plan_batch("photos", [checked("a")], spec, registry=tracking_uri)
    save_batch(planned, concepts)
    documents.write(f"{planned.uri}/{PACKS}/0.json", {"a": as_facts(DONE)})
    return planned


def test_a_storage_that_is_away_at_the_start_is_waited_for(faults: Faults, batch: Batch) -> None:
    # The batch, the lease on it (which is read, then written) and its concepts.
    faults.plan = ["503", "ok", "503", "ok", "ok", "503"]
    events: list[Event] = []
    found = drive(batch.uri, events.append, threading.Event())
    assert found["a"].good and not faults.plan
    assert sum("waits 0 s: s3://" in event.text for event in events) == 3
    status = BatchView(batch.uri).read()
    assert status.state == "done" and status.counts == {"trained": 1}


def test_who_waits_for_a_storage_can_be_cancelled(faults: Faults, batch: Batch) -> None:
    faults.plan = ["ok", "ok", "ok", "503"]
    stop = threading.Event()
    with pytest.raises(ServiceError, match="was stopped while it waited"):
        drive(batch.uri, lambda event: stop.set() if "waits" in event.text else None, stop)
    assert BatchView(batch.uri).read().state == "cancelled"


def test_a_job_that_cannot_begin_says_why_in_a_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([f"{tmp_path}/batches/none"]) == 2
    said = capfd.readouterr()
    assert said.out.startswith("error: there is no batch") and said.out.count("\n") == 1
    assert "Traceback" not in said.err


def test_a_driver_that_breaks_does_not_end_like_one_whose_concepts_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    planned, concepts = plan_batch("photos", [checked("a")], spec_at(tmp_path), registry="")
    save_batch(planned, concepts)
    place = f"{planned.uri}/batch.json"
    there = documents.read(place)
    assert there is not None
    there.value["spec"]["train"]["of_tomorrow"] = 1
    documents.write(place, there.value)
    assert main([planned.uri]) == 2
    assert "another version of this program" in capfd.readouterr().out

    def broken(_: str) -> Batch:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(pipeline.drive, "load_batch", broken)
    assert main([planned.uri]) == 4
    assert "RuntimeError: a mistake of ours" in capfd.readouterr().err
