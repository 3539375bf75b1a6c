"""`echodistill export`: what plain diffusers draws with the files, and what is refused."""

from __future__ import annotations

import ast
import json
import re
import resource
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from model.adapter import Adapter, load_adapter, trained_adapter, write_adapter
from model.adapter_meta import AdapterInfo
from model.base_pair import BasePair, load_base_pair
from model.errors import InputError, ServiceError
from model.rank_choice import with_rank
from model.sampler import draw, picture_noise
from pipeline.cli.main import run
from pipeline.cli.output import Output
from pipeline.export import export
from pipeline.export_card import Exported, human, python_lines
from tests.tiny import TinyPaths, build_tiny_pair, want_less_noise

ALL = "32"  # the tiny layers' full rank: nothing is lost but round-off
PROMPT = "a photo of a <new1> dog"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyPaths:
    return build_tiny_pair(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def pair(tiny: TinyPaths) -> BasePair:
    return load_base_pair(tiny.student, tiny.student, name="tiny")


def make(pair: BasePair, tiny: TinyPaths, tokens: tuple[str, ...] = ("<new1>",)) -> Adapter:
    """Moves every matrix in a few strong directions and many weak ones."""
    gen = torch.Generator().manual_seed(1)
    down = torch.randn(12, pair.student_kv.shape[1], generator=gen)
    up = torch.randn(pair.student_kv.shape[0], 12, generator=gen) * 0.3 ** torch.arange(12).float()
    info = AdapterInfo("tiny-dog", "dog", tokens, student_id=str(tiny.student))
    rows = 3 * torch.randn(len(tokens), 32, generator=gen)
    moved = pair.student_kv + 0.3 * up @ down
    return trained_adapter(pair=pair, info=info, student_kv=moved, token_rows=rows)


@pytest.fixture(scope="module")
def adapter(pair: BasePair, tiny: TinyPaths, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter's folder, of whole deltas."""
    folder = tmp_path_factory.mktemp("adapters") / "whole"
    write_adapter(folder, make(pair, tiny))
    return folder


def export_to(out: Path, adapter: Path, format: str, rank: str | None = None) -> Exported:
    return export(
        None,
        adapter_dir=adapter,
        format=format,
        rank=rank,
        out=out,
        tracking_uri=None,
        progress=lambda event: None,
    )


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(np.int16)


def test_tensors_have_the_names_that_loaders_want(adapter: Path, tmp_path: Path) -> None:
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    export_to(tmp_path / "d", adapter, "diffusers", "4")
    lora = load_file(tmp_path / "d" / "pytorch_lora_weights.safetensors")
    assert lora[f"unet.{layer}.lora_A.weight"].shape == (4, 32)
    assert lora[f"unet.{layer}.lora_B.weight"].shape == (16, 4)
    assert list(load_file(tmp_path / "d" / "learned_embeds.safetensors")) == ["<new1>"]
    export_to(tmp_path / "k", adapter, "kohya", "4")
    flat = "lora_unet_" + layer.replace(".", "_")
    kohya = load_file(tmp_path / "k" / "tiny-dog-lora.safetensors")
    assert torch.equal(kohya[f"{flat}.lora_down.weight"], lora[f"unet.{layer}.lora_A.weight"])
    assert torch.equal(kohya[f"{flat}.lora_up.weight"], lora[f"unet.{layer}.lora_B.weight"])
    assert kohya[f"{flat}.alpha"].item() == 4.0 and len(kohya) == 1.5 * len(lora)
    export_to(tmp_path / "c", adapter, "comfyui", "4")
    comfy = load_file(tmp_path / "c" / "models" / "loras" / "tiny-dog.safetensors")
    assert comfy.keys() == kohya.keys()
    rows = load_file(tmp_path / "c" / "models" / "embeddings" / "tiny-dog.safetensors")
    assert list(rows) == ["clip_l"] and rows["clip_l"].shape == (1, 32)
    assert "a photo of a embedding:tiny-dog dog" in (tmp_path / "c" / "README.md").read_text()


def test_the_readmes_python_scales_the_noise_as_the_base_wants(
    tiny: TinyPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = tmp_path / "student"
    shutil.copytree(tiny.student, student)
    want_less_noise(student, 0.5)
    quiet = load_base_pair(student, student, name="tiny")
    write_adapter(tmp_path / "adapter", make(quiet, replace(tiny, student=student)))
    out = tmp_path / "out"
    assert export_to(out, tmp_path / "adapter", "full").noise_scale == 0.5
    (code,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    assert "latents=0.5 * torch.randn" in code
    monkeypatch.chdir(out)
    exec(code, {})  # what a person would paste
    assert np.abs(pixels(out / "picture.png") - pixels(out / "example.png")).max() <= 2
    export_to(tmp_path / "c", tmp_path / "adapter", "comfyui", "4")
    assert "times 0.5" in (tmp_path / "c" / "README.md").read_text()


@pytest.mark.parametrize("format", ["diffusers", "kohya", "full"])
def test_the_readmes_python_draws_the_same_picture_with_plain_diffusers(
    format: str, adapter: Path, pair: BasePair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / format
    made = export_to(out, adapter, format, None if format == "full" else ALL)
    assert made.error["pictures"] < 0.1 and made.error["weights"] < 5e-3
    (code,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(out)
    names: dict[str, Any] = {}
    exec(code, names)  # what a person would paste
    found, mine = pixels(out / "picture.png"), pixels(out / "example.png")
    assert np.abs(found - mine).max() <= 2 and np.abs(found - mine).mean() < 0.1
    base = draw(pair, [None], ["a photo of a dog"], [0])[0].permute(1, 2, 0).numpy()
    assert np.abs(found - base.astype(np.int16)).mean() > 5
    # Without the K/V part of the adapter it is another picture: the file is what draws.
    if format != "full":
        names["pipe"].unload_lora_weights()
        noise = picture_noise(pair, [0])
        bare = names["pipe"](PROMPT, latents=noise, num_inference_steps=1, guidance_scale=0.0)
        assert np.abs(np.asarray(bare.images[0]).astype(np.int16) - mine).mean() > 5


def test_a_lower_rank_is_off_by_what_is_told(adapter: Path, pair: BasePair, tmp_path: Path) -> None:
    made = export_to(tmp_path / "out", adapter, "diffusers", "2")
    assert made.rank == 2 and made.error["pictures"] > 0.5
    told = json.loads((tmp_path / "out" / "export.json").read_text())
    assert told["off"] == made.error and told["stored_rank"] is None
    pipe = StableDiffusionPipeline.from_pretrained(made.base, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(str(tmp_path / "out"), local_files_only=True)
    pipe.load_textual_inversion(str(tmp_path / "out"), local_files_only=True)
    noise = picture_noise(pair, [0])
    picture = pipe(PROMPT, latents=noise, num_inference_steps=1, guidance_scale=0.0).images[0]
    off = np.abs(np.asarray(picture).astype(np.int16) - pixels(tmp_path / "out" / "example.png"))
    # The first test picture is this one; the error is the worst one's.
    assert 0.1 < off.mean() <= made.error["pictures"] + 0.05


def test_auto_keeps_the_bound_and_the_rank_that_is_stored(
    adapter: Path, pair: BasePair, tmp_path: Path
) -> None:
    made = export_to(tmp_path / "auto", adapter, "diffusers")
    assert made.rank is not None and made.error["pictures"] <= 0.5
    small = tmp_path / "small"
    write_adapter(small, with_rank(pair, load_adapter(adapter), 4, 0.5))
    for rank in (None, "auto", "8"):
        stored = export_to(tmp_path / f"stored-{rank}", small, "diffusers", rank)
        assert (stored.rank, stored.error) == (4, {"weights": 0.0, "pictures": 0.0})
        assert stored.stored_rank == 4 and stored.stored_error["weights"] > 0
        assert "stored in rank 4" in human(stored, "out")[-1]
    assert export_to(tmp_path / "two", small, "diffusers", "2").error["weights"] > 0


def test_auto_takes_all_of_a_delta_that_no_rank_is_near(
    pair: BasePair, tiny: TinyPaths, tmp_path: Path
) -> None:
    noise = torch.randn(pair.student_kv.shape, generator=torch.Generator().manual_seed(2))
    wild = trained_adapter(
        pair=pair,
        info=AdapterInfo("tiny-dog", "dog", ("<new1>",), student_id=str(tiny.student)),
        student_kv=pair.student_kv + noise,
        token_rows=torch.ones(1, 32),
    )
    write_adapter(tmp_path / "wild", wild)
    made = export_to(tmp_path / "out", tmp_path / "wild", "diffusers")
    assert made.rank == 32 and made.error["weights"] < 2e-3


def test_every_token_has_its_file(pair: BasePair, tiny: TinyPaths, tmp_path: Path) -> None:
    two = make(pair, tiny, ("<a>", "<b>"))
    write_adapter(tmp_path / "two", two)
    made = export_to(tmp_path / "out", tmp_path / "two", "diffusers", "2")
    assert made.embeddings == ("learned_embeds.safetensors", "learned_embeds-2.safetensors")
    second = load_file(tmp_path / "out" / made.embeddings[1])
    assert torch.equal(second["<b>"], two.token_rows[1:])


def test_what_an_adapter_says_of_itself_cannot_become_code(
    pair: BasePair, tiny: TinyPaths, tmp_path: Path
) -> None:
    noun = "dog'); print('owned'); (\"\n```"
    info = AdapterInfo("tiny-dog", noun, ("<new1>",), student_id=str(tiny.student))
    kv, rows = pair.student_kv, torch.ones(1, 32)
    evil = trained_adapter(pair=pair, info=info, student_kv=kv, token_rows=rows)
    write_adapter(tmp_path / "evil", evil)
    made = export_to(tmp_path / "out", tmp_path / "evil", "diffusers", "1")
    said = [
        node.value
        for node in ast.walk(ast.parse(python_lines(made)))
        if isinstance(node, ast.Constant)
    ]
    assert f"a photo of a <new1> {noun}" in said
    assert made.error == {"weights": 0.0, "pictures": 0.0}


def test_a_folder_of_something_else_stays_as_it_is(adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="is no export"):
        export_to(out, adapter, "diffusers", "2")
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    export_to(tmp_path / "mine", adapter, "diffusers", "2")
    with pytest.raises(InputError, match="holds tiny-dog for diffusers"):
        export_to(tmp_path / "mine", adapter, "full")
    (tmp_path / "mine" / "README.md").unlink()
    assert export_to(tmp_path / "mine", adapter, "diffusers", "4").rank == 4
    assert (tmp_path / "mine" / "README.md").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]


def test_a_full_disk_leaves_nothing(adapter: Path, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(ServiceError, match="no space left"):
            export_to(tmp_path / "out", adapter, "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--format", "onnx"], "--format 'onnx' is not known: give diffusers, kohya"),
        (["--format", "kohya", "--rank", "0"], "--rank '0' is none: give auto or a number"),
        (["--format", "kohya", "--rank", "low"], "--rank 'low' is none"),
        (["--format", "full", "--rank", "4"], "--rank has no meaning for --format full"),
        (["--format", "kohya", "my-dog"], "one of both"),
        ([], "Missing option '--format'"),
    ],
)
def test_a_wrong_word_is_one_sentence(
    arguments: list[str],
    words: str,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["export", *arguments, "--adapter", str(adapter), "-o", "out"]
    assert run(given, Output()) == 2
    message = capfd.readouterr().err
    assert words in message and message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_command_tells_what_it_made(
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["export", "--adapter", str(adapter), "--format", "kohya", "--rank", "3", "-o", "out"]
    assert run([*given, "--json"], Output(as_json=True)) == 0
    told = json.loads(capfd.readouterr().out)
    assert (told["concept"], told["version"], told["rank"]) == ("tiny-dog", None, 3)
    assert told["sha256"] == load_adapter(adapter).sha256 and told["folder"] == "out"
    for path, size in told["files"].items():
        assert (tmp_path / "out" / path).stat().st_size == size
    assert 0 < told["off"]["weights"] < 1 and told["off"]["pictures"] > 0
