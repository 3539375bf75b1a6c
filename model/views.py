"""Augmented reference views with masks and prompts (METHOD.md "Reference data").

A view is what one item of a batch sees of a concept: a reference image, flipped, scaled and
placed, its prompt, and the mask of latent places that count.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from model.errors import InputError
from model.randomness import generator, integer, uniform
from model.settings import ViewSettings

TEMPLATES = (
    "a photo of a {}",
    "a rendering of a {}",
    "a cropped photo of the {}",
    "the photo of a {}",
    "a photo of a clean {}",
    "a photo of a dirty {}",
    "a dark photo of the {}",
    "a photo of my {}",
    "a photo of the cool {}",
    "a bright photo of the {}",
    "a cropped photo of a {}",
    "a photo of the {}",
    "a good photo of the {}",
    "a photo of one {}",
    "a rendition of the {}",
    "a photo of the clean {}",
    "a rendition of a {}",
    "a photo of a nice {}",
    "a good photo of a {}",
    "a photo of the nice {}",
    "a photo of the small {}",
    "a photo of the weird {}",
    "a photo of the large {}",
    "a photo of a cool {}",
    "a photo of a small {}",
)
"""The short ImageNet templates, without those that say "close-up"."""

FAR_WORDS = ("a far away", "very small")
NEAR_WORDS = ("zoomed in", "close up")
EMPTY = 0.0
"""Value of an empty canvas: mid-grey in [-1, 1]."""


@dataclass(frozen=True)
class ConceptText:
    """The words of a concept.

    Attributes:
        class_noun: e.g. `dog`.
        token: e.g. `<new1>`.
        captions: one a reference image, or None where the templates are used; may be empty.
    """

    class_noun: str
    token: str
    captions: tuple[str | None, ...] = ()

    @property
    def phrase(self) -> str:
        """Give what fills a template: `<new1> dog`."""
        return f"{self.token} {self.class_noun}"

    def caption(self, image: int) -> str | None:
        """Give an image's own caption with the token in it, or None."""
        text = self.captions[image] if image < len(self.captions) else None
        if text is None:
            return None
        return name_concept(text, (self.token,), self.class_noun) or f"{text}, {self.phrase}"


@dataclass(frozen=True, eq=False)
class View:
    """One augmented reference view.

    Attributes:
        image: [3, S, S] float32 in [-1, 1].
        mask: [1, S/f, S/f] float32, 1 where the loss counts.
        prompt: its prompt.
    """

    image: torch.Tensor
    mask: torch.Tensor
    prompt: str


def name_concept(text: str, tokens: Sequence[str], class_noun: str) -> str | None:
    """Put the concept's tokens before the first class noun of a text.

    A text that holds a token already stays as it is. None when it has neither.
    """
    if any(token in text for token in tokens):
        return text
    found = re.search(rf"(?<!\w){re.escape(class_noun)}(?!\w)", text, flags=re.IGNORECASE)
    if found is None:
        return None
    return f"{text[: found.start()]}{' '.join(tokens)} {text[found.start() :]}"


