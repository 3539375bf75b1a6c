"""Stage "vae": the autoencoder, trained by distance, features of its critic, and the critic."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.pretrain import networks
from components.pretrain.training import Stage, Trainee, cosine, freeze, mean
from components.pretrain.world import World


class Critic(nn.Module):
    """Patch critic (Isola et al. 2017); returns scores and the features on the way."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv2d(3, width, 4, 2, 1)])
        for k, stride in ((1, 2), (2, 2), (4, 1)):
            self.blocks.append(
                nn.Sequential(
                    nn.LeakyReLU(0.2),
                    nn.Conv2d(width * k, width * min(4, 2 * k), 4 if stride == 2 else 3, stride, 1),
                    nn.GroupNorm(8, width * min(4, 2 * k)),
                )
            )
        self.score = nn.Sequential(nn.LeakyReLU(0.2), nn.Conv2d(width * 4, 1, 3, 1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Scores [B, 1, h, w] of pictures [B, 3, H, W], and every block's features."""
        features = []
        for block in self.blocks:
            x = block(x)
            features.append(x)
        return self.score(x).float(), features


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbours, across and down."""
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def train_vae(
    stage: Stage,
    world: World,
    dtype: torch.dtype,
    batch: int,
    start: dict[str, Tensor] | None = None,
) -> Trainee:
    """L1 + L2 + edges, then also the critic's features and its opinion (from a fifth on).

    With `start`, the weights of an earlier VAE, only the decoder learns: what latents mean stays.
    """
    torch.manual_seed(3)
    vae = networks.vae()
    if start is not None:
        vae.load_state_dict(start)
    learns = "decoder." if start is not None else ""
    trainee = Trainee(vae, world.device, dtype, (0.9, 0.99), ema=0.998, learns=learns)
    critic = Trainee(Critic(), world.device, dtype, (0.5, 0.9), ema=0.9)
    stage.resume({"vae": trainee, "critic": critic})
    gen = world.generator(33)

    def step(i: int) -> dict[str, Tensor]:
        rate = cosine(i, stage.total, 1.0)
        trainee.lr.fill_(6e-4 * rate)
        critic.lr.fill_(3e-4 * rate)
        with torch.no_grad():
            x = world.render(world.sample(batch, gen))[0]
        with torch.set_grad_enabled(start is None):
            posterior = trainee.net.encode(x.to(dtype)).latent_dist
        mu, spread = posterior.mean.float(), posterior.std.float()
        z = mu + spread * torch.randn(mu.shape, device=mu.device, generator=gen)
        y = trainee.net.decode(z.to(dtype)).sample
        distance = (y.float() - x).abs().mean() + 2 * (y.float() - x).square().mean()
        distance = distance + 0.5 * mean(
            (a - b).abs().mean() for a, b in zip(edges(y.float()), edges(x), strict=True)
        )
        kl = 0.5 * (mu.square() + spread.square() - 1 - 2 * spread.log()).mean()
        loss = distance + 2e-4 * kl
        logs = {"psnr": 10 * torch.log10(4 / (y.float() - x).square().mean()), "kl": kl}
        judged = i > stage.total // 5
        if judged:
            loss = loss + _judge(critic, x.to(dtype), y)
        trainee.step(loss)
        if judged:
            logs["critic"] = _train_critic(critic, x.to(dtype), y.detach())
        return logs

    stage.run({"vae": trainee, "critic": critic}, step, gen)
    return trainee


def _judge(critic: Trainee, x: Tensor, y: Tensor) -> Tensor:
    """The critic's opinion of y and its distance to x in the critic's features."""
    score, drawn = critic.net(y)
    with torch.no_grad():
        _, real = critic.net(x)
    features = mean(F.l1_loss(a.float(), b.float()) for a, b in zip(drawn, real, strict=True))
    return -0.01 * score.mean() + 0.25 * features


def _train_critic(critic: Trainee, x: Tensor, y: Tensor) -> Tensor:
    loss = 0.5 * (F.relu(1 - critic.net(x)[0]).mean() + F.relu(1 + critic.net(y)[0]).mean())
    critic.step(loss)
    return loss


@torch.no_grad()
def fold_statistics(vae: Any, world: World, count: int) -> Any:
    """Fold the latents' mean and spread into the 1x1 convolutions: scaling factor 1, unit latents.

    Args:
        vae: the trained AutoencoderKL, float32.
        world: draws the pictures that are measured.
        count: how many.
    """
    gen = world.generator(44)
    means = torch.cat(
        [
            vae.encode(world.render(world.sample(min(64, count - start), gen))[0]).latent_dist.mean
            for start in range(0, count, 64)
        ]
    )
    mu, sd = means.mean((0, 2, 3)), means.std((0, 2, 3))
    folded = freeze(copy.deepcopy(vae))
    c = len(mu)
    quant, post = folded.quant_conv, folded.post_quant_conv
    quant.weight[:c] /= sd.view(-1, 1, 1, 1)
    quant.bias[:c] = (quant.bias[:c] - mu) / sd
    quant.bias[c:] -= 2 * sd.log()
    post.bias += post.weight[:, :, 0, 0] @ mu
    post.weight *= sd.view(1, -1, 1, 1)
    folded.register_to_config(scaling_factor=1.0)
    return folded
