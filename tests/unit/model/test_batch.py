"""The draws of an iteration: keyed by concept and item, never by place, rank or pack."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model.base_pair import BasePair
from model.batch import Batch, ConceptData, EchoSample
from model.randomness import generator, integer, normal, uniform
from model.settings import EchoSettings, LossSettings, ViewSettings
from tests.unit.model.packs import draw

PER_ROW = ("images", "masks", "noise", "t", "t_align")


def rows(batch: Batch, index: list[int]) -> dict[str, object]:
    found: dict[str, object] = {name: getattr(batch, name)[index] for name in PER_ROW}
    found["ids"], found["slots"] = batch.prompts.ids[index], batch.prompts.slots[index]
    return found


def same(a: dict[str, object], b: dict[str, object]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)  # type: ignore[arg-type]


def test_shapes(pair: BasePair, concepts: tuple[ConceptData, ...]) -> None:
    batch = draw(pair, concepts, items=2)
    assert batch.n == 3 and batch.concept.tolist() == [0, 0, 1, 1, 2, 2]
    assert batch.images.shape == (6, 3, 32, 32) and batch.masks.shape == (6, 1, 8, 8)
    assert batch.noise.shape == (6, 4, 8, 8) and batch.noise.dtype == torch.float32
    assert batch.t.shape == batch.t_align.shape == (6,)
    assert len(batch.texts) == len(batch.prompts) == 6
    assert batch.directions is not None and batch.directions.shape == (3, 128, 3, 11, 11)
    assert batch.directions.flatten(2).norm(dim=-1).sub(1).abs().max() < 1e-5
    assert all("<new1> robot" in text for text in batch.texts[4:])
    assert (batch.prompts.slots == 0).any(dim=1).all()


@pytest.mark.parametrize("items", [1, 2])
def test_ranks_take_their_rows_of_the_global_batch(
    pair: BasePair, concepts: tuple[ConceptData, ...], items: int
) -> None:
    whole = draw(pair, concepts, items=4)
    for rank in range(4 // items):
        part = draw(pair, concepts, items=items, rank=rank)
        index = [n * 4 + rank * items + i for n in range(3) for i in range(items)]
        assert same(rows(part, list(range(3 * items))), rows(whole, index))
        assert part.directions is not None and whole.directions is not None
        assert torch.equal(part.directions, whole.directions)


def test_a_concept_draws_the_same_alone_and_in_any_pack(
    pair: BasePair, concepts: tuple[ConceptData, ...]
) -> None:
    ada, bob, cyd = concepts
    alone = draw(pair, [bob])
    for pack, place in (([ada, bob, cyd], 1), ([bob, cyd], 0), ([cyd, ada, bob], 2)):
        batch = draw(pair, pack)
        assert same(rows(batch, [2 * place, 2 * place + 1]), rows(alone, [0, 1]))
        assert batch.directions is not None and alone.directions is not None
        assert torch.equal(batch.directions[place], alone.directions[0])


def test_items_iterations_and_purposes_differ(
    pair: BasePair, concepts: tuple[ConceptData, ...]
) -> None:
    batch, later = draw(pair, concepts, iteration=3), draw(pair, concepts, iteration=4)
    assert not torch.equal(batch.noise[0], batch.noise[1])
    assert not torch.equal(batch.noise, later.noise)
    assert not torch.equal(batch.directions, later.directions)  # type: ignore[arg-type]
    assert not torch.equal(batch.t, batch.t_align)


def test_time_steps_cover_their_range_evenly(
    pair: BasePair, concepts: tuple[ConceptData, ...]
) -> None:
    loss = LossSettings(align_min_t=100, align_max_t=199, perceptual="lpips")
    batch = draw(pair, concepts[:1], items=300, loss=loss)
    assert batch.directions is None
    assert batch.t.min() >= 0 and batch.t.max() <= 999
    assert batch.t.float().mean().item() == pytest.approx(499.5, abs=60)
    assert batch.t_align.min() >= 100 and batch.t_align.max() <= 199
    assert batch.t_align.float().mean().item() == pytest.approx(149.5, abs=6)
    assert batch.noise.mean().abs() < 0.02 and batch.noise.std().item() == pytest.approx(
        1, abs=0.02
    )


def test_echo_samples_stand_in_as_often_as_asked(
    pair: BasePair, concepts: tuple[ConceptData, ...]
) -> None:
    image = torch.full((3, 32, 32), 77, dtype=torch.uint8)
    sample = EchoSample(image, "a <new1> dog drawn before")
    concept = replace(concepts[0], echo=(sample,))
    for share in (0.0, 0.5, 1.0):
        batch = draw(pair, [concept], items=200, echo=EchoSettings(share=share))
        echoed = [r for r, text in enumerate(batch.texts) if text == sample.prompt]
        assert len(echoed) / 200 == pytest.approx(share, abs=0.1)
        assert (batch.masks[echoed] == 1).all()
        assert torch.allclose(batch.images[echoed], torch.tensor(77 / 127.5 - 1))
    plain = draw(pair, [concepts[0]], items=4)
    never = draw(pair, [concept], items=4, echo=EchoSettings(share=0))
    assert torch.equal(plain.noise, never.noise)


def test_every_reference_image_is_drawn(pair: BasePair, concepts: tuple[ConceptData, ...]) -> None:
    images = tuple(torch.full((3, 45, 45), v, dtype=torch.uint8) for v in (10, 100, 250))
    concept = replace(concepts[0], images=images)
    batch = draw(pair, [concept], items=90)
    centre = batch.images.flatten(1).abs().max(dim=1).values
    values = {round(float(v), 3) for v in centre}
    assert values == {round(abs(v / 127.5 - 1), 3) for v in (10, 100, 250)}


def test_image_captions_are_used(pair: BasePair, concepts: tuple[ConceptData, ...]) -> None:
    text = replace(concepts[0].text, captions=("a dog asleep",) * 3)
    batch = draw(pair, [replace(concepts[0], text=text)], items=4)
    assert all("<new1> dog asleep" in prompt for prompt in batch.texts)


def test_generators_are_keyed_and_on_the_cpu() -> None:
    first = normal((4,), generator(1, "ada", 2, "noise", 3))
    assert torch.equal(first, normal((4,), generator(1, "ada", 2, "noise", 3)))
    keys = [(2, "ada", 2, "noise", 3), (1, "bob", 2, "noise", 3), (1, "ada", 3, "noise", 3)]
    keys += [(1, "ada", 2, "t", 3), (1, "ada", 2, "noise", 4), (1, "ada2", 2, "noise", 3)]
    for key in keys:
        assert not torch.equal(first, normal((4,), generator(*key)))
    # Known numbers: a change here would change what every seed draws.
    assert first.tolist() == pytest.approx([0.085527, -1.436172, 0.465611, -1.667011], abs=1e-5)
    gen = generator(0, "x", 0, "y")
    draws = [integer(3, 5, gen) for _ in range(60)]
    assert set(draws) == {3, 4, 5}
    assert all(0 <= uniform(gen) < 1 for _ in range(20))


def test_settings_default_to_the_methods_values() -> None:
    loss, views, echo = LossSettings(), ViewSettings(), EchoSettings()
    weights = (loss.mse_weight, loss.id_weight, loss.perc_weight, loss.adv_weight)
    assert weights == (1, 1, 1, 1) and loss.guidance == 7.5 and loss.perceptual == "swd"
    assert (views.flip, views.paste_probability, views.far_below) == (0.5, 0.66, 0.6)
    assert (views.crop_min, views.crop_max) == (1.2, 1.4)
    assert (echo.samples, echo.rounds, echo.iterations_share, echo.share) == (16, 2, 0.25, 0.5)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (LossSettings, {"adv_weight": -1}),
        (LossSettings, {"align_min_t": 500, "align_max_t": 400}),
        (ViewSettings, {"flip": 2}),
        (ViewSettings, {"crop_min": 1.5}),
        (EchoSettings, {"share": 1.5}),
    ],
)
def test_settings_that_mean_nothing_are_refused(kind: type, wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        kind(**wrong)
