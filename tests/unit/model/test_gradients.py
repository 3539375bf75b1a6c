"""Where gradients go, and that a pack's are those of its concepts."""

from __future__ import annotations

import pytest
import torch

from model.batch import ConceptData
from model.discriminators import Backbone
from model.iteration import (
    Frozen,
    alignment_target,
    discriminator_loss,
    student_draw,
    student_loss,
    teacher_loss,
)
from model.settings import LossSettings
from tests.unit.model.packs import LOSS, Trained, backward, draw, gradients, trained


def norms(own: Trained) -> dict[str, float]:
    """Gradient norm of each parameter group; 0 where there is none."""
    parts = {
        "teacher.kv": [own.teacher.kv],
        "teacher.rows": [own.teacher.rows],
        "student": list(own.student.parameters()),
        "heads": list(own.heads.parameters()),
    }
    return {
        name: sum(0.0 if p.grad is None else float(p.grad.norm()) for p in parameters)
        for name, parameters in parts.items()
    }


def test_each_loss_reaches_its_own_parameters_alone(
    frozen: Frozen, concepts: tuple[ConceptData, ...]
) -> None:
    own, batch = trained(frozen, concepts), draw(frozen.pair, concepts)

    def reached() -> set[str]:
        found = {name for name, norm in norms(own).items() if norm > 0}
        for group in own.groups.values():
            group.zero_grad(set_to_none=True)
        return found

    loss, states = teacher_loss(frozen, own.teacher, batch, LOSS)
    assert not states.requires_grad
    loss.sum().backward()
    assert reached() == {"teacher.kv", "teacher.rows"}

    drawn = student_draw(frozen, own.student, states, batch)
    target = alignment_target(frozen, own.teacher, states, drawn, batch, LOSS)
    assert not any(t.requires_grad for t in (target.latents, target.images, target.weight))
    own.heads.requires_grad_(False)
    result = student_loss(frozen, own.heads, drawn, target, batch, LOSS)
    assert not any(f.requires_grad for f in result.fake_features)
    result.total.sum().backward()
    assert reached() == {"student"}

    own.heads.requires_grad_(True)
    discriminator_loss(frozen, own.heads, batch, result.fake_features).sum().backward()
    assert reached() == {"heads"}


@pytest.mark.parametrize("part", ["mse", "id", "perc", "adv"])
def test_each_part_of_the_students_loss_reaches_the_student(
    frozen: Frozen, concepts: tuple[ConceptData, ...], part: str
) -> None:
    weights = {f"{name}_weight": float(name == part) for name in ("mse", "id", "perc", "adv")}
    settings = LossSettings(**weights)
    own, batch = trained(frozen, concepts[:1]), draw(frozen.pair, concepts[:1])
    _, states = teacher_loss(frozen, own.teacher, batch, settings)
    drawn = student_draw(frozen, own.student, states, batch)
    target = alignment_target(frozen, own.teacher, states, drawn, batch, settings)
    own.heads.requires_grad_(False)
    result = student_loss(frozen, own.heads, drawn, target, batch, settings)
    assert set(result.parts) == {part}
    assert bool(result.fake_features) == (part == "adv")
    result.total.sum().backward()
    assert norms(own)["student"] > 0


def test_each_step_moves_its_own_parameters_and_nothing_else(
    frozen: Frozen, concepts: tuple[ConceptData, ...], backbones: tuple[Backbone, ...]
) -> None:
    own, batch = trained(frozen, concepts[:1]), draw(frozen.pair, concepts[:1])
    pair = frozen.pair
    still = [pair.teacher, pair.student, pair.vae, pair.text_encoder]
    still += [backbone.network for backbone in backbones]
    optimizers = {
        name: torch.optim.AdamW(group.parameters(), 1e-2) for name, group in own.groups.items()
    }

    def snapshot() -> dict[str, list[torch.Tensor]]:
        everything = {**own.groups, "frozen": torch.nn.ModuleList(still)}
        return {n: [p.detach().clone() for p in m.parameters()] for n, m in everything.items()}

    def moved(before: dict[str, list[torch.Tensor]]) -> set[str]:
        after = snapshot()
        return {
            name
            for name, old in before.items()
            if not all(torch.equal(a, b) for a, b in zip(old, after[name], strict=True))
        }

    def step(name: str, loss: torch.Tensor) -> set[str]:
        before = snapshot()
        optimizers[name].zero_grad()
        loss.sum().backward()
        optimizers[name].step()
        return moved(before)

    loss, states = teacher_loss(frozen, own.teacher, batch, LOSS)
    assert step("teacher", loss) == {"teacher"}
    drawn = student_draw(frozen, own.student, states, batch)
    target = alignment_target(frozen, own.teacher, states, drawn, batch, LOSS)
    own.heads.requires_grad_(False)
    result = student_loss(frozen, own.heads, drawn, target, batch, LOSS)
    assert step("student", result.total) == {"student"}
    own.heads.requires_grad_(True)
    judged = discriminator_loss(frozen, own.heads, batch, result.fake_features)
    assert step("heads", judged) == {"heads"}


def test_token_rows_of_other_concepts_get_no_gradient(
    frozen: Frozen, concepts: tuple[ConceptData, ...]
) -> None:
    own, batch = trained(frozen, concepts), draw(frozen.pair, concepts)
    loss, _ = teacher_loss(frozen, own.teacher, batch, LOSS)
    loss[1].backward()
    assert own.teacher.rows.grad is not None and own.teacher.kv.grad is not None
    for gradient in (own.teacher.rows.grad, own.teacher.kv.grad):
        assert [float(g.abs().sum()) > 0 for g in gradient] == [False, True, False]


@pytest.mark.parametrize("settings", [LOSS, LossSettings(perceptual="lpips", masked_id=True)])
def test_a_pack_of_three_is_three_packs_of_one(
    frozen: Frozen, concepts: tuple[ConceptData, ...], settings: LossSettings
) -> None:
    pack = trained(frozen, concepts)
    losses = backward(frozen, pack, draw(frozen.pair, concepts, loss=settings), settings)
    packed = gradients(pack)
    for n, concept in enumerate(concepts):
        own = trained(frozen, [concept])
        alone = backward(frozen, own, draw(frozen.pair, [concept], loss=settings), settings)
        for name, value in alone.items():
            assert float(value[0]) == pytest.approx(float(losses[name][n]), rel=1e-4, abs=1e-6)
        for name, gradient in gradients(own).items():
            assert relative(packed[name][n], gradient[0]) < 1e-4, name


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(1e-12))


def test_two_ranks_average_to_one(frozen: Frozen, concepts: tuple[ConceptData, ...]) -> None:
    whole = trained(frozen, concepts)
    backward(frozen, whole, draw(frozen.pair, concepts, items=2))
    ranks = [trained(frozen, concepts) for _ in range(2)]
    for rank, own in enumerate(ranks):
        backward(frozen, own, draw(frozen.pair, concepts, items=1, rank=rank))
    first, second = (gradients(own) for own in ranks)
    for name, gradient in gradients(whole).items():
        assert relative((first[name] + second[name]) / 2, gradient) < 1e-4, name
