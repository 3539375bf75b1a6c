from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.integration.train.packs import write_concepts
from tests.tiny import build_tiny_pair


@pytest.fixture(scope="session")
def tiny_paths(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return build_tiny_pair(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def concepts_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("concepts")
    write_concepts(folder)
    return folder
