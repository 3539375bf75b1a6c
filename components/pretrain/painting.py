"""Tools of the scenes' painters: noise, colours, skies, grounds, and PIL to draw shapes with."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

# The scenes are a little larger than the world's pictures, which crop into them.
R = SCENE_PX = 160
Array = NDArray[np.float32]
Rng = np.random.Generator
Colour = tuple[float, float, float]

PLAIN: dict[str, Colour] = {
    "red": (205, 40, 45),
    "orange": (240, 140, 40),
    "yellow": (245, 215, 60),
    "green": (60, 160, 75),
    "blue": (50, 100, 210),
    "purple": (125, 65, 175),
    "pink": (245, 150, 190),
    "white": (243, 243, 240),
    "black": (28, 28, 32),
    "gray": (135, 138, 142),
    "brown": (125, 80, 45),
}


def noise(
    rng: Rng,
    height: int,
    width: int = R,
    octaves: int = 5,
    decay: float = 0.5,
    aspect: Colour | tuple[float, float] = (1, 1),
    base: int = 2,
) -> Array:
    """Fractal value noise [height, width] in 0..1; `aspect` stretches it (rows, columns)."""
    out, total, amplitude = np.zeros((height, width), np.float32), 0.0, 1.0
    for octave in range(octaves):
        cells = [max(2, int(base * 2**octave * a)) for a in aspect[:2]]
        grid = Image.fromarray(rng.random(cells).astype(np.float32))
        out += amplitude * np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC))
        total, amplitude = total + amplitude, amplitude * decay
    return (out / total).clip(0, 1)


def jitter(rng: Rng, colour: Colour, amount: float = 14) -> Colour:
    """A colour near `colour`."""
    r, g, b = (float(np.clip(c + rng.normal() * amount, 0, 255)) for c in colour)
    return r, g, b


def ink(rng: Rng, colour: Colour, amount: float = 14) -> tuple[int, int, int]:
    """The same for ImageDraw, which wants integers."""
    r, g, b = jitter(rng, colour, amount)
    return int(r), int(g), int(b)


def mix(a: Colour | Array, b: Colour | Array, t: Array) -> Array:
    """Blend of two colours (or pictures) by a map t in 0..1."""
    blend = (
        np.asarray(a, np.float32) * (1 - t[..., None]) + np.asarray(b, np.float32) * t[..., None]
    )
    return np.asarray(blend, np.float32)


def gradient(top: Colour, bottom: Colour, height: int = R) -> Array:
    """Vertical gradient [height, R, 3]."""
    return mix(top, bottom, np.repeat(np.linspace(0, 1, height, dtype=np.float32)[:, None], R, 1))


def canvas(picture: Array) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """The picture as a PIL image to draw on."""
    image = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
    return image, ImageDraw.Draw(image, "RGBA")


def done(image: Image.Image) -> Array:
    """Back from PIL."""
    return np.asarray(image.convert("RGB")).astype(np.float32)


def sky(
    rng: Rng,
    height: int,
    top: Colour = (70, 150, 230),
    bottom: Colour = (190, 225, 250),
    clouds: bool = True,
) -> Array:
    """Sky [height, R, 3]."""
    picture = gradient(jitter(rng, top), jitter(rng, bottom), height)
    if not clouds:
        return picture
    cover = ((noise(rng, height, decay=0.55, aspect=(1, 1.5)) - 0.55) * 5).clip(0, 0.85)
    return mix(picture, (250, 250, 252), cover)


def ground(
    rng: Rng,
    height: int,
    dark: Colour,
    light: Colour,
    decay: float = 0.8,
    aspect: tuple[float, float] = (1, 2),
) -> Array:
    """Textured ground [height, R, 3]."""
    return mix(jitter(rng, dark), jitter(rng, light), noise(rng, height, R, 6, decay, aspect))


def horizon(rng: Rng, low: float, high: float) -> int:
    """Row of a horizon at a share low..high of the height."""
    return int(R * rng.uniform(low, high))


def spot(rng: Rng, margin: float = 0) -> tuple[float, float]:
    """A place (x, y) at least `margin` inside the picture."""
    x, y = rng.uniform(margin, R - margin, 2)
    return float(x), float(y)


def disc(
    draw: ImageDraw.ImageDraw,
    at: tuple[float, float],
    r: float,
    fill: tuple[int, ...] | None = None,
    outline: tuple[int, ...] | None = None,
) -> None:
    """A circle of radius r about `at` (x, y)."""
    x, y = at
    draw.ellipse([x - r, y - r, x + r, y + r], fill=fill, outline=outline)


def blades(
    rng: Rng, draw: ImageDraw.ImageDraw, top: int, count: int, length: float, colour: Colour
) -> None:
    """Grass or wheat, longer towards the viewer."""
    for _ in range(count):
        x, y = rng.uniform(0, R), rng.uniform(top, R + 8)
        reach = length * (0.3 + (y - top) / (R - top))
        draw.line([(x, y), (x + rng.normal() * 2, y - reach)], fill=ink(rng, colour, 20), width=1)


def houses(rng: Rng, draw: ImageDraw.ImageDraw, foot: int) -> None:
    """Two rows of buildings with windows."""
    for lighter, tallest in ((60, 95), (0, 75)):
        x = -5
        while x < R:
            width, height = int(rng.integers(16, 34)), int(rng.integers(35, tallest))
            wall = tuple(int(np.clip(c + lighter, 0, 255)) for c in ink(rng, (120, 110, 115), 28))
            shift = 50 if rng.random() < 0.6 else -45
            pane = tuple(int(np.clip(c + shift, 0, 255)) for c in wall)
            draw.rectangle([x, foot - height, x + width, foot], fill=wall)
            for top in range(foot - height + 4, foot - 4, 7):
                for left in range(x + 3, x + width - 4, 6):
                    draw.rectangle([left, top, left + 2, top + 3], fill=pane)
            x += width + int(rng.integers(0, 5))


def plain(rng: Rng, colour: Colour) -> Array:
    """A plain colour, a little uneven."""
    ramp = np.linspace(-1, 1, R, dtype=np.float32)
    shade = ramp[:, None, None] * rng.normal() * 10 + ramp[None, :, None] * rng.normal() * 8
    return np.asarray(np.ones((R, R, 3)) * np.array(jitter(rng, colour, 7)) + shade, np.float32)
