"""Write a base of random weights as folders that every command takes: to try it at full size.

    python3 -m tests.bench.random_base runs/sd21 --base sd-turbo
    echodistill train photos/ --base runs/sd21

Teacher and student have the shapes of Stable Diffusion 2.1 and SD-Turbo, `clip/` those of CLIP
ViT-H/14, `dino/` of DINO ViT-S/16 and `dinov2/` of DINOv2 ViT-L/14. Weights are float16, 7 GB; no
file is fetched. On a CPU it takes minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTModel,
)

from model.errors import EchoDistillError, InputError
from pipeline import bench_bases as bases
from pipeline.bench_measure import find_device

PARTS = ("teacher", "student", "clip", "dino", "dinov2")
DONE = "base.json"  # which one it is; written last
_CLIP_TEXT_LAYERS = 1  # more than the text encoder has: it leaves the last one out


def settings_of(folder: Path, base: str) -> list[str]:
    """Give the settings of a run spec that name a base's parts."""
    parts = {name: json.dumps(str(folder / name)) for name in PARTS}
    clip, dino, dinov2 = parts["clip"], parts["dino"], parts["dinov2"]
    return [
        f"base.name={base}-random",
        f"base.teacher={parts['teacher']}",
        f"base.student={parts['student']}",
        f"base.identity={clip}",
        f"base.backbones=[{dino},{dinov2},{clip}]",
        f"base.metric_clip={clip}",
        f"base.metric_dino={dino}",
    ]


def write_base(folder: Path, base: str, device: torch.device, seed: int = 0) -> None:
    """Write a base into `folder`, if it is not there.

    Raises:
        InputError: when the folder holds another one.
    """
    facts, done = {"base": base, "seed": seed}, folder / DONE
    if done.exists():
        held = json.loads(done.read_text())
        if held != facts:
            raise InputError(f"{folder} holds {held}, not {facts}: give another folder")
        return
    shapes = bases.RANDOM_BASES[base]
    _write_pair(folder, shapes, device, seed)
    _write_backbones(folder, shapes, device, seed)
    done.write_text(json.dumps(facts))


def _write_pair(folder: Path, shapes: bases.Shapes, device: torch.device, seed: int) -> None:
    """Write teacher and student; the student's other parts are links to the teacher's."""
    text = CLIPTextConfig(**shapes.text, max_position_embeddings=bases.LENGTH)
    parts: dict[str, Any] = {
        "text_encoder": (CLIPTextModel, {"config": text}),
        "vae": (AutoencoderKL, shapes.vae),
    }
    teacher, student = folder / "teacher", folder / "student"
    for place, number, schedule in (
        (teacher, 0, bases.TEACHER_SCHEDULE),
        (student, 1, bases.STUDENT_SCHEDULE),
    ):
        _write(place / "unet", UNet2DConditionModel, shapes.unet, device, seed + number)
        (place / "scheduler").mkdir(exist_ok=True)
        (place / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule))
    for name, (kind, settings) in parts.items():
        _write(teacher / name, kind, settings, device, seed)
    bases.letter_tokenizer().save_pretrained(teacher / "tokenizer")
    for name in (*parts, "tokenizer"):
        link = student / name
        if not link.is_symlink():
            link.symlink_to(Path("..") / "teacher" / name)


def _write_backbones(folder: Path, shapes: bases.Shapes, device: torch.device, seed: int) -> None:
    layers = shapes.text["num_hidden_layers"] + _CLIP_TEXT_LAYERS
    dim = {"projection_dim": shapes.clip["projection_dim"]}
    text = (
        shapes.text | dim | {"num_hidden_layers": layers, "max_position_embeddings": bases.LENGTH}
    )
    clip = CLIPConfig(text_config=text, vision_config=shapes.clip, **dim)
    kinds: dict[str, Any] = {
        "clip": (CLIPModel, {"config": clip}),
        "dino": (ViTModel, {"config": ViTConfig(**shapes.vit), "add_pooling_layer": False}),
        "dinov2": (Dinov2Model, {"config": Dinov2Config(**shapes.dinov2)}),
    }
    preprocessor = {"resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    for name, (kind, settings) in kinds.items():
        _write(folder / name, kind, settings, device, seed)
        (folder / name / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    bases.letter_tokenizer().save_pretrained(folder / "clip")


def _write(folder: Path, kind: Any, settings: Any, device: torch.device, seed: int) -> None:
    (network,) = bases.random_networks([(kind, settings)], seed, device)
    network.half().save_pretrained(folder)


def main() -> str | None:
    """Write the base; returns what is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--base", default=bases.PRESET, choices=sorted(bases.RANDOM_BASES))
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    options = parser.parse_args()
    try:
        write_base(options.folder.resolve(), options.base, find_device(options.device))
    except EchoDistillError as error:
        return f"error: {error}"
    return None


if __name__ == "__main__":
    sys.exit(main())
