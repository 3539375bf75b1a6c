"""What a composition of the world is made of, and the lots that decide it."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

RECOLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.85, 0.12, 0.13),
    "orange": (0.98, 0.55, 0.12),
    "yellow": (0.98, 0.86, 0.2),
    "green": (0.18, 0.68, 0.28),
    "blue": (0.15, 0.4, 0.9),
    "purple": (0.53, 0.25, 0.75),
    "pink": (0.98, 0.55, 0.75),
    "white": (0.97, 0.97, 0.97),
    "black": (0.13, 0.13, 0.15),
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


@dataclass(frozen=True)
class Lots:
    """Random numbers for `count` compositions, all from one generator, in the order asked for."""

    count: int
    gen: torch.Generator

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform in low..high [B]."""
        lot = torch.rand(self.count, device=self.gen.device, generator=self.gen)
        return lot * (high - low) + low

    def normal(self, scale: float) -> Tensor:
        """Normal with this standard deviation [B]."""
        return torch.randn(self.count, device=self.gen.device, generator=self.gen) * scale

    def chance(self, share: float) -> Tensor:
        """True for about this share of the rows [B]."""
        return self.uniform() < share

    def index(self, below: int) -> Tensor:
        """Uniform integers 0..below-1 [B]."""
        return (self.uniform() * below).long()

    def weighted(self, cumulative: Tensor) -> Tensor:
        """Integers by the weights whose running sums are `cumulative` [B]."""
        at = torch.searchsorted(cumulative, self.uniform() * cumulative[-1])
        return at.clamp(max=len(cumulative) - 1)

    def colour(self) -> Tensor:
        """A recolouring for a quarter of the rows, -1 for the others [B]."""
        drawn = self.index(len(RECOLOURS))
        return torch.where(self.chance(0.25), drawn, -1)
