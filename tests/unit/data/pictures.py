"""Small real photos for the data tests, and folders of them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image


def photo(width: int = 96, height: int = 80, seed: int = 0) -> Image.Image:
    """A picture with smooth shades and some noise, so that no two seeds are alike."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 200, width)[None, :, None] * np.ones((height, 1, 3))
    noise = rng.integers(0, 50, (height, width, 3))
    return Image.fromarray((ramp + noise).astype(np.uint8))


def encoded(picture: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def concept_folder(
    prefix: Path, name: str, n_images: int = 3, facts: str = "class_noun: dog\n"
) -> Path:
    folder = prefix / name
    folder.mkdir(parents=True)
    for index in range(n_images):
        (folder / f"{index:02d}.jpg").write_bytes(encoded(photo(seed=sum(name.encode()) + index)))
    if facts:
        (folder / "concept.yaml").write_text(facts)
    return folder
