"""Measuring registered versions of one base: the models are loaded once, when they are needed."""

from __future__ import annotations

import tempfile
from functools import cached_property
from pathlib import Path

import torch

from components.evaluate.card import card_of
from components.evaluate.evaluate import (
    FeatureModels,
    Metrics,
    evaluate_adapter,
    load_feature_models,
    record_metrics,
)
from components.ingest.concept_folder import Concept
from components.ingest.store import resolve_model
from components.register.registry import RegisteredVersion, fetch_adapter
from components.spec import RunSpec
from model.base_pair import BasePair, load_base_pair


class Measurer:
    """Draws and measures with the networks that a run spec names.

    Args:
        spec: the resolved run spec.
        registry: MLflow URI.
    """

    def __init__(self, spec: RunSpec, registry: str) -> None:
        self._spec = spec
        self._registry = registry

    def load(self) -> None:
        """Load the networks now.

        Raises:
            InputError: when one can't be used: that is no concept's fault.
            ServiceError: when one can't be fetched.
        """
        _ = self._pair, self._models

    def measure(
        self,
        version: RegisteredVersion,
        concept: Concept,
        adapter_dir: Path | None = None,
        out: Path | None = None,
    ) -> tuple[RegisteredVersion, Metrics]:
        """Measure a version and record the figures; returns it with them.

        Args:
            version: which one.
            concept: with the reference photos.
            adapter_dir: its adapter; by default it comes from the registry.
            out: a folder to keep the pictures in; None keeps them with the version's run only.
        """
        settings = self._spec.evaluate
        with tempfile.TemporaryDirectory(prefix="echodistill-evaluate-") as scratch:
            if adapter_dir is None:
                adapter_dir = fetch_adapter(version, Path(scratch), tracking_uri=self._registry)
            found = evaluate_adapter(
                adapter_dir,
                concept,
                pair=self._pair,
                models=self._models,
                prompts=settings.prompts,
                seeds=settings.seeds,
                out=out or Path(scratch) / "grids",
            )
            card = card_of(adapter_dir, found)
            measured = record_metrics(version, found, tracking_uri=self._registry, card=card)
        return measured, found

    @cached_property
    def _pair(self) -> BasePair:
        base = self._spec.base
        # Pictures are the student's alone, so it stands in for the teacher, which may be large.
        student = resolve_model(base.student)
        return load_base_pair(
            student,
            student,
            name=base.name,
            device=self._device,
            resolution=self._spec.resolution,
        )

    @cached_property
    def _models(self) -> FeatureModels:
        base = self._spec.base
        return load_feature_models(
            resolve_model(base.metric_clip),
            resolve_model(base.metric_dino),
            clip_name=base.metric_clip,
            dino_name=base.metric_dino,
            device=self._device,
        )

    @property
    def _device(self) -> str:
        wanted = self._spec.train.device
        return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"
