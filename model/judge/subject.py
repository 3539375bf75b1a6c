"""Where the subject of a picture of the pocket world is: a small U-Net."""

import torch
from torch import nn
from torch.nn import functional as F

SIDE = 64
_WIDTHS = (16, 32, 48, 64)
_GROUP = 8


def _layer(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.GroupNorm(outputs // _GROUP, outputs),
        nn.SiLU(),
    )


class SubjectNetwork(nn.Module):
    """Pictures [R, 3, 64, 64] in [-1, 1] to logits [R, 1, 64, 64]."""

    def __init__(self) -> None:
        super().__init__()
        inputs = (3, *_WIDTHS[:-1])
        self.down = nn.ModuleList(
            nn.Sequential(_layer(i, o), _layer(o, o)) for i, o in zip(inputs, _WIDTHS, strict=True)
        )
        pairs = list(zip(_WIDTHS[:-1], _WIDTHS[1:], strict=True))
        self.up = nn.ModuleList(_layer(fine + coarse, fine) for fine, coarse in reversed(pairs))
        self.logit = nn.Conv2d(_WIDTHS[0], 1, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Compute one logit a pixel."""
        x, seen = images, []
        for level, block in enumerate(self.down):
            x = block(x if level == 0 else F.max_pool2d(x, 2))
            seen.append(x)
        for block, fine in zip(self.up, reversed(seen[:-1]), strict=True):
            x = block(torch.cat([fine, F.interpolate(x, scale_factor=2)], dim=1))
        logit: torch.Tensor = self.logit(x)
        return logit
