"""Stage "teacher": denoising in many steps; and how it is sampled, with guidance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from components.pretrain import networks
from components.pretrain.latents import LatentSet, Lessons, Noising
from components.pretrain.training import Stage, Trainee, cosine, graphed

GUIDANCE = 3.0  # of the teacher, while it teaches
Moves = Sequence[Tensor] | None
SUBJECT_WEIGHT = 2.5  # extra weight of latent pixels under the subject: it is what is hard


def predict(
    net: Any,
    z: Tensor,
    t: Tensor,
    text: Tensor,
    dtype: torch.dtype,
    moves: Moves = None,
) -> Tensor:
    """v-prediction, float32; `moves` are those of every item's adapter (adapters.py)."""
    also = {} if moves is None else {"cross_attention_kwargs": {"moves": moves}}
    out: Tensor = net(z.to(dtype), t, text.to(dtype), **also).sample
    return out.float()


def train_teacher(
    stage: Stage,
    data: LatentSet,
    dtype: torch.dtype,
    batch: int,
    compiled: bool,
    start: dict[str, Tensor] | None = None,
) -> Trainee:
    """Denoising with v-prediction, 10 % of the captions left out for guidance.

    `start` holds the weights of an earlier teacher to begin from.
    """
    dev = data.latents.device
    torch.manual_seed(4)
    unet = networks.unet()
    if start is not None:
        unet.load_state_dict(start)
    trainee = Trainee(unet, dev, dtype, (0.9, 0.99), 0.01, ema=0.9993)
    stage.resume({"teacher": trainee})
    net: Any = torch.compile(trainee.net) if compiled else trainee.net
    gen = torch.Generator(dev).manual_seed(66)
    noising = Noising(networks.alphas_cumprod(dev))

    def one() -> Tensor:
        i = torch.randint(0, len(data), (batch,), device=dev, generator=gen)
        z0, cover = data.latents[i].float(), data.cover[i].float() / 255
        dropped = torch.rand(batch, 1, 1, device=dev, generator=gen) < 0.1
        text = torch.where(dropped, data.empty, data.text[i])
        t = torch.randint(0, 1000, (batch,), device=dev, generator=gen)
        noise = torch.randn(z0.shape, device=dev, generator=gen)
        error = predict(net, noising.add(z0, noise, t), t, text, dtype) - noising.v(z0, noise, t)
        weight = 1 + SUBJECT_WEIGHT * cover
        loss = (error.square() * weight).mean() / weight.mean()
        trainee.step(loss)
        return loss

    run = graphed(one, gen)

    def step(i: int) -> dict[str, Tensor]:
        trainee.lr.fill_(cosine(i, stage.total, 1.2e-3, warm=300, floor=0.01))
        return {"loss": run()}

    stage.run({"teacher": trainee}, step, gen, every=500)
    return trainee


@torch.no_grad()
def guided(
    net: Any,
    noising: Noising,
    z: Tensor,
    t: Tensor,
    text: Tensor,
    empty: Tensor,
    dtype: torch.dtype,
    guidance: float = GUIDANCE,
    moves: Moves = None,
) -> Tensor:
    """v-prediction with classifier-free guidance (Ho & Salimans 2022)."""
    both = torch.cat([empty.expand(len(text), -1, -1), text])
    twice = None if moves is None else [torch.cat([move, move]) for move in moves]
    v = predict(net, torch.cat([z, z]), torch.cat([t, t]), both, dtype, twice)
    without, with_text = v.chunk(2)
    return without + guidance * (with_text - without)


@torch.no_grad()
def ddim(
    net: Any,
    noising: Noising,
    z: Tensor,
    text: Tensor,
    empty: Tensor,
    steps: int,
    dtype: torch.dtype,
    guidance: float = GUIDANCE,
    moves: Moves = None,
) -> Tensor:
    """Deterministic sampling (Song et al. 2021), trailing timesteps; z is pure noise."""
    times = [round(1000 - k * 1000 / steps) - 1 for k in range(steps)]
    for k, now in enumerate(times):
        t = torch.full((len(z),), now, device=z.device)
        v = guided(net, noising, z, t, text, empty, dtype, guidance, moves)
        z0, noise = noising.z0(v, z, t), noising.noise(v, z, t)
        z = z0 if k + 1 == steps else noising.add(z0, noise, torch.full_like(t, times[k + 1]))
    return z


@torch.no_grad()
def teach_pairs(
    teacher: Any,
    lessons: Lessons,
    count: int,
    steps: int,
    dtype: torch.dtype,
    batch: int = 4096,
) -> tuple[Tensor, Tensor, Tensor]:
    """(noise, the teacher's picture of it, lesson's row): what the student regresses to first."""
    data, gen = lessons.data, torch.Generator(lessons.device).manual_seed(77)
    noising = Noising(networks.alphas_cumprod(lessons.device))
    noise = torch.randn(count, *data.latents.shape[1:], device=lessons.device, generator=gen)
    rows = lessons.draw(count, gen)
    pictures = []
    for k in range(0, count, batch):
        z, row = noise[k : k + batch], rows[k : k + batch]
        text, moves = data.text[row], lessons.moves(row)
        pictures.append(ddim(teacher, noising, z, text, data.empty, steps, dtype, moves=moves))
    return noise, torch.cat(pictures).to(dtype), rows
