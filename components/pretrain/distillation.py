"""Stage "student": one to four steps, distilled from the teacher."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.pretrain import networks
from components.pretrain.adapters import let_move
from components.pretrain.diffusion import Moves, guided, predict
from components.pretrain.latents import Lessons, Noising
from components.pretrain.training import Stage, Trainee, cosine, freeze, graphed, mean
from model.compiling import allow_variants

WHOLE = 0.6  # share of the adapters that are followed as they are
PURE = 0.9  # share of the starts that are pure noise, as for a picture in one step
_VARIANTS = 64  # three networks share one code, each with and without gradient


class Heads(nn.Module):
    """Critics on the frozen teacher's features (Sauer et al. 2024, latent adversarial)."""

    def __init__(self, channels: list[int]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            [
                nn.Sequential(
                    nn.GroupNorm(32, c),
                    nn.Conv2d(c, 96, 1),
                    nn.LeakyReLU(0.2),
                    nn.Conv2d(96, 96, 3, 1, 1),
                    nn.GroupNorm(8, 96),
                    nn.LeakyReLU(0.2),
                    nn.Conv2d(96, 1, 1),
                )
                for c in channels
            ]
        )

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Scores [B, 1, h, w] for each block's features."""
        return [head(f).float() for head, f in zip(self.heads, features, strict=True)]


