"""A concept's state on disk: exact, and refused when it is not whole."""

from __future__ import annotations

import json

import pytest
import torch

from components.train.checkpoint import (
    ConceptState,
    read_state,
    state_folders,
    write_state,
)
from model.errors import InputError


def a_state(iteration: int = 7) -> ConceptState:
    gen = torch.Generator().manual_seed(iteration)
    groups = {
        name: {key: torch.randn(4, 3, generator=gen) for key in ("kv", "exp_avg.kv")}
        for name in ("teacher", "student", "heads")
    }
    images = torch.randint(0, 256, (2, 3, 8, 8), generator=gen, dtype=torch.uint8)
    prompts = ("a photo of a <new1> dog", "a <new1> dog, red")
    return ConceptState(
        "dog", "d" * 64, iteration, groups, images, prompts, 1.5, {"rec": 0.25}, 3.0
    )


def test_a_state_comes_back_bit_for_bit(tmp_path):
    state = a_state()
    write_state(tmp_path / "dog", state)
    back = read_state(tmp_path / "dog", state.digest)
    for group, tensors in state.groups.items():
        for name, tensor in tensors.items():
            assert torch.equal(back.groups[group][name], tensor)
    assert torch.equal(back.echo_images, state.echo_images)
    assert (back.iteration, back.echo_prompts) == (7, state.echo_prompts)
    assert (back.seconds, back.gpu_seconds, back.losses) == (1.5, 3.0, {"rec": 0.25})
    assert list(state_folders(tmp_path)) == ["dog"]


def test_nothing_is_left_of_a_writing_that_broke(tmp_path):
    state = a_state()
    state.groups["heads"] = {"bad": "not a tensor"}  # type: ignore[dict-item]
    with pytest.raises(AttributeError):
        write_state(tmp_path / "dog", state)
    assert list(tmp_path.iterdir()) == []


def _without(folder, name):
    (folder / name).unlink()


def _flipped(folder, name):
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)


def _cut(folder, name):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])


def _edited(folder, name):
    content = json.loads((folder / name).read_text())
    content["iteration"] += 1
    (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("harm", "name"),
    [
        (_without, "manifest.json"),
        (_without, "teacher.safetensors"),
        (_without, "echo.safetensors"),
        (_flipped, "student.safetensors"),
        (_flipped, "echo.safetensors"),
        (_cut, "heads.safetensors"),
        (_cut, "manifest.json"),
        (_edited, "manifest.json"),
    ],
)
def test_a_state_that_is_not_whole_is_refused(tmp_path, harm, name):
    write_state(tmp_path / "dog", a_state())
    harm(tmp_path / "dog", name)
    with pytest.raises(InputError, match="not whole"):
        read_state(tmp_path / "dog")


def test_a_state_of_something_else_is_refused(tmp_path):
    write_state(tmp_path / "dog", a_state())
    with pytest.raises(InputError, match="other photos, settings or base"):
        read_state(tmp_path / "dog", "e" * 64)


def test_a_path_in_the_manifest_leads_nowhere(tmp_path):
    write_state(tmp_path / "dog", a_state())
    path = tmp_path / "dog" / "manifest.json"
    content = json.loads(path.read_text())
    content["files"]["../dog/heads.safetensors"] = content["files"].pop("heads.safetensors")
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="not whole"):
        read_state(tmp_path / "dog")
