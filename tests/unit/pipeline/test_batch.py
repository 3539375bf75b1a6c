"""Batches: what is planned, what is written, and what the documents say of a batch's state."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest
from PIL import Image

from components.ingest import documents, s3
from components.ingest.concept_folder import CheckedConcept, Concept, check_prefix
from components.register.registry import RegisteredVersion
from components.spec import RunSpec, resolve_spec
from components.train.batch import (
    Batch,
    at_storage,
    find_batch,
    load_batch,
    load_concepts,
    new_id,
    plan_batch,
    save_batch,
    storage_for,
    upload_photos,
)
from components.train.claims import LEASE, Lease, end_lease
from components.train.state import FOUND, PACKS, BatchView, ConceptState, as_facts
from model.errors import InputError
from pipeline.driver import Driver, _Flight, _Turn
from pipeline.progress import silent
from pipeline.run import ConceptResult
from tests.conftest import S3Bucket
from tests.faults import Faults, everything, faulty_proxy


def checked(name: str, *problems: str) -> CheckedConcept:
    concept = None if problems else Concept(name, "dog", "<new1>", "dog", True, ())
    return CheckedConcept(name, not problems, "dog", 0, problems, concept)


def spec_at(folder: Path, *sets: str) -> RunSpec:
    return at_storage(resolve_spec("pocket", None, ["pack.size=2", *sets]), str(folder))


def planned(folder: Path, *names: str) -> Batch:
    every = [checked(name) for name in names] + [checked("broken", "a.png: is no picture")]
    batch, concepts = plan_batch("photos/", every, spec_at(folder), registry="sqlite:///x.db")
    save_batch(batch, concepts)
    return batch


def test_a_plan_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    batch = planned(tmp_path, "c", "a", "b")
    assert batch.packs == (("a",), ("b", "c")) and batch.invalid["broken"]
    assert batch.concept_ids == ["a", "b", "broken", "c"]
    assert load_batch(batch.uri) == batch
    assert find_batch(None, str(tmp_path)) == batch.uri
    assert find_batch(batch.id, str(tmp_path)) == find_batch(batch.uri, "elsewhere") == batch.uri
    with pytest.raises(InputError, match="already"):
        save_batch(batch, {})
    with pytest.raises(InputError, match="no batch"):
        load_batch(f"{batch.uri}-not")
    with pytest.raises(InputError, match="no batch in"):
        find_batch(None, str(tmp_path / "elsewhere"))


def test_what_cannot_be_a_concept_is_left_out(tmp_path: Path) -> None:
    batch, concepts = plan_batch(
        "photos", [checked("pocket"), checked("fox")], spec_at(tmp_path), registry=""
    )
    assert list(concepts) == ["fox"] and "name of the base" in batch.invalid["pocket"][0]
    with pytest.raises(InputError, match="no concept of photos is valid"):
        plan_batch("photos", [checked("fox", "no")], spec_at(tmp_path), registry="")


@pytest.mark.parametrize("prefix", ["s3://bucket/My Photos/", "/x/" + 100 * "é", "photos"])
def test_a_batch_id_fits_everywhere_and_tells_the_order(prefix: str) -> None:
    name = new_id(prefix)
    assert len(name) <= 47 and name == name.lower() and name.isascii() and name[0].isalnum()


def test_where_a_batch_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plain = resolve_spec("pocket")
    own = resolve_spec("pocket", None, ["train.storage_path=s3://own/place/"])
    assert storage_for("photos", plain, None) == str(tmp_path / "runs" / "train")
    assert storage_for("s3://bucket/photos", plain, None) == "s3://bucket/.echodistill"
    with pytest.raises(InputError, match="names no bucket"):
        storage_for("photos", plain, "s3://")
    assert storage_for("s3://bucket/photos", own, None) == "s3://own/place"
    assert storage_for("s3://bucket/photos", own, "shared") == str(tmp_path / "shared")


def test_photos_are_copied_by_content_and_once(tmp_path: Path, s3_bucket: S3Bucket) -> None:
    for number in range(4):
        place = tmp_path / "photos" / f"fox-{number // 2}" / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (80, 96), (number, 0, 0)).save(place)
    (tmp_path / "photos" / "classes.json").write_text('{"fox-0": "fox", "fox-1": "fox"}')
    concepts = {one.id: one.concept for one in check_prefix(str(tmp_path / "photos"))}
    assert all(concepts.values())
    moved = upload_photos(concepts, f"{s3_bucket.uri}/storage")  # type: ignore[arg-type]
    listed = s3_bucket.client.list_objects_v2(Bucket=s3_bucket.name)["Contents"]
    assert len(listed) == 4
    times = {item["Key"]: item["LastModified"] for item in listed}
    for name, concept in moved.items():
        before = concepts[name]
        assert before is not None and concept.digest == before.digest
        assert all(f"storage/photos/{image.sha256}.png" in times for image in concept.images)
        assert all(image.path == "" for image in concept.images)
    assert upload_photos(moved, "elsewhere") == moved  # what is on S3 stays there
    batch, _ = plan_batch(
        "p", check_prefix(str(tmp_path / "photos")), spec_at(tmp_path), registry=""
    )
    save_batch(batch, moved)
    assert load_concepts(batch) == moved


def test_what_the_documents_say(tmp_path: Path) -> None:
    batch = planned(tmp_path, "a", "b", "c")
    view = BatchView(batch.uri)
    assert view.read().state == "queued" and view.read().counts == {"invalid": 1, "queued": 3}

    lease = {"holder": "x", "job": "j1", "ended": None, "error": None}
    alive = {**lease, "expires": time.time() + 60}
    documents.write(f"{batch.uri}/{LEASE}", alive)
    already = as_facts(ConceptState("a", "already", version="3", seconds=7.0))
    digests = {name: f"digest-{name}" for name in "abc"}
    found = {"digests": digests, "already": {"a": already}, "registry": "sqlite:///x.db"}
    documents.write(f"{batch.uri}/{FOUND}", found)
    training = ConceptState("b", "training", iteration=5, iterations=9, loss={"mse": 0.25})
    pack = {"b": as_facts(training), "c": as_facts(ConceptState("c", "failed", error="it broke"))}
    documents.write(f"{batch.uri}/{PACKS}/1.json", pack)

    status = view.read()
    assert (status.state, status.job, status.over) == ("running", "j1", False)
    a, b, broken, c = status.concepts
    assert (a.state, a.version, a.seconds, a.digest) == ("already", "3", 7.0, "digest-a")
    assert b == replace(training, digest="digest-b") and b.losses == "mse 0.25"
    assert broken.state == "invalid" and broken.error == "a.png: is no picture"
    assert (c.state, c.error, c.good) == ("failed", "it broke", False)
    document = status.as_json()
    assert document["counts"] == {"already": 1, "failed": 1, "invalid": 1, "training": 1}
    assert set(document["concepts"][0]) >= {"id", "state", "version", "digest", "seconds", "error"}

    # The driver is gone: nobody wrote anything, and the reader knows.
    heard = {"beat": 1796026821.5, "expires": time.time() - 1}
    documents.write(f"{batch.uri}/{LEASE}", {**lease, **heard})
    status = view.read()
    assert status.state == "interrupted" and status.over
    assert [one.state for one in status.concepts] == ["already", "interrupted", "invalid", "failed"]
    # Advice that works from everywhere: a name alone is looked for below `runs/train`.
    assert f"echodistill retry {batch.uri} goes on" in (status.concepts[1].error or "")
    assert "last heard of at 2026-11-30T08:20:21Z" in (status.concepts[1].error or "")
    documents.write(f"{batch.uri}/{LEASE}", {**alive, "ended": "cancelled"})
    assert [one.state for one in view.read().concepts][1] == "cancelled"


def test_a_driver_that_never_began_was_never_heard_of(tmp_path: Path) -> None:
    batch = planned(tmp_path, "a")
    end_lease(batch.uri, "interrupted")
    one = next(each for each in BatchView(batch.uri).read().concepts if each.id == "a")
    assert one.state == "interrupted" and "its driver never began" in (one.error or "")


def test_a_failed_concept_names_the_command_that_tries_it_again(tmp_path: Path) -> None:
    batch = planned(tmp_path, "a")
    lease = Lease(batch.uri, "job")
    try:
        driver = Driver(batch, lease, silent, Event())
        driver._states.by_id = {"a": ConceptState("a")}
        driver._settle(0, ConceptResult("a", "failed", error="it broke"))
        note = driver._states["a"].note
    finally:
        lease.end("done")
    assert note == f"echodistill retry {batch.uri} --failed tries it again"


def driver_of(batch: Batch, *states: ConceptState) -> Driver:
    """Gives a driver of which only the methods are asked; its lease has ended."""
    lease = Lease(batch.uri, "job")
    lease.end("done")
    driver = Driver(batch, lease, silent, Event())
    driver._states.by_id = {one.id: one for one in states}
    driver._concepts = load_concepts(batch)
    driver._digests = {one.id: one.id for one in states}
    return driver


def test_two_runs_of_a_pack_at_once_have_different_names(tmp_path: Path) -> None:
    batch = planned(tmp_path, "a", "b")
    a, b = ConceptState("a"), ConceptState("b")
    driver = driver_of(batch, a, b)
    whole, one, other = (driver._run_name(_Turn(0, ids)) for ids in (("a", "b"), ("a",), ("b",)))
    assert whole == batch.run_name(0) and len({whole, one, other}) == 3
    driver._states.put(0, replace(b, state="trained", version="1"))
    assert driver._run_name(_Turn(0, ("a",))) == whole, "what is left goes on where the pack was"
    driver._again(_Turn(0, ("a",), run=one), "its process died")
    driver._wait(_Turn(0, ("a",), run=one), "s3 is away")
    assert [turn.run for turn in driver._queue] == [one, one], "what was begun keeps its name"


def version(tags: dict[str, str], number: int = 2) -> RegisteredVersion:
    return RegisteredVersion("echodistill.a", number, "0" * 64, tags)


@pytest.mark.parametrize(
    ("tags", "champion", "promoted"),
    [
        ({"metric.clip_i": "0.5", "gate": "refused"}, 1, False),
        ({"metric.clip_i": "0.5", "gate": "passed"}, 2, True),
        ({"metric.clip_i": "0.5"}, 2, True),
        ({"metric.clip_i": "0.5"}, 3, False),
        ({"metric.clip_i": "0.5"}, 1, None),  # the gate has not seen it
        ({"metric.clip_i": "0.5"}, None, None),
        ({"metric.dino": "0.5", "gate": "passed"}, 2, None),  # its measuring was interrupted
    ],
)
def test_a_version_is_done_when_it_was_measured_and_judged(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tags: dict[str, str],
    champion: int | None,
    promoted: bool | None,
) -> None:
    driver = driver_of(planned(tmp_path, "a"), ConceptState("a"))
    found = {"a": (version(tags), champion)}
    monkeypatch.setattr("pipeline.driver.find_versions", lambda *_, **__: found)
    done = driver._registered(["a"])
    if promoted is None:
        assert not done
    else:
        assert (done["a"].state, done["a"].promoted) == ("already", promoted)


def test_what_was_done_before_its_pack_broke_has_not_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = planned(tmp_path, "a", "b")
    driver = driver_of(batch, ConceptState("a"), ConceptState("b"))
    found = {"a": (version({"metric.clip_i": "0.5", "gate": "passed"}), 2)}
    monkeypatch.setattr("pipeline.driver.find_versions", lambda *_, **__: found)
    driver._fail(_Turn(0, ("a", "b")), "its process died")
    a, b = driver._states["a"], driver._states["b"]
    assert (a.state, a.version, a.error) == ("already", "2", None)
    assert (b.state, b.error) == ("failed", "its process died")


def test_who_has_lost_a_batch_writes_no_states_any_more(tmp_path: Path) -> None:
    batch = planned(tmp_path, "a")
    driver = driver_of(batch, ConceptState("a"))
    driver._states.put(0, ConceptState("a", "training"))
    driver._lease.lost.set()
    assert not driver._save()
    driver._lease.lost.clear()
    assert not documents.read_folder(f"{batch.uri}/{PACKS}")
    assert driver._save() and documents.read_folder(f"{batch.uri}/{PACKS}")


def test_a_driver_does_not_end_before_the_last_states_are_written(
    tmp_path: Path, s3_bucket: S3Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "REQUEST_ATTEMPTS", 0)
    faults = Faults(only=everything)
    with faulty_proxy(s3_bucket.endpoint, faults) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)
        batch, concepts = plan_batch(
            "photos", [checked("a")], at_storage(spec_at(tmp_path), s3_bucket.uri), registry=""
        )
        save_batch(batch, concepts)
        lease = Lease(batch.uri, "job")
        driver = Driver(batch, lease, silent, Event(), away_seconds=0.1)
        done = ConceptState("a", "trained", version="1", promoted=True)

        def settle(failed: bool) -> None:  # the storage goes away with the last pack's end
            driver._states.by_id = {"a": ConceptState("a")}
            driver._states.put(0, done)
            faults.plan = ["503"] * 4

        monkeypatch.setattr(driver, "_prepare", settle)
        assert driver.run() == {"a": done}
        lease.end("done")
        assert BatchView(batch.uri).read().concepts == (done,)
    assert faults.done["503"] == 4


def test_only_so_many_packs_wait_for_room_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = planned(tmp_path, "a")
    lease = Lease(batch.uri, "job")
    driver = Driver(batch, lease, silent, Event())
    lease.end("done")
    started: list[_Turn] = []

    def start(turn: _Turn) -> bool:
        if turn.pack == 1:  # another batch trains it
            return False
        started.append(turn)
        driver._flights[turn.pack] = _Flight(turn, None, [], ())
        return True

    monkeypatch.setattr(driver, "_start", start)
    later = _Turn(0, ("a",), not_before=time.monotonic() + 600)
    driver._queue.extend([later, *(_Turn(number, ("a",)) for number in range(1, 6))])
    for _ in range(2):
        driver._launch()
        assert [turn.pack for turn in started] == [2, 3]
    driver._flights[2].began = True  # it has room, and the next may ask for some
    driver._launch()
    assert [turn.pack for turn in started] == [2, 3, 4]
    assert later in driver._queue
