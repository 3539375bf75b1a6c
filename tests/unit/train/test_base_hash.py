"""The hash of the frozen models: by what they hold, wherever they lie."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from components.spec import RunSpec
from components.train.base_hash import base_hash
from tests.integration.train.packs import tiny_spec
from tests.tiny import TinyPaths, build_tiny_pair


def spec_at(root: Path) -> RunSpec:
    return tiny_spec(TinyPaths(*(root / name for name in TinyPaths.__dataclass_fields__)))


def change(place: Path) -> None:
    tensors = load_file(place)
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    tensors[name] = tensors[name] * 1.5
    save_file(tensors, place, metadata={"format": "pt"})


def test_copies_are_the_same_and_other_weights_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ECHODISTILL_CACHE", str(tmp_path / "cache"))
    build_tiny_pair(tmp_path / "tiny")
    expected = base_hash(spec_at(tmp_path / "tiny"))
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "tiny", copy)
    assert base_hash(spec_at(copy)) == base_hash(spec_at(copy)) == expected
    seen = {expected}
    for part in ("student/unet", "teacher/unet", "clip", "dino"):
        for place in (copy / part).glob("*.safetensors"):
            change(place)
        assert base_hash(spec_at(copy)) not in seen, part
        seen.add(base_hash(spec_at(copy)))


def test_models_of_s3_and_the_hub_count_by_name(tmp_path: Path) -> None:
    build_tiny_pair(tmp_path / "tiny")
    spec = spec_at(tmp_path / "tiny")

    def named(teacher: str) -> str:
        base = spec.base.model_copy(update={"teacher": teacher, "identity": "org/clip@1"})
        return base_hash(spec.model_copy(update={"base": base}))

    # Nothing is fetched: there is no such bucket.
    assert named("s3://nowhere/a") == named("s3://nowhere/a") != named("s3://nowhere/b")
