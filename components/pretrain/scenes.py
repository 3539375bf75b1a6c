"""Procedural scenes behind the subjects: the phrases that name them, and all of them painted.

A painter (landscapes.py, surfaces.py) takes a numpy generator and returns [R, R, 3] float32 in
0..255, R = `SCENE_PX`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from components.pretrain import landscapes, surfaces
from components.pretrain.painting import PLAIN, Array, Rng, plain

PHRASES: dict[str, list[str]] = {
    "beach": ["on the beach", "on a sandy beach", "at the beach"],
    "snow": ["in the snow", "in a snowy field"],
    "grass": ["in the grass", "in a grassy field", "in the park", "on green grass"],
    "sunflowers": ["on top of green grass with sunflowers around it", "with sunflowers around it"],
    "wood": ["on a wooden floor", "on top of a wooden floor", "on a wooden table"],
    "city": [
        "in the city",
        "with a city in the background",
        "on the street",
        "on top of a sidewalk in a crowded street",
    ],
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
    "leaves": [
        "on autumn leaves",
        "with autumn leaves in the background",
        "with a tree and autumn leaves in the background",
    ],
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


# In the order in which they are painted: one generator serves them all.
PAINTERS: dict[str, Callable[[Rng], Array]] = {
    painter.__name__: painter
    for painter in (
        landscapes.beach,
        landscapes.snow,
        landscapes.grass,
        landscapes.sunflowers,
        surfaces.wood,
        landscapes.city,
        landscapes.house,
        landscapes.eiffel,
        landscapes.night,
        landscapes.desert,
        landscapes.dirt,
        landscapes.water,
        landscapes.floating,
        landscapes.forest,
        landscapes.mountain,
        landscapes.sunset,
        surfaces.fabric,
        surfaces.brick,
        surfaces.check,
        surfaces.cobble,
        landscapes.space,
        surfaces.dots,
        surfaces.rug,
        surfaces.white_rug,
        surfaces.room,
        surfaces.leaves,
        landscapes.wheat,
        landscapes.rain,
    )
}


def paint_all(
    seed: int, per_scene: int = 40, per_colour: int = 5
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
