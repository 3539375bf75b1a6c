"""Stages "clip" (text encoder and vision tower) and "vit" (the small brother of DINO)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from components.pretrain import networks
from components.pretrain.training import Stage, Trainee, cosine
from components.pretrain.world import World


class ContrastivePair(nn.Module):
    """CLIP with its temperature; embeddings of pictures and captions."""

    def __init__(self) -> None:
        super().__init__()
        self.clip = networks.clip()

    def forward(self, pictures: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Unit embeddings of pictures [B, 3, H, W] and captions [B, L], each [B, d]."""
        seen = self.clip.vision_model(pixel_values=pictures).pooler_output
        read = self.clip.text_model(input_ids=ids).pooler_output
        return (
            F.normalize(self.clip.visual_projection(seen).float(), dim=-1),
            F.normalize(self.clip.text_projection(read).float(), dim=-1),
        )


def train_clip(
    stage: Stage,
    world: World,
    tokenizer: CLIPTokenizer,
    dtype: torch.dtype,
    batch: int,
    start: dict[str, Tensor] | None = None,
) -> Trainee:
    """Contrast pictures of the world with their captions (Radford et al. 2021).

    With `start`, the weights of an earlier CLIP, only its vision tower learns: the text tower is
    the text encoder of teacher and student.
    """
    torch.manual_seed(1)
    pair = ContrastivePair()
    if start is not None:
        pair.clip.load_state_dict(start)
    learns = "clip.vi" if start is not None else ""  # vision_model and visual_projection
    trainee = Trainee(pair, world.device, dtype, (0.9, 0.98), 0.05, ema=0.998, learns=learns)
    stage.resume({"clip": trainee})
    table = world.captioner.table(tokenizer)
    gen = world.generator(11)
    truth = torch.arange(batch, device=world.device)

    def step(i: int) -> dict[str, Tensor]:
        trainee.lr.fill_(cosine(i, stage.total, 1e-3))
        with torch.no_grad():
            scenes = world.sample(batch, gen)
            ids = table(world.captions(scenes, gen))
            pictures = world.render(scenes)[0].to(dtype)
        seen, read = trainee.net(pictures, ids)
        scale = trainee.net.clip.logit_scale.float().exp().clamp(max=100)
        logits = scale * seen @ read.T
        loss = 0.5 * (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth))
        trainee.step(loss)
        return {"loss": loss, "top1": (logits.argmax(1) == truth).float().mean()}

    stage.run({"clip": trainee}, step, gen)
    return trainee


def text_encoder_of(clip: Any) -> Any:
    """CLIP's text tower as the CLIPTextModel that diffusers wants."""
    encoder = CLIPTextModel(networks.text_config())
    wanted = encoder.state_dict()
    tower = {k: v for k, v in clip.state_dict().items() if k.startswith("text_model.")}
    if not set(tower) <= set(wanted):  # transformers 5 dropped the prefix in some releases
        tower = {k.removeprefix("text_model."): v for k, v in tower.items()}
    encoder.load_state_dict(tower)
    return encoder


class SelfDistiller(nn.Module):
    """A vision transformer with DINO's projection head."""

    def __init__(self, prototypes: int = 2048) -> None:
        super().__init__()
        self.vit = networks.vit()
        width = self.vit.config.hidden_size
        self.head = nn.Sequential(
            nn.Linear(width, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 128)
        )
        self.prototypes = nn.Linear(128, prototypes, bias=False)

    def forward(self, pictures: Tensor) -> Tensor:
        """Similarity of each picture [B, 3, s, s] to the prototypes [B, K]."""
        out = self.vit(pixel_values=pictures, interpolate_pos_encoding=True).last_hidden_state
        code = F.normalize(self.head(out[:, 0]).float(), dim=-1)
        return code @ F.normalize(self.prototypes.weight.float(), dim=-1).T


def crop(pictures: Tensor, side: int, low: float, high: float, gen: torch.Generator) -> Tensor:
    """Square crops of low..high of the side, flipped and recoloured [B, 3, s, s]."""
    b, dev = len(pictures), pictures.device

    def uniform(a: float, c: float) -> Tensor:
        return torch.rand(b, device=dev, generator=gen) * (c - a) + a

    scale = uniform(low, high)
    theta = pictures.new_zeros(b, 2, 3)
    theta[:, 0, 0] = scale * torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    theta[:, 1, 1] = scale
    theta[:, 0, 2], theta[:, 1, 2] = uniform(-1, 1) * (1 - scale), uniform(-1, 1) * (1 - scale)
    grid = F.affine_grid(theta, [b, 3, side, side], align_corners=False)
    out = F.grid_sample(pictures, grid, align_corners=False, padding_mode="reflection")
    grey = out.mean(1, keepdim=True)
    out = grey + (out - grey) * uniform(0.6, 1.4).view(-1, 1, 1, 1)
    return (
        out * uniform(0.75, 1.2).view(-1, 1, 1, 1) + uniform(-0.15, 0.15).view(-1, 1, 1, 1)
    ).clamp(-1, 1)


@torch.no_grad()
def sinkhorn(scores: Tensor, temperature: float, rounds: int = 3) -> Tensor:
    """Assignments [B, K] that use all prototypes alike: no collapse (Caron et al. 2020)."""
    q = torch.exp((scores - scores.amax(1, keepdim=True)) / temperature)
    for _ in range(rounds):
        q = q / (q.sum(0, keepdim=True) + 1e-8)
        q = q / q.sum(1, keepdim=True)
    return q


def train_vit(stage: Stage, world: World, dtype: torch.dtype, batch: int) -> Trainee:
    """Self-distillation without labels (Caron et al. 2021) on pictures of the world.

    The teacher is the trainee's own average; two large and two small crops a picture.
    """
    torch.manual_seed(2)
    trainee = Trainee(SelfDistiller(), world.device, dtype, (0.9, 0.98), 0.04, ema=0.994)
    stage.resume({"vit": trainee})
    gen = world.generator(22)
    teacher = trainee.averaged().to(dtype)
    weights: list[Tensor] = list(teacher.parameters())

    def step(i: int) -> dict[str, Tensor]:
        trainee.lr.fill_(cosine(i, stage.total, 8e-4))
        with torch.no_grad():
            pictures = world.render(world.sample(batch, gen))[0]
            large = [
                crop(pictures, networks.RESOLUTION, 0.55, 1.0, gen).to(dtype) for _ in range(2)
            ]
            small = [
                crop(pictures, networks.RESOLUTION // 2, 0.3, 0.55, gen).to(dtype) for _ in range(2)
            ]
            torch._foreach_copy_(weights, trainee.average)
            targets = [sinkhorn(teacher(x), 0.05) for x in large]
        logs = [F.log_softmax(trainee.net(x) / 0.1, -1) for x in large + small]
        losses = [
            -(target * log).sum(-1).mean()
            for k, target in enumerate(targets)
            for j, log in enumerate(logs)
            if j != k
        ]
        loss = torch.stack(losses).mean()
        trainee.step(loss)
        used = targets[0].mean(0)
        return {"loss": loss, "usage": -(used * (used + 1e-9).log()).sum()}

    stage.run({"vit": trainee}, step, gen)
    return trainee
