"""A bank of views: the same losses whether it is kept or drawn again."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model.batch import Batch, ConceptData, EchoSample, draw_batch
from model.iteration import Frozen
from model.settings import EchoSettings, LossSettings, ViewSettings
from model.view_bank import with_bank
from tests.unit.model.packs import backward, gradients, trained

VIEWS = ViewSettings(bank=5)
ECHO = EchoSettings(share=0.5)


def draw(frozen: Frozen, concepts: list[ConceptData], iteration: int, items: int = 4) -> Batch:
    return draw_batch(
        concepts,
        frozen.pair,
        seed=11,
        iteration=iteration,
        items=items,
        views=VIEWS,
        echo=ECHO,
        loss=LossSettings(),
    )


def echoed(concept: ConceptData) -> ConceptData:
    samples = tuple(
        EchoSample(torch.full((3, 32, 32), shade, dtype=torch.uint8), f"sample {shade} <new1>")
        for shade in (10, 200)
    )
    return replace(concept, echo=samples)


@pytest.mark.parametrize("with_echo", [False, True])
def test_kept_and_drawn_again_are_the_same(
    frozen: Frozen, concepts: tuple[ConceptData, ...], with_echo: bool
) -> None:
    pack = [echoed(concept) if with_echo else concept for concept in concepts]
    filled = [with_bank(frozen, concept, 11, VIEWS) for concept in pack]
    again, kept = draw(frozen, pack, 3), draw(frozen, filled, 3)
    assert again.known is None and kept.known is not None
    assert len(again.images) == 12 and len(kept.images) == 0
    assert again.texts == kept.texts and torch.equal(again.masks, kept.masks)
    assert any(text.startswith("sample") for text in kept.texts) == with_echo
    latents = frozen.pair.encode_images(again.images)
    assert torch.allclose(latents, kept.known[0], atol=1e-5)
    one, other = trained(frozen, pack), trained(frozen, filled)
    expected, found = backward(frozen, one, again), backward(frozen, other, kept)
    for name, values in expected.items():
        assert torch.allclose(found[name], values, rtol=1e-4), name
    mine = gradients(other)
    for name, gradient in gradients(one).items():
        assert torch.allclose(mine[name], gradient, rtol=1e-3, atol=1e-6), name


def test_items_choose_among_the_banks_views_and_all_images_have_some(
    frozen: Frozen, concepts: tuple[ConceptData, ...]
) -> None:
    seen = {
        (text, image.flatten()[::97].sum().item())
        for iteration in range(30)
        for batch in [draw(frozen, [concepts[0]], iteration)]
        for text, image in zip(batch.texts, batch.images, strict=True)
    }
    assert len(seen) == 5
    assert len(with_bank(frozen, concepts[0], 11, VIEWS).known_views) == 5


def test_only_what_is_missing_is_filled(frozen: Frozen, concepts: tuple[ConceptData, ...]) -> None:
    first = with_bank(frozen, concepts[0], 11, VIEWS)
    assert with_bank(frozen, first, 11, VIEWS) is first
    assert with_bank(frozen, concepts[0], 11, ViewSettings()) is concepts[0]
    later = with_bank(frozen, echoed(first), 11, VIEWS)
    assert later.known_views is first.known_views and len(later.known_echo) == 2


def test_an_empty_bank_is_refused() -> None:
    with pytest.raises(ValueError, match="bank must lie in"):
        ViewSettings(bank=0)
