"""Measure the pair and draw grids for a person to judge."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTokenizer

from components.pretrain import networks
from components.pretrain.diffusion import ddim, predict
from components.pretrain.latents import Noising, empty_ids
from components.pretrain.world import World

PROMPTS = [
    "a photo of a dog on the beach", "a photo of a red car in the snow",
    "a 3d render of a cat in a grassy field", "a photo of a penguin in the desert",
    "a close up of a lion in the city", "a small elephant far away in the snow",
    "a cartoon of a fox on a wooden floor", "a photo of a blue teapot on a purple rug",
    "a photo of a backpack in the jungle", "a photo of a robot in space",
    "a photo of a green dragon on a cobblestone street", "a dog wearing a top hat in the snow",
    "a cat wearing a crown on pink fabric", "a photo of a cat and a dog on the beach",
    "a flat icon of a rocket on a yellow background", "a photo of a pink elephant under water",
    "a photo of a teddy bear with a mountain in the background",
    "a photo of a shoe in front of a brick wall", "a photo of an owl at night",
    "a photo of a clock on autumn leaves", "a photo of a white horse in a wheat field",
    "a photo of a pizza on a checkered floor", "a photo of a duck in the rain",
    "a photo of a banana with the eiffel tower in the background",
]


class Painter:
    """Draws captions with teacher and student (float32 networks)."""

    def __init__(self, teacher: nn.Module, student: nn.Module, vae: AutoencoderKL,
                 text_encoder: Any, tokenizer: CLIPTokenizer, device: torch.device) -> None:
        self.teacher, self.student = teacher.to(device), student.to(device)
        self.vae, self.text_encoder = vae.to(device), text_encoder.to(device)
        self.tokenizer, self.device = tokenizer, device
        self.noising = Noising(networks.alphas_cumprod(device))

    @torch.no_grad()
    def read(self, prompts: list[str]) -> Tensor:
        """Text states [B, L, d]."""
        ids = self.tokenizer(prompts, padding="max_length", truncation=True,
                             return_tensors="pt").input_ids.to(self.device)
        return self.text_encoder(ids).last_hidden_state  # type: ignore[no-any-return]

    def noise(self, count: int, seed: int) -> Tensor:
        """The same noise on every device."""
        shape = (count, networks.LATENT_CHANNELS, networks.LATENT_SIDE, networks.LATENT_SIDE)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device)

    @torch.no_grad()
    def teach(self, prompts: list[str], seed: int, steps: int = 25, guidance: float = 3.0
              ) -> Tensor:
        """Teacher's pictures [B, 3, H, W] in [-1, 1]."""
        empty = self.text_encoder(empty_ids(self.tokenizer).to(self.device)).last_hidden_state
        z = ddim(self.teacher, self.noising, self.noise(len(prompts), seed), self.read(prompts),
                 empty, steps, torch.float32, guidance)
        return self.vae.decode(z).sample.clamp(-1, 1)  # type: ignore[no-any-return]

    @torch.no_grad()
    def draw(self, prompts: list[str], seed: int, steps: int = 1) -> Tensor:
        """Student's pictures in 1, 2 or 4 steps."""
        text, z = self.read(prompts), self.noise(len(prompts), seed)
        times = [round(1000 - k * 1000 / steps) - 1 for k in range(steps)]
        z = z * (1 - self.noising.abar[times[0]]).sqrt()
        for k, now in enumerate(times):
            t = torch.full((len(z),), now, device=self.device)
            v = predict(self.student, z, t, text, torch.float32)
            z0, noise = self.noising.z0(v, z, t), self.noising.noise(v, z, t)
            z = z0 if k + 1 == steps else self.noising.add(z0, noise,
                                                           torch.full_like(t, times[k + 1]))
        return self.vae.decode(z).sample.clamp(-1, 1)  # type: ignore[no-any-return]


@torch.no_grad()
def measure(painter: Painter, clip: Any, world: World, count: int = 96, seed: int = 99
            ) -> dict[str, float]:
    """Text agreement on fresh compositions (with their true renders) and the VAE's PSNR.

    CLIP-T style: cosine of the pair's own CLIP; "shuffled" pairs each render with another caption.
    """
    clip, gen, dev = clip.to(painter.device), world.generator(seed), painter.device
    scenes = world.sample(count, gen)
    captions = world.captioner.text(world.captions(scenes, gen))
    truth = world.render(scenes)[0]

    def see(x: Tensor) -> Tensor:
        return F.normalize(clip.visual_projection(
            clip.vision_model(pixel_values=x).pooler_output), dim=-1)

    ids = painter.tokenizer(captions, padding="max_length", truncation=True,
                            return_tensors="pt").input_ids.to(dev)
    text = F.normalize(clip.text_projection(clip.text_model(input_ids=ids).pooler_output), dim=-1)
    back = painter.vae.decode(painter.vae.encode(truth).latent_dist.mean).sample.clamp(-1, 1)
    error = (back - truth).square().mean((1, 2, 3))
    seen = {"truth": see(truth), "vae": see(back), "teacher": see(painter.teach(captions, seed)),
            "student": see(painter.draw(captions, seed)),
            "student_4_steps": see(painter.draw(captions, seed, 4))}
    out = {f"text_{k}": float((v * text).sum(1).mean()) for k, v in seen.items()}
    out["text_shuffled"] = float((seen["truth"] * text.roll(1, 0)).sum(1).mean())
    out["vae_psnr"] = float((10 * torch.log10(4 / error)).mean())
    return out


def grid(pictures: Tensor, columns: int) -> Image.Image:
    """Pictures [B, 3, H, W] in [-1, 1] side by side."""
    b, _, h, w = pictures.shape
    rows = -(-b // columns)
    sheet = torch.ones(rows * columns, 3, h, w)
    sheet[:b] = pictures.float().cpu()
    sheet = sheet.view(rows, columns, 3, h, w).permute(0, 3, 1, 4, 2)
    values = ((sheet.reshape(rows * h, columns * w, 3) + 1) * 127.5).round().clamp(0, 255)
    return Image.fromarray(values.to(torch.uint8).numpy())
