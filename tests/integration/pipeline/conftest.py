"""A tiny base of one's own and concepts for it, as folders that a person would give."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.tiny import build_tiny_pair


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with teacher/, student/, clip/ and dino/, for `--base`."""
    folder = tmp_path_factory.mktemp("bases") / "tiny"
    build_tiny_pair(folder)
    return folder


@pytest.fixture(scope="session")
def _concepts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prefix") / "concepts"
    gen = torch.Generator().manual_seed(7)
    for concept, noun in (("my-dog", "dog"), ("my-robot", "robot")):
        (folder / concept).mkdir(parents=True)
        for number in range(3):
            colours = torch.randint(0, 256, (6, 5, 3), generator=gen, dtype=torch.uint8)
            picture = Image.fromarray(colours.numpy()).resize((80, 96), Image.Resampling.BILINEAR)
            picture.save(folder / concept / f"{number:02d}.png")
        (folder / concept / "concept.yaml").write_text(f"class_noun: {noun}\nlive: true\n")
    return folder


@pytest.fixture
def concepts(_concepts: Path, tmp_path: Path) -> Path:
    """A prefix of two valid concepts, my-dog and my-robot, of this test's own."""
    return Path(shutil.copytree(_concepts, tmp_path / "concepts"))