def square(image: torch.Tensor, side: int) -> torch.Tensor:
    """Cut the central square of an image and resize it.

    Args:
        image: uint8 [3, H, W].
        side: pixels of the result; a smaller square is not enlarged.

    Returns:
        uint8 [3, s, s], s = min(side, H, W).

    Raises:
        InputError: for a tensor of another kind.
    """
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise InputError(
            f"An image must be uint8 [3, H, W], not {image.dtype} {tuple(image.shape)}; "
            "decode it as RGB."
        )
    edge = min(image.shape[-2:])
    top, left = ((length - edge) // 2 for length in image.shape[-2:])
    cut = image[:, top : top + edge, left : left + edge]
    if edge <= side:
        return cut.contiguous()
    return _resized(cut.float(), side).round().clamp(0, 255).to(torch.uint8)


def prepare_images(
    images: Sequence[torch.Tensor], size: int, settings: ViewSettings
) -> tuple[torch.Tensor, ...]:
    """Shrink reference images once to the largest size that a view of `size` px needs."""
    return tuple(square(image, math.ceil(size * settings.crop_max)) for image in images)


def draw_view(
    image: torch.Tensor,
    text: ConceptText,
    size: int,
    settings: ViewSettings,
    gen: torch.Generator,
    *,
    factor: int = 8,
    caption: str | None = None,
) -> View:
    """Draw one augmented view of a reference image.

    Args:
        image: uint8 [3, H, W]; its central square is used.
        text: the concept's words.
        size: S, side of the view in pixels.
        settings: probabilities and ranges.
        gen: the item's generator; all draws come from it.
        factor: pixels per latent pixel.
        caption: this image's own caption, in place of a template where it is drawn.
    """
    picture = square(image, math.ceil(size * settings.crop_max)).float() / 127.5 - 1
    template = TEMPLATES[integer(0, len(TEMPLATES) - 1, gen)]
    prompt = template.format(text.phrase)
    if caption is not None:
        share = settings.caption_probability
        if share == 1 or uniform(gen) < share:  # at 1 no draw, so that others stay as they were
            prompt = caption
    if uniform(gen) < settings.flip:
        picture = picture.flip(-1)
    pasted = uniform(gen) < settings.paste_probability
    if pasted:
        low, high = math.ceil(size * settings.paste_min), size
    else:
        low, high = math.ceil(size * settings.crop_min), math.floor(size * settings.crop_max)
    scale = integer(low, max(low, high), gen)
    room = abs(size - scale)
    top, left = integer(0, room, gen), integer(0, room, gen)
    word = integer(0, 1, gen)
    scaled = _resized(picture, scale).clamp(-1, 1)
    if scale > size:
        view = scaled[:, top : top + size, left : left + size].contiguous()
    else:
        view = torch.full((3, size, size), EMPTY)
        view[:, top : top + scale, left : left + scale] = scaled
    if settings.scale_words and scale < settings.far_below * size:
        prompt = _insert(prompt, FAR_WORDS[word])
    elif settings.scale_words and scale > size:
        prompt = _insert(prompt, NEAR_WORDS[word])
    side = size // factor
    mask = _inside(size, factor, top, left, scale) if pasted else torch.ones(1, side, side)
    return View(view, mask, prompt)


def reference_grid(
    concept_id: str,
    images: Sequence[torch.Tensor],
    text: ConceptText,
    size: int,
    settings: ViewSettings,
    *,
    seed: int = 0,
    views: int = 4,
    factor: int = 8,
) -> tuple[torch.Tensor, list[list[str]]]:
    """Lay out reference views for a person to check; one row an image.

    The first column is the central square as the method sees it, the others are augmented views
    in which what the mask leaves out is darkened.

    Returns:
        uint8 [3, rows * S, (1 + views) * S], and the views' prompts by row.
    """
    rows, prompts = [], []
    for i, image in enumerate(images):
        plain = _resized(square(image, size).float() / 127.5 - 1, size).clamp(-1, 1)
        cells, words = [plain], []
        for j in range(views):
            gen = generator(seed, concept_id, 0, "grid", i * views + j)
            caption = text.caption(i)
            view = draw_view(image, text, size, settings, gen, factor=factor, caption=caption)
            mask = F.interpolate(view.mask[None], size=(size, size))[0]
            cells.append((view.image + 1) * (0.4 + 0.6 * mask) - 1)
            words.append(view.prompt)
        rows.append(torch.cat(cells, dim=2))
        prompts.append(words)
    grid = torch.cat(rows, dim=1)
    return ((grid + 1) * 127.5).round().clamp(0, 255).to(torch.uint8), prompts


def _inside(size: int, factor: int, top: int, left: int, scale: int) -> torch.Tensor:
    """Give the inside of a pasted image in latent pixels, one less on every side.

    At least the pixel in the middle stays, so that no mask is empty.
    """
    side = size // factor
    mask = torch.zeros(1, side, side)
    spans = []
    for start in (top, left):
        low, high = math.ceil(start / factor) + 1, (start + scale) // factor - 1
        if high <= low:
            low = min((start + scale // 2) // factor, side - 1)
            high = low + 1
        spans.append(slice(low, high))
    mask[:, spans[0], spans[1]] = 1
    return mask


def _insert(prompt: str, words: str) -> str:
    """Insert words after the first word; after an article they bring none of their own."""
    first, _, rest = prompt.partition(" ")
    if first.lower() in ("a", "an", "the"):
        words = words.removeprefix("a ")
    return f"{first} {words} {rest}".rstrip()


def _resized(image: torch.Tensor, side: int) -> torch.Tensor:
    """Resize a square float image [3, s, s], antialiased when it shrinks."""
    return F.interpolate(image[None], size=(side, side), mode="bilinear", antialias=True)[0]
