"""From a prefix to champions, in one Ray: results, what is not done again, what is finished."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from mlflow import MlflowClient

from components.spec import RunSpec, resolve_spec
from components.train.lineage import trained_on
from pipeline.base import base_settings
from pipeline.evaluate import evaluate
from pipeline.progress import Event
from pipeline.run import train_prefix
from pipeline.versions import spec_of

PARENT = "mlflow.parentRunId"


def no_cluster() -> AbstractContextManager[None]:
    raise AssertionError("nothing was left to train, but a cluster was asked for")


def spec_for(base: Path, folder: Path, *sets: str) -> RunSpec:
    preset, own = base_settings(str(base))
    quick = (
        "train.iterations=2",
        "echo.rounds=0",
        "evaluate.prompts=2",
        "evaluate.seeds=1",
        f"train.storage_path={folder / 'train'}",
    )
    return resolve_spec(preset, None, [*own, *quick, *sets])


def test_from_a_prefix_to_champions(
    tiny_base: Path, concepts: Path, tmp_path: Path, tracking_uri: str, ray_cluster: None
) -> None:
    """One story, told in one test, because every training run costs ten seconds to start."""
    (concepts / "my-broken").mkdir()
    (concepts / "my-broken" / "0.png").write_bytes(b"no picture")
    events: list[Event] = []
    spec = spec_for(tiny_base, tmp_path)

    # One pack of two; the broken one is told and stops nobody.
    dog, broken, robot = sorted(
        train_prefix(str(concepts), spec, progress=events.append),
        key=lambda result: ["my-dog", "my-broken", "my-robot"].index(result.id),
    )
    assert broken.state == "invalid" and "0.png" in (broken.error or "")
    client = MlflowClient(tracking_uri, tracking_uri)
    for result in (dog, robot):
        assert (result.state, result.version, result.error) == ("trained", "1", None)
        assert result.iterations == 2 and result.seconds > 0 and result.promoted
        version = client.get_model_version_by_alias(f"echodistill.{result.id}", "champion")
        assert version.tags["adapter_sha256"] == result.sha256
        assert float(version.tags["train_seconds"]) == pytest.approx(result.seconds, abs=1e-3)
        assert set(result.metrics) >= {"clip_i", "dino", "clip_t", "before_clip_i"}
        run = client.get_run(result.run_id)
        assert run.info.status == "FINISHED" and run.data.metrics["gpu_seconds"] == 0
        assert run.data.metrics["seconds"] == pytest.approx(result.seconds)
        read = trained_on(run)
        assert read is not None and read.digest == (result.concept and result.concept.digest)
    assert dog.sha256 != robot.sha256
    stages = [event.stage for event in events if event.subject == "my-dog"]
    assert stages[0] == "train" and stages[-3:] == ["register", "evaluate", "promote"]
    counted = [event for event in events if event.stage == "train" and event.done == 2]
    assert {event.subject for event in counted} == {"my-dog", "my-robot"}

    # Both are below one run, which tells of the batch.
    (parent,) = {client.get_run(each.run_id).data.tags[PARENT] for each in (dog, robot)}
    batch = client.get_run(parent)
    assert batch.info.status == "FINISHED" and batch.info.run_name == "concepts"
    figures = batch.data.metrics
    assert (figures["concepts/trained"], figures["concepts/invalid"]) == (2, 1)
    assert figures["seconds"] == pytest.approx(dog.seconds + robot.seconds, abs=0.01)
    (report,) = (i for i in client.list_artifacts(parent) if i.path == "report.html")
    assert report.file_size > 10_000

    # Measured once more, by what its run knows: the figures are the same.
    (again,) = evaluate(
        ["my-dog"],
        lambda version: spec_of(version, [], tracking_uri=tracking_uri),
        concepts=None,
        out=tmp_path / "out",
        tracking_uri=tracking_uri,
        progress=events.append,
    )
    assert again.champion and again.version.metrics == pytest.approx(dog.metrics)
    assert again.photos.place == str(concepts / "my-dog") and not again.photos.note

    # Again: nothing is trained, whatever is asked of workers, ZeRO stage or pack.
    other_ways = spec_for(tiny_base, tmp_path, "train.zero_stage=1", "pack.size=1")
    twice = train_prefix(str(concepts), other_ways, cluster=no_cluster)
    assert [r.state for r in twice] == ["invalid", "already", "already"]
    assert [r.sha256 for r in twice if r.sha256] == [dog.sha256, robot.sha256]
    assert all(r.promoted and r.iterations == 2 and r.seconds > 0 for r in twice[1:])

    # A run that was interrupted between registering and promoting is taken to its end.
    model = f"echodistill.{dog.id}"
    client.delete_registered_model_alias(model, "champion")
    for name in dog.metrics:
        client.delete_model_version_tag(model, "1", f"metric.{name}")
    (finished,) = train_prefix(str(concepts / "my-dog"), spec, cluster=no_cluster)
    assert finished.state == "already" and finished.promoted
    assert finished.metrics == pytest.approx(dog.metrics)

    # Forced, it is a new version, and the gate decides. Alone instead of in a pack, its weights
    # are the same to round-off.
    (forced,) = train_prefix(str(concepts / "my-dog"), spec, force=True)
    assert (forced.state, forced.version) == ("trained", "2")
    assert forced.metrics == pytest.approx(dog.metrics, abs=1e-3)
    champion = client.get_model_version_by_alias(model, "champion").version
    assert str(champion) == ("2" if forced.promoted else "1")


def test_a_concept_cannot_be_named_like_the_base(
    tiny_base: Path, concepts: Path, tmp_path: Path, tracking_uri: str
) -> None:
    (concepts / "my-dog").rename(concepts / "tiny")
    (result,) = train_prefix(
        str(concepts / "tiny"), spec_for(tiny_base, tmp_path), cluster=no_cluster
    )
    assert result.state == "invalid" and "name of the base" in (result.error or "")
