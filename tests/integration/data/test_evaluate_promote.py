"""Evaluation of real pictures, and the way of a version from candidate to champion and back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from PIL import Image

from components.evaluate.evaluate import (
    FeatureModels,
    evaluate_adapter,
    load_feature_models,
    record_metrics,
)
from components.ingest.concept_folder import Concept
from components.promote.promote import promote, rollback
from components.register.registry import get_version, register_adapter, set_metrics
from components.spec import GateSpec, resolve_spec
from model.adapter import load_adapter
from model.base_pair import BasePair
from model.errors import InputError
from model.names import MEASURED
from model.sampler import draw
from pipeline.assess import Assessor
from tests.integration.data.conftest import MakeAdapter
from tests.tiny import TinyPaths


@pytest.fixture(scope="module")
def models(tiny: TinyPaths) -> FeatureModels:
    return load_feature_models(tiny.clip, tiny.dino, clip_name="tiny:clip")


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def test_the_figures_are_those_of_a_slow_reference(
    make_adapter: MakeAdapter,
    concept: Concept,
    pair: BasePair,
    models: FeatureModels,
    tmp_path: Path,
) -> None:
    """Recomputes every cosine one by one from pictures that are drawn again."""
    folder = make_adapter()
    found = evaluate_adapter(
        folder, concept, pair=pair, models=models, prompts=3, seeds=2, out=tmp_path / "out"
    )
    assert (found.n_prompts, found.n_seeds, found.protocol) == (3, 2, "dreambench 3x2")
    words = ["a {} in the jungle", "a {} with a blue house in the background"]
    words.append("a {} in a police outfit")  # the concept is a dog: live prompts
    adapter = load_adapter(folder)
    cases = (("before", found.before, None, "dog"), ("after", found.after, adapter, "<new1> dog"))
    for name, scores, drawn_with, subject in cases:
        figures: dict[str, list[float]] = {"clip_i": [], "dino": [], "clip_t": []}
        rows = []
        for template in words:
            text = models.clip_text([template.format("dog")])[0].numpy()
            for seed in (0, 1):
                prompt = template.format(subject)
                picture = draw(pair, [drawn_with], [prompt], [seed])[0]
                rows.append(picture)
                signed = picture[None].float() / 127.5 - 1
                mine = models.clip.projected(signed)[0].numpy()
                features = models.dino.features(signed)[0].numpy()
                figures["clip_t"].append(cosine(mine, text))
                for image in concept.images:
                    pixels = np.array(Image.open(image.path))[:, 8:88]  # 96 x 80: the middle
                    square = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
                    small = torch.nn.functional.interpolate(
                        square, size=(32, 32), mode="bilinear", antialias=True
                    )
                    reference = small.round() / 127.5 - 1
                    figures["clip_i"].append(
                        cosine(mine, models.clip.projected(reference)[0].numpy())
                    )
                    figures["dino"].append(
                        cosine(features, models.dino.features(reference)[0].numpy())
                    )
        for metric, values in figures.items():
            assert getattr(scores, metric) == pytest.approx(np.mean(values), abs=0.005), metric
        grid = np.array(Image.open(found.pictures[name]))
        assert grid.shape == (3 * 32, 2 * 32, 3)
        expected = rows[3].permute(1, 2, 0).numpy().astype(int)
        assert np.abs(grid[32:64, 32:] - expected).max() <= 1
    assert found.after != found.before
    assert found.figures()["before_dino"] == found.before.dino


def test_the_report_names_the_feature_models_by_content(
    tiny: TinyPaths, models: FeatureModels
) -> None:
    assert models.names.startswith("CLIP tiny:clip (") and ", DINO dino (" in models.names
    other = load_feature_models(tiny.clip, tiny.vit, clip_name="tiny:clip", dino_name="dino")
    assert other.names != models.names


def test_an_adapter_of_another_base_or_a_folder_of_another_kind_is_refused(
    make_adapter: MakeAdapter,
    concept: Concept,
    pair: BasePair,
    models: FeatureModels,
    tiny: TinyPaths,
) -> None:
    with pytest.raises(InputError, match="was made for base"):
        evaluate_adapter(
            make_adapter(), concept, pair=replace(pair, hash="0" * 64), models=models, prompts=1
        )
    with pytest.raises(InputError):
        load_feature_models(tiny.dino, tiny.dino)


def test_from_candidate_to_champion_and_back(
    tracking_uri: str,
    make_adapter: MakeAdapter,
    concept: Concept,
    pair: BasePair,
    models: FeatureModels,
    tmp_path: Path,
) -> None:
    gate = GateSpec()
    folder = make_adapter()
    first = register_adapter(folder, concept, tracking_uri=tracking_uri)
    found = evaluate_adapter(
        folder, concept, pair=pair, models=models, prompts=2, seeds=1, out=tmp_path / "out"
    )
    measured = record_metrics(first, found, tracking_uri=tracking_uri)
    assert measured.metrics == found.figures()
    client = mlflow.MlflowClient(tracking_uri, tracking_uri)
    files = {item.path for item in client.list_artifacts(first.run_id, "evaluation")}
    assert files == {"evaluation/before.png", "evaluation/after.png"}
    decision = promote(concept.id, first.version, gate, tracking_uri=tracking_uri)
    assert decision.promoted and decision.champion_before is None

    def champion() -> int:
        version = get_version(concept.id, "champion", tracking_uri=tracking_uri)
        assert version is not None
        return version.version

    assert champion() == 1
    with pytest.raises(InputError, match="replaced no champion"):
        rollback(concept.id, tracking_uri=tracking_uri)
    second = register_adapter(make_adapter(2, "b"), concept, tracking_uri=tracking_uri)
    better = replace(
        found, after=replace(found.after, clip_i=found.before.clip_i + 0.1, clip_t=-1.0)
    )
    record_metrics(second, better, tracking_uri=tracking_uri)
    decision = promote(concept.id, "candidate", gate, tracking_uri=tracking_uri)
    assert not decision.promoted and "clip_t -1.000 is more than" in " ".join(decision.reasons)
    assert champion() == 1
    decision = promote(concept.id, 2, gate, tracking_uri=tracking_uri, force=True)
    assert decision.promoted and decision.reasons[0] == "forced" and champion() == 2
    set_metrics(second, {"clip_t": 0.9}, tracking_uri=tracking_uri)
    again = promote(concept.id, 2, gate, tracking_uri=tracking_uri)
    assert again.promoted and "already" in again.reasons[0]
    back = rollback(concept.id, tracking_uri=tracking_uri)
    assert back.champion_before == 2 and champion() == 1

    # What was measured and never put to the gate (its process died) is, when it comes again;
    # what the gate has seen is left alone, also after a roll-back.
    assessor = Assessor(resolve_spec("pocket"), tracking_uri, lambda _: None)

    def finished(number: int) -> int:
        version = get_version(concept.id, number, tracking_uri=tracking_uri)
        assert version is not None and MEASURED in version.metrics
        assessor.finish(version, concept)
        return champion()

    assert finished(2) == 1
    third = register_adapter(make_adapter(3, "c"), concept, tracking_uri=tracking_uri)
    best = replace(found, after=replace(found.before, clip_i=found.before.clip_i + 0.1))
    record_metrics(third, best, tracking_uri=tracking_uri)
    assert finished(3) == 3


def test_what_is_not_there_can_not_be_promoted(tracking_uri: str) -> None:
    with pytest.raises(InputError, match=r"echodistill\.nobody has no version 3"):
        promote("nobody", 3, GateSpec(), tracking_uri=tracking_uri)
    with pytest.raises(InputError, match="has no champion"):
        rollback("nobody", tracking_uri=tracking_uri)


def test_other_prompts_are_used_for_objects(
    make_adapter: MakeAdapter, concept: Concept, pair: BasePair, models: FeatureModels
) -> None:
    folder = make_adapter()
    live, thing = (
        evaluate_adapter(folder, each, pair=pair, models=models, prompts=25, seeds=1)
        for each in (concept, replace(concept, live=False))
    )
    assert live.before.clip_t != thing.before.clip_t
