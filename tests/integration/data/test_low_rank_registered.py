"""An adapter of low rank from the registry: drawn as it was registered, and exported."""

from __future__ import annotations

import io
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from components.ingest.concept_folder import Concept
from components.register.registry import register_adapter
from model.adapter import load_adapter, write_adapter
from model.base_pair import BasePair
from model.errors import InputError
from model.rank_choice import with_rank
from model.sampler import draw
from pipeline.export import export
from tests.integration.data.conftest import MakeAdapter


def test_low_rank_versions_are_drawn_and_exported_as_registered(
    make_adapter: MakeAdapter,
    concept: Concept,
    pair: BasePair,
    tracking_uri: str,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "small"
    sha256 = write_adapter(folder, with_rank(pair, load_adapter(make_adapter()), 4, 0.5))
    made = register_adapter(folder, concept, tracking_uri=tracking_uri)
    assert made.sha256 == sha256
    model = mlflow.pyfunc.load_model("models:/echodistill.tiny-dog@candidate")
    words = f"a photo of a {concept.token} dog"
    png = model.predict(pd.DataFrame([{"prompt": words, "seed": 3}])).image[0]
    mine = draw(pair, [load_adapter(folder)], [words], [3])[0].permute(1, 2, 0).numpy()
    drawn = np.asarray(Image.open(io.BytesIO(png))).astype(np.int16)
    assert np.abs(drawn - mine.astype(np.int16)).max() <= 1

    def to(out: Path, name: str) -> object:
        return export(
            name,
            adapter_dir=None,
            format="diffusers",
            rank=None,
            out=out,
            tracking_uri=tracking_uri,
            progress=lambda event: None,
        ).document()

    found = to(tmp_path / "out", "tiny-dog@candidate")
    assert isinstance(found, dict)
    assert (found["version"], found["sha256"], found["rank"]) == ("1", sha256, 4)
    assert found["off"] == {"weights": 0.0, "pictures": 0.0}
    with pytest.raises(InputError, match="no version 9"):
        to(tmp_path / "none", "tiny-dog@9")
    assert not (tmp_path / "none").exists()