class Student:
    """Distillation: regression to the teacher's pairs, distribution matching, and critics.

    Distribution matching (Yin et al. 2024): move the student's picture along the difference of the
    teacher's and of a second network's estimate, the second being trained on the student's own
    pictures all the while.
    """

    def __init__(
        self,
        teacher: Any,
        lessons: Lessons,
        pairs: tuple[Tensor, Tensor, Tensor],
        dtype: torch.dtype,
        batch: int,
        regression: int,
        compiled: bool,
        start: Any = None,
    ) -> None:
        """Build everything; a student that goes on does so from `start`, not from the teacher."""
        dev, data = lessons.device, lessons.data
        self.lessons, self.data, self.pairs = lessons, data, pairs
        self.dtype, self.batch, self.regression = dtype, batch, regression
        self.further = start is not None
        self.noising = Noising(networks.alphas_cumprod(dev))
        self.gen = torch.Generator(dev).manual_seed(88)
        self.teacher = freeze(copy.deepcopy(teacher).to(dev, dtype))
        student = copy.deepcopy(teacher if start is None else start)
        self.student = Trainee(student, dev, dtype, (0.9, 0.99), ema=0.997)
        self.fake = Trainee(teacher, dev, dtype, (0.9, 0.99), ema=0.9)
        if lessons.adapters:
            for net in (self.teacher, self.student.net, self.fake.net):
                let_move(net)
        # As they are called. The critics watch blocks of the teacher, which stay plain.
        self.networks: dict[str, Any] = {
            "teacher": self.teacher,
            "student": self.student.net,
            "fake": self.fake.net,
        }
        if compiled:
            allow_variants(_VARIANTS)
            self.networks = {
                name: torch.compile(net, dynamic=False) for name, net in self.networks.items()
            }
        down, up = self.teacher.down_blocks, self.teacher.up_blocks
        self.blocks = [down[0], down[1], self.teacher.mid_block, up[1], up[2]]
        two = self.lessons.moves(torch.zeros(2, dtype=torch.long, device=dev))
        widths = [f.shape[1] for f in self._features(pairs[0][:2], data.text[:2], two)]
        torch.manual_seed(5)
        self.heads = Trainee(Heads(widths), dev, dtype, (0.5, 0.99), 0.01, ema=0.9)
        self.times = torch.tensor(networks.STUDENT_STEPS, device=dev)
        if not self.further:
            self.step_regress = graphed(self._regress, self.gen)
        self.step_fake = graphed(self._train_fake, self.gen)
        self.step_draw = graphed(self._train_student, self.gen)

    def trainees(self) -> dict[str, Trainee]:
        """All that is trained here, by name."""
        return {"student": self.student, "fake": self.fake, "heads": self.heads}

    # ---- random choices
    def _rand(self) -> Tensor:
        return torch.rand(self.batch, device=self.gen.device, generator=self.gen)

    def _like(self, x: Tensor) -> Tensor:
        return torch.randn(x.shape, device=x.device, generator=self.gen)

    def _start(self, z0: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """What the student starts from: mostly pure noise at t = 999, else a later step's z_t."""
        later = (self._rand() * 3).long() + 1
        t = self.times[torch.where(self._rand() < PURE, 0, later)]
        pure = (t == self.times[0]).view(-1, 1, 1, 1)
        _, sigma = self.noising.split(t)
        return torch.where(pure, sigma * noise, self.noising.add(z0, noise, t)), t

    def _draw(self, z: Tensor, t: Tensor, text: Tensor, moves: Moves) -> Tensor:
        v = predict(self.networks["student"], z, t, text, self.dtype, moves)
        return self.noising.z0(v, z, t)

    # ---- the three kinds of step; each returns a loss to log
    def _pair_loss(self) -> Tensor:
        """Distance of the student's pictures to the teacher's of the same noise."""
        noise, pictures, rows = self.pairs
        i = torch.randint(0, len(noise), (self.batch,), device=noise.device, generator=self.gen)
        z, t = self._start(pictures[i].float(), noise[i])
        text, moves = self.data.text[rows[i]], self.lessons.moves(rows[i])
        error = self._draw(z, t, text, moves) - pictures[i].float()
        # pseudo-Huber: robust to what the student cannot know
        return (error.square().sum((1, 2, 3)) + 0.01).sqrt().mean() / 45

    def _regress(self) -> Tensor:
        loss = self._pair_loss()
        self.student.step(loss)
        return loss

    def _batch(self) -> tuple[Tensor, Tensor, Moves]:
        """Compositions, their texts and adapters; some adapters in part, or beyond themselves."""
        rows, share = self.lessons.draw(self.batch, self.gen), None
        if self.lessons.adapters:
            other = 0.5 + self._rand()
            share = torch.where(self._rand() < WHOLE, torch.ones_like(other), other)
        moves = self.lessons.moves(rows, share)
        return self.data.latents[rows].float(), self.data.text[rows], moves

    def _features(self, z: Tensor, text: Tensor, moves: Moves) -> list[Tensor]:
        """The frozen teacher's block outputs for z, noised a little."""
        out: list[Tensor] = []

        def keep(_: nn.Module, __: Any, result: Any) -> None:
            out.append(result[0] if isinstance(result, tuple) else result)

        hooks = [block.register_forward_hook(keep) for block in self.blocks]
        b = len(z)
        t = (torch.rand(b, device=z.device, generator=self.gen) ** 1.5 * 800).long() + 5
        predict(self.teacher, self.noising.add(z, self._like(z), t), t, text, self.dtype, moves)
        for hook in hooks:
            hook.remove()
        return out

    def _train_fake(self) -> Tensor:
        """Second network and critics learn what the student draws now."""
        real, text, moves = self._batch()
        with torch.no_grad():
            z, t = self._start(real, self._like(real))
            drawn = self._draw(z, t, text, moves)
        t = (self._rand() * 1000).long()
        noise = self._like(drawn)
        noised = self.noising.add(drawn, noise, t)
        v = predict(self.networks["fake"], noised, t, text, self.dtype, moves)
        loss = (v - self.noising.v(drawn, noise, t)).square().mean()
        self.fake.step(loss)
        with torch.no_grad():
            of_real, of_drawn = (self._features(x, text, moves) for x in (real, drawn))
        self.heads.step(
            mean(
                F.relu(1 - a).mean() + F.relu(1 + b).mean()
                for a, b in zip(self.heads.net(of_real), self.heads.net(of_drawn), strict=True)
            )
        )
        return loss

    def _train_student(self) -> Tensor:
        """One step along the matching direction and the critics', with the pairs as an anchor."""
        real, text, moves = self._batch()
        z, t = self._start(real, self._like(real))
        drawn = self._draw(z, t, text, moves)
        leaf = drawn.detach().requires_grad_(True)
        opinion = -mean(s.mean() for s in self.heads.net(self._features(leaf, text, moves)))
        critics = torch.autograd.grad(opinion, leaf)[0]
        with torch.no_grad():
            t = (self._rand() * 960).long() + 20
            noised = self.noising.add(drawn, self._like(drawn), t)
            net, empty = self.networks["teacher"], self.data.empty
            v = guided(net, self.noising, noised, t, text, empty, self.dtype, moves=moves)
            wanted = self.noising.z0(v, noised, t)
            v = predict(self.networks["fake"], noised, t, text, self.dtype, moves)
            believed = self.noising.z0(v, noised, t)
            scale = (drawn - wanted).abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-3)
            pull = (believed - wanted) / scale
            pull = pull + 0.35 * pull.norm() / (critics.norm() + 1e-12) * critics
        loss = (drawn * pull).mean() + 0.35 * self._pair_loss()
        self.student.step(loss)
        return pull.abs().mean()

    def train(self, stage: Stage) -> Trainee:
        """Regression, then matching: two steps of the second network to one of the student.

        A student that goes on needs no regression; in its place the second network and the critics
        get to know it.
        """
        stage.resume(self.trainees())

        def step(i: int) -> dict[str, Tensor]:
            if i < self.regression and self.further:
                self.fake.lr.fill_(3e-4)
                self.heads.lr.fill_(5e-4)
                return {"fake": self.step_fake()}
            if i < self.regression:
                self.student.lr.fill_(cosine(i, 2 * self.regression, 7e-4, warm=100))
                return {"regression": self.step_regress()}
            late, length = i - self.regression, stage.total - self.regression
            rate = cosine(late, length, 1.0, warm=60, floor=0.05)
            self.fake.lr.fill_(3e-4 * max(rate, 0.3))
            self.heads.lr.fill_(5e-4 * max(rate, 0.3))
            self.student.lr.fill_(1.5e-4 * rate)
            logs = {"fake": self.step_fake()}
            if i % 2:
                logs["pull"] = self.step_draw()
            return logs

        stage.run(self.trainees(), step, self.gen)
        return self.student
