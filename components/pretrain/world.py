"""The captioned world: subjects composed into scenes, drawn in batches on any device.

Everything random comes from one `torch.Generator` of the world's device, so a batch of scenes, its
pictures and its captions are made without a copy to or from the CPU.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from components.pretrain import captions
from components.pretrain.assets import SPRITE_PX
from components.pretrain.composition import CLOSE, NORMAL, RECOLOURS, SMALL, Lots, Scenes
from components.pretrain.painting import SCENE_PX
from components.pretrain.rendering import Renderer
from components.pretrain.subjects import NEVER_TOGETHER, PLURAL, TOO_FINE, WEARERS
from model.errors import InputError

NEVER_BY_HASH = 3  # scenes a name


class World:
    """The built world (folder of `build-world`) on a device.

    Args:
        folder: holds sprites.png, scenes.*.jpg and world.json.
        device: where batches are drawn.
        held_out: False leaves out the subjects that the pair must never see; True shows only them.
        drawn: "all" shows every subject in every scene; "seen" is what teacher and student learn:
            no subject of `TOO_FINE`, and no subject in a scene that is kept from it; "unseen" shows
            them in these scenes only.

    Raises:
        InputError: when world.json is not what `build-world` wrote.
    """

    def __init__(
        self,
        folder: Path,
        device: str | torch.device,
        held_out: bool = False,
        drawn: Literal["all", "seen", "unseen"] = "all",
    ) -> None:
        try:
            facts = json.loads((folder / "world.json").read_text())
            self.sprites, scenes = facts["sprites"], list(facts["scenes"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{folder / 'world.json'} is broken: build the world again."
            ) from error
        self.device = torch.device(device)
        self.scene_names = list(dict.fromkeys(scenes))
        self.renderer = Renderer(_load_sprites(folder), _load_scenes(folder), self.device)
        self._index_scenes(scenes)
        self._index_subjects(held_out, drawn != "all")
        self.instead = None if drawn == "all" else self._index_pairs(scenes, drawn)
        self.captioner = captions.Captioner(
            self.names,
            [n in PLURAL for n in self.names],
            list(RECOLOURS),
            self.scene_names,
            [str(s["style"]) for s in self.sprites],
            {i: str(s["name"]) for i, s in enumerate(self.sprites) if s["kind"] == "worn"},
            self.device,
        )

    def _index_scenes(self, scenes: list[str]) -> None:
        """Which picture shows which scene, and how often each is drawn (plain colours: less)."""
        index = {name: i for i, name in enumerate(self.scene_names)}
        scene = torch.tensor([index[n] for n in scenes])
        weight = torch.tensor([0.35 if n.startswith("plain") else 1.0 for n in self.scene_names])
        count = torch.bincount(scene, minlength=len(weight)).float()
        self.back_odds = (weight / count)[scene].cumsum(0).to(self.device)
        self.back_scene = scene.to(self.device)

    def _index_pairs(self, scenes: list[str], drawn: str) -> Tensor:
        """The first picture of the scene that stands in for each scene [name, scene]."""
        table = [
            stand_ins(never_together(name, self.scene_names), drawn == "seen")
            for name in self.names
        ]
        self.first = torch.tensor([scenes.index(n) for n in self.scene_names], device=self.device)
        self.pictures_of = torch.bincount(self.back_scene, minlength=len(self.scene_names))
        return torch.tensor(table, device=self.device)

    def _index_subjects(self, held_out: bool, clear: bool) -> None:
        """Which sprites may be drawn and how often: every name alike, "3d" twice as often."""
        shown = [i for i, s in enumerate(self.sprites) if s["kind"] != "worn"]
        self.names = list(dict.fromkeys(str(self.sprites[i]["name"]) for i in shown))
        name_of = {name: i for i, name in enumerate(self.names)}
        shown = [i for i in shown if bool(self.sprites[i]["held_out"]) == held_out]
        if clear:
            shown = [i for i in shown if self.sprites[i]["emoji"] not in TOO_FINE]
        odds = torch.tensor([2.0 if self.sprites[i]["style"] == "3d" else 1.0 for i in shown])
        names = torch.tensor([name_of[str(self.sprites[i]["name"])] for i in shown])
        share = torch.zeros(len(self.names)).index_add_(0, names, odds)
        self.odds = (odds / share[names]).cumsum(0).to(self.device)
        self.shown = torch.tensor(shown, device=self.device)
        self.name_of = torch.tensor(
            [name_of.get(str(s["name"]), 0) for s in self.sprites], device=self.device
        )
        wears = [s["kind"] == "animal" or s["name"] in WEARERS for s in self.sprites]
        self.wears = torch.tensor(wears, device=self.device)
        self.hats = torch.tensor(
            [i for i, s in enumerate(self.sprites) if s["kind"] == "worn"], device=self.device
        )

    def generator(self, seed: int) -> torch.Generator:
        """A generator of this world's device."""
        return torch.Generator(self.device).manual_seed(seed)

    def sprite(self, style: str, emoji: str) -> int:
        """Index of the sprite of `emoji` in `style`."""
        return next(
            i for i, s in enumerate(self.sprites) if s["style"] == style and s["emoji"] == emoji
        )

    # ---- drawing lots
    def sample(
        self,
        count: int,
        gen: torch.Generator,
        subject: Tensor | None = None,
        scene: str | None = None,
        alone: bool = False,
        zoom: int | None = None,
    ) -> Scenes:
        """Draw `count` compositions.

        Args:
            count: how many.
            gen: source of all randomness.
            subject: sprites to show [count], as they are (not recoloured); default: any.
            scene: name of the scene behind; default: any.
            alone: no second subject and no hat.
            zoom: NORMAL, SMALL or CLOSE; default: any.
        """
        lots = Lots(count, gen)
        zooms, size = _frame(lots, zoom)
        chosen = self._pick(lots) if subject is None else subject
        colour = lots.colour() if subject is None else torch.full_like(chosen, -1)
        vary = (lots.chance(0.5) & (subject is None)).float()
        pair = lots.chance(0.07) & (zooms == NORMAL) & (not alone)
        dressed = lots.chance(0.1) & (zooms != SMALL) & self.wears[chosen] & ~pair & (not alone)
        side = torch.where(lots.chance(0.5), -1.0, 1.0)
        size = torch.where(pair, lots.uniform(0.4, 0.52), size)
        back = self._background(lots, scene)
        if self.instead is not None and scene is None:
            back = self._stand_in(lots, back, self.instead, self.name_of[chosen])
        other, hat = self._pick(lots), self.hats[lots.index(len(self.hats))]
        hue = lots.normal(0.2) * vary
        saturation = 1 + (lots.uniform(0.7, 1.25) - 1) * vary
        brightness = 1 + (lots.uniform(0.85, 1.1) - 1) * vary
        x, y = _place(lots, size, zooms == CLOSE, pair, side)
        return Scenes(
            subject=chosen,
            name=self.name_of[chosen],
            colour=colour,
            hue=hue,
            saturation=saturation,
            brightness=brightness,
            zoom=zooms,
            size=size,
            x=x,
            y=y,
            turn=lots.normal(0.12),
            flip=lots.chance(0.5),
            shadow=lots.chance(0.55) * lots.uniform(0.2, 0.45),
            other=torch.where(pair, other, -1),
            other_name=self.name_of[other],
            other_colour=lots.colour(),
            other_size=lots.uniform(0.4, 0.52),
            worn=torch.where(dressed, hat, -1),
            back=back,
            back_scene=self.back_scene[back],
            **_backdrop(lots),
        )

    def _pick(self, lots: Lots) -> Tensor:
        """Sprites [B], by the odds of their names."""
        return self.shown[lots.weighted(self.odds)]

    def _background(self, lots: Lots, scene: str | None) -> Tensor:
        """Pictures to stand behind [B]: any, or any of the scene."""
        back = lots.weighted(self.back_odds)
        if scene is None:
            return back
        own = (self.back_scene == self.scene_names.index(scene)).nonzero()[:, 0]
        return own[lots.index(len(own))]

    def _stand_in(self, lots: Lots, back: Tensor, instead: Tensor, name: Tensor) -> Tensor:
        """The pictures `back` [B], another scene's where name and scene must not meet."""
        wanted = self.back_scene[back]
        scene = instead[name, wanted]
        other = self.first[scene] + (lots.uniform() * self.pictures_of[scene]).long()
        return torch.where(scene == wanted, back, other)

    def captions(self, scenes: Scenes, gen: torch.Generator) -> Tensor:
        """Caption pieces [B, slots] of the compositions (see captions.Captioner)."""
        return self.captioner.draw(scenes, gen)

    # ---- drawing pictures
    def render(self, scenes: Scenes) -> tuple[Tensor, Tensor]:
        """Pictures [B, 3, 128, 128] in [-1, 1] and the subject's coverage [B, 1, 128, 128]."""
        return self.renderer.render(scenes)


