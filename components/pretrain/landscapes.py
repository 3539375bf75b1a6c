"""Painters of the scenes out of doors; each returns [R, R, 3] float32 in 0..255."""

from __future__ import annotations

import numpy as np

from components.pretrain.painting import (
    Array,
    Colour,
    R,
    Rng,
    blades,
    canvas,
    disc,
    done,
    gradient,
    ground,
    horizon,
    houses,
    ink,
    jitter,
    mix,
    noise,
    sky,
    spot,
)


def beach(rng: Rng) -> Array:
    """Sky, sea, foam and sand."""
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
    """Firs behind a white field, and flakes."""
    far = horizon(rng, 0.4, 0.55)
    field = ground(rng, R - far, (205, 218, 235), (252, 253, 255), 0.5, (1.5, 1))
    back = gradient(jitter(rng, (150, 175, 205)), jitter(rng, (215, 225, 238)), far)
    image, draw = canvas(np.concatenate([back, field]))
    for x in range(0, R, int(rng.integers(12, 22))):
        tall, x0, green = rng.uniform(14, 34), x + rng.uniform(-5, 5), ink(rng, (70, 105, 95))
        for k in range(3):
            half, foot = tall * 0.3 * (1 - k * 0.22), far + 2 - tall * 0.28 * k
            draw.polygon(
                [(x0 - half, foot), (x0 + half, foot), (x0, foot - tall * 0.45)], fill=green
            )
    for _ in range(90):
        disc(draw, spot(rng), rng.uniform(0.6, 1.9), fill=(255, 255, 255))
    return done(image)


def grass(rng: Rng) -> Array:
    """Sky over a meadow with a few flowers."""
    far = horizon(rng, 0.35, 0.5)
    field = ground(rng, R - far, (40, 110, 35), (125, 190, 70), aspect=(1, 2.5))
    image, draw = canvas(np.concatenate([sky(rng, far), field]))
    blades(rng, draw, far, 500, 7, (70, 150, 50))
    for _ in range(int(rng.integers(0, 14))):
        petal = ((255, 255, 255), (250, 220, 70), (240, 120, 150))[int(rng.integers(3))]
        disc(draw, (rng.uniform(0, R), rng.uniform(far + 8, R)), rng.uniform(1, 2), fill=petal)
    return done(image)


def sunflowers(rng: Rng) -> Array:
    """A meadow full of sunflowers."""
    far = horizon(rng, 0.25, 0.38)
    field = ground(rng, R - far, (50, 120, 40), (130, 190, 75))
    image, draw = canvas(np.concatenate([sky(rng, far), field]))
    for y in np.sort(rng.uniform(far, R, 24)):
        x, r = rng.uniform(0, R), 3 + 7 * (y - far) / (R - far)
        draw.line([(x, y), (x, y + 3 * r)], fill=ink(rng, (60, 130, 50)), width=2)
        for turn in np.arange(0, 2 * np.pi, np.pi / 5):
            disc(draw, (x + r * np.cos(turn), y + r * np.sin(turn)), r * 0.45, fill=(250, 205, 45))
        disc(draw, (x, y), r * 0.6, fill=(100, 60, 25))
    return done(image)


def city(rng: Rng) -> Array:
    """A street with two rows of buildings."""
    foot = int(R * 0.72)
    road = np.broadcast_to(np.array(jitter(rng, (88, 90, 96), 8), np.float32), (R - foot, R, 3))
    image, draw = canvas(np.concatenate([sky(rng, foot, (120, 165, 215), (225, 225, 225)), road]))
    houses(rng, draw, foot)
    draw.rectangle([0, foot, R, foot + 4], fill=(170, 168, 165))
    for x in range(int(rng.integers(0, 15)), R, 30):
        draw.rectangle([x, foot + 22, x + 14, foot + 25], fill=(235, 225, 150))
    return done(image)


def house(rng: Rng) -> Array:
    """A blue house on a lawn."""
    foot = horizon(rng, 0.6, 0.7)
    lawn = ground(rng, R - foot, (60, 120, 45), (130, 185, 80))
    image, draw = canvas(np.concatenate([sky(rng, foot), lawn]))
    x, width, tall = rng.uniform(10, 50), rng.uniform(75, 95), rng.uniform(42, 55)
    draw.rectangle([x, foot - tall, x + width, foot + 3], fill=ink(rng, (65, 120, 205)))
    draw.polygon(
        [(x - 8, foot - tall), (x + width + 8, foot - tall), (x + width / 2, foot - tall - 30)],
        fill=ink(rng, (110, 60, 50)),
    )
    for k in (0.12, 0.68):
        left = x + width * k
        draw.rectangle(
            [left, foot - tall + 12, left + 16, foot - tall + 28],
            fill=(235, 240, 200),
            outline=(250, 250, 250),
            width=2,
        )
    middle = x + width * 0.44
    draw.rectangle([middle, foot - 26, middle + 13, foot + 3], fill=(240, 238, 230))
    return done(image)


