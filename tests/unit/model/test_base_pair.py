"""Loading a base pair: what is shared, what is refused, what the hash covers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from model.base_pair import BasePair, load_base_pair
from model.errors import InputError
from tests.tiny import TinyPaths, want_less_noise
from tests.unit.model.conftest import load


@pytest.fixture
def copied(tiny: TinyPaths, tmp_path: Path) -> TinyPaths:
    for name in ("teacher", "student"):
        shutil.copytree(getattr(tiny, name), tmp_path / name)
    return TinyPaths(tmp_path / "teacher", tmp_path / "student", *[tmp_path] * 4)


def change(path: Path, name: str | None = None, by: float = 0.1) -> str:
    """Change one value of a safetensors file."""
    tensors = load_file(path)
    name = name or sorted(tensors)[0]
    tensors[name].view(-1)[0] += by
    save_file(tensors, path, metadata={"format": "pt"})
    return name


def test_what_is_loaded(pair: BasePair) -> None:
    assert pair.resolution == 32 and pair.latent_shape == (4, 8, 8) and pair.factor == 4
    assert pair.teacher_schedule.prediction == "v_prediction"
    assert pair.student_schedule.prediction == "epsilon"
    assert pair.teacher_kv.dtype == torch.float32
    assert pair.teacher_kv.shape == (pair.teacher_layout.width, 32)
    for network in (pair.teacher, pair.student, pair.vae, pair.text_encoder):
        assert not network.training
        assert not any(p.requires_grad for p in network.parameters())
    assert not torch.equal(pair.teacher_kv, pair.student_kv)


def test_tiny_directories_are_ordinary_diffusers_ones(tiny: TinyPaths) -> None:
    for folder in (tiny.teacher, tiny.student):
        pipe = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
        assert pipe.vae_scale_factor == 4


def test_latents_are_the_scaled_posterior_mean(pair: BasePair, tiny: TinyPaths) -> None:
    vae = AutoencoderKL.from_pretrained(tiny.student / "vae")
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    z = pair.encode_images(x)
    assert z.shape == (2, 4, 8, 8)
    assert torch.allclose(z, vae.encode(x).latent_dist.mean * 0.5, atol=1e-6)
    assert torch.allclose(pair.decode(z), vae.decode(z / 0.5).sample, atol=1e-5)


def test_base_weights_stay_float32_when_the_networks_are_bfloat16(
    tiny: TinyPaths, pair: BasePair
) -> None:
    half = load(tiny, torch.bfloat16)
    assert half.teacher.dtype == half.vae.dtype == half.text_encoder.dtype == torch.bfloat16
    assert torch.equal(half.student_kv, pair.student_kv)
    assert half.hash == pair.hash
    z = half.encode_images(torch.zeros(1, 3, 32, 32))
    assert z.dtype == torch.float32


def test_hash_covers_what_the_students_picture_depends_on(
    copied: TinyPaths, pair: BasePair
) -> None:
    assert load(copied).hash == pair.hash  # the content counts, not the place
    change(copied.teacher / "unet" / "diffusion_pytorch_model.safetensors")
    assert load(copied).hash == pair.hash
    change(copied.student / "unet" / "diffusion_pytorch_model.safetensors")
    changed = load(copied).hash
    assert changed != pair.hash
    config = copied.student / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"epsilon"', '"v_prediction"'))
    other = load(copied).hash
    assert other not in (changed, pair.hash)
    want_less_noise(copied.student, 0.75)
    assert load(copied).hash not in (changed, pair.hash, other)
    want_less_noise(copied.student, 1)
    assert load(copied).hash == other


def test_shared_parts_may_differ_in_precision(copied: TinyPaths, pair: BasePair) -> None:
    path = copied.teacher / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({n: t.half() for n, t in load_file(path).items()}, path, metadata={"format": "pt"})
    assert load(copied).hash == pair.hash


def test_fp16_variants_load(copied: TinyPaths) -> None:
    for part in ("vae", "unet"):
        path = copied.student / part / "diffusion_pytorch_model.safetensors"
        path.rename(path.with_name("diffusion_pytorch_model.fp16.safetensors"))
    path = copied.student / "text_encoder" / "model.safetensors"
    path.rename(path.with_name("model.fp16.safetensors"))
    assert load(copied).resolution == 32


def test_parts_on_disk_may_be_shared_by_links(copied: TinyPaths, pair: BasePair) -> None:
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.rmtree(copied.teacher / part)
        (copied.teacher / part).symlink_to(copied.student / part)
    assert load(copied).hash == pair.hash


@pytest.mark.parametrize(
    ("part", "file"),
    [("vae", "diffusion_pytorch_model.safetensors"), ("text_encoder", "model.safetensors")],
)
def test_a_difference_in_a_shared_part_is_named(copied: TinyPaths, part: str, file: str) -> None:
    change(copied.teacher / part / file, by=1.0)
    with pytest.raises(InputError, match=f"differ in {part} at '") as caught:
        load(copied)
    assert caught.value.exit_code == 2


def test_a_different_tokenizer_is_named(copied: TinyPaths) -> None:
    path = copied.teacher / "tokenizer" / "vocab.json"
    vocabulary = json.loads(path.read_text())
    vocabulary["dog</w>"], vocabulary["cat</w>"] = vocabulary["cat</w>"], vocabulary["dog</w>"]
    path.write_text(json.dumps(vocabulary))
    with pytest.raises(InputError, match="differ in their tokenizer"):
        load(copied)


@pytest.mark.parametrize(
    "path",
    ["unet", "vae", "text_encoder", "tokenizer", "scheduler/scheduler_config.json"],
)
def test_a_missing_part_is_named(copied: TinyPaths, path: str) -> None:
    place = copied.student / path
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    with pytest.raises(InputError, match=path.split("/")[-1]):
        load(copied)


def test_broken_and_incomplete_weights_are_refused(copied: TinyPaths) -> None:
    path = copied.student / "unet" / "diffusion_pytorch_model.safetensors"
    whole = load_file(path)
    name = next(n for n in whole if "attn2.to_k" in n)
    save_file({n: t for n, t in whole.items() if n != name}, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match="unet"):
        load(copied)
    path.write_bytes(b"half a file")
    with pytest.raises(InputError, match="cannot be loaded"):
        load(copied)


def test_pickled_weights_are_not_loaded(copied: TinyPaths) -> None:
    folder = copied.student / "unet"
    torch.save(
        load_file(folder / "diffusion_pytorch_model.safetensors"),
        folder / "diffusion_pytorch_model.bin",
    )
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(InputError, match="safetensors"):
        load(copied)


def test_resolution_can_be_set_and_is_checked(tiny: TinyPaths) -> None:
    larger = load_base_pair(tiny.teacher, tiny.student, name="x", resolution=48)
    assert larger.latent_shape == (4, 12, 12)
    with pytest.raises(InputError, match="Resolution 50"):
        load_base_pair(tiny.teacher, tiny.student, name="x", resolution=50)
