"""The recipe: stages in order, with their sizes; every stage goes on where it was left."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTokenizer

from components.pretrain import autoencoder, diffusion, networks, vision
from components.pretrain.evaluate import Painter
from components.pretrain.latents import LatentSet, encode_world
from components.pretrain.training import Clock, Stage, freeze, write_tensors
from components.pretrain.world import World


@dataclass(frozen=True)
class Recipe:
    """Steps and batch sizes of the stages; model/pocket/README.md says what made the shipped pair.

    The steps of "student" count the regression and both kinds of step that come after it.
    """

    clip_steps: int = 700
    clip_batch: int = 2048
    vit_steps: int = 700
    vit_batch: int = 256
    vae_steps: int = 2200
    vae_batch: int = 96
    latents: int = 600_000
    teacher_steps: int = 19_000
    teacher_batch: int = 256
    pairs: int = 24_576
    pair_steps: int = 12
    regression_steps: int = 1200
    student_steps: int = 3100
    student_batch: int = 128
    compiled: bool = True


DRY = Recipe(clip_steps=3, clip_batch=8, vit_steps=3, vit_batch=4, vae_steps=6, vae_batch=2,
             latents=64, teacher_steps=4, teacher_batch=4, pairs=8, pair_steps=2,
             regression_steps=3, student_steps=9, student_batch=4, compiled=False)


class Kitchen:
    """One call of the trainer: the world, the device, the recipe and the state folder."""

    def __init__(self, recipe: Recipe, world_folder: Path, state: Path, clock: Clock,
                 device: str) -> None:
        self.recipe, self.state, self.clock = recipe, state, clock
        self.device = torch.device(device)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.world = World(world_folder, self.device)
        self.tokenizer = CLIPTokenizer.from_pretrained(world_folder / "tokenizer")
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")

    def stage(self, name: str, total: int) -> Stage:
        return Stage(name, self.state, total, self.clock)

    def finished(self, name: str) -> Path:
        return self.state / f"final_{name}.safetensors"

    def keep(self, name: str, network: Any) -> None:
        """The finished network, float32."""
        write_tensors(self.finished(name), network.state_dict())

    def network(self, name: str) -> Any:
        """A finished network on the device, frozen, float32."""
        if not self.finished(name).exists():
            raise FileNotFoundError(f"{self.finished(name)}: train the stage {name!r} first.")
        build: dict[str, Any] = {"clip": networks.clip, "vit": networks.vit, "vae": networks.vae,
                                 "teacher": networks.unet, "student": networks.unet}
        net: nn.Module = build[name]()
        net.load_state_dict(load_file(self.finished(name)))
        return freeze(net).to(self.device)

    def cook(self, name: str) -> None:
        """Run one stage to its end (or raise OutOfTime)."""
        if self.finished(name).exists():
            return
        r, dtype = self.recipe, self.dtype
        if name == "clip":
            made: Any = vision.train_clip(self.stage(name, r.clip_steps), self.world,
                                          self.tokenizer, dtype, r.clip_batch).averaged()
            self.keep("clip", made.clip)
        elif name == "vit":
            made = vision.train_vit(self.stage(name, r.vit_steps), self.world, dtype,
                                    r.vit_batch).averaged()
            self.keep("vit", made.vit)
        elif name == "vae":
            made = autoencoder.train_vae(self.stage(name, r.vae_steps), self.world, dtype,
                                         r.vae_batch).averaged()
            self.keep("vae", autoencoder.fold_statistics(made, self.world))
        elif name == "teacher":
            made = diffusion.train_teacher(self.stage(name, r.teacher_steps), self.data(), dtype,
                                           r.teacher_batch, r.compiled)
            self.keep("teacher", made.averaged())
        elif name == "student":
            data, teacher = self.data(), self.network("teacher").to(dtype)
            pairs = diffusion.teach_pairs(teacher, data, r.pairs, r.pair_steps, dtype)
            made = diffusion.Student(self.network("teacher"), data, pairs, dtype, r.student_batch,
                                     r.regression_steps)
            self.keep("student", made.train(self.stage(name, r.student_steps)).averaged())
        else:
            raise ValueError(f"No stage is called {name!r}: {', '.join(STAGES)}.")

    def data(self) -> LatentSet:
        """The world in latents: kept on disk, so that a later call need not draw it again."""
        path = self.state / "latents.safetensors"
        if path.exists():
            return LatentSet(**load_file(path, device=str(self.device)))
        text_encoder = vision.text_encoder_of(self.network("clip"))
        data = encode_world(self.world, self.network("vae"), freeze(text_encoder),  # type: ignore[arg-type]
                            self.tokenizer, self.recipe.latents, self.dtype)
        if os.environ.get("ECHODISTILL_KEEP_LATENTS"):
            write_tensors(path, vars(data))
        return data


STAGES = ("clip", "vit", "vae", "teacher", "student")


def finished_painter(recipe: Recipe, work: Path, device: str) -> tuple[Painter, Any, World]:
    """The finished pair ready to draw, its CLIP and its world."""
    kitchen = Kitchen(recipe, work / "world", work / "state", Clock(0), device)
    clip = kitchen.network("clip")
    painter = Painter(
        kitchen.network("teacher"), kitchen.network("student"), kitchen.network("vae"),
        freeze(vision.text_encoder_of(clip)), kitchen.tokenizer, kitchen.device)
    return painter, clip, kitchen.world
