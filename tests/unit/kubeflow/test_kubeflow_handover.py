"""What a training leaves in its batch's folder for the step that registers it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from components.train.handover import hand_over, take_over
from components.train.job import TrainedConcept
from model.errors import InputError
from tests.conftest import S3Bucket


def made(folder: Path, content: str) -> TrainedConcept:
    folder.mkdir(parents=True)
    (folder / "adapter.json").write_text(content)
    entry = {"what": "end", "run": "r", "concept": "fox", "error": None}
    return TrainedConcept("fox", "trained", folder, "a" * 64, seconds=3.5, unlogged=(entry,))


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
