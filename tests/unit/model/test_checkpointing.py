"""Gradient checkpointing: the same gradients, fewer activations kept."""

from __future__ import annotations

import torch
from torch.autograd.graph import saved_tensors_hooks

from model.base_pair import load_base_pair
from model.batch import ConceptData
from model.checkpointing import save_memory
from model.discriminators import load_backbone
from model.iteration import (
    Frozen,
    alignment_target,
    student_draw,
    student_loss,
    teacher_loss,
)
from tests.tiny import TinyPaths
from tests.unit.model.packs import LOSS, backward, draw, gradients, trained


def saving(tiny: TinyPaths) -> Frozen:
    pair = load_base_pair(tiny.teacher, tiny.student, name="tiny")
    return save_memory(
        Frozen.build(pair, [load_backbone(folder) for folder in (tiny.clip, tiny.dino)])
    )


def kept_bytes(frozen: Frozen, concepts: tuple[ConceptData, ...]) -> int:
    """Count what the student's graph holds until it goes backward, blocks' insides included."""
    own, batch = trained(frozen, concepts), draw(frozen.pair, concepts)
    _, states = teacher_loss(frozen, own.teacher, batch, LOSS)
    own.heads.requires_grad_(False)
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        drawn = student_draw(frozen, own.student, states, batch)
        target = alignment_target(frozen, own.teacher, states, drawn, batch, LOSS)
        result = student_loss(frozen, own.heads, drawn, target, batch, LOSS)
    assert result.total.requires_grad
    return sum(kept.values())


def test_gradients_and_losses_stay_what_they_are(
    tiny: TinyPaths, frozen: Frozen, concepts: tuple[ConceptData, ...]
) -> None:
    plain, sparing = trained(frozen, concepts), trained(frozen, concepts)
    batch = draw(frozen.pair, concepts)
    expected = backward(frozen, plain, batch)
    found = backward(saving(tiny), sparing, batch)
    for name, values in expected.items():
        assert torch.equal(found[name], values), name
    mine = gradients(sparing)
    for name, gradient in gradients(plain).items():
        assert torch.allclose(mine[name], gradient, rtol=1e-5, atol=1e-9), name


def test_what_is_inside_blocks_is_not_kept(
    tiny: TinyPaths, frozen: Frozen, concepts: tuple[ConceptData, ...]
) -> None:
    assert kept_bytes(saving(tiny), concepts) < 0.5 * kept_bytes(frozen, concepts)
