"""The tiny pair and its backbones, loaded once a session; tests must not change them, but `own`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.base_pair import BasePair, load_base_pair
from model.batch import ConceptData
from model.discriminators import Backbone, load_backbone
from model.iteration import Frozen
from model.settings import ViewSettings
from model.views import ConceptText
from tests.tiny import TinyPaths, build_tiny_pair


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyPaths:
    return build_tiny_pair(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_swapped(tmp_path_factory: pytest.TempPathFactory) -> TinyPaths:
    """The pair with the predictions the other way round: epsilon teacher, v student."""
    folder = tmp_path_factory.mktemp("swapped")
    return build_tiny_pair(
        folder, teacher_prediction="epsilon", student_prediction="v_prediction", seed=1
    )


def load(paths: TinyPaths, dtype: torch.dtype = torch.float32) -> BasePair:
    return load_base_pair(paths.teacher, paths.student, name="tiny", dtype=dtype)


@pytest.fixture(scope="session")
def pair(tiny: TinyPaths) -> BasePair:
    return load(tiny)


@pytest.fixture(scope="session")
def swapped_pair(tiny_swapped: TinyPaths) -> BasePair:
    return load(tiny_swapped)


@pytest.fixture(scope="session")
def backbones(tiny: TinyPaths) -> tuple[Backbone, ...]:
    return tuple(load_backbone(folder) for folder in (tiny.clip, tiny.dino))


@pytest.fixture(scope="session")
def frozen(pair: BasePair, backbones: tuple[Backbone, ...]) -> Frozen:
    return Frozen.build(pair, backbones)


@pytest.fixture
def own(tiny: TinyPaths) -> Frozen:
    """The frozen networks once more, to be changed."""
    return Frozen.build(load(tiny), [load_backbone(folder) for folder in (tiny.clip, tiny.dino)])


@pytest.fixture(scope="session")
def concepts() -> tuple[ConceptData, ...]:
    """Three concepts, three random pictures each."""
    gen = torch.Generator().manual_seed(5)
    made = []
    for name, noun in (("ada", "dog"), ("bob", "cat"), ("cyd", "robot")):
        images = [torch.randint(0, 256, (3, 50, 44), generator=gen).byte() for _ in range(3)]
        text = ConceptText(noun, "<new1>")
        made.append(ConceptData.build(name, text, images, 32, ViewSettings()))
    return tuple(made)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "adapter"
