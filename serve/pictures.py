"""Pictures as files: PNG, JPEG or WebP of uint8 arrays."""

from __future__ import annotations

import io
from typing import Any

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
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, output_format, **_OPTIONS[output_format])
    return buffer.getvalue()
