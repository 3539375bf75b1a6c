"""Procedural scenes behind the subjects: one painter a scene, and the phrases that name it.

Every painter takes a numpy generator and returns [R, R, 3] float32 in 0..255; R = `SCENE_PX` is a
little larger than the world's pictures, which crop into it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

R = SCENE_PX = 160
Array = NDArray[np.float32]
Rng = np.random.Generator
Colour = tuple[float, float, float]

PLAIN: dict[str, Colour] = {
    "red": (205, 40, 45), "orange": (240, 140, 40), "yellow": (245, 215, 60),
    "green": (60, 160, 75), "blue": (50, 100, 210), "purple": (125, 65, 175),
    "pink": (245, 150, 190), "white": (243, 243, 240), "black": (28, 28, 32),
    "gray": (135, 138, 142), "brown": (125, 80, 45),
}
PHRASES: dict[str, list[str]] = {
    "beach": ["on the beach", "on a sandy beach", "at the beach"],
    "snow": ["in the snow", "in a snowy field"],
    "grass": ["in the grass", "in a grassy field", "in the park", "on green grass"],
    "sunflowers": ["on top of green grass with sunflowers around it", "with sunflowers around it"],
    "wood": ["on a wooden floor", "on top of a wooden floor", "on a wooden table"],
    "city": ["in the city", "with a city in the background", "on the street",
             "on top of a sidewalk in a crowded street"],
    "house": ["with a blue house in the background", "in front of a blue house"],
    "eiffel": ["with the eiffel tower in the background", "in paris"],
    "night": ["at night", "under the night sky"],
    "desert": ["in the desert"],
    "dirt": ["on top of a dirt road", "on a dirt road"],
    "water": ["under water", "in the ocean"],
    "floating": ["floating on top of water", "on top of water"],
    "forest": ["in the forest", "in the jungle"],
    "mountain": ["in the mountains", "with a mountain in the background"],
    "sunset": ["at sunset"],
    "fabric": ["on top of pink fabric", "on pink fabric"],
    "brick": ["in front of a brick wall", "against a brick wall"],
    "check": ["on a checkered floor"],
    "cobble": ["on a cobblestone street", "on top of a cobblestone street"],
    "space": ["in space", "in outer space"],
    "dots": ["on a polka dot background"],
    "rug": ["on a purple rug", "on top of a purple rug", "on top of a purple rug in a forest"],
    "white_rug": ["on a white rug", "on top of a white rug"],
    "room": ["in a room", "in a living room"],
    "leaves": ["on autumn leaves", "with autumn leaves in the background",
               "with a tree and autumn leaves in the background"],
    "wheat": ["in a wheat field", "with a wheat field in the background"],
    "rain": ["in the rain"],
}


def phrases(scene: str) -> list[str]:
    """The phrases that put a subject into `scene`; plain colours are called "plain_<colour>"."""
    if scene.startswith("plain_"):
        colour = scene.removeprefix("plain_")
        article = "an" if colour[0] in "aeiou" else "a"
        return [f"on {article} {colour} background"] * 2 + [f"on a plain {colour} background"]
    return PHRASES[scene]


# ---- tools of the painters
def noise(rng: Rng, height: int, width: int = R, octaves: int = 5, decay: float = 0.5,
          aspect: Colour | tuple[float, float] = (1, 1), base: int = 2) -> Array:
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
    blend = np.asarray(a, np.float32) * (1 - t[..., None]) + np.asarray(b, np.float32) * t[..., None]
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


def sky(rng: Rng, height: int, top: Colour = (70, 150, 230), bottom: Colour = (190, 225, 250),
        clouds: bool = True) -> Array:
    """Sky [height, R, 3]."""
    picture = gradient(jitter(rng, top), jitter(rng, bottom), height)
    if not clouds:
        return picture
    cover = ((noise(rng, height, decay=0.55, aspect=(1, 1.5)) - 0.55) * 5).clip(0, 0.85)
    return mix(picture, (250, 250, 252), cover)


def ground(rng: Rng, height: int, dark: Colour, light: Colour, decay: float = 0.8,
           aspect: tuple[float, float] = (1, 2)) -> Array:
    """Textured ground [height, R, 3]."""
    return mix(jitter(rng, dark), jitter(rng, light), noise(rng, height, R, 6, decay, aspect))


def horizon(rng: Rng, low: float, high: float) -> int:
    return int(R * rng.uniform(low, high))


def disc(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, **style: object) -> None:
    draw.ellipse([x - r, y - r, x + r, y + r], **style)  # type: ignore[arg-type]


def blades(rng: Rng, draw: ImageDraw.ImageDraw, top: int, count: int, length: float,
           colour: Colour) -> None:
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


# ---- painters
def plain(rng: Rng, colour: Colour) -> Array:
    ramp = np.linspace(-1, 1, R, dtype=np.float32)
    shade = ramp[:, None, None] * rng.normal() * 10 + ramp[None, :, None] * rng.normal() * 8
    return np.asarray(np.ones((R, R, 3)) * np.array(jitter(rng, colour, 7)) + shade, np.float32)


def beach(rng: Rng) -> Array:
    far, shore = horizon(rng, 0.3, 0.42), horizon(rng, 0.52, 0.64)
    depth = noise(rng, shore - far, decay=0.6, aspect=(4, 1)) * 0.5
    depth += np.linspace(0, 0.5, shore - far, dtype=np.float32)[:, None]
    sea = mix(jitter(rng, (20, 110, 170)), jitter(rng, (80, 190, 205)), depth)
    sand = ground(rng, R - shore, (215, 180, 125), (245, 222, 170), aspect=(1, 1))
    image, draw = canvas(np.concatenate([sky(rng, far), sea, sand]))
    wave, phase = rng.uniform(8, 16), rng.uniform(0, 6)
    foam = [(x, shore + 3 * np.sin(x / wave + phase)) for x in range(-2, R + 2, 2)]
    draw.line(foam, fill=(245, 250, 250), width=5)
    return done(image)


def snow(rng: Rng) -> Array:
    far = horizon(rng, 0.4, 0.55)
    field = ground(rng, R - far, (205, 218, 235), (252, 253, 255), 0.5, (1.5, 1))
    back = gradient(jitter(rng, (150, 175, 205)), jitter(rng, (215, 225, 238)), far)
    image, draw = canvas(np.concatenate([back, field]))
    for x in range(0, R, int(rng.integers(12, 22))):
        tall, x0, green = rng.uniform(14, 34), x + rng.uniform(-5, 5), ink(rng, (70, 105, 95))
        for k in range(3):
            half, foot = tall * 0.3 * (1 - k * 0.22), far + 2 - tall * 0.28 * k
            draw.polygon([(x0 - half, foot), (x0 + half, foot), (x0, foot - tall * 0.45)],
                         fill=green)
    for _ in range(90):
        disc(draw, *rng.uniform(0, R, 2), rng.uniform(0.6, 1.9), fill=(255, 255, 255))
    return done(image)


def grass(rng: Rng) -> Array:
    far = horizon(rng, 0.35, 0.5)
    field = ground(rng, R - far, (40, 110, 35), (125, 190, 70), aspect=(1, 2.5))
    image, draw = canvas(np.concatenate([sky(rng, far), field]))
    blades(rng, draw, far, 500, 7, (70, 150, 50))
    for _ in range(int(rng.integers(0, 14))):
        petal = ((255, 255, 255), (250, 220, 70), (240, 120, 150))[int(rng.integers(3))]
        disc(draw, rng.uniform(0, R), rng.uniform(far + 8, R), rng.uniform(1, 2), fill=petal)
    return done(image)


def sunflowers(rng: Rng) -> Array:
    far = horizon(rng, 0.25, 0.38)
    field = ground(rng, R - far, (50, 120, 40), (130, 190, 75))
    image, draw = canvas(np.concatenate([sky(rng, far), field]))
    for y in np.sort(rng.uniform(far, R, 24)):
        x, r = rng.uniform(0, R), 3 + 7 * (y - far) / (R - far)
        draw.line([(x, y), (x, y + 3 * r)], fill=ink(rng, (60, 130, 50)), width=2)
        for turn in np.arange(0, 2 * np.pi, np.pi / 5):
            disc(draw, x + r * np.cos(turn), y + r * np.sin(turn), r * 0.45, fill=(250, 205, 45))
        disc(draw, x, y, r * 0.6, fill=(100, 60, 25))
    return done(image)


def wood(rng: Rng) -> Array:
    count = int(rng.integers(5, 8))
    width = R // count + 1
    dark, light = jitter(rng, (150, 95, 50)), jitter(rng, (205, 150, 95))
    boards = []
    for _ in range(count):
        board = mix(dark, light, (noise(rng, R, width, 6, 0.7, (1, 5))
                                  + rng.uniform(-0.25, 0.25)).clip(0, 1))
        board[:, 0] *= 0.45
        boards.append(board)
    picture = np.concatenate(boards, 1)[:, :R]
    return picture if rng.random() < 0.5 else picture.transpose(1, 0, 2).copy()


def city(rng: Rng) -> Array:
    foot = int(R * 0.72)
    road = np.broadcast_to(np.array(jitter(rng, (88, 90, 96), 8), np.float32), (R - foot, R, 3))
    image, draw = canvas(np.concatenate([sky(rng, foot, (120, 165, 215), (225, 225, 225)), road]))
    houses(rng, draw, foot)
    draw.rectangle([0, foot, R, foot + 4], fill=(170, 168, 165))
    for x in range(int(rng.integers(0, 15)), R, 30):
        draw.rectangle([x, foot + 22, x + 14, foot + 25], fill=(235, 225, 150))
    return done(image)


def house(rng: Rng) -> Array:
    foot = horizon(rng, 0.6, 0.7)
    lawn = ground(rng, R - foot, (60, 120, 45), (130, 185, 80))
    image, draw = canvas(np.concatenate([sky(rng, foot), lawn]))
    x, width, tall = rng.uniform(10, 50), rng.uniform(75, 95), rng.uniform(42, 55)
    draw.rectangle([x, foot - tall, x + width, foot + 3], fill=ink(rng, (65, 120, 205)))
    draw.polygon([(x - 8, foot - tall), (x + width + 8, foot - tall),
                  (x + width / 2, foot - tall - 30)], fill=ink(rng, (110, 60, 50)))
    for k in (0.12, 0.68):
        left = x + width * k
        draw.rectangle([left, foot - tall + 12, left + 16, foot - tall + 28],
                       fill=(235, 240, 200), outline=(250, 250, 250), width=2)
    middle = x + width * 0.44
    draw.rectangle([middle, foot - 26, middle + 13, foot + 3], fill=(240, 238, 230))
    return done(image)


def eiffel(rng: Rng) -> Array:
    foot = horizon(rng, 0.66, 0.74)
    lawn = ground(rng, R - foot, (70, 125, 60), (140, 180, 95))
    image, draw = canvas(np.concatenate([sky(rng, foot), lawn]))
    x, tall, iron = rng.uniform(35, R - 35), rng.uniform(80, 98), ink(rng, (105, 85, 70), 8)
    for side in (-1, 1):
        draw.polygon([(x + side * 25, foot), (x + side * 15, foot), (x + side * 2, foot - tall),
                      (x + side * 8, foot - tall * 0.45)], fill=iron)
    for level, half in ((0.28, 17), (0.52, 10)):
        draw.rectangle([x - half, foot - tall * level - 4, x + half, foot - tall * level],
                       fill=iron)
    draw.polygon([(x - 6, foot - tall * 0.52), (x + 6, foot - tall * 0.52),
                  (x, foot - tall * 1.12)], fill=iron)
    return done(image)


def night(rng: Rng) -> Array:
    image, draw = canvas(gradient(jitter(rng, (8, 10, 40), 6), jitter(rng, (45, 40, 95), 10)))
    for _ in range(110):
        disc(draw, rng.uniform(0, R), rng.uniform(0, R * 0.8), rng.choice([0.4, 0.6, 1.2]),
             fill=(255, 255, 225))
    disc(draw, rng.uniform(15, R - 15), rng.uniform(12, 45), rng.uniform(8, 14),
         fill=(250, 245, 205))
    for x, height in enumerate(noise(rng, 2)[0]):
        draw.line([(x, R * 0.8 + height * 22), (x, R)], fill=(10, 14, 26))
    return done(image)


def desert(rng: Rng) -> Array:
    far = horizon(rng, 0.38, 0.48)
    top = sky(rng, far, (90, 160, 225), (250, 225, 180), clouds=False)
    image, draw = canvas(np.concatenate([top, ground(rng, R - far, (225, 165, 90),
                                                     (235, 180, 105))]))
    for k in range(1, 4):
        wave, phase, y = rng.uniform(14, 30), rng.uniform(0, 6), far + (R - far) * k * 0.25
        crest = [(x, y + 8 * np.sin(x / wave + phase)) for x in range(0, R + 1, 2)]
        shade = ((205, 135, 65), (240, 190, 115), (225, 160, 85))[k - 1]
        draw.polygon([*crest, (R, R), (0, R)], fill=ink(rng, shade))
    return done(image) + (noise(rng, R, octaves=6, decay=0.8)[..., None] - 0.5) * 20


def dirt(rng: Rng) -> Array:
    far = horizon(rng, 0.36, 0.48)
    field = ground(rng, R - far, (75, 120, 50), (140, 170, 85))
    image, draw = canvas(np.concatenate([sky(rng, far), field]))
    x = rng.uniform(50, R - 50)
    draw.polygon([(x - 7, far), (x + 7, far), (R + 5, R), (-5, R)], fill=ink(rng, (160, 115, 75)))
    for side in (0.35, 0.65):
        draw.line([(x, far), (R * side, R)], fill=(125, 88, 55, 160), width=5)
    return done(image) + (noise(rng, R, octaves=6, decay=0.9)[..., None] - 0.5) * 26


def water(rng: Rng) -> Array:
    sea = gradient(jitter(rng, (60, 180, 215)), jitter(rng, (8, 50, 115)))
    image, draw = canvas(sea + (noise(rng, R, octaves=4, aspect=(1, 1.5))[..., None] - 0.5) * 30)
    for _ in range(4):
        x, width = rng.uniform(0, R), rng.uniform(6, 16)
        draw.polygon([(x, 0), (x + width, 0), (x + width * 2.5 - 25, R), (x - 25, R)],
                     fill=(255, 255, 255, 24))
    for _ in range(26):
        disc(draw, *rng.uniform(0, R, 2), rng.uniform(1, 4), outline=(225, 245, 255, 200))
    for _ in range(10):
        x, tall = rng.uniform(0, R), rng.uniform(14, 40)
        draw.line([(x, R), (x + rng.normal() * 5, R - tall)], fill=ink(rng, (35, 130, 70)),
                  width=3)
    return done(image)


def floating(rng: Rng) -> Array:
    far = horizon(rng, 0.3, 0.42)
    sea = ground(rng, R - far, (20, 90, 165), (95, 175, 220), 0.65, (5, 1))
    return np.concatenate([sky(rng, far), sea])


def forest(rng: Rng) -> Array:
    image, draw = canvas(ground(rng, R, (20, 60, 25), (85, 140, 60), 0.75, (1, 1)))
    for _ in range(7):
        x, width, bark = rng.uniform(-5, R), rng.uniform(5, 13), ink(rng, (75, 52, 32))
        light = tuple(min(255, int(c * 1.25)) for c in bark)
        draw.rectangle([x, 0, x + width, R * 0.83], fill=bark)
        draw.rectangle([x, 0, x + width * 0.3, R * 0.83], fill=light)
    for _ in range(70):
        x, y, r = rng.uniform(0, R), rng.uniform(0, R * 0.45), rng.uniform(4, 12)
        draw.ellipse([x - r, y - r * 0.6, x + r, y + r * 0.6], fill=ink(rng, (50, 115, 45), 20))
    foot = int(R * 0.8)
    floor = ground(rng, R - foot, (60, 75, 30), (110, 105, 50))
    return np.concatenate([done(image)[:foot], floor])


def mountain(rng: Rng) -> Array:
    foot = int(R * 0.66)
    image, draw = canvas(sky(rng, R, (85, 150, 225), (215, 230, 245)))
    for _ in range(4):
        x, tall = rng.uniform(-10, R + 10), rng.uniform(50, 95)
        half = tall * rng.uniform(0.7, 1)
        draw.polygon([(x - half, foot), (x + half, foot), (x, foot - tall)],
                     fill=ink(rng, (105, 115, 140)))
        draw.polygon([(x, foot - tall), (x - half * 0.3, foot - tall * 0.7),
                      (x - half * 0.1, foot - tall * 0.76), (x + half * 0.08, foot - tall * 0.68),
                      (x + half * 0.3, foot - tall * 0.7)], fill=(248, 250, 252))
    meadow = ground(rng, R - foot, (70, 115, 60), (125, 165, 85), 0.7)
    return np.concatenate([done(image)[:foot], meadow])


def sunset(rng: Rng) -> Array:
    far = horizon(rng, 0.6, 0.7)
    image, draw = canvas(gradient(jitter(rng, (95, 55, 130)), jitter(rng, (255, 150, 60))))
    disc(draw, rng.uniform(25, R - 25), far - 4, rng.uniform(12, 20), fill=(255, 235, 150))
    sea = ground(rng, R - far, (70, 30, 60), (220, 110, 70), 0.6, (4, 1))
    return np.concatenate([done(image)[:far], sea])


def fabric(rng: Rng) -> Array:
    ys, xs = np.mgrid[0:R, 0:R].astype(np.float32)
    turn, pitch = rng.uniform(0, np.pi), rng.uniform(9, 15)
    folds = np.sin((xs * np.cos(turn) + ys * np.sin(turn)) / pitch
                   + noise(rng, R, octaves=3) * 9) * 0.4 + 0.5
    return mix(jitter(rng, (205, 95, 145)), jitter(rng, (252, 180, 210)), folds)


def brick(rng: Rng) -> Array:
    image, draw = canvas(plain(rng, (200, 190, 180)))
    tall, colour = int(rng.integers(12, 17)), jitter(rng, (165, 70, 50))
    for row, y in enumerate(range(-2, R, tall)):
        for x in range(-2 * tall + (row % 2) * tall, R, 2 * tall):
            draw.rectangle([x, y, x + 2 * tall - 3, y + tall - 3], fill=ink(rng, colour, 10))
    return done(image) + (noise(rng, R, octaves=6, decay=0.9)[..., None] - 0.5) * 26


def check(rng: Rng) -> Array:
    cell = int(rng.integers(14, 24))
    ys, xs = np.mgrid[0:R, 0:R]
    dark: Colour = ((200, 40, 45), (45, 90, 180), (30, 30, 32), (50, 140, 80))[rng.integers(4)]
    return mix(jitter(rng, dark, 8), (245, 243, 238),
               ((ys // cell + xs // cell) % 2).astype(np.float32))


def cobble(rng: Rng) -> Array:
    image, draw = canvas(plain(rng, (70, 68, 66)))
    for row, y in enumerate(range(-6, R + 6, 13)):
        for x in range(-10 + (row % 2) * 8, R + 6, 16):
            dx, dy = rng.uniform(-1.5, 1.5, 2)
            draw.rounded_rectangle([x + dx, y + dy, x + dx + 14, y + dy + 11], 4,
                                   fill=ink(rng, (140, 135, 130), 13))
    return done(image) + (noise(rng, R, octaves=6, decay=0.9)[..., None] - 0.5) * 20


def space(rng: Rng) -> Array:
    picture = np.broadcast_to(np.array((6, 6, 16), np.float32), (R, R, 3))
    for colour, most in (((120, 40, 150), 0.75), ((30, 80, 180), 0.65)):
        cloud = ((noise(rng, R, decay=0.55) - 0.5) * 3).clip(0, most)
        picture = mix(picture, jitter(rng, colour), cloud)  # type: ignore[arg-type]
    image, draw = canvas(picture)
    for _ in range(130):
        disc(draw, *rng.uniform(0, R, 2), rng.choice([0.3, 0.5, 1.1]), fill=(255, 255, 255))
    if rng.random() < 0.6:
        disc(draw, *rng.uniform(10, R - 10, 2), rng.uniform(9, 18),
             fill=ink(rng, (205, 150, 100), 35))
    return done(image)


def dots(rng: Rng) -> Array:
    image, draw = canvas(plain(rng, (245, 235, 225)))
    colour, pitch = list(PLAIN.values())[int(rng.integers(7))], int(rng.integers(16, 24))
    for row, y in enumerate(range(0, R + pitch, pitch)):
        for x in range((row % 2) * pitch // 2, R + pitch, pitch):
            disc(draw, x, y, 5, fill=ink(rng, colour, 4))
    return done(image)


def rug(rng: Rng) -> Array:
    image, draw = canvas(mix(jitter(rng, (90, 40, 135)), jitter(rng, (150, 95, 195)),
                             noise(rng, R, octaves=6, decay=0.95, base=8)))
    for inset in (10, 16):
        draw.rectangle([inset, inset, R - inset, R - inset], outline=ink(rng, (225, 195, 90), 10),
                       width=3)
    return done(image)


def white_rug(rng: Rng) -> Array:
    pile = noise(rng, R, octaves=6, decay=1.0, base=10)
    return mix(jitter(rng, (205, 200, 192), 5), jitter(rng, (250, 248, 244), 4), pile)


def room(rng: Rng) -> Array:
    foot = horizon(rng, 0.6, 0.68)
    walls: list[Colour] = [(225, 215, 195), (185, 210, 215), (215, 200, 225), (205, 220, 190)]
    wall = plain(rng, walls[int(rng.integers(4))])[:foot]
    floor = ground(rng, R - foot, (125, 80, 50), (175, 120, 80), 0.7, (1, 4))
    image, draw = canvas(np.concatenate([wall, floor]))
    draw.rectangle([0, foot, R, foot + 3], fill=(245, 243, 238))
    x = rng.uniform(10, R - 60)
    draw.rectangle([x, 18, x + 44, 66], fill=(250, 250, 250))
    for left in (x + 4, x + 24):
        for top in (22, 44):
            draw.rectangle([left, top, left + 16, top + 18], fill=(165, 210, 240))
    return done(image)


def leaves(rng: Rng) -> Array:
    image, draw = canvas(mix((95, 65, 35), (140, 95, 50), noise(rng, R, decay=0.7)))
    palette = [(205, 85, 30), (225, 150, 45), (180, 50, 35), (235, 195, 70), (150, 90, 40)]
    for _ in range(230):
        x, y, r, turn = *rng.uniform(0, R, 2), rng.uniform(5, 10), rng.uniform(0, 3.14)
        dx, dy = r * np.cos(turn), r * np.sin(turn)
        draw.polygon([(x - dx, y - dy), (x - dy * 0.45, y + dx * 0.45), (x + dx, y + dy),
                      (x + dy * 0.45, y - dx * 0.45)],
                     fill=ink(rng, palette[int(rng.integers(5))], 10))
    return done(image)


def wheat(rng: Rng) -> Array:
    far = horizon(rng, 0.35, 0.45)
    field = ground(rng, R - far, (200, 155, 60), (240, 205, 110), 0.7)
    image, draw = canvas(np.concatenate([sky(rng, far), field]))
    blades(rng, draw, far + 2, 650, 16, (215, 170, 70))
    return done(image)


def rain(rng: Rng) -> Array:
    foot = int(R * 0.7)
    street = ground(rng, R - foot, (62, 72, 86), (110, 122, 138), 0.6, (3, 1))
    back = gradient(jitter(rng, (80, 92, 110)), jitter(rng, (135, 145, 160)), foot)
    image, draw = canvas(np.concatenate([back, street]))
    for _ in range(120):
        x, y, fall = *rng.uniform(0, R, 2), rng.uniform(6, 12)
        draw.line([(x, y), (x - fall * 0.3, y + fall)], fill=(195, 210, 228), width=1)
    return done(image)


PAINTERS: dict[str, Callable[[Rng], Array]] = {
    f.__name__: f for f in (
        beach, snow, grass, sunflowers, wood, city, house, eiffel, night, desert, dirt, water,
        floating, forest, mountain, sunset, fabric, brick, check, cobble, space, dots, rug,
        white_rug, room, leaves, wheat, rain)
}


def paint_all(seed: int, per_scene: int = 40, per_colour: int = 5
              ) -> tuple[NDArray[np.uint8], list[str]]:
    """Every scene several times: pictures [n, R, R, 3] uint8 and the scene's name of each."""
    rng = np.random.default_rng(seed)
    pictures, names = [], []
    for name, painter in PAINTERS.items():
        pictures += [painter(rng) for _ in range(per_scene)]
        names += [name] * per_scene
    for name, colour in PLAIN.items():
        pictures += [plain(rng, colour) for _ in range(per_colour)]
        names += [f"plain_{name}"] * per_colour
    return np.stack(pictures).clip(0, 255).astype(np.uint8), names
