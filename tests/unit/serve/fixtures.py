from __future__ import annotations

from pathlib import Path

import pytest

from model.base_pair import BasePair, load_base_pair
from tests.tiny import build_tiny_pair
from tests.unit.serve.world import BASE, Shelf, copy_database


@pytest.fixture(scope="session")
def tiny_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_pair(tmp_path_factory.mktemp("tiny")).student


@pytest.fixture(scope="session")
def tiny_pair(tiny_student: Path) -> BasePair:
    return load_base_pair(tiny_student, tiny_student, name=BASE)


@pytest.fixture
def shelf(tmp_path: Path, mlflow_template: Path, tiny_pair: BasePair) -> Shelf:
    return Shelf(copy_database(mlflow_template, tmp_path), tmp_path / "models", tiny_pair)
