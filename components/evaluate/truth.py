"""True renders of the sample concepts in scenes for new prompts (model/pocket/truth)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

from model import pocket
from model.errors import InputError

_FOLDER = Path(pocket.__file__).parent / "truth"


def truth_prompts(count: int | None = None) -> list[str]:
    """Return the prompts of the scenes that are rendered; `{}` is the subject.

    Raises:
        InputError: for a count that is not 1 to all.
    """
    prompts: list[str] = yaml.safe_load((_FOLDER / "prompts.yaml").read_text(encoding="utf-8"))
    count = len(prompts) if count is None else count
    if not 1 <= count <= len(prompts):
        raise InputError(f"{count} prompts were asked for: give 1 to {len(prompts)}")
    return prompts[:count]


def true_renders(concept_id: str, references: Sequence[str]) -> torch.Tensor | None:
    """Return a sample concept's true pictures, uint8 [P, K, 3, S, S]: P prompts, K renders.

    Args:
        concept_id: the concept's id.
        references: sha256 of its images; another concept may have a sample's name.

    Returns:
        None for a concept that is not one of the samples.
    """
    sheet = _FOLDER / f"{concept_id}.webp"
    if not sheet.is_file() or set(references) != _sample_digests(concept_id):
        return None
    pixels = torch.from_numpy(np.array(Image.open(sheet).convert("RGB"))).permute(2, 0, 1)
    side = pixels.shape[2] // len(truth_prompts())
    tiles = pixels.unfold(1, side, side).unfold(2, side, side)  # [3, K, P, S, S]
    return tiles.permute(2, 1, 0, 3, 4).contiguous()


def _sample_digests(concept_id: str) -> set[str]:
    from components.ingest.cache import file_sha256

    folder = Path(pocket.__file__).parent / "concepts" / concept_id
    return {file_sha256(path) for path in folder.glob("*.png")}
