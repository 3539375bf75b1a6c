"""Pictures as files: PNG, JPEG or WebP of uint8 arrays."""

from __future__ import annotations

import io
import os
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from model.png import png
from serve.api import OutputFormat

# At a quality where eyes see no loss.
_OPTIONS: dict[str, dict[str, Any]] = {
    "jpeg": {"quality": 95, "subsampling": 0},
    "webp": {"quality": 95, "method": 4},
}


def encode_picture(picture: np.ndarray, output_format: OutputFormat) -> bytes:
    """The file of a picture [H, W, 3] uint8."""
    if output_format == "png":
        return png(picture)
    with _file() as file:
        Image.fromarray(picture).save(file, output_format, **_OPTIONS[output_format])
        file.seek(0)
        return file.read()


def _file() -> BinaryIO:
    """A file in memory.

    Of the operating system where it has them (Linux): only while it writes to a real file does
    Pillow's JPEG encoder let other threads run, and whoever draws is one of these
    (tests/bench/encoder_threads.py).
    """
    if not hasattr(os, "memfd_create"):
        return io.BytesIO()
    return os.fdopen(os.memfd_create("picture"), "w+b")
