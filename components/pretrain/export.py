"""Finished networks -> the files that ship in model/pocket."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTokenizer

from components.pretrain import networks
from components.pretrain.evaluate import grid
from components.pretrain.recipe import STAGES, load_network
from components.pretrain.subjects import SAMPLE_CONCEPTS
from components.pretrain.training import write_tensors, write_text
from components.pretrain.vision import text_encoder_of
from components.pretrain.world import NORMAL, World
from model.errors import InputError
from model.pocket.storage import pack, unpack

# Where the reference pictures of a sample concept are taken; new scenes are for prompts.
REFERENCE_SCENES = {  # and what their captions say of them
    "grass": "in a grassy field",
    "wood": "on a wooden floor",
    "plain_white": "on a white background",
    "room": "in a room",
    "plain_blue": "on a blue background",
}
_MEAN = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


def export(state: Path, world_folder: Path, out: Path) -> None:
    """Write weights/, layout/ and concepts/ into `out` from the finished networks in `state`.

    Raises:
        InputError: when a stage is not finished; nothing is written then.
    """
    packed = {name: pack(load_network(state, name).state_dict()) for name in STAGES}
    for name, tensors in packed.items():
        write_tensors(out / "weights" / f"{name}.safetensors", tensors)
    write_layout(world_folder / "tokenizer", out / "layout")
    write_concepts(World(world_folder, "cpu", held_out=True), out / "concepts")


def mean_of(files: Sequence[Path]) -> dict[str, Tensor]:
    """Return the packed mean of packed networks, taken in float32.

    Raises:
        InputError: when one cannot be read, or they are not of one network.
    """
    states = [_unpacked(path) for path in files]
    shapes = [{name: value.shape for name, value in state.items()} for state in states]
    for path, own in zip(files, shapes, strict=True):
        if own != shapes[0]:
            raise InputError(f"{path} is not of the same network as {files[0]}.")
    means = {
        name: torch.stack([state[name].float() for state in states]).mean(0) for name in shapes[0]
    }
    return pack(means)


def _unpacked(path: Path) -> dict[str, Tensor]:
    try:
        return unpack(load_file(path))
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read ({error}); give a packed network.") from None


def write_layout(tokenizer_folder: Path, out: Path) -> None:
    """The folders' configuration files, as diffusers and transformers write them, no weights."""
    tokenizer: Any = CLIPTokenizer.from_pretrained(tokenizer_folder)
    shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        clip, unet, vae = networks.clip(), networks.unet(), networks.vae()
        for name, scheduler in (
            ("teacher", networks.teacher_scheduler()),
            ("student", networks.student_scheduler()),
        ):
            parts: dict[str, Any] = {
                "vae": vae,
                "text_encoder": text_encoder_of(clip),
                "tokenizer": tokenizer,
                "unet": unet,
                "scheduler": scheduler,
                "safety_checker": None,
                "feature_extractor": None,
            }
            pipeline = StableDiffusionPipeline(**parts, requires_safety_checker=False)
            pipeline.save_pretrained(work / name)
        for part in ("vae", "text_encoder", "tokenizer"):  # the teacher's serve both
            shutil.rmtree(work / "student" / part)
        clip.save_pretrained(work / "clip")
        networks.vit().save_pretrained(work / "dino")
        for folder, kind in (("clip", "CLIPImageProcessor"), ("dino", "ViTImageProcessor")):
            write_text(
                work / folder / "preprocessor_config.json",
                json.dumps(processor_config(kind), indent=2),
            )
        for path in work.rglob("*.safetensors"):
            path.unlink()
        vocabulary = (
            work / "teacher" / "tokenizer" / "tokenizer.json"
        )  # indented, it is twice as long
        short = json.dumps(
            json.loads(vocabulary.read_text()), ensure_ascii=False, separators=(",", ":")
        )
        write_text(vocabulary, short + "\n")
        shutil.copytree(work, out)


def processor_config(kind: str) -> dict[str, object]:
    """Pictures go in at the pair's own size, scaled to [-1, 1]."""
    size = networks.RESOLUTION
    box = {"height": size, "width": size}
    return {
        "image_processor_type": kind,
        "do_resize": True,
        "do_normalize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "resample": 3,
        "size": {"shortest_edge": size} if kind.startswith("CLIP") else box,
        **({"do_center_crop": True, "crop_size": box} if kind.startswith("CLIP") else {}),
        **_MEAN,
    }


def write_concepts(world: World, out: Path) -> None:
    """Reference pictures and facts of the sample concepts: subjects that the pair never saw."""
    for index, (name, (style, emoji, noun, live)) in enumerate(SAMPLE_CONCEPTS.items()):
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        gen = world.generator(1000 + index)
        subject = torch.tensor([world.sprite(style, emoji)])
        captions = []
        for k, (scene, words) in enumerate(REFERENCE_SCENES.items()):
            scenes = world.sample(1, gen, subject=subject, scene=scene, alone=True, zoom=NORMAL)
            scenes.size = scenes.size.clamp(min=0.62)
            picture: Image.Image = grid(world.render(scenes)[0], 1)
            picture.save(folder / f"{k:02d}.png", optimize=True)
            captions.append(f"  {k:02d}.png: a photo of a {noun} {words}")
        write_text(
            folder / "concept.yaml",
            f"class_noun: {noun}\ntoken: <new1>\n"
            f"initializer: {noun.split()[-1]}\nlive: {str(live).lower()}\n"
            + "\n".join(["captions:", *captions, ""]),
        )