def eiffel(rng: Rng) -> Array:
    """The tower behind a lawn."""
    foot = horizon(rng, 0.66, 0.74)
    lawn = ground(rng, R - foot, (70, 125, 60), (140, 180, 95))
    image, draw = canvas(np.concatenate([sky(rng, foot), lawn]))
    x, tall, iron = rng.uniform(35, R - 35), rng.uniform(80, 98), ink(rng, (105, 85, 70), 8)
    for side in (-1, 1):
        draw.polygon(
            [
                (x + side * 25, foot),
                (x + side * 15, foot),
                (x + side * 2, foot - tall),
                (x + side * 8, foot - tall * 0.45),
            ],
            fill=iron,
        )
    for level, half in ((0.28, 17), (0.52, 10)):
        draw.rectangle(
            [x - half, foot - tall * level - 4, x + half, foot - tall * level], fill=iron
        )
    draw.polygon(
        [(x - 6, foot - tall * 0.52), (x + 6, foot - tall * 0.52), (x, foot - tall * 1.12)],
        fill=iron,
    )
    return done(image)


def night(rng: Rng) -> Array:
    """Stars, a moon and dark hills."""
    image, draw = canvas(gradient(jitter(rng, (8, 10, 40), 6), jitter(rng, (45, 40, 95), 10)))
    for _ in range(110):
        disc(
            draw,
            (rng.uniform(0, R), rng.uniform(0, R * 0.8)),
            rng.choice([0.4, 0.6, 1.2]),
            fill=(255, 255, 225),
        )
    moon = rng.uniform(15, R - 15), rng.uniform(12, 45)
    disc(draw, moon, rng.uniform(8, 14), fill=(250, 245, 205))
    for x, height in enumerate(noise(rng, 2)[0]):
        draw.line([(x, R * 0.8 + height * 22), (x, R)], fill=(10, 14, 26))
    return done(image)


def desert(rng: Rng) -> Array:
    """Dunes."""
    far = horizon(rng, 0.38, 0.48)
    top = sky(rng, far, (90, 160, 225), (250, 225, 180), clouds=False)
    image, draw = canvas(
        np.concatenate([top, ground(rng, R - far, (225, 165, 90), (235, 180, 105))])
    )
    for k in range(1, 4):
        wave, phase, y = rng.uniform(14, 30), rng.uniform(0, 6), far + (R - far) * k * 0.25
        crest = [(x, y + 8 * np.sin(x / wave + phase)) for x in range(0, R + 1, 2)]
        shade = ((205, 135, 65), (240, 190, 115), (225, 160, 85))[k - 1]
        draw.polygon([*crest, (R, R), (0, R)], fill=ink(rng, shade))
    return done(image) + (noise(rng, R, octaves=6, decay=0.8)[..., None] - 0.5) * 20


def dirt(rng: Rng) -> Array:
    """A road through fields."""
    far = horizon(rng, 0.36, 0.48)
    field = ground(rng, R - far, (75, 120, 50), (140, 170, 85))
    image, draw = canvas(np.concatenate([sky(rng, far), field]))
    x = rng.uniform(50, R - 50)
    draw.polygon([(x - 7, far), (x + 7, far), (R + 5, R), (-5, R)], fill=ink(rng, (160, 115, 75)))
    for side in (0.35, 0.65):
        draw.line([(x, far), (R * side, R)], fill=(125, 88, 55, 160), width=5)
    return done(image) + (noise(rng, R, octaves=6, decay=0.9)[..., None] - 0.5) * 26


