"""Work on the frozen networks that is recorded and replayed: the same losses and gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from components.train.graphs import RecordedItems
from model.batch import Batch, ConceptData
from model.iteration import Frozen, discriminator_loss
from model.settings import LossSettings
from tests.unit.model.packs import LOSS, Trained, backward, draw, gradients, trained


def recorder(calls: list[str]) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Record as a GPU does, on a device that has to do the work itself."""

    def record(work: Callable[[], None]) -> Callable[[], None]:
        calls.append("recorded")
        work()

        def again() -> None:
            calls.append("replayed")
            work()

        return again

    return record


def recorded_backward(
    items: RecordedItems, frozen: Frozen, own: Trained, batches: list[Batch]
) -> dict[str, torch.Tensor]:
    """All items in order, over some passes; the losses [N] by name, averaged over the passes."""
    learned = [items.teacher_loss(own.teacher, batch) for batch in batches]
    rec = torch.stack([loss for loss, _ in learned]).mean(0)
    rec.sum().backward()
    own.heads.requires_grad_(False)
    answered = [
        items.student_loss(own.student, own.teacher, states, batch)
        for batch, (_, states) in zip(batches, learned, strict=True)
    ]
    total = torch.stack([loss.total for loss in answered]).mean(0)
    total.sum().backward()
    own.heads.requires_grad_(True)
    judged = [
        discriminator_loss(frozen, own.heads, items.seen(batch), loss.fake_features)
        for batch, loss in zip(batches, answered, strict=True)
    ]
    disc = torch.stack(judged).mean(0)
    disc.sum().backward()
    parts = {
        name: torch.stack([loss.parts[name] for loss in answered]).mean(0)
        for name in answered[0].parts
    }
    return {"rec": rec.detach(), "total": total.detach(), "disc": disc.detach(), **parts}


@pytest.mark.parametrize("bank", [False, True])
def test_replayed_passes_give_the_losses_and_gradients_of_the_items(
    frozen: Frozen, concepts: tuple[ConceptData, ...], bank: bool
) -> None:
    calls: list[str] = []
    one, other = trained(frozen, concepts), trained(frozen, concepts)
    settings = LossSettings(perceptual="lpips") if bank else LOSS
    items = RecordedItems(frozen, other.heads, settings, recorder(calls))
    for iteration in (3, 4):  # the second one is given other values in the same places
        for own in (one, other):
            for group in own.groups.values():
                group.zero_grad()
        whole = draw(frozen.pair, concepts, loss=settings, iteration=iteration)
        halves = [
            draw(frozen.pair, concepts, loss=settings, iteration=iteration, items=1, rank=rank)
            for rank in (0, 1)
        ]
        if bank:
            whole, *halves = (known(frozen, batch) for batch in (whole, *halves))
        expected = backward(frozen, one, whole, settings)
        losses = recorded_backward(items, frozen, other, halves)
        assert losses.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.allclose(losses[name], value, rtol=1e-4, atol=1e-6), name
        mine = gradients(other)
        for name, gradient in gradients(one).items():
            assert (mine[name] - gradient).norm() <= 1e-4 * gradient.norm(), name
        with torch.no_grad():  # the next iteration reads what is trained where it was
            for own in (one, other):
                own.heads.heads[0].w2 += 0.1
    assert items.complete
    # The text encoder, its way back, items 1 to 4; without a bank what the backbones see.
    assert calls.count("recorded") == (4 if bank else 5)
    # Two iterations of two passes each; backward was recorded ahead of its first use.
    assert calls.count("replayed") == 4 * calls.count("recorded") + 1


def known(frozen: Frozen, batch: Batch) -> Batch:
    """Give a batch as a bank of views gives it."""
    with torch.no_grad():
        features = tuple(backbone.features(batch.images) for backbone in frozen.backbones)
        latents = frozen.pair.encode_images(batch.images)
    return replace(batch, images=batch.images[:0], known=(latents, features))


def test_a_batch_of_another_shape_is_refused(
    frozen: Frozen, concepts: tuple[ConceptData, ...]
) -> None:
    own = trained(frozen, concepts)
    items = RecordedItems(frozen, own.heads, LOSS, recorder([]))
    items.teacher_loss(own.teacher, draw(frozen.pair, concepts))
    with pytest.raises(AssertionError, match="one shape"):
        items.teacher_loss(own.teacher, draw(frozen.pair, concepts, items=1))
