"""Resolving models, and the disk's own failures."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.ingest import hub, store
from components.ingest.cache import ContentCache, replacing, replacing_folder
from model.errors import EchoDistillError, InputError, ServiceError


def test_a_path_resolves_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert store.resolve_model(str(tmp_path / "org")) == tmp_path / "org"
    assert store.resolve_model((tmp_path / "org").as_uri()) == tmp_path / "org"
    monkeypatch.chdir(tmp_path)
    assert store.resolve_model("org/model") == tmp_path / "org" / "model", "a path before a hub id"
    assert store.resolve_model("./org") == tmp_path / "org"


@pytest.mark.parametrize("ref", ["no-such", "./no/such", "/no/such", "a/b/c", "..", "file:///no"])
def test_an_unknown_model_is_a_wrong_input(
    ref: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if ref == "..":
        assert store.resolve_model(ref) == tmp_path.parent
        return
    with pytest.raises(InputError, match="there is no model .*: give a directory"):
        store.resolve_model(ref)


def test_a_hub_id_offline_is_a_service_out_of_reach() -> None:
    with pytest.raises(ServiceError, match="the hub is out of reach and some-org/some-model"):
        store.resolve_model("some-org/some-model")


def test_only_what_loading_needs_is_a_model_file() -> None:
    wanted = (
        *("model_index.json", "config.json", "model.safetensors", "tokenizer/vocab.json"),
        *("model-00001-of-00002.safetensors", "vae/diffusion_pytorch_model.safetensors"),
        *("tokenizer/merges.txt", "model.safetensors.index.json"),
    )
    unwanted = (
        *("pytorch_model.bin", "unet/x.bin", "v2-1_768-ema-pruned.ckpt", "README.md"),
        *("sd_turbo.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors", ".env.json"),
        *("onnx/model.json", "weights.pkl", "unet/model.pt"),
    )
    assert [name for name in wanted if not hub.is_model_file(name)] == []
    assert [name for name in unwanted if hub.is_model_file(name)] == []
    assert hub.is_hub_id("org/name") and hub.is_hub_id("org/name@refs/pr/3")
    assert not hub.is_hub_id("name") and not hub.is_hub_id("../name") and not hub.is_hub_id("a/b/c")


def test_a_full_disk_is_a_service_error(tmp_path: Path) -> None:
    with (
        pytest.raises(ServiceError, match="no space left on the disk"),
        replacing(tmp_path / "file"),
        open("/dev/full", "w") as full,
    ):
        full.write("x" * 100_000)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), replacing_folder(tmp_path / "x") as folder:
        (folder / "half").write_text("half")
        raise RuntimeError("the process ends here")
    assert list(tmp_path.iterdir()) == []
    for text in ("first", "second"):
        with replacing_folder(tmp_path / "x") as folder:
            (folder / "whole").write_text(text)
    assert (tmp_path / "x" / "whole").read_text() == "first", "the first maker's folder is kept"


def test_a_cache_that_is_no_folder_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(EchoDistillError, match="can't be written"),
        ContentCache(tmp_path / "file").download(),
    ):
        raise AssertionError("no download starts")
