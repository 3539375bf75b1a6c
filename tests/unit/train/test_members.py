"""How a pack's members are loaded where something is wrong."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from components.ingest import s3
from components.ingest.concept_folder import Concept, ReferenceImage
from components.spec import resolve_spec
from components.train import ranks
from components.train.job import BasePaths, PackJob
from components.train.members import load_members
from model.errors import AwayError

FROZEN: Any = SimpleNamespace(pair=SimpleNamespace(hash="base"))


def concept(name: str, place: str) -> Concept:
    photo = ReferenceImage("0.png", place, "", "0" * 64, 64, 64)
    return Concept(name, "dog", "<new1>", "dog", True, (photo,))


def test_a_storage_that_is_away_is_no_members_fault_and_every_rank_hears_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []

    def gathered(value: Any) -> list[Any]:
        told.append(value)
        return told

    monkeypatch.setattr(ranks, "gathered", gathered)
    monkeypatch.setattr(s3, "REQUEST_ATTEMPTS", 1)
    for name, value in {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "none",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    spec = resolve_spec("pocket", None, [])

    def load(*concepts: Concept) -> list[str | None]:
        job = PackJob(spec, concepts, BasePaths.from_spec(spec), "pack", None)
        return [member.error for member in load_members(job, FROZEN, None)]

    gone, dog = concept("gone", str(tmp_path / "0.png")), concept("dog", "s3://photos/dog/0.png")
    with pytest.raises(AwayError, match=r"s3://photos/dog/0.png: .* is out of reach"):
        load(gone, dog)
    assert len(told) == 1, "the other ranks wait for this one's word"
    with pytest.raises(AwayError, match="out of reach"):
        load(gone)  # the word of another rank counts here too

    told.clear()
    (error,) = load(gone)
    assert error is not None and "can't be read on this machine" in error
