"""Stage "latents": the world as latents, captions and masks, held in memory by the later stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from components.pretrain import networks
from components.pretrain.world import World


@dataclass
class LatentSet:
    """N compositions on the device.

    Attributes:
        latents: [N, C, h, w], unit variance.
        cover: how much of each latent pixel the subject covers [N, 1, h, w], 0..255.
        text: text states of the captions [N, L, d].
        empty: text states of the empty caption [1, L, d].
    """

    latents: Tensor
    cover: Tensor
    text: Tensor
    empty: Tensor

    def __len__(self) -> int:
        return len(self.latents)


@torch.no_grad()
def encode_world(
    world: World,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    count: int,
    dtype: torch.dtype,
    seed: int = 55,
    batch: int = 1024,
) -> LatentSet:
    """Draw `count` compositions and encode them (float32 networks in; bf16 runs on GPUs)."""
    table, gen, dev = world.captioner.table(tokenizer), world.generator(seed), world.device
    coder, reader = vae.to(dev, dtype), text_encoder.to(dev, dtype)
    side, channels = networks.LATENT_SIDE, networks.LATENT_CHANNELS
    out = LatentSet(
        torch.empty(count, channels, side, side, dtype=dtype, device=dev),
        torch.empty(count, 1, side, side, dtype=torch.uint8, device=dev),
        torch.empty(count, networks.TEXT_LENGTH, networks.TEXT_WIDTH, dtype=dtype, device=dev),
        reader(empty_ids(tokenizer).to(dev)).last_hidden_state,
    )
    for start in range(0, count, batch):
        rows = slice(start, min(count, start + batch))
        scenes = world.sample(rows.stop - start, gen)
        ids = table(world.captions(scenes, gen))
        pictures, cover = world.render(scenes)
        out.latents[rows] = encode_pictures(coder, pictures, gen, dtype)
        out.cover[rows] = F.avg_pool2d(cover, 8).mul(255).round().to(torch.uint8)
        out.text[rows] = reader(ids).last_hidden_state
    return out


def encode_pictures(
    vae: AutoencoderKL, pictures: Tensor, gen: torch.Generator, dtype: torch.dtype
) -> Tensor:
    """Latents [B, C, h, w] of pictures [B, 3, H, W] in [-1, 1], drawn from their distribution."""
    posterior = vae.encode(pictures.to(dtype)).latent_dist
    noise = torch.randn(posterior.mean.shape, device=pictures.device, generator=gen)
    latents: Tensor = (posterior.mean + posterior.std * noise).to(dtype)
    return latents


def empty_ids(tokenizer: CLIPTokenizer) -> Tensor:
    """Tokens of the empty prompt [1, L]."""
    ids: Tensor = tokenizer("", padding="max_length", return_tensors="pt").input_ids
    return ids


ADAPTED = 0.5  # share of the lessons that are of made-up concepts, where there are any


@dataclass(frozen=True)
class Lessons:
    """What the student is taught: compositions, of which the last may be of made-up concepts.

    Attributes:
        data: the compositions.
        adapters: movements of keys' and values' weights [1 + C, out, in], layer by layer; row 0
            moves nothing. Without any the teacher is as it is for all compositions.
        which: the row in `adapters` of each of the last compositions.
    """

    data: LatentSet
    adapters: Sequence[Tensor] = ()
    which: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where all of it lies."""
        return self.data.latents.device

    def draw(self, count: int, gen: torch.Generator) -> Tensor:
        """Rows of compositions drawn by lot [count]."""
        concepts = 0 if self.which is None else len(self.which)
        plain = len(self.data) - concepts
        rows = torch.randint(0, plain, (count,), device=self.device, generator=gen)
        if not concepts:
            return rows
        other = torch.randint(0, concepts, (count,), device=self.device, generator=gen)
        lot = torch.rand(count, device=self.device, generator=gen)
        return torch.where(lot < ADAPTED, plain + other, rows)

    def moves(self, rows: Tensor, share: Tensor | None = None) -> list[Tensor] | None:
        """Each row's movements [B, out, in], or a share [B] of them; None where nothing moves."""
        if self.which is None:
            return None
        late = rows - (len(self.data) - len(self.which))
        own = torch.where(late < 0, 0, self.which[late.clamp(min=0)])
        found = [move.index_select(0, own) for move in self.adapters]
        if share is None:
            return found
        return [move * share.to(move.dtype).view(-1, 1, 1) for move in found]


@dataclass
class Noising:
    """The noise schedule on the device: v-prediction algebra (Salimans & Ho 2022)."""

    abar: Tensor

    def split(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar_t) and sqrt(1 - abar_t), each [B, 1, 1, 1]."""
        a = self.abar[t].view(-1, 1, 1, 1)
        return a.sqrt(), (1 - a).sqrt()

    def add(self, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """z_t."""
        a, s = self.split(t)
        return a * z0 + s * noise

    def v(self, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The target of v-prediction."""
        a, s = self.split(t)
        return a * noise - s * z0

    def z0(self, v: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """Estimate of z_0 from a v-prediction."""
        a, s = self.split(t)
        return a * z_t - s * v

    def noise(self, v: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """Estimate of the noise from a v-prediction."""
        a, s = self.split(t)
        return a * v + s * z_t
