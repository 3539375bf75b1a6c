"""The captioned world: subjects composed into scenes, drawn in batches on any device.

Everything random comes from one `torch.Generator` of the world's device, so a batch of scenes, its
pictures and its captions are made without a copy to or from the CPU.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from components.pretrain import captions
from components.pretrain.assets import SPRITE_PX
from components.pretrain.scenes import SCENE_PX
from components.pretrain.subjects import PLURAL, WEARERS

RESOLUTION = 128
RECOLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.85, 0.12, 0.13), "orange": (0.98, 0.55, 0.12), "yellow": (0.98, 0.86, 0.2),
    "green": (0.18, 0.68, 0.28), "blue": (0.15, 0.4, 0.9), "purple": (0.53, 0.25, 0.75),
    "pink": (0.98, 0.55, 0.75), "white": (0.97, 0.97, 0.97), "black": (0.13, 0.13, 0.15),
    "brown": (0.52, 0.33, 0.18),
}
NORMAL, SMALL, CLOSE = 0, 1, 2


@dataclass
class Scenes:
    """B compositions; every field is a tensor [B] (positions and sizes in units of half a side)."""

    subject: Tensor  # sprite of the subject
    name: Tensor  # its name's index
    colour: Tensor  # recolouring, -1 for none
    hue: Tensor
    saturation: Tensor
    brightness: Tensor
    zoom: Tensor  # NORMAL, SMALL or CLOSE
    size: Tensor  # side of the sprite, 1 = the whole picture
    x: Tensor
    y: Tensor
    turn: Tensor  # radians
    flip: Tensor
    shadow: Tensor
    other: Tensor  # sprite of a second subject, -1 for none
    other_name: Tensor
    other_colour: Tensor
    other_size: Tensor
    worn: Tensor  # sprite of a hat, -1 for none
    back: Tensor  # picture behind
    back_scene: Tensor  # index of its scene's name
    back_zoom: Tensor
    back_x: Tensor
    back_y: Tensor
    back_flip: Tensor
    back_light: Tensor

    def __len__(self) -> int:
        return len(self.subject)

    def rows(self, index: Tensor) -> Scenes:
        """The compositions at `index`."""
        return Scenes(**{f.name: getattr(self, f.name)[index] for f in fields(self)})


class World:
    """The built world (folder of `build-world`) on a device.

    Args:
        folder: holds sprites.png, scenes.*.jpg and world.json.
        device: where batches are drawn.
        held_out: False leaves out the subjects that the pair must never see; True shows only them.
    """

    def __init__(self, folder: Path, device: str | torch.device, held_out: bool = False) -> None:
        facts = json.loads((folder / "world.json").read_text())
        self.device = torch.device(device)
        self.sprites = facts["sprites"]
        self.scene_names = list(dict.fromkeys(facts["scenes"]))
        self._load_sprites(folder)
        self._load_scenes(folder, facts)
        self._index_subjects(held_out)
        self.captioner = captions.Captioner(
            self.names, [n in PLURAL for n in self.names], list(RECOLOURS), self.scene_names,
            [str(s["style"]) for s in self.sprites],
            {i: str(s["name"]) for i, s in enumerate(self.sprites) if s["kind"] == "worn"},
            self.device)
        colours = [(0.0, 0.0, 0.0), *RECOLOURS.values()]
        self.colours = torch.tensor(colours, device=self.device)
        axis = (torch.arange(RESOLUTION, device=self.device) + 0.5) * 2 / RESOLUTION - 1
        self.grid_y, self.grid_x = torch.meshgrid(axis, axis, indexing="ij")

    def _load_sprites(self, folder: Path) -> None:
        sheet = torch.from_numpy(np.array(Image.open(folder / "sprites.png")))
        sprites = sheet.reshape(-1, SPRITE_PX, SPRITE_PX, 4).permute(0, 3, 1, 2)
        # Drawn small, a sprite is sampled at half its resolution or less: a blurred copy of every
        # sprite stands behind the sharp ones so that bilinear sampling does not alias.
        soft = torch.cat([F.interpolate(F.avg_pool2d(part.float(), 2), scale_factor=2.0,
                                        mode="bilinear") for part in sprites.split(64)])
        self.bank = torch.cat([sprites, soft.round().to(torch.uint8)]).to(self.device)
        alpha = sprites[:, 3].float() / 255
        tops = []
        for a in alpha:  # where a hat sits: centre of mass of the uppermost rows
            top = int((a.max(1).values > 0.3).nonzero()[0, 0])
            columns = a[top:top + 14].sum(0)
            middle = (columns * torch.arange(SPRITE_PX)).sum() / columns.sum()
            tops.append((float(middle) * 2 / SPRITE_PX - 1, top * 2 / SPRITE_PX - 1))
        self.tops = torch.tensor(tops, device=self.device)

    def _load_scenes(self, folder: Path, facts: dict[str, list[str]]) -> None:
        sheet = torch.cat([torch.from_numpy(np.array(Image.open(path)))
                           for path in sorted(folder.glob("scenes.*.jpg"))])
        pictures = sheet.reshape(-1, SCENE_PX, SCENE_PX, 3).permute(0, 3, 1, 2)
        self.backs = pictures.contiguous().to(self.device)
        index = {name: i for i, name in enumerate(self.scene_names)}
        self.back_scene = torch.tensor([index[n] for n in facts["scenes"]], device=self.device)
        weight = torch.tensor([0.35 if n.startswith("plain") else 1.0 for n in self.scene_names])
        count = torch.bincount(self.back_scene.cpu(), minlength=len(weight)).float()
        self.back_odds = (weight / count)[self.back_scene.cpu()].cumsum(0).to(self.device)

    def _index_subjects(self, held_out: bool) -> None:
        shown = [i for i, s in enumerate(self.sprites) if s["kind"] != "worn"]
        self.names = list(dict.fromkeys(str(self.sprites[i]["name"]) for i in shown))
        name_of = {name: i for i, name in enumerate(self.names)}
        shown = [i for i in shown if bool(self.sprites[i]["held_out"]) == held_out]
        odds = torch.tensor([2.0 if self.sprites[i]["style"] == "3d" else 1.0 for i in shown])
        names = torch.tensor([name_of[str(self.sprites[i]["name"])] for i in shown])
        share = torch.zeros(len(self.names)).index_add_(0, names, odds)
        self.odds = (odds / share[names]).cumsum(0).to(self.device)
        self.shown = torch.tensor(shown, device=self.device)
        self.name_of = torch.tensor([name_of.get(str(s["name"]), 0) for s in self.sprites],
                                    device=self.device)
        wears = [s["kind"] == "animal" or s["name"] in WEARERS for s in self.sprites]
        self.wears = torch.tensor(wears, device=self.device)
        self.hats = torch.tensor([i for i, s in enumerate(self.sprites) if s["kind"] == "worn"],
                                 device=self.device)

    # ---- drawing lots
    def generator(self, seed: int) -> torch.Generator:
        """A generator of this world's device."""
        return torch.Generator(self.device).manual_seed(seed)

    def sprite(self, style: str, emoji: str) -> int:
        """Index of the sprite of `emoji` in `style`."""
        return next(i for i, s in enumerate(self.sprites)
                    if s["style"] == style and s["emoji"] == emoji)

    def sample(self, count: int, gen: torch.Generator, subject: Tensor | None = None,
               scene: str | None = None, alone: bool = False, zoom: int | None = None) -> Scenes:
        """Draw `count` compositions.

        Args:
            count: how many.
            gen: source of all randomness.
            subject: sprites to show [count], as they are (not recoloured); default: any.
            scene: name of the scene behind; default: any.
            alone: no second subject and no hat.
            zoom: NORMAL, SMALL or CLOSE; default: any.
        """
        dev, b = self.device, count

        def uniform(low: float = 0.0, high: float = 1.0) -> Tensor:
            return torch.rand(b, device=dev, generator=gen) * (high - low) + low

        def normal(scale: float) -> Tensor:
            return torch.randn(b, device=dev, generator=gen) * scale

        def pick() -> Tensor:
            at = torch.searchsorted(self.odds, uniform() * self.odds[-1])
            return self.shown[at.clamp(max=len(self.shown) - 1)]

        def recolour() -> Tensor:
            drawn = (uniform() * len(RECOLOURS)).long()
            return torch.where(uniform() < 0.25, drawn, -1)

        lot = uniform()
        z = torch.where(lot < 0.12, CLOSE, torch.where(lot < 0.27, SMALL, NORMAL))
        if zoom is not None:
            z = torch.full_like(z, zoom)
        size = torch.where(z == CLOSE, uniform(0.95, 1.25),
                           torch.where(z == SMALL, uniform(0.24, 0.38), uniform(0.5, 0.85)))
        chosen = pick() if subject is None else subject
        colour = recolour() if subject is None else torch.full((b,), -1, device=dev)
        vary = ((uniform() < 0.5) & (subject is None)).float()
        pair = (uniform() < 0.07) & (z == NORMAL) & (not alone)
        dressed = (uniform() < 0.1) & (z != SMALL) & self.wears[chosen] & ~pair & (not alone)
        side = torch.where(uniform() < 0.5, -1.0, 1.0)
        size = torch.where(pair, uniform(0.4, 0.52), size)
        room = (1 - size).clamp(min=0)
        close = (z == CLOSE).float()
        back = torch.searchsorted(self.back_odds, uniform() * self.back_odds[-1])
        if scene is not None:
            own = (self.back_scene == self.scene_names.index(scene)).nonzero()[:, 0]
            back = own[(uniform() * len(own)).long()]
        other = pick()
        hat = self.hats[(uniform() * len(self.hats)).long()]
        none = torch.full_like(other, -1)
        return Scenes(
            subject=chosen, name=self.name_of[chosen], colour=colour, hue=normal(0.2) * vary,
            saturation=1 + (uniform(0.7, 1.25) - 1) * vary,
            brightness=1 + (uniform(0.85, 1.1) - 1) * vary, zoom=z, size=size,
            x=torch.where(pair, side * uniform(0.4, 0.5),
                          uniform(-0.75, 0.75) * room + close * normal(0.06)),
            y=uniform(-0.32, 0.77) * room + close * normal(0.06), turn=normal(0.12),
            flip=uniform() < 0.5, shadow=(uniform() < 0.55) * uniform(0.2, 0.45),
            other=torch.where(pair, other, none), other_name=self.name_of[other],
            other_colour=recolour(), other_size=uniform(0.4, 0.52),
            worn=torch.where(dressed, hat, none), back=back.clamp(max=len(self.backs) - 1),
            back_scene=self.back_scene[back.clamp(max=len(self.backs) - 1)],
            back_zoom=uniform(0.66, 0.84), back_x=uniform(-1, 1), back_y=uniform(-1, 1),
            back_flip=uniform() < 0.5, back_light=uniform(0.9, 1.08))

    def captions(self, scenes: Scenes, gen: torch.Generator) -> Tensor:
        """Caption pieces [B, slots] of the compositions (see captions.Captioner)."""
        return self.captioner.draw(scenes, gen)

    # ---- drawing pictures
    def render(self, scenes: Scenes) -> tuple[Tensor, Tensor]:
        """Pictures [B, 3, 128, 128] in [-1, 1] and the subject's coverage [B, 1, 128, 128]."""
        def column(values: Tensor) -> Tensor:
            return values.float().view(-1, 1, 1)

        zoom = column(scenes.back_zoom)
        grid = torch.stack([
            (self.grid_x * zoom + column(scenes.back_x) * (1 - zoom))
            * (1 - 2 * column(scenes.back_flip)),
            self.grid_y * zoom + column(scenes.back_y) * (1 - zoom)], -1)
        picture = F.grid_sample(self.backs[scenes.back].float() / 255, grid, align_corners=False,
                                padding_mode="border") * column(scenes.back_light)[:, None]
        paired = (scenes.other >= 0).nonzero()[:, 0]
        if len(paired):
            s = scenes.rows(paired)
            plain = torch.zeros_like(s.hue)
            picture[paired], _ = self._draw(
                picture[paired], s.other, s.other_colour, (plain, plain + 1, plain + 1), -s.x, s.y,
                s.other_size, s.turn * 0.7, ~s.flip, s.shadow)
        picture, cover = self._draw(
            picture, scenes.subject, scenes.colour,
            (scenes.hue, scenes.saturation, scenes.brightness), scenes.x, scenes.y, scenes.size,
            scenes.turn, scenes.flip, scenes.shadow)
        hatted = (scenes.worn >= 0).nonzero()[:, 0]
        if len(hatted):
            picture[hatted] = self._put_hat(picture[hatted], scenes.rows(hatted))
        return picture.clamp(0, 1) * 2 - 1, cover

    def _put_hat(self, picture: Tensor, s: Scenes) -> Tensor:
        top = self.tops[s.subject]
        across, up = top[:, 0] * torch.where(s.flip, -1.0, 1.0), top[:, 1] - 0.12
        cos, sin = torch.cos(s.turn), torch.sin(s.turn)
        plain = torch.zeros_like(s.hue)
        return self._draw(
            picture, s.worn, torch.full_like(s.worn, -1), (plain, plain + 1, plain + 1),
            s.x + s.size * (cos * across - sin * up), s.y + s.size * (sin * across + cos * up),
            s.size * 0.42, s.turn, s.flip, plain)[0]

    def _draw(self, picture: Tensor, sprite: Tensor, colour: Tensor,
              tint: tuple[Tensor, Tensor, Tensor], x: Tensor, y: Tensor, size: Tensor,
              turn: Tensor, flip: Tensor, shadow: Tensor) -> tuple[Tensor, Tensor]:
        """Lay sprites over pictures [B, 3, H, W] in 0..1; returns pictures and coverage."""
        cx, cy, scale, angle, mirror, dark = (
            v.float().view(-1, 1, 1) for v in (x, y, size, turn, 1 - 2 * flip.float(), shadow))
        foot = ((self.grid_x - cx) / (0.42 * scale)) ** 2
        foot = foot + ((self.grid_y - (cy + 0.92 * scale)) / (0.12 * scale)) ** 2
        picture = picture * (1 - dark * torch.exp(-1.2 * foot))[:, None]
        u, v = (self.grid_x - cx) / scale, (self.grid_y - cy) / scale
        cos, sin = torch.cos(angle), torch.sin(angle)
        grid = torch.stack([(cos * u + sin * v) * mirror, cos * v - sin * u], -1)
        soft = (size < 0.52).long() * (len(self.bank) // 2)
        drawn = F.grid_sample(self.bank[sprite + soft].float() / 255, grid, align_corners=False)
        alpha = drawn[:, 3:]
        rgb = self._tint(drawn[:, :3], alpha, colour, *tint)
        return picture * (1 - alpha) + rgb, alpha

    def _tint(self, rgb: Tensor, alpha: Tensor, colour: Tensor, hue: Tensor, saturation: Tensor,
              brightness: Tensor) -> Tensor:
        """Recolour premultiplied rgb: to a named colour, or by a turn in YIQ."""
        yiq = rgb.new_tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322],
                              [0.211, -0.523, 0.312]])
        turn = rgb.new_zeros(len(hue), 3, 3)
        turn[:, 0, 0] = 1
        turn[:, 1, 1] = turn[:, 2, 2] = saturation * torch.cos(hue)
        turn[:, 2, 1] = saturation * torch.sin(hue)
        turn[:, 1, 2] = -turn[:, 2, 1]
        matrix = torch.linalg.inv(yiq) @ turn @ yiq * brightness.view(-1, 1, 1)
        turned = torch.einsum("bij,bjhw->bihw", matrix, rgb).clamp(min=0).minimum(alpha)
        light = (rgb * yiq[0].view(1, 3, 1, 1)).sum(1, keepdim=True) / (alpha + 1e-4)
        paint = self.colours[colour + 1].view(-1, 3, 1, 1)
        glint = (light - 0.82).clamp(min=0) * 2.2 * (1 - paint)
        painted = ((paint * (0.42 + 0.85 * light)).clamp(0, 1) + glint).clamp(0, 1) * alpha
        return torch.where((colour >= 0).view(-1, 1, 1, 1), 0.86 * painted + 0.14 * rgb, turned)
