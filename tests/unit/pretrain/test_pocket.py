"""The shipped pair: unpacking in any surroundings, and what its parts do once they are loaded."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPTextModel, ViTModel

from components.pretrain import networks
from components.pretrain.pair import Painter, shipped_pair
from components.pretrain.recipe import STAGES
from components.pretrain.subjects import HELD_OUT, SAMPLE_CONCEPTS
from model.base_pair import BasePair, load_base_pair
from model.discriminators import load_backbone
from model.errors import ServiceError
from model.metrics import load_clip_text
from model.pocket import PocketPaths, content_id, pocket_paths
from model.sampler import (
    picture_noise,
    sample_student,
    sample_teacher,
    student_keys_values,
)
from tests.unit.pretrain.conftest import POCKET

UNPACK = "from model.pocket import pocket_paths; print(pocket_paths().student)"
PROMPTS = ["a photo of a fox on the beach", "a red car in the snow"]


@pytest.fixture(scope="module")
def paths() -> PocketPaths:
    return pocket_paths()


@pytest.fixture(scope="module")
def pair(paths: PocketPaths) -> BasePair:
    return load_base_pair(paths.teacher, paths.student, name="pocket")


def unpack_in_a_process(cache: Path, root: Path, *prefix: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "ECHODISTILL_CACHE": str(cache), "PYTHONPATH": str(root)}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    return subprocess.Popen(
        [*prefix, sys.executable, "-c", UNPACK],
        cwd=cache.parent,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("kind", "part", "more"),
    [
        (UNet2DConditionModel, "teacher/unet", {}),
        (UNet2DConditionModel, "student/unet", {}),
        (AutoencoderKL, "student/vae", {}),
        (CLIPTextModel, "teacher/text_encoder", {}),
        (CLIPModel, "clip", {}),
        (ViTModel, "dino", {"add_pooling_layer": False}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_part_loads_whole(
    paths: PocketPaths, kind: Any, part: str, more: dict[str, Any]
) -> None:
    folder = paths.teacher.parent / part
    net, report = kind.from_pretrained(
        folder, output_loading_info=True, local_files_only=True, **more
    )
    assert {k: list(v) for k, v in report.items() if len(v)} == {}
    stored = {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}
    floats = [v for v in stored.values() if v.is_floating_point()]
    assert {v.dtype for v in floats} == {torch.float16}
    parameters = sum(p.numel() for p in net.parameters())
    assert parameters == sum(v.numel() for v in floats)


def test_text_tower_is_clips_own(paths: PocketPaths) -> None:
    tower = CLIPTextModel.from_pretrained(paths.teacher / "text_encoder", local_files_only=True)
    clip = CLIPModel.from_pretrained(paths.clip, local_files_only=True)
    ids = torch.tensor([[6142, 320, 1125, 539, 6143]])
    with torch.no_grad():
        one, other = tower(ids), clip.text_model(input_ids=ids)
    assert torch.equal(one.last_hidden_state, other.last_hidden_state)


def test_all_together_is_under_32_megabytes() -> None:
    sizes = [path.stat().st_size for path in (POCKET / "weights").iterdir()]
    assert len(sizes) == len(STAGES) and sum(sizes) < 32e6


def test_teacher_and_student_share_their_folders(paths: PocketPaths) -> None:
    for part in ("vae", "text_encoder", "tokenizer"):
        assert (paths.student / part).samefile(paths.teacher / part)
    assert not (paths.student / "unet").samefile(paths.teacher / "unet")


def test_two_processes_unpack_at_once(tmp_path: Path) -> None:
    started = [unpack_in_a_process(tmp_path / "cache", POCKET.parents[1]) for _ in range(2)]
    answers = [process.communicate(timeout=200) for process in started]
    assert [p.returncode for p in started] == [0, 0], answers
    assert len({out for out, _ in answers}) == 1
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [f"pocket-{content_id()}"]


def test_a_read_only_installation_is_enough(tmp_path: Path) -> None:
    root = tmp_path / "installation"
    (root / "model").mkdir(parents=True)
    for name in ("__init__.py", "errors.py"):
        shutil.copy(POCKET.parent / name, root / "model" / name)
    shutil.copytree(
        POCKET, root / "model" / "pocket", ignore=shutil.ignore_patterns("__pycache__", "concepts")
    )
    prefix: list[str] = []
    if os.geteuid() == 0:  # root may write anywhere, unless it gives that up
        if not shutil.which("setpriv"):
            pytest.skip("root without setpriv cannot give up its rights")
        prefix = ["setpriv", "--inh-caps=-dac_override", "--bounding-set=-dac_override"]
    everything = [root, *root.rglob("*")]
    for path in everything:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        probe = [*prefix, "touch", str(root / "model" / "pocket" / "x")]
        assert subprocess.run(probe, capture_output=True, check=False).returncode
        process = unpack_in_a_process(tmp_path / "cache", root, *prefix)
        out, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
        assert (Path(out.strip()) / "unet" / "config.json").exists()
        assert set(root.rglob("*")) | {root} == set(everything)
    finally:
        for path in everything:
            path.chmod(0o755)


def test_a_cache_that_cannot_be_written_is_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ECHODISTILL_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ServiceError, match="set ECHODISTILL_CACHE to a folder that can be") as said:
        pocket_paths()
    assert str(tmp_path / "file" / "cache") in str(said.value)
    assert "\n" not in str(said.value)


@pytest.mark.parametrize("most", [0, 1_000_000], ids=["configuration", "weights"])
def test_unpacking_that_breaks_off_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """A limit on the size of files stands for a full disk, met in Python or in safetensors."""
    monkeypatch.setenv("ECHODISTILL_CACHE", str(tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        with pytest.raises(ServiceError, match="make room there, or set ECHODISTILL_CACHE"):
            pocket_paths()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())
    assert pocket_paths().teacher.is_dir()


def test_the_pair_is_what_it_says(pair: BasePair) -> None:
    assert pair.resolution == 128 and pair.latent_shape == (8, 16, 16)
    assert pair.teacher_schedule.prediction == pair.student_schedule.prediction == "v_prediction"
    assert pair.tokenizer.model_max_length == 32


@torch.no_grad()
def test_one_step_is_diffusers_one_step(paths: PocketPaths, pair: BasePair) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(paths.student, local_files_only=True)
    assert type(pipe.scheduler).__name__ == "EulerDiscreteScheduler"
    pipe.set_progress_bar_config(disable=True)
    noise = picture_noise(pair, [3, 4])
    scale = pair.student_schedule.noise_scale
    assert scale == networks.NOISE_SCALE
    drawn = pipe(
        PROMPTS, latents=scale * noise, num_inference_steps=1, guidance_scale=0.0, output_type="pt"
    )
    kv = student_keys_values(pair, [None, None], PROMPTS)
    ours = sample_student(pair, kv, noise, 1)
    assert torch.allclose(ours, drawn.images * 2 - 1, atol=2e-4)
    # and so does the painter that measures the pair
    painter = Painter(shipped_pair(), "cpu")
    theirs = painter.decode(painter.imagine(painter.read(PROMPTS), noise, 1))
    assert torch.allclose(ours, theirs, atol=2e-4)


@torch.no_grad()
def test_teacher_steps_are_diffusers_steps(paths: PocketPaths, pair: BasePair) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(paths.teacher, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    noise = picture_noise(pair, [3])
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "pt"}
    drawn = pipe(PROMPTS[:1], negative_prompt=[""], latents=noise, **options).images * 2 - 1
    kv, without = (_teacher_kv(pair, text) for text in (PROMPTS[0], ""))
    assert torch.allclose(sample_teacher(pair, kv, without, noise, 4, 3.0), drawn, atol=1e-3)


def _teacher_kv(pair: BasePair, text: str) -> torch.Tensor:
    from model.cross_attention import keys_values
    from model.text import encode, tokenize

    states = encode(pair.text_encoder, tokenize(pair.tokenizer, [text]), None)
    return keys_values(states, pair.teacher_kv[None], torch.zeros(1, dtype=torch.long))


@cache
def concept_pictures(name: str) -> torch.Tensor:
    """A sample concept's pictures [5, 3, 128, 128] in [-1, 1]."""
    import numpy as np

    files = sorted((POCKET / "concepts" / name).glob("*.png"))
    pictures = [torch.from_numpy(np.array(Image.open(f).convert("RGB"))) for f in files]
    return torch.stack(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def test_sample_concepts_are_of_held_out_subjects() -> None:
    folders = {path.name: path for path in (POCKET / "concepts").iterdir() if path.is_dir()}
    assert folders.keys() == SAMPLE_CONCEPTS.keys() and len(folders) >= 8
    for name, (style, emoji, noun, live) in SAMPLE_CONCEPTS.items():
        assert (style, emoji) in HELD_OUT
        facts = yaml.safe_load((folders[name] / "concept.yaml").read_text())
        assert facts["class_noun"] == noun and facts["live"] is live
        assert concept_pictures(name).shape == (5, 3, 128, 128)


@torch.no_grad()
def test_clip_agrees_more_with_the_own_noun_than_with_others(paths: PocketPaths) -> None:
    """The subjects were never seen: right by a margin on average, far above chance one by one."""
    nouns = [noun for _, _, noun, _ in SAMPLE_CONCEPTS.values()]
    read = F.normalize(load_clip_text(paths.clip)([f"a photo of a {n}" for n in nouns]), dim=-1)
    see = load_backbone(paths.clip)
    seen = torch.stack([see.projected(concept_pictures(c)) for c in SAMPLE_CONCEPTS])
    agreement = F.normalize(seen, dim=-1) @ read.T  # [concept, picture, noun]
    own = agreement.diagonal(dim1=0, dim2=2).mean(0)
    others = (agreement.mean(1).sum(1) - own) / (len(nouns) - 1)
    assert (own > others).all() and (own - others).mean() > 0.15
    right = agreement.argmax(2) == torch.arange(len(nouns))[:, None]
    assert right.float().mean() > 3 / len(nouns)
