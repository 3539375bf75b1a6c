"""Photos as bytes: is it what it says, may it be decoded, and its upright RGB pixels."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import PurePosixPath

from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 50_000_000
MIN_SIDE = 64
_FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP"}
_UNREAD = {
    *(".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jxl", ".jp2", ".svg"),
    *(".raw", ".dng", ".cr2", ".nef", ".arw", ".jfif", ".psd", ".ico"),
}


@dataclass(frozen=True)
class CheckedPicture:
    """A picture's content hash and its size in pixels after its EXIF orientation."""

    sha256: str
    width: int
    height: int


def is_image_name(name: str) -> bool:
    """Return whether a file's suffix is one of the image types that are read."""
    return PurePosixPath(name).suffix.lower() in _FORMATS


def is_unread_image_name(name: str) -> bool:
    """Return whether a file's suffix is an image type that is not read."""
    return PurePosixPath(name).suffix.lower() in _UNREAD


def check(data: bytes, name: str) -> CheckedPicture | str:
    """Decode a picture fully; returns what it is, or what is wrong and what to do.

    Size, type and number of frames are read from the header, before any pixel is decoded.
    """
    if not data:
        return "is empty: upload it again"
    expected = _FORMATS[PurePosixPath(name).suffix.lower()]
    try:
        with Image.open(io.BytesIO(data)) as picture:
            refusal = _refuse(picture, expected)
            if refusal:
                return refusal
            width, height = _upright_rgb(picture).size
    except (Image.DecompressionBombError, MemoryError):
        return _TOO_LARGE
    except UnidentifiedImageError:
        return f"is not a {expected} image: replace it by a real photo"
    except Exception as error:  # decoders raise errors of any kind on damaged bytes
        return f"is damaged or cut off ({error or type(error).__name__}): upload it again"
    return CheckedPicture(hashlib.sha256(data).hexdigest(), width, height)


_TOO_LARGE = f"has over {MAX_PIXELS // 1_000_000} megapixels: scale it down"


def _refuse(picture: Image.Image, expected: str) -> str:
    """Say why the header alone rules a picture out ("" when it does not)."""
    # Phones append a second picture (depth, HDR gain) to a JPEG: Pillow calls that MPO.
    found = "JPEG" if picture.format == "MPO" else str(picture.format)
    if found != expected:
        return f"is a {found} image behind a {expected} suffix: rename or convert it"
    width, height = picture.size
    if width * height > MAX_PIXELS:
        return f"has {width} x {height} pixels, {_TOO_LARGE}"
    if min(width, height) < MIN_SIDE:
        return f"is {width} x {height} pixels: use one of at least {MIN_SIDE} on each side"
    if picture.format != "MPO" and getattr(picture, "n_frames", 1) > 1:
        return "is an animation: use a still image"
    return ""


def decode(data: bytes, shorter_side: int | None = None) -> Image.Image:
    """Return a checked picture upright in RGB; transparent parts become white.

    ``shorter_side``: larger pictures are scaled down so that the shorter side has so many
    pixels.
    """
    with Image.open(io.BytesIO(data)) as opened:
        picture = _upright_rgb(opened)
    if shorter_side is not None and min(picture.size) > shorter_side:
        scale = shorter_side / min(picture.size)
        width, height = (max(shorter_side, round(side * scale)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    return picture


def _upright_rgb(opened: Image.Image) -> Image.Image:
    """Decode an opened picture, turn it as its EXIF orientation says, make it RGB."""
    opened.load()
    picture = ImageOps.exif_transpose(opened)
    if picture.has_transparency_data:
        over = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    if picture.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip
        picture = picture.convert("I").point(lambda value: value / 257).convert("L")
    return picture.convert("RGB")
