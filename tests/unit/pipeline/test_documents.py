"""Conditional writes, in a folder and on S3: of two who saw the same, one wins."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from components.ingest import documents, s3
from components.train.claims import LEASE, Claims, Lease
from model.errors import InputError, ServiceError
from tests.conftest import S3Bucket
from tests.faults import Faults, everything, faulty_proxy


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return str(tmp_path / "some" / "where")
    bucket: S3Bucket = request.getfixturevalue("s3_bucket")
    return f"{bucket.uri}/some/where"


def test_a_write_comes_back_and_a_condition_holds(place: str) -> None:
    uri = f"{place}/a.json"
    assert documents.read(uri) is None
    first = documents.write(uri, {"ä": [1, None]}, documents.ABSENT)
    there = documents.read(uri)
    assert there is not None and there.value == {"ä": [1, None]} and there.tag == first
    assert documents.write(uri, "mine", documents.ABSENT) is None
    second = documents.write(uri, "second", first)
    assert second not in (None, first)
    assert documents.write(uri, "late", first) is None
    assert documents.write(f"{place}/never.json", "was", first) is None
    assert documents.read(uri) == documents.Document("second", second or "")
    assert documents.write(uri, "whatever") and documents.read(uri) != second


def test_of_many_writers_one_wins(place: str) -> None:
    uri = f"{place}/a.json"
    with ThreadPoolExecutor(8) as pool:
        tags = list(pool.map(lambda n: documents.write(uri, n, documents.ABSENT), range(16)))
    winners = [n for n, tag in enumerate(tags) if tag]
    there = documents.read(uri)
    assert there is not None and winners == [there.value]


def test_a_folder_is_read_once_unless_it_changes(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        documents.write(f"{place}/{name}.json", name)
    documents.write(f"{place}/below/c.json", "c")
    first = documents.read_folder(place)
    assert {name: document.value for name, document in first.items()} == {"a": "a", "b": "b"}
    read: list[str] = []
    real = documents.read
    monkeypatch.setattr(documents, "read", lambda uri: (read.append(uri), real(uri))[1])
    assert documents.read_folder(place, first) == first and read == []
    documents.write(f"{place}/b.json", "c")
    assert documents.read_folder(place, first)["b"].value == "c"
    assert read == [f"{place}/b.json"]
    assert documents.list_folders(place) == ["below"]
    assert documents.read_folder(f"{place}/nowhere") == {}


def test_what_is_not_json_is_told(place: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(InputError, match=r"broken\.json is not JSON"):
        documents.read(str(broken))


@pytest.mark.parametrize("fault", ["503", "slow", "drop", "lose", "cut", "late"])
def test_no_fault_on_the_way_loses_or_doubles_a_write(
    fault: str, s3_bucket: S3Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "READ_SECONDS", 0.3)
    faults = Faults(only=everything, late_seconds=1.0)
    with faulty_proxy(s3_bucket.endpoint, faults) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)
        uri = f"{s3_bucket.uri}/x/a.json"
        faults.plan = [fault]
        first = documents.write(uri, "first", documents.ABSENT)
        assert first, "nobody else has written"
        faults.plan = [fault]
        second = documents.write(uri, "second", first)
        faults.plan = [fault]
        assert second and documents.write(uri, "late", first) is None
        faults.plan = [fault]
        assert documents.read(uri) == documents.Document("second", second)
        faults.plan = [fault]
        assert set(documents.read_folder(f"{s3_bucket.uri}/x")) == {"a"}
        # A driver takes its batch and its claims in spite of it.
        faults.plan = ["ok", fault]
        lease = Lease(f"{s3_bucket.uri}/b", "job")
        faults.plan = ["ok", fault]
        assert Claims(s3_bucket.uri, lease).take("digest", "run")
        faults.plan = [fault]
        lease.end("done")
        there = documents.read(f"{s3_bucket.uri}/b/{LEASE}")
        assert there is not None and there.value["ended"] == "done"
    assert faults.done[fault] >= 7 and not faults.plan


def test_a_store_without_conditional_writes_is_written_to_without_them(
    s3_bucket: S3Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = Faults(plan=["unable", "ok"] * 2, only=lambda method, path: method == "PUT")
    with faulty_proxy(s3_bucket.endpoint, faults) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)
        uri = f"{s3_bucket.uri}/a.json"
        first = documents.write(uri, "first", documents.ABSENT)
        assert first and documents.write(uri, "second", first) not in (None, first)
        there = documents.read(uri)
        assert there is not None and there.value == "second"
    assert faults.done == {"unable": 2, "ok": 3}


def test_a_store_that_stays_away_is_one_sentence(
    s3_bucket: S3Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "REQUEST_ATTEMPTS", 2)
    for kind, said in (
        ("slow", "S3 keeps answering SlowDown: try later"),
        ("drop", "out of reach"),
    ):
        faults = Faults(plan=[kind] * 9, only=everything)
        with faulty_proxy(s3_bucket.endpoint, faults) as proxy:
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)
            for ask in (documents.read, lambda uri: documents.write(uri, 1, documents.ABSENT)):
                with pytest.raises(ServiceError, match=said) as caught:
                    ask(f"{s3_bucket.uri}/a.json")
                assert "\n" not in str(caught.value)
