"""A tiny trained-looking adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from components.ingest.concept_folder import Concept, check_prefix, concept_digest
from model.adapter import save_adapter
from model.adapter_meta import AdapterInfo
from model.base_pair import BasePair, load_base_pair
from tests.tiny import TinyPaths, build_tiny_pair
from tests.unit.data.pictures import concept_folder

MakeAdapter = Callable[..., Path]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyPaths:
    return build_tiny_pair(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def pair(tiny: TinyPaths) -> BasePair:
    return load_base_pair(tiny.teacher, tiny.student, name="tiny")


@pytest.fixture(scope="session")
def concept(tmp_path_factory: pytest.TempPathFactory) -> Concept:
    prefix = tmp_path_factory.mktemp("concepts")
    concept_folder(prefix, "tiny-dog")
    (dog,) = check_prefix(str(prefix))
    assert dog.concept is not None
    return dog.concept


@pytest.fixture
def make_adapter(tiny: TinyPaths, pair: BasePair, concept: Concept, tmp_path: Path) -> MakeAdapter:
    """Writes an adapter folder of `concept` whose weights depend on `seed`."""

    def make(seed: int = 1, spec: str = "spec", name: str = "adapter") -> Path:
        gen = torch.Generator().manual_seed(seed)
        kv = pair.student_kv + 0.3 * torch.randn(pair.student_kv.shape, generator=gen)
        info = AdapterInfo(
            concept_id=concept.id,
            class_noun=concept.class_noun,
            tokens=(concept.token,),
            initializer=concept.initializer,
            base_name="tiny",
            teacher_id=str(tiny.teacher),
            student_id=str(tiny.student),
            spec_digest=spec,
            concept_digest=concept_digest(concept, spec, pair.hash),
            iterations=5,
        )
        folder = tmp_path / f"{name}-{seed}"
        rows = torch.randn(1, pair.student_kv.shape[1], generator=gen)
        save_adapter(folder, pair=pair, info=info, student_kv=kv, token_rows=rows)
        return folder

    return make
