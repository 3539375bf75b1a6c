"""What the register step writes is what the endpoint draws with, and draws the same as MLflow."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from components.ingest.concept_folder import Concept
from components.register.registry import register_adapter
from model.adapter import prompt_for, save_adapter
from model.adapter_meta import AdapterInfo
from model.base_pair import BasePair
from model.errors import InputError
from model.names import CHAMPION
from pipeline.generate import generate
from serve.engine import Engine, PictureRequest
from serve.registry import Registry
from serve.store import AdapterStore


def test_registered_version_is_served_as_mlflow_draws_it(
    tracking_uri: str,
    tmp_path: Path,
    tiny_pair: BasePair,
    tiny_student: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    concept = Concept("rex", "dog", "<new1>", "dog", True, ())
    base = tiny_pair.student_kv
    save_adapter(
        tmp_path / "adapter",
        pair=tiny_pair,
        info=AdapterInfo("rex", "dog", ("<new1>",), concept_digest="1" * 64),
        student_kv=base + 0.3 * base.flip(0),
        token_rows=base[:1] * 20,
    )
    registered = register_adapter(tmp_path / "adapter", concept, tracking_uri=tracking_uri)
    shutil.rmtree(tmp_path / "adapter")
    client = mlflow.MlflowClient(tracking_uri, tracking_uri)
    client.set_registered_model_alias(registered.name, CHAMPION, str(registered.version))

    registry = Registry(tracking_uri)
    pinned = registry.find("rex", CHAMPION)
    assert pinned is not None
    assert (pinned.version, pinned.sha256) == (str(registered.version), registered.sha256)
    engine = Engine(tiny_pair)
    store = AdapterStore(
        registry,
        tmp_path / "cache",
        base_hash=tiny_pair.hash,
        memory_bytes=2**20,
        check=engine.check,
    )
    adapter, level = store.adapter(pinned)
    assert level == "registry"

    monkeypatch.setenv("ECHODISTILL_BASE_STUDENT", str(tiny_student))
    pyfunc = mlflow.pyfunc.load_model(f"models:/{registered.name}@{CHAMPION}")
    asked = [("a photo of a dog", 3, 1), ("the dog on the beach", 4, 4)]
    drawn = pyfunc.predict(pd.DataFrame(asked, columns=["prompt", "seed", "steps"]))
    for (prompt, seed, steps), file in zip(asked, drawn["image"], strict=True):
        request = PictureRequest(prompt_for(adapter.meta, prompt), seed, steps, adapter)
        picture = engine.draw([request])[0]
        assert np.array_equal(picture, np.asarray(Image.open(io.BytesIO(file))))
        assert picture.std() > 1

    too_long = "dog " * 20
    with pytest.raises(InputError, match="21 tokens"):
        pyfunc.predict(pd.DataFrame([{"prompt": too_long}]))
    with pytest.raises(InputError, match="21 tokens"):
        generate(
            "rex",
            too_long,
            seed=0,
            steps=1,
            n=1,
            out=tmp_path / "out",
            tracking_uri=tracking_uri,
            base={"teacher": str(tiny_student), "student": str(tiny_student)},
            progress=lambda event: None,
        )
    assert not (tmp_path / "out").exists()
