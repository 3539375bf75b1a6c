"""The pair's networks together, as trained here or as shipped, and pictures drawn with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer, ViTModel

from components.pretrain import networks
from components.pretrain.diffusion import GUIDANCE, ddim, predict
from components.pretrain.latents import Noising, empty_ids
from components.pretrain.recipe import load_network
from components.pretrain.training import freeze
from components.pretrain.vision import text_encoder_of
from model.pocket import pocket_paths


@dataclass(frozen=True)
class Pair:
    """Frozen float32 networks and the tokenizer."""

    teacher: Any
    student: Any
    vae: Any
    clip: Any
    vit: Any
    text_encoder: Any
    tokenizer: Any

    def networks(self) -> dict[str, Any]:
        """The networks that have weights of their own, by the names of their files."""
        return {name: getattr(self, name) for name in ("teacher", "student", "vae", "clip", "vit")}


def trained_pair(state: Path, world_folder: Path) -> Pair:
    """The pair that `train` left in `state`.

    Raises:
        InputError: when a stage is not finished.
    """
    clip = load_network(state, "clip")
    return Pair(
        teacher=load_network(state, "teacher"),
        student=load_network(state, "student"),
        vae=load_network(state, "vae"),
        clip=clip,
        vit=load_network(state, "vit"),
        text_encoder=freeze(text_encoder_of(clip)),
        tokenizer=CLIPTokenizer.from_pretrained(world_folder / "tokenizer"),
    )


def shipped_pair() -> Pair:
    """The pair that ships with the project, from its unpacked folders."""
    paths = pocket_paths()

    def load(kind: Any, folder: Path, **more: Any) -> Any:
        return freeze(kind.from_pretrained(folder, local_files_only=True, **more).float())

    return Pair(
        teacher=load(UNet2DConditionModel, paths.teacher / "unet"),
        student=load(UNet2DConditionModel, paths.student / "unet"),
        vae=load(AutoencoderKL, paths.student / "vae"),
        clip=load(CLIPModel, paths.clip),
        vit=load(ViTModel, paths.dino, add_pooling_layer=False),
        text_encoder=load(CLIPTextModel, paths.student / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(paths.student / "tokenizer", local_files_only=True),
    )


class Painter:
    """Draws captions with teacher and student."""

    def __init__(self, pair: Pair, device: str | torch.device) -> None:
        self.device, self.tokenizer = torch.device(device), pair.tokenizer
        self.teacher, self.student = pair.teacher.to(device), pair.student.to(device)
        self.vae, self.text_encoder = pair.vae.to(device), pair.text_encoder.to(device)
        self.noising = Noising(networks.alphas_cumprod(device))

    def ids(self, prompts: list[str]) -> Tensor:
        """Tokens [B, L]."""
        out = self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
        ids: Tensor = out.input_ids.to(self.device)
        return ids

    @torch.no_grad()
    def read(self, prompts: list[str]) -> Tensor:
        """Text states [B, L, d]."""
        states: Tensor = self.text_encoder(self.ids(prompts)).last_hidden_state
        return states

    def noise(self, count: int, seed: int) -> Tensor:
        """The same noise on every device [B, C, h, w]."""
        shape = (count, networks.LATENT_CHANNELS, networks.LATENT_SIDE, networks.LATENT_SIDE)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1]."""
        picture: Tensor = self.vae.decode(z).sample
        return picture.clamp(-1, 1)

    @torch.no_grad()
    def teach(
        self, prompts: list[str], seed: int, steps: int = 25, guidance: float = GUIDANCE
    ) -> Tensor:
        """Teacher's pictures [B, 3, H, W] in [-1, 1]."""
        empty = self.text_encoder(empty_ids(self.tokenizer).to(self.device)).last_hidden_state
        text, noise = self.read(prompts), self.noise(len(prompts), seed)
        z = ddim(self.teacher, self.noising, noise, text, empty, steps, torch.float32, guidance)
        return self.decode(z)

    @torch.no_grad()
    def draw(self, prompts: list[str], seed: int, steps: int = 1) -> Tensor:
        """Student's pictures in 1, 2 or 4 steps [B, 3, H, W] in [-1, 1]."""
        return self.decode(self.imagine(self.read(prompts), self.noise(len(prompts), seed), steps))

    @torch.no_grad()
    def imagine(self, text: Tensor, noise: Tensor, steps: int) -> Tensor:
        """Student's latents for text states and standard normal noise."""
        times = [round(1000 - k * 1000 / steps) - 1 for k in range(steps)]
        scale = networks.NOISE_SCALE if steps == 1 else 1.0
        z = scale * noise * (1 - self.noising.abar[times[0]]).sqrt()
        for k, now in enumerate(times):
            t = torch.full((len(z),), now, device=self.device)
            v = predict(self.student, z, t, text, torch.float32)
            z0, left = self.noising.z0(v, z, t), self.noising.noise(v, z, t)
            last = k + 1 == steps
            z = z0 if last else self.noising.add(z0, left, torch.full_like(t, times[k + 1]))
        return z
