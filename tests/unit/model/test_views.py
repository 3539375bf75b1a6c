"""Augmented views: their statistics, masks and prompts."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from model.errors import InputError
from model.randomness import generator
from model.settings import ViewSettings
from model.views import (
    TEMPLATES,
    ConceptText,
    View,
    draw_view,
    name_concept,
    prepare_images,
    reference_grid,
    square,
)

SIZE, FACTOR = 128, 8
TEXT = ConceptText("dog", "<new1>")


def picture(height: int = 180, width: int = 180) -> torch.Tensor:
    """Left half red, right half blue; never the canvas's grey."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[0, :, : width // 2] = 255
    image[2, :, width // 2 :] = 255
    return image


def views(count: int, settings: ViewSettings | None = None) -> list[View]:
    return [
        draw_view(picture(), TEXT, SIZE, settings or ViewSettings(), generator(0, "c", n, "view"))
        for n in range(count)
    ]


def painted(view: View) -> tuple[int, int, int, int]:
    """Top, left, height and width of what is not canvas."""
    covered = (view.image.abs().sum(0) > 0.5).nonzero()
    top, left = covered.min(0).values.tolist()
    bottom, right = covered.max(0).values.tolist()
    return top, left, bottom - top + 1, right - left + 1


@pytest.fixture(scope="module")
def many() -> list[View]:
    return views(600)


def test_shapes_and_ranges(many: list[View]) -> None:
    for view in many[:50]:
        assert view.image.shape == (3, SIZE, SIZE) and view.image.dtype == torch.float32
        assert view.image.abs().max() <= 1
        assert view.mask.shape == (1, 16, 16)
        assert set(view.mask.unique().tolist()) <= {0.0, 1.0}


def test_how_often_views_are_pasted_flipped_and_how_large(many: list[View]) -> None:
    pasted = [v for v in many if v.mask.min() == 0]
    assert len(pasted) / len(many) == pytest.approx(0.66, abs=0.06)
    sizes = [painted(v)[2] for v in pasted]
    assert min(sizes) == pytest.approx(SIZE / 3, abs=2) and max(sizes) == SIZE
    assert sum(sizes) / len(sizes) == pytest.approx((SIZE / 3 + SIZE) / 2, abs=5)
    flipped = 0
    for view in pasted:
        top, left, height, _ = painted(view)
        flipped += int(view.image[2, top + height // 2, left + 1] > 0)  # blue on the left
    assert flipped / len(pasted) == pytest.approx(0.5, abs=0.08)


def test_masks_are_the_inside_less_a_latent_pixel(many: list[View]) -> None:
    for view in many:
        if view.mask.min() == 1:
            assert painted(view) == (0, 0, SIZE, SIZE)
            continue
        top, left, height, width = painted(view)
        assert height == width
        expected = torch.zeros(1, 16, 16)
        for y in range(16):
            for x in range(16):
                inside = (
                    top + FACTOR <= y * FACTOR
                    and (y + 1) * FACTOR <= top + height - FACTOR
                    and left + FACTOR <= x * FACTOR
                    and (x + 1) * FACTOR <= left + width - FACTOR
                )
                expected[0, y, x] = float(inside)
        assert torch.equal(view.mask, expected)


def test_no_mask_is_empty_even_when_the_image_is_tiny() -> None:
    for n in range(100):
        gen = generator(0, "c", n, "view")
        view = draw_view(picture(), TEXT, 32, ViewSettings(), gen, factor=8)
        assert view.mask.sum() >= 1


def test_prompts_say_how_large_the_subject_is(many: list[View]) -> None:
    for view in many:
        words = view.prompt
        far = "far away" in words or "very small" in words
        near = "zoomed in" in words or "close up" in words
        if view.mask.min() == 1:
            assert near and not far
        else:
            assert far == (painted(view)[2] < 0.6 * SIZE) and not near
        assert "<new1> dog" in words
    seen = Counter(
        w
        for v in many
        for w in ("far away", "very small", "zoomed in", "close up")
        if w in v.prompt
    )
    assert len(seen) == 4 and min(seen.values()) > 30


def test_words_go_in_after_the_first_and_articles_are_not_doubled(many: list[View]) -> None:
    plain = {template.format("<new1> dog") for template in TEMPLATES}
    for view in many:
        stripped = view.prompt
        for words in ("far away ", "very small ", "zoomed in ", "close up "):
            first, _, rest = stripped.partition(" ")
            if rest.startswith(words):
                stripped = f"{first} {rest.removeprefix(words)}"
        assert stripped in plain, view.prompt
        assert "a a " not in view.prompt and "the a " not in view.prompt


def test_all_templates_are_used_and_none_says_close_up(many: list[View]) -> None:
    assert len(TEMPLATES) == len(set(TEMPLATES)) == 25
    assert not any("close" in template for template in TEMPLATES)
    assert all(template.count("{}") == 1 for template in TEMPLATES)
    prompts = {v.prompt for v in many if v.mask.min() == 0}
    assert all(any(t.format(TEXT.phrase) == p for p in prompts) for t in TEMPLATES)


def test_settings_are_obeyed() -> None:
    never = ViewSettings(flip=0, paste_probability=0, scale_words=False)
    for view in views(20, never):
        assert view.mask.min() == 1 and view.prompt in {t.format(TEXT.phrase) for t in TEMPLATES}
        assert view.image[0, 64, 0] > 0  # red stays on the left
    always = ViewSettings(flip=1, paste_probability=1, paste_min=1.0)
    for view in views(20, always):
        assert painted(view) == (0, 0, SIZE, SIZE) and view.image[2, 64, 0] > 0


def test_the_same_generator_gives_the_same_view() -> None:
    first, second = (
        draw_view(picture(), TEXT, SIZE, ViewSettings(), generator(1, "c", 2, "view", 3))
        for _ in range(2)
    )
    assert torch.equal(first.image, second.image) and first.prompt == second.prompt


def test_preparing_images_changes_no_view() -> None:
    """Shrinking once to 1.4 S, which `draw_view` would do itself, gives equal views."""
    large = torch.randint(0, 256, (3, 300, 420), generator=torch.Generator().manual_seed(0)).byte()
    (prepared,) = prepare_images([large], 64, ViewSettings())
    assert prepared.shape == (3, 90, 90)
    for n in range(5):
        a, b = (
            draw_view(image, TEXT, 64, ViewSettings(), generator(0, "c", n, "view"))
            for image in (large, prepared)
        )
        assert torch.equal(a.image, b.image)


def test_square_takes_the_middle() -> None:
    wide = torch.zeros(3, 10, 30, dtype=torch.uint8)
    wide[:, :, 10:20] = 200
    assert (square(wide, 100) == 200).all() and square(wide, 100).shape == (3, 10, 10)
    assert square(wide, 5).shape == (3, 5, 5)
    tall = wide.transpose(1, 2)
    assert (square(tall, 5) == 200).all()
    with pytest.raises(InputError, match="uint8"):
        square(wide.float(), 5)


def test_captions_take_the_place_of_templates() -> None:
    text = ConceptText("dog", "<new1>", ("a Dog on a sofa", None, "asleep in the sun"))
    assert text.caption(0) == "a <new1> Dog on a sofa"
    assert text.caption(1) is None and text.caption(7) is None
    assert text.caption(2) == "asleep in the sun, <new1> dog"
    plain = ViewSettings(scale_words=False)
    gen = generator(0, "c", 0, "view")
    view = draw_view(picture(), text, SIZE, plain, gen, caption=text.caption(0))
    assert view.prompt == "a <new1> Dog on a sofa"


def test_a_caption_is_the_prompt_of_its_share_of_views() -> None:
    text = ConceptText("dog", "<new1>", ("a <new1> dog on a sofa",))
    shares = {}
    for probability in (0.0, 0.25, 1.0):
        settings = ViewSettings(scale_words=False, caption_probability=probability)
        gens = (generator(0, "c", i, "view") for i in range(400))
        views = [
            draw_view(picture(), text, SIZE, settings, g, caption=text.caption(0)) for g in gens
        ]
        shares[probability] = sum(view.prompt.endswith("on a sofa") for view in views) / 400
    assert shares[0.0] == 0 and shares[1.0] == 1
    assert 0.19 < shares[0.25] < 0.31  # 0.25 and three deviations


def test_naming_a_concept() -> None:
    assert name_concept("a dog", ["<a>", "<b>"], "dog") == "a <a> <b> dog"
    assert name_concept("a <a>", ["<a>"], "dog") == "a <a>"
    assert name_concept("a doghouse", ["<a>"], "dog") is None
    assert name_concept("a c++ (dog)", ["<a>"], "c++") == "a <a> c++ (dog)"


def test_reference_grid_shows_every_image_with_its_views() -> None:
    images = [picture(), picture(90, 200)]
    grid, prompts = reference_grid("c", images, TEXT, 64, ViewSettings(), views=3)
    assert grid.shape == (3, 2 * 64, 4 * 64) and grid.dtype == torch.uint8
    assert [len(row) for row in prompts] == [3, 3]
    assert grid[0, 30, 5] == 255 and grid[2, 30, 60] == 255  # the plain square comes first
    again, _ = reference_grid("c", images, TEXT, 64, ViewSettings(), views=3)
    assert torch.equal(grid, again)


def test_scales_follow_the_settings_ranges() -> None:
    crops = ViewSettings(flip=0, paste_probability=0)
    for view in views(40, crops):
        # The edge between red and blue lies in the middle of the scaled image, so where it can be
        # seen says how far the window can have moved: at most (1.4 - 1) / 2 S from the centre.
        edge = int((view.image[0, 64] > 0).sum())
        assert abs(edge - SIZE / 2) <= math.ceil(0.2 * SIZE) + 1
