"""Pictures as files: PNG, JPEG or WebP of uint8 arrays."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from serve.api import OutputFormat

# PNG's level trades time for size only; JPEG and WebP are at a quality where eyes see no loss.
_OPTIONS: dict[str, dict[str, Any]] = {
    "png": {"compress_level": 4},
    "jpeg": {"quality": 95, "subsampling": 0},
    "webp": {"quality": 95, "method": 4},
}


def encode_picture(picture: np.ndarray, output_format: OutputFormat) -> bytes:
    """The file of a picture [H, W, 3] uint8."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, output_format, **_OPTIONS[output_format])
    return buffer.getvalue()
