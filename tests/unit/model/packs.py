"""Packs of concepts for the tests of an iteration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from model.base_pair import BasePair
from model.batch import Batch, ConceptData, draw_batch
from model.concept import StudentWeights, TeacherWeights
from model.discriminators import DiscriminatorHeads
from model.iteration import (
    Frozen,
    alignment_target,
    discriminator_loss,
    student_draw,
    student_loss,
    teacher_loss,
)
from model.settings import EchoSettings, LossSettings, ViewSettings

LOSS = LossSettings()


@dataclass
class Trained:
    """The three trained groups of a pack, moved away from their start."""

    teacher: TeacherWeights
    student: StudentWeights
    heads: DiscriminatorHeads

    @property
    def groups(self) -> dict[str, torch.nn.Module]:
        return {"teacher": self.teacher, "student": self.student, "heads": self.heads}


def trained(frozen: Frozen, concepts: Sequence[ConceptData]) -> Trained:
    pair, ids = frozen.pair, [concept.id for concept in concepts]
    teacher = TeacherWeights.from_pair(pair, ["dog"] * len(ids))
    student = StudentWeights.from_pair(pair, len(ids))
    heads = DiscriminatorHeads([b.dim for b in frozen.backbones], ids, seed=0)
    with torch.no_grad():
        for n, name in enumerate(ids):  # keyed by name, so that packs and singles start alike
            gen = torch.Generator().manual_seed(sum(name.encode()))
            for parameter in (teacher.kv, teacher.rows, student.kv):
                parameter[n] += 0.2 * torch.randn(parameter.shape[1:], generator=gen)
    return Trained(teacher, student, heads)


def draw(
    pair: BasePair,
    concepts: Sequence[ConceptData],
    *,
    items: int = 2,
    rank: int = 0,
    loss: LossSettings = LOSS,
    iteration: int = 3,
    echo: EchoSettings | None = None,
) -> Batch:
    return draw_batch(
        concepts,
        pair,
        seed=11,
        iteration=iteration,
        items=items,
        rank=rank,
        views=ViewSettings(),
        echo=echo or EchoSettings(),
        loss=loss,
    )


def backward(
    frozen: Frozen, own: Trained, batch: Batch, settings: LossSettings = LOSS
) -> dict[str, torch.Tensor]:
    """All items in order, gradients left on the parameters; the losses [N] by name."""
    loss, states = teacher_loss(frozen, own.teacher, batch, settings)
    loss.sum().backward()
    drawn = student_draw(frozen, own.student, states, batch)
    target = alignment_target(frozen, own.teacher, states, drawn, batch, settings)
    own.heads.requires_grad_(False)
    result = student_loss(frozen, own.heads, drawn, target, batch, settings)
    result.total.sum().backward()
    own.heads.requires_grad_(True)
    judged = discriminator_loss(frozen, own.heads, batch, result.fake_features)
    judged.sum().backward()
    return {
        "rec": loss.detach(),
        "total": result.total.detach(),
        "disc": judged.detach(),
        **result.parts,
    }


def gradients(own: Trained) -> dict[str, torch.Tensor]:
    named = {}
    for group, module in own.groups.items():
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None
            named[f"{group}.{name}"] = parameter.grad
    return named


def assert_same(found: Frozen, plain: Frozen, concepts: tuple[ConceptData, ...]) -> None:
    """Assert that an iteration's losses and gradients differ by round-off alone."""
    one, other = trained(plain, concepts), trained(plain, concepts)
    batch = draw(plain.pair, concepts)
    expected, losses = backward(plain, one, batch), backward(found, other, batch)
    for name, value in expected.items():
        assert torch.allclose(losses[name], value, rtol=1e-4, atol=1e-6), name
    mine = gradients(other)
    for name, gradient in gradients(one).items():
        assert (mine[name] - gradient).norm() <= 1e-3 * gradient.norm(), name
