"""Compositions -> pictures, in batches on the world's device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from components.pretrain.composition import RECOLOURS, Scenes
from components.pretrain.networks import RESOLUTION

# Rows of Y, I, Q: hue is an angle and saturation a radius in the plane of the last two.
YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))


@dataclass(frozen=True)
class Look:
    """A sprite's colours: changed to a named one (-1: none), else by a turn in YIQ; all [B]."""

    colour: Tensor
    hue: Tensor
    saturation: Tensor
    brightness: Tensor

    @classmethod
    def plain(cls, colour: Tensor) -> Look:
        """Only the named colour."""
        one = torch.ones_like(colour, dtype=torch.float32)
        return cls(colour, torch.zeros_like(one), one, one)


@dataclass(frozen=True)
class Pose:
    """Where a sprite stands: centre, size, turn (radians), mirror, shadow; all [B]."""

    x: Tensor
    y: Tensor
    size: Tensor
    turn: Tensor
    flip: Tensor
    shadow: Tensor


class Renderer:
    """Sprites and scenes on a device, and the way they are laid over each other.

    Args:
        sprites: premultiplied RGBA [n, 4, 128, 128], uint8.
        backs: the scenes' pictures [m, 3, 160, 160], uint8.
        device: where pictures are drawn.
    """

    def __init__(self, sprites: Tensor, backs: Tensor, device: torch.device) -> None:
        # Drawn small, a sprite is sampled at half its resolution or less: a blurred copy of every
        # sprite stands behind the sharp ones so that bilinear sampling does not alias.
        soft = torch.cat(
            [
                F.interpolate(F.avg_pool2d(part.float(), 2), scale_factor=2.0, mode="bilinear")
                for part in sprites.split(64)
            ]
        )
        self.bank = torch.cat([sprites, soft.round().to(torch.uint8)]).to(device)
        self.tops = _tops(sprites[:, 3].float() / 255).to(device)
        self.backs = backs.to(device)
        self.colours = torch.tensor([(0.0, 0.0, 0.0), *RECOLOURS.values()], device=device)
        self.yiq = torch.tensor(YIQ, device=device)
        axis = (torch.arange(RESOLUTION, device=device) + 0.5) * 2 / RESOLUTION - 1
        self.grid_y, self.grid_x = torch.meshgrid(axis, axis, indexing="ij")

    def render(self, scenes: Scenes) -> tuple[Tensor, Tensor]:
        """Pictures [B, 3, 128, 128] in [-1, 1] and the subject's coverage [B, 1, 128, 128]."""
        picture = self._background(scenes)
        paired = (scenes.other >= 0).nonzero()[:, 0]
        if len(paired):
            picture[paired] = self._put_companion(picture[paired], scenes.rows(paired))
        pose = Pose(scenes.x, scenes.y, scenes.size, scenes.turn, scenes.flip, scenes.shadow)
        look = Look(scenes.colour, scenes.hue, scenes.saturation, scenes.brightness)
        picture, cover = self._draw(picture, scenes.subject, look, pose)
        hatted = (scenes.worn >= 0).nonzero()[:, 0]
        if len(hatted):
            picture[hatted] = self._put_hat(picture[hatted], scenes.rows(hatted))
        return picture.clamp(0, 1) * 2 - 1, cover

    def _background(self, s: Scenes) -> Tensor:
        """Crops of the scenes [B, 3, 128, 128] in 0..1, mirrored and lit."""
        zoom, x, y, flip, light = (
            v.float().view(-1, 1, 1)
            for v in (s.back_zoom, s.back_x, s.back_y, s.back_flip, s.back_light)
        )
        across = (self.grid_x * zoom + x * (1 - zoom)) * (1 - 2 * flip)
        grid = torch.stack([across, self.grid_y * zoom + y * (1 - zoom)], -1)
        backs = self.backs[s.back].float() / 255
        cropped = F.grid_sample(backs, grid, align_corners=False, padding_mode="border")
        return cropped * light[:, None]

    def _put_companion(self, picture: Tensor, s: Scenes) -> Tensor:
        """The second subject, on the other side."""
        pose = Pose(-s.x, s.y, s.other_size, s.turn * 0.7, ~s.flip, s.shadow)
        return self._draw(picture, s.other, Look.plain(s.other_colour), pose)[0]

    def _put_hat(self, picture: Tensor, s: Scenes) -> Tensor:
        """A hat on the subject's top, turned and mirrored with it."""
        top = self.tops[s.subject]
        across, up = top[:, 0] * torch.where(s.flip, -1.0, 1.0), top[:, 1] - 0.12
        cos, sin = torch.cos(s.turn), torch.sin(s.turn)
        pose = Pose(
            s.x + s.size * (cos * across - sin * up),
            s.y + s.size * (sin * across + cos * up),
            s.size * 0.42,
            s.turn,
            s.flip,
            torch.zeros_like(s.hue),
        )
        return self._draw(picture, s.worn, Look.plain(torch.full_like(s.worn, -1)), pose)[0]

    def _draw(
        self, picture: Tensor, sprite: Tensor, look: Look, pose: Pose
    ) -> tuple[Tensor, Tensor]:
        """Lay sprites over pictures [B, 3, H, W] in 0..1; returns pictures and coverage."""
        cx, cy, scale, angle, mirror, dark = (
            v.float().view(-1, 1, 1)
            for v in (pose.x, pose.y, pose.size, pose.turn, 1 - 2 * pose.flip.float(), pose.shadow)
        )
        foot = ((self.grid_x - cx) / (0.42 * scale)) ** 2
        foot = foot + ((self.grid_y - (cy + 0.92 * scale)) / (0.12 * scale)) ** 2
        picture = picture * (1 - dark * torch.exp(-1.2 * foot))[:, None]
        u, v = (self.grid_x - cx) / scale, (self.grid_y - cy) / scale
        cos, sin = torch.cos(angle), torch.sin(angle)
        grid = torch.stack([(cos * u + sin * v) * mirror, cos * v - sin * u], -1)
        soft = (pose.size < 0.52).long() * (len(self.bank) // 2)
        drawn = F.grid_sample(self.bank[sprite + soft].float() / 255, grid, align_corners=False)
        alpha = drawn[:, 3:]
        return picture * (1 - alpha) + self._tint(drawn[:, :3], alpha, look), alpha

    def _tint(self, rgb: Tensor, alpha: Tensor, look: Look) -> Tensor:
        """Recolour premultiplied rgb [B, 3, H, W]; stays within alpha."""
        turn = rgb.new_zeros(len(look.hue), 3, 3)
        turn[:, 0, 0] = 1
        turn[:, 1, 1] = turn[:, 2, 2] = look.saturation * torch.cos(look.hue)
        turn[:, 2, 1] = look.saturation * torch.sin(look.hue)
        turn[:, 1, 2] = -turn[:, 2, 1]
        matrix = torch.linalg.inv(self.yiq) @ turn @ self.yiq * look.brightness.view(-1, 1, 1)
        turned = torch.einsum("bij,bjhw->bihw", matrix, rgb).clamp(min=0).minimum(alpha)
        light = (rgb * self.yiq[0].view(1, 3, 1, 1)).sum(1, keepdim=True) / (alpha + 1e-4)
        paint = self.colours[look.colour + 1].view(-1, 3, 1, 1)
        glint = (light - 0.82).clamp(min=0) * 2.2 * (1 - paint)
        painted = ((paint * (0.42 + 0.85 * light)).clamp(0, 1) + glint).clamp(0, 1) * alpha
        named = (look.colour >= 0).view(-1, 1, 1, 1)
        return torch.where(named, 0.86 * painted + 0.14 * rgb, turned)


def _tops(alpha: Tensor) -> Tensor:
    """Where a hat sits on each sprite [n, 2]: centre of mass of its uppermost rows, in -1..1."""
    side = alpha.shape[-1]
    tops = []
    for a in alpha:
        top = int((a.max(1).values > 0.3).nonzero()[0, 0])
        columns = a[top : top + 14].sum(0)
        middle = (columns * torch.arange(side)).sum() / columns.sum()
        tops.append((float(middle) * 2 / side - 1, top * 2 / side - 1))
    return torch.tensor(tops)
