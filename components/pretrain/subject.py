"""Training of the network that finds a picture's subject, for comparisons (model/judge)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from components.pretrain.training import Stage, Trainee, cosine
from components.pretrain.world import World
from model.judge.subject import SIDE, SubjectNetwork


def train_subject(stage: Stage, world: World, dtype: torch.dtype, batch: int) -> Trainee:
    """Cross-entropy and overlap with the sprite's own coverage, on whole and on spoilt renders.

    Half of the pictures are blurred, faded and noisy: what a weak model draws has to be found too.
    """
    torch.manual_seed(7)
    trainee = Trainee(SubjectNetwork(), world.device, dtype, (0.9, 0.99), ema=0.995)
    stage.resume({"subject": trainee})
    gen = world.generator(77)

    def step(i: int) -> dict[str, Tensor]:
        trainee.lr.fill_(3e-3 * cosine(i, stage.total, 1.0, warm=50))
        with torch.no_grad():
            x, coverage = small(*world.render(world.sample(batch, gen)))
            x = spoilt(x, gen)
        logits = trainee.net(x.to(dtype)).float()
        found = logits.sigmoid()
        shared = (found * coverage).sum((1, 2, 3))
        overlap = (2 * shared + 1) / (found.sum((1, 2, 3)) + coverage.sum((1, 2, 3)) + 1)
        loss = F.binary_cross_entropy_with_logits(logits, coverage) + 0.5 * (1 - overlap).mean()
        trainee.step(loss)
        return {"loss": loss.detach(), "overlap": overlap.mean()}

    stage.run({"subject": trainee}, step, gen)
    return trainee


def small(x: Tensor, coverage: Tensor) -> tuple[Tensor, Tensor]:
    """Bring pictures and coverage to the network's size."""
    scale = x.shape[-1] // SIDE
    return F.avg_pool2d(x, scale), F.avg_pool2d(coverage, scale)


def spoilt(x: Tensor, gen: torch.Generator) -> Tensor:
    """Blur, fade and disturb a random half of pictures [B, 3, S, S]."""
    count = len(x)

    def lots(low: float, high: float) -> Tensor:
        drawn = torch.rand(count, 1, 1, 1, device=x.device, generator=gen)
        return low + (high - low) * drawn

    coarse = F.avg_pool2d(x, 4)
    blurred = F.interpolate(coarse, size=x.shape[-2:], mode="bilinear")
    y = torch.lerp(x, blurred, lots(0, 1)) * lots(0.5, 1.1) + lots(-0.2, 0.2)
    noise = torch.randn(coarse.shape, device=x.device, generator=gen)
    y = y + lots(0, 0.3) * F.interpolate(noise, size=x.shape[-2:], mode="bilinear")
    return torch.where(lots(0, 1) < 0.5, y.clamp(-1, 1), x)


@torch.no_grad()
def overlap(network: torch.nn.Module, world: World, count: int = 96, seed: int = 5) -> float:
    """Mean intersection over union with the true coverage, on single subjects of a world."""
    scenes = world.sample(count, world.generator(seed), alone=True)
    x, coverage = small(*world.render(scenes))
    found, true = network(x) > 0, coverage > 0.5
    shared = (found & true).sum((1, 2, 3)).float()
    return float((shared / (found | true).sum((1, 2, 3)).clamp(min=1)).mean())
