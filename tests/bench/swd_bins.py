"""How far MS-SWD by counting in bins is from MS-SWD by sorting: `python -m tests.bench.swd_bins`.

A sample concept's picture against itself with some of another's mixed in: the nearer the two are,
the more signs of the gradient hang on a projection's last digits.
"""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

import model.pocket
from model import swd

SIDE, DIRECTIONS = 256, 32
BINS = (1024, 4096, 16384)


def picture(concept: str) -> torch.Tensor:
    """Give a reference picture [1, 3, S, S] in [-1, 1]."""
    path = Path(model.pocket.__file__).parent / "concepts" / concept / "00.png"
    pixels = np.asarray(Image.open(path).convert("RGB").resize((SIDE, SIDE)))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1


def measured(
    x: torch.Tensor, y: torch.Tensor, directions: torch.Tensor, bins: int | None
) -> tuple[float, torch.Tensor]:
    """Give the distance and its gradient."""
    x = x.clone().requires_grad_()
    distance = swd.ms_swd(x, y, directions, bins=bins)
    distance.sum().backward()
    assert x.grad is not None
    return float(distance.detach()), x.grad


def main() -> None:
    """Print a row for each distance: how far value and gradient are, in percent."""
    x, other = picture("dog"), picture("cat")
    raw = torch.randn(1, DIRECTIONS, 3, 11, 11, generator=torch.Generator().manual_seed(0))
    directions, project = swd.unit_directions(raw), swd._project_rows
    for part in (0.005, 0.02, 0.1, 1.0):
        y = torch.lerp(x, other, part)
        distance, gradient = measured(x, y, directions, None)
        words = [f"distance {distance:6.3f}"]
        for kind in (torch.float32, torch.float16):
            with mock.patch.object(swd, "_project_rows", lambda i, w, k=kind: project(i, w).to(k)):
                for bins in BINS:
                    found, mine = measured(x, y, directions, bins)
                    off = float((mine - gradient).norm() / gradient.norm())
                    words.append(f"{bins}: {abs(found / distance - 1):.2%} {off:.1%}")
            words.append("|")
        print("  ".join(words[:-1]), flush=True)


if __name__ == "__main__":
    main()
