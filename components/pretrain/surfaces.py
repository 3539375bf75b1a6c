"""Painters of floors, walls, cloth and patterns; each returns [R, R, 3] float32 in 0..255."""

from __future__ import annotations

import numpy as np

from components.pretrain.painting import (
    PLAIN,
    Array,
    Colour,
    R,
    Rng,
    canvas,
    disc,
    done,
    ground,
    horizon,
    ink,
    jitter,
    mix,
    noise,
    plain,
    spot,
)


def wood(rng: Rng) -> Array:
    """Boards, lengthwise or across."""
    count = int(rng.integers(5, 8))
    width = R // count + 1
    dark, light = jitter(rng, (150, 95, 50)), jitter(rng, (205, 150, 95))
    boards = []
    for _ in range(count):
        board = mix(
            dark,
            light,
            (noise(rng, R, width, 6, 0.7, (1, 5)) + rng.uniform(-0.25, 0.25)).clip(0, 1),
        )
        board[:, 0] *= 0.45
        boards.append(board)
    picture = np.concatenate(boards, 1)[:, :R]
    return picture if rng.random() < 0.5 else picture.transpose(1, 0, 2).copy()


def fabric(rng: Rng) -> Array:
    """Folds of pink cloth."""
    ys, xs = np.mgrid[0:R, 0:R].astype(np.float32)
    turn, pitch = rng.uniform(0, np.pi), rng.uniform(9, 15)
    folds = (
        np.sin((xs * np.cos(turn) + ys * np.sin(turn)) / pitch + noise(rng, R, octaves=3) * 9) * 0.4
        + 0.5
    )
    return mix(jitter(rng, (205, 95, 145)), jitter(rng, (252, 180, 210)), folds)


def brick(rng: Rng) -> Array:
    """A wall of bricks."""
    image, draw = canvas(plain(rng, (200, 190, 180)))
    tall, colour = int(rng.integers(12, 17)), jitter(rng, (165, 70, 50))
    for row, y in enumerate(range(-2, R, tall)):
        for x in range(-2 * tall + (row % 2) * tall, R, 2 * tall):
            draw.rectangle([x, y, x + 2 * tall - 3, y + tall - 3], fill=ink(rng, colour, 10))
    return done(image) + (noise(rng, R, octaves=6, decay=0.9)[..., None] - 0.5) * 26


def check(rng: Rng) -> Array:
    """Tiles in two colours."""
    cell = int(rng.integers(14, 24))
    ys, xs = np.mgrid[0:R, 0:R]
    dark: Colour = ((200, 40, 45), (45, 90, 180), (30, 30, 32), (50, 140, 80))[rng.integers(4)]
    return mix(
        jitter(rng, dark, 8), (245, 243, 238), ((ys // cell + xs // cell) % 2).astype(np.float32)
    )


def cobble(rng: Rng) -> Array:
    """Cobblestones."""
    image, draw = canvas(plain(rng, (70, 68, 66)))
    for row, y in enumerate(range(-6, R + 6, 13)):
        for x in range(-10 + (row % 2) * 8, R + 6, 16):
            dx, dy = rng.uniform(-1.5, 1.5, 2)
            draw.rounded_rectangle(
                [x + dx, y + dy, x + dx + 14, y + dy + 11], 4, fill=ink(rng, (140, 135, 130), 13)
            )
    return done(image) + (noise(rng, R, octaves=6, decay=0.9)[..., None] - 0.5) * 20


def dots(rng: Rng) -> Array:
    """Polka dots."""
    image, draw = canvas(plain(rng, (245, 235, 225)))
    colour, pitch = list(PLAIN.values())[int(rng.integers(7))], int(rng.integers(16, 24))
    for row, y in enumerate(range(0, R + pitch, pitch)):
        for x in range((row % 2) * pitch // 2, R + pitch, pitch):
            disc(draw, (x, y), 5, fill=ink(rng, colour, 4))
    return done(image)


def rug(rng: Rng) -> Array:
    """A purple rug with a golden border."""
    image, draw = canvas(
        mix(
            jitter(rng, (90, 40, 135)),
            jitter(rng, (150, 95, 195)),
            noise(rng, R, octaves=6, decay=0.95, base=8),
        )
    )
    for inset in (10, 16):
        draw.rectangle(
            [inset, inset, R - inset, R - inset], outline=ink(rng, (225, 195, 90), 10), width=3
        )
    return done(image)


def white_rug(rng: Rng) -> Array:
    """A white rug."""
    pile = noise(rng, R, octaves=6, decay=1.0, base=10)
    return mix(jitter(rng, (205, 200, 192), 5), jitter(rng, (250, 248, 244), 4), pile)


def room(rng: Rng) -> Array:
    """A wall with a window, and a floor."""
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
    """Fallen leaves."""
    image, draw = canvas(mix((95, 65, 35), (140, 95, 50), noise(rng, R, decay=0.7)))
    palette = [(205, 85, 30), (225, 150, 45), (180, 50, 35), (235, 195, 70), (150, 90, 40)]
    for _ in range(230):
        (x, y), r, turn = spot(rng), rng.uniform(5, 10), rng.uniform(0, 3.14)
        dx, dy = r * np.cos(turn), r * np.sin(turn)
        draw.polygon(
            [
                (x - dx, y - dy),
                (x - dy * 0.45, y + dx * 0.45),
                (x + dx, y + dy),
                (x + dy * 0.45, y - dx * 0.45),
            ],
            fill=ink(rng, palette[int(rng.integers(5))], 10),
        )
    return done(image)