def never_together(name: str, scenes: list[str]) -> list[bool]:
    """For each scene, whether it is kept from the subject: what is listed, and a few more."""
    by_hash = sorted(scenes, key=lambda s: hashlib.sha256(f"{name}/{s}".encode()).digest())
    kept = set(by_hash[:NEVER_BY_HASH])
    return [scene in kept or (name, scene) in NEVER_TOGETHER for scene in scenes]


def stand_ins(never: list[bool], allowed: bool) -> list[int]:
    """For each scene the next one, itself first, that may (or must not) show the subject."""
    n = len(never)
    return [next(j % n for j in range(i, i + n) if never[j % n] != allowed) for i in range(n)]


def _frame(lots: Lots, zoom: int | None) -> tuple[Tensor, Tensor]:
    """How near the subject is, and its size."""
    lot = lots.uniform()
    zooms = torch.where(lot < 0.12, CLOSE, torch.where(lot < 0.27, SMALL, NORMAL))
    if zoom is not None:
        zooms = torch.full_like(zooms, zoom)
    close, small, normal = (lots.uniform(*r) for r in ((0.95, 1.25), (0.31, 0.4), (0.5, 0.85)))
    return zooms, torch.where(zooms == CLOSE, close, torch.where(zooms == SMALL, small, normal))


