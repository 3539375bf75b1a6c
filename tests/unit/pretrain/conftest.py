"""A world small enough for tests: drawn shapes, every scene once, the real tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from components.pretrain import assets, scenes
from components.pretrain.painting import SCENE_PX
from components.pretrain.subjects import HELD_OUT
from components.pretrain.world import World

POCKET = Path(assets.__file__).parents[2] / "model" / "pocket"
# name -> emoji, kind, colour; "fox" and "cat face" are held out in style "3d", as in the real one.
SUBJECTS = {
    "fox": ("fox", "animal", (230, 120, 30)),
    "cat": ("cat face", "animal", (240, 200, 80)),
    "owl": ("owl", "animal", (150, 100, 60)),
    "grapes": ("grapes", "food", (120, 60, 160)),
    "soccer ball": ("soccer ball", "object", (220, 220, 220)),
    "snowman": ("snowman without snow", "object", (200, 220, 240)),
}
# Subjects of the sample concepts, so that `export` finds them.
SAMPLES = {
    "dog": ("dog face", "noto"),
    "duck": ("duck", "3d"),
    "teddy bear": ("teddy bear", "3d"),
    "robot": ("robot", "3d"),
    "backpack": ("backpack", "3d"),
    "teapot": ("teapot", "3d"),
    "shoe": ("running shoe", "3d"),
    "rocket": ("rocket", "3d"),
    "clock": ("alarm clock", "3d"),
}


def shape(colour: tuple[int, int, int], corner: bool = False) -> Image.Image:
    """A square of one colour, or a triangle that is not its own mirror image."""
    picture = Image.new("RGBA", (64, 64))
    draw = ImageDraw.Draw(picture)
    if corner:
        draw.polygon([(8, 8), (8, 56), (56, 56)], fill=(*colour, 255))
    else:
        draw.rectangle([8, 8, 56, 56], fill=(*colour, 255))
    return picture


@pytest.fixture(scope="session")
def world_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `build-world` writes, in small and without any download."""
    folder = tmp_path_factory.mktemp("pretrain") / "work" / "world"
    folder.mkdir(parents=True)
    sprites, facts = [], []

    def add(picture: Image.Image, style: str, emoji: str, **fact: object) -> None:
        sprites.append(assets.fit(picture))
        held = (style, emoji) in HELD_OUT
        facts.append({"style": style, "emoji": emoji, "held_out": held, **fact})

    for name, (emoji, kind, colour) in SUBJECTS.items():
        for style in ("3d", "noto"):
            add(shape(colour, style == "noto"), style, emoji, name=name, kind=kind)
    for name, (emoji, style) in SAMPLES.items():
        add(shape((90, 140, 200)), style, emoji, name=name, kind="object")
    add(shape((250, 210, 40), corner=True), "3d", "crown", name="a crown", kind="worn")
    Image.fromarray(np.stack(sprites).reshape(-1, assets.SPRITE_PX, 4)).save(folder / "sprites.png")
    pictures, names = scenes.paint_all(seed=0, per_scene=1, per_colour=1)
    sheet = Image.fromarray(pictures.reshape(-1, SCENE_PX, 3))
    sheet.save(folder / "scenes.0.jpg", quality=90, subsampling=0)
    (folder / "world.json").write_text(json.dumps({"sprites": facts, "scenes": names}))
    shutil.copytree(POCKET / "layout" / "teacher" / "tokenizer", folder / "tokenizer")
    return folder


@pytest.fixture(scope="session")
def world(world_folder: Path) -> World:
    """The world as training sees it."""
    return World(world_folder, "cpu")