def water(rng: Rng) -> Array:
    """Under water: rays, bubbles and weed."""
    sea = gradient(jitter(rng, (60, 180, 215)), jitter(rng, (8, 50, 115)))
    image, draw = canvas(sea + (noise(rng, R, octaves=4, aspect=(1, 1.5))[..., None] - 0.5) * 30)
    for _ in range(4):
        x, width = rng.uniform(0, R), rng.uniform(6, 16)
        draw.polygon(
            [(x, 0), (x + width, 0), (x + width * 2.5 - 25, R), (x - 25, R)],
            fill=(255, 255, 255, 24),
        )
    for _ in range(26):
        disc(draw, spot(rng), rng.uniform(1, 4), outline=(225, 245, 255, 200))
    for _ in range(10):
        x, tall = rng.uniform(0, R), rng.uniform(14, 40)
        draw.line([(x, R), (x + rng.normal() * 5, R - tall)], fill=ink(rng, (35, 130, 70)), width=3)
    return done(image)


def floating(rng: Rng) -> Array:
    """The surface of water, under a sky."""
    far = horizon(rng, 0.3, 0.42)
    sea = ground(rng, R - far, (20, 90, 165), (95, 175, 220), 0.65, (5, 1))
    return np.concatenate([sky(rng, far), sea])


def forest(rng: Rng) -> Array:
    """Trunks and leaves."""
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
    """Peaks with snow behind a meadow."""
    foot = int(R * 0.66)
    image, draw = canvas(sky(rng, R, (85, 150, 225), (215, 230, 245)))
    for _ in range(4):
        x, tall = rng.uniform(-10, R + 10), rng.uniform(50, 95)
        half = tall * rng.uniform(0.7, 1)
        draw.polygon(
            [(x - half, foot), (x + half, foot), (x, foot - tall)], fill=ink(rng, (105, 115, 140))
        )
        draw.polygon(
            [
                (x, foot - tall),
                (x - half * 0.3, foot - tall * 0.7),
                (x - half * 0.1, foot - tall * 0.76),
                (x + half * 0.08, foot - tall * 0.68),
                (x + half * 0.3, foot - tall * 0.7),
            ],
            fill=(248, 250, 252),
        )
    meadow = ground(rng, R - foot, (70, 115, 60), (125, 165, 85), 0.7)
    return np.concatenate([done(image)[:foot], meadow])


def sunset(rng: Rng) -> Array:
    """A low sun over the sea."""
    far = horizon(rng, 0.6, 0.7)
    image, draw = canvas(gradient(jitter(rng, (95, 55, 130)), jitter(rng, (255, 150, 60))))
    disc(draw, (rng.uniform(25, R - 25), far - 4), rng.uniform(12, 20), fill=(255, 235, 150))
    sea = ground(rng, R - far, (70, 30, 60), (220, 110, 70), 0.6, (4, 1))
    return np.concatenate([done(image)[:far], sea])


def space(rng: Rng) -> Array:
    """Nebulae, stars and perhaps a planet."""
    picture: Array = np.broadcast_to(np.array((6, 6, 16), np.float32), (R, R, 3))
    clouds: tuple[tuple[Colour, float], ...] = (((120, 40, 150), 0.75), ((30, 80, 180), 0.65))
    for colour, most in clouds:
        cloud = ((noise(rng, R, decay=0.55) - 0.5) * 3).clip(0, most)
        picture = mix(picture, jitter(rng, colour), cloud)
    image, draw = canvas(picture)
    for _ in range(130):
        disc(draw, spot(rng), rng.choice([0.3, 0.5, 1.1]), fill=(255, 255, 255))
    if rng.random() < 0.6:
        disc(
            draw,
            spot(rng, 10),
            rng.uniform(9, 18),
            fill=ink(rng, (205, 150, 100), 35),
        )
    return done(image)


def wheat(rng: Rng) -> Array:
    """Sky over a field of wheat."""
    far = horizon(rng, 0.35, 0.45)
    field = ground(rng, R - far, (200, 155, 60), (240, 205, 110), 0.7)
    image, draw = canvas(np.concatenate([sky(rng, far), field]))
    blades(rng, draw, far + 2, 650, 16, (215, 170, 70))
    return done(image)


def rain(rng: Rng) -> Array:
    """Rain over a wet street."""
    foot = int(R * 0.7)
    street = ground(rng, R - foot, (62, 72, 86), (110, 122, 138), 0.6, (3, 1))
    back = gradient(jitter(rng, (80, 92, 110)), jitter(rng, (135, 145, 160)), foot)
    image, draw = canvas(np.concatenate([back, street]))
    for _ in range(120):
        (x, y), fall = spot(rng), rng.uniform(6, 12)
        draw.line([(x, y), (x - fall * 0.3, y + fall)], fill=(195, 210, 228), width=1)
    return done(image)