def _place(
    lots: Lots, size: Tensor, close: Tensor, pair: Tensor, side: Tensor
) -> tuple[Tensor, Tensor]:
    """Where the subject stands: inside the picture, beside its companion, or filling the frame."""
    room, near = (1 - size).clamp(min=0), close.float()
    beside = side * lots.uniform(0.4, 0.5)
    free = lots.uniform(-0.75, 0.75) * room + near * lots.normal(0.06)
    y = lots.uniform(-0.32, 0.77) * room + near * lots.normal(0.06)
    return torch.where(pair, beside, free), y


def _backdrop(lots: Lots) -> dict[str, Tensor]:
    """How the picture behind is cropped, mirrored and lit."""
    return {
        "back_zoom": lots.uniform(0.66, 0.84),
        "back_x": lots.uniform(-1, 1),
        "back_y": lots.uniform(-1, 1),
        "back_flip": lots.chance(0.5),
        "back_light": lots.uniform(0.9, 1.08),
    }


def _load_sprites(folder: Path) -> Tensor:
    """Premultiplied RGBA [n, 4, 128, 128], uint8."""
    sheet = torch.from_numpy(np.array(Image.open(folder / "sprites.png")))
    return sheet.reshape(-1, SPRITE_PX, SPRITE_PX, 4).permute(0, 3, 1, 2)


def _load_scenes(folder: Path) -> Tensor:
    """Pictures [n, 3, 160, 160], uint8."""
    sheets = [
        torch.from_numpy(np.array(Image.open(path))) for path in sorted(folder.glob("scenes.*.jpg"))
    ]
    return torch.cat(sheets).reshape(-1, SCENE_PX, SCENE_PX, 3).permute(0, 3, 1, 2).contiguous()
