"""What a step leaves in its batch's folder for the next, and what the last one makes of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from components.promote import step
from components.promote.promote import Decision
from components.promote.step import promote_batch
from components.register.registry import RegisteredVersion
from components.train.claims import end_lease
from components.train.handover import hand_over, take_over
from components.train.job import TrainedConcept
from components.train.state import ConceptState, write_states
from model.errors import InputError
from model.names import CHAMPION
from tests.conftest import S3Bucket
from tests.unit.pipeline.test_batch import planned


def made(folder: Path, content: str) -> TrainedConcept:
    folder.mkdir(parents=True)
    (folder / "adapter.json").write_text(content)
    entry = {"what": "end", "run": "r", "concept": "fox", "error": None}
    return TrainedConcept("fox", "trained", folder, "a" * 64, seconds=3.5, unlogged=(entry,))


def test_what_was_not_measured_is_not_promoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = planned(tmp_path, "a", "b", "c")
    there = {"b": {"metric.clip_i": "0.5"}, "c": {}}  # a is gone from the registry
    judged: list[str] = []

    def get(name: str, pointer: str, **_: str) -> RegisteredVersion | None:
        if pointer == CHAMPION or name not in there:
            return None
        return RegisteredVersion(f"echodistill.{name}", 1, "0" * 64, there[name])

    def promote(name: str, *_: object, **__: str) -> Decision:
        judged.append(name)
        return Decision(True, ())

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///x.db")
    monkeypatch.setattr(step, "get_version", get)
    monkeypatch.setattr(step, "promote", promote)
    states = [ConceptState(name, "trained", version="1") for name in "abc"]
    write_states(batch, states)
    end_lease(batch.uri, "done")
    status = promote_batch(batch.uri, print)
    assert judged == ["b"]
    assert {one.id for one in status.concepts if one.promoted} == {"b"}


@pytest.mark.parametrize("place", ["folder", "s3"])
def test_what_is_handed_over_is_taken_over(place: str, tmp_path: Path, s3_bucket: S3Bucket) -> None:
    batch = str(tmp_path / "batch") if place == "folder" else f"{s3_bucket.uri}/storage/batch"
    with pytest.raises(InputError, match="no adapter of fox"):
        take_over(batch, "fox", tmp_path / "none")
    hand_over(made(tmp_path / "first", "1"), batch)
    hand_over(made(tmp_path / "second", "2"), batch)  # trained again: in place of the first
    taken = take_over(batch, "fox", tmp_path / "taken")
    assert taken.adapter_dir == tmp_path / "taken" / "fox"
    assert json.loads((taken.adapter_dir / "adapter.json").read_text()) == 2
    assert (taken.sha256, taken.seconds, taken.unlogged[0]["what"]) == ("a" * 64, 3.5, "end")
    with pytest.raises(InputError, match="was not trained"):
        hand_over(TrainedConcept("fox", "failed"), batch)
