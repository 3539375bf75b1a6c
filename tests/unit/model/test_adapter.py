"""The adapter folder: round trip, refusal of whatever was touched, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.adapter import load_adapter, prompt_for, save_adapter
from model.adapter_meta import AdapterInfo
from model.base_pair import BasePair
from model.errors import EchoDistillError, InputError

INFO = AdapterInfo(
    concept_id="my-dog",
    class_noun="dog",
    tokens=("<new1>",),
    initializer="corgi",
    live=True,
    base_name="tiny",
    spec_digest="abc",
    iterations=5,
    metrics={"clip_i": 0.75},
)


def save(pair: BasePair, folder: Path, **changes: Any) -> str:
    gen = torch.Generator().manual_seed(0)
    moves = 0.01 * torch.randn(pair.student_kv.shape, generator=gen)
    options = {
        "info": INFO,
        "student_kv": pair.student_kv + moves,
        "token_rows": torch.randn(1, 32, generator=gen),
        **changes,
    }
    return save_adapter(folder, pair=pair, **options)


def test_round_trip(pair: BasePair, folder: Path) -> None:
    trained = pair.student_kv + 0.01 * torch.randn(pair.student_kv.shape)
    teacher = pair.teacher_kv + 0.01 * torch.randn(pair.teacher_kv.shape)
    rows = torch.randn(1, 32)
    sha256 = save(pair, folder, student_kv=trained, teacher_kv=teacher, token_rows=rows)
    data = (folder / "adapter.safetensors").read_bytes()
    assert sha256 == hashlib.sha256(data).hexdigest()
    adapter = load_adapter(folder, sha256)
    assert adapter.sha256 == sha256 and adapter.tokens == ("<new1>",)
    # fp16 deltas: eleven bits of how far a weight moved
    assert torch.allclose(adapter.student_weight(pair), trained, atol=0.01 * 4 * 2**-11)
    assert torch.allclose(adapter.teacher_weight(pair), teacher, atol=0.01 * 4 * 2**-11)
    assert torch.equal(adapter.token_rows, rows)
    assert set(adapter.kv_delta) == set(pair.student_layout.names)
    assert all(part.dtype == torch.float16 for part in adapter.kv_delta.values())
    assert adapter.meta["concept"] == {
        "id": "my-dog",
        "class_noun": "dog",
        "initializer": "corgi",
        "live": True,
    }
    assert adapter.meta["base"]["hash"] == pair.hash
    assert adapter.meta["metrics"] == {"clip_i": 0.75}


def test_files_hold_no_more_than_they_should(pair: BasePair, folder: Path) -> None:
    save(pair, folder)
    names = {"adapter.json", "adapter.safetensors", "README.md"}
    assert {path.name for path in folder.iterdir()} == names
    assert list(folder.parent.iterdir()) == [folder]  # nothing half-made is left beside it
    weights = pair.student_kv.numel() * 2 + 32 * 4
    assert (folder / "adapter.safetensors").stat().st_size < weights + 8192
    card = (folder / "README.md").read_text()
    assert "<new1> dog" in card and pair.hash in card and "clip_i" in card


def test_the_same_weights_give_the_same_sha256(pair: BasePair, tmp_path: Path) -> None:
    assert save(pair, tmp_path / "a") == save(pair, tmp_path / "b")


def test_a_teacherless_adapter_says_so(pair: BasePair, folder: Path) -> None:
    save(pair, folder)
    with pytest.raises(InputError, match="has no teacher.safetensors"):
        load_adapter(folder).teacher_weight(pair)


def test_an_existing_folder_is_replaced_whole(pair: BasePair, folder: Path) -> None:
    first = save(pair, folder, teacher_kv=pair.teacher_kv)
    (folder / "preview.png").write_bytes(b"old")
    second = save(pair, folder, token_rows=torch.ones(1, 32))
    assert first != second == load_adapter(folder).sha256
    assert not (folder / "preview.png").exists() and not (folder / "teacher.safetensors").exists()
    assert list(folder.parent.iterdir()) == [folder]


def test_a_failed_write_leaves_the_old_adapter(
    pair: BasePair, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = save(pair, folder)

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save(pair, folder, token_rows=torch.ones(1, 32))
    assert load_adapter(folder).sha256 == first
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("name", ["adapter.safetensors", "teacher.safetensors"])
def test_a_tampered_file_is_refused(pair: BasePair, folder: Path, name: str) -> None:
    save(pair, folder, teacher_kv=pair.teacher_kv)
    path = folder / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(InputError, match="sha256"):
        load_adapter(folder)


def test_another_adapter_than_expected_is_refused(pair: BasePair, folder: Path) -> None:
    save(pair, folder)
    with pytest.raises(InputError, match="not the expected"):
        load_adapter(folder, "0" * 64)


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Put other tensors in and make the hash fit: what a careful forger would do."""
    path = folder / "adapter.safetensors"
    save_file(tensors, path)
    meta = json.loads((folder / "adapter.json").read_text())
    meta["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "adapter.json").write_text(json.dumps(meta))


def test_tensors_that_do_not_belong_are_refused(pair: BasePair, folder: Path) -> None:
    save(pair, folder)
    tensors = load_file(folder / "adapter.safetensors")
    name = next(iter(pair.student_layout.names))
    for bad in (
        {**tensors, "../../evil.to_k.weight": tensors[name].clone()},
        {**tensors, "conv_in.weight": tensors[name].clone()},
        {**tensors, name: tensors[name].float()},
        {n: t for n, t in tensors.items() if n != "token_rows"},
        {**tensors, "token_rows": torch.zeros(2, 32)},
    ):
        rewrite(folder, bad)
        with pytest.raises(InputError):
            load_adapter(folder)
    rewrite(folder, {n: t for n, t in tensors.items() if n != name})
    with pytest.raises(InputError, match="missing or of another size"):
        load_adapter(folder).student_weight(pair)


@pytest.mark.parametrize(
    ("path", "value", "what"),
    [
        (("schema_version",), 99, "schema_version"),
        (("concept", "id"), "../up", "concept id"),
        (("concept", "class_noun"), "", "class_noun"),
        (("tokens",), ["<a/../b>"], "token"),
        (("tokens",), [], "tokens"),
        (("tokens",), ["<a>", "<a>"], "twice"),
        (("base", "hash"), "xyz", "hash"),
        (("sha256",), None, "sha256"),
        (("base",), None, "base"),
    ],
)
def test_a_bad_description_is_refused_by_field(
    pair: BasePair, folder: Path, path: tuple[str, ...], value: object, what: str
) -> None:
    save(pair, folder)
    meta = json.loads((folder / "adapter.json").read_text())
    place = meta
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (folder / "adapter.json").write_text(json.dumps(meta))
    with pytest.raises(InputError, match=what):
        load_adapter(folder)


def test_broken_or_missing_files_are_refused(pair: BasePair, folder: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load_adapter(folder)
    save(pair, folder)
    (folder / "adapter.json").write_text("{")
    with pytest.raises(InputError, match="adapter.json"):
        load_adapter(folder)
    save(pair, folder)
    (folder / "adapter.safetensors").unlink()
    with pytest.raises(InputError, match="adapter.safetensors"):
        load_adapter(folder)


def test_another_base_is_refused(pair: BasePair, swapped_pair: BasePair, folder: Path) -> None:
    save(pair, folder)
    with pytest.raises(InputError, match="was made for base 'tiny'"):
        load_adapter(folder).student_weight(swapped_pair)


def test_bad_input_is_not_written(pair: BasePair, folder: Path) -> None:
    for info in (
        AdapterInfo("../evil", "dog", ("<new1>",)),
        AdapterInfo("dog", "dog", ("new1",)),
    ):
        with pytest.raises(InputError):
            save(pair, folder, info=info)
    broken = pair.student_kv.clone()
    broken[0, 0] = float("nan")
    with pytest.raises(EchoDistillError, match="diverged"):
        save(pair, folder, student_kv=broken)
    assert not list(folder.parent.iterdir())


META = {"tokens": ["<new1>"], "concept": {"class_noun": "stuffed animal"}}


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a <new1> stuffed animal", "a <new1> stuffed animal"),
        ("a <new1> thing", "a <new1> thing"),
        ("a red Stuffed Animal on a bed", "a red <new1> Stuffed Animal on a bed"),
        ("stuffed animal, stuffed animal", "<new1> stuffed animal, stuffed animal"),
    ],
)
def test_prompts_get_the_token_before_the_class_noun(prompt: str, expected: str) -> None:
    assert prompt_for(META, prompt) == expected


@pytest.mark.parametrize("prompt", ["", "a cat", "a stuffed animalist"])
def test_prompts_that_name_nothing_are_refused(prompt: str) -> None:
    with pytest.raises(InputError, match="<new1> stuffed animal"):
        prompt_for(META, prompt)
