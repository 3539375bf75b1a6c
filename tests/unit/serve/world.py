"""What the endpoint's tests are made of: tiny adapters, and a real registry that holds them."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from model.adapter import save_adapter
from model.adapter_meta import AdapterInfo
from model.base_pair import BasePair
from serve.engine import Engine, PictureRequest
from serve.painter import Drawn

BASE = "tiny"


def write_adapter(
    folder: Path,
    pair: BasePair,
    concept: str,
    seed: int,
    *,
    noun: str = "dog",
    tokens: Sequence[str] = ("<new1>",),
    keep_teacher: bool = False,
) -> str:
    """An adapter that moves pictures visibly; returns its sha256."""
    gen = torch.Generator().manual_seed(seed)
    base = pair.student_kv
    delta = torch.randn(base.shape, generator=gen) * base.std() * 2
    return save_adapter(
        folder,
        pair=pair,
        info=AdapterInfo(concept_id=concept, class_noun=noun, tokens=tuple(tokens)),
        student_kv=base + delta,
        token_rows=torch.randn(len(tokens), base.shape[1], generator=gen) * 10,
        teacher_kv=pair.teacher_kv if keep_teacher else None,
    )


@dataclass
class Shelf:
    """A real MLflow registry, filled by plain MLflow calls as `components/register` fills it."""

    tracking_uri: str
    folder: Path
    pair: BasePair

    def __post_init__(self) -> None:
        self.client = MlflowClient(self.tracking_uri, self.tracking_uri)

    def add(
        self,
        concept: str,
        seed: int,
        *,
        alias: str | None = "champion",
        tags: dict[str, str] | None = None,
        **options: Any,
    ) -> tuple[str, str]:
        """Registers a new version of a concept; returns its version and sha256."""
        model = self.folder / f"{concept}-{seed}"
        place = model / "artifacts" / "adapter"
        sha256 = write_adapter(place, self.pair, concept, seed, **options)
        return self.add_folder(concept, model, sha256, alias=alias, tags=tags), sha256

    def add_folder(
        self,
        concept: str,
        model: Path,
        sha256: str,
        *,
        alias: str | None = "champion",
        tags: dict[str, str] | None = None,
    ) -> str:
        """Registers a model folder as a new version of a concept."""
        name = f"echodistill.{concept}"
        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            assert error.error_code == "RESOURCE_ALREADY_EXISTS"
        given = {
            "adapter_sha256": sha256,
            "base_hash": self.pair.hash,
            "concept_digest": "0" * 64,
            **(tags or {}),
        }
        version = str(self.client.create_model_version(name, str(model), tags=given).version)
        if alias is not None:
            self.point(concept, alias, version)
        return version

    def point(self, concept: str, alias: str, version: str) -> None:
        """Moves an alias."""
        self.client.set_registered_model_alias(f"echodistill.{concept}", alias, version)


def copy_database(template: Path, folder: Path) -> str:
    """A tracking URI of an empty database of its own."""
    shutil.copyfile(template, folder / "mlflow.db")
    return f"sqlite:///{folder / 'mlflow.db'}"


def alone(engine: Engine) -> Any:
    """A painter's `draw` without batching: each picture in a forward of its own."""

    async def draw(request: PictureRequest) -> Drawn:
        picture = (await asyncio.to_thread(engine.draw, [request]))[0]
        return Drawn(picture, 0.0, 0.0, 1)

    return draw
