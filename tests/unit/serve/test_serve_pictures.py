"""Picture files: what Pillow would write, through a file that lets other threads run."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
from PIL import Image

from serve import pictures
from serve.pictures import encode_picture

PICTURE = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_files_are_those_of_pillow(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = encode_picture(PICTURE, kind)  # type: ignore[arg-type]
    buffer = io.BytesIO()
    Image.fromarray(PICTURE).save(buffer, kind, **pictures._OPTIONS[kind])
    assert made == buffer.getvalue()
    monkeypatch.delattr("os.memfd_create", raising=False)  # as where there is none
    assert encode_picture(PICTURE, kind) == made  # type: ignore[arg-type]


def test_png_keeps_every_value() -> None:
    with Image.open(io.BytesIO(encode_picture(PICTURE, "png"))) as image:
        assert np.array_equal(np.asarray(image), PICTURE)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no files in memory")
def test_the_file_is_a_real_one() -> None:
    with pictures._file() as file:
        assert file.fileno() > 2
