"""One way to write a picture that was drawn, so that equal pictures are equal files."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

# The level trades time for size only.
_LEVEL = 4


def png(picture: np.ndarray) -> bytes:
    """Encode a picture [H, W, 3] uint8 as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", compress_level=_LEVEL)
    return buffer.getvalue()
