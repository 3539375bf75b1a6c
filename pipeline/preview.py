"""The views that training would draw of each concept, as one picture for a person to check."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

from components.ingest.cache import replacing
from components.ingest.concept_folder import load_images
from model.errors import InputError

if TYPE_CHECKING:
    from components.ingest.concept_folder import Concept
    from components.spec import RunSpec

SIDE = 128
VIEWS = 5
HEADER = 20
LATENT_PIXEL = 8  # of common bases; masks are made of them


def write_view_grid(concepts: Sequence[Concept], spec: RunSpec, path: Path) -> None:
    """Write a PNG with one block a concept, one row a photo: the photo, then augmented views.

    Photos are turned as their EXIF orientation says; what a view's mask leaves out is darkened.

    Raises:
        InputError: when there is no valid concept, or the file's type can't be written.
    """
    from model.views import ConceptText, reference_grid

    if not concepts:
        raise InputError("there is no valid concept to draw views of: mend the problems first")
    if path.suffix.lower() != ".png":
        raise InputError(f"--grid {path} must name a .png file")
    blocks = []
    for concept in concepts:
        text = ConceptText(
            concept.class_noun, concept.token, tuple(image.caption for image in concept.images)
        )
        images = load_images(concept, shorter_side=2 * SIDE)
        pixels, _ = reference_grid(
            concept.id,
            images,
            text,
            SIDE,
            spec.views,
            seed=spec.seed,
            views=VIEWS,
            factor=max(1, LATENT_PIXEL * SIDE // spec.resolution),
        )
        title = f"{concept.id}: {text.phrase}, {len(images)} photos"
        blocks.append((title, Image.fromarray(pixels.permute(1, 2, 0).numpy())))
    width = max(block.width for _, block in blocks)
    sheet = Image.new("RGB", (width, sum(block.height + HEADER for _, block in blocks)), "white")
    pen = ImageDraw.Draw(sheet)
    top = 0
    for title, block in blocks:
        pen.text((4, top + 4), title, fill="black")
        sheet.paste(block, (0, top + HEADER))
        top += block.height + HEADER
    with replacing(path) as temporary:
        sheet.save(temporary, "PNG")
