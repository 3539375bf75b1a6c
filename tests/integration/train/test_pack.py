"""Packs through Ray Train, DeepSpeed, MLflow and S3, as they are run."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from components.train import pack as pack_module
from components.train import worker
from components.train.checkpoint import read_state
from components.train.job import BasePaths, PackJob, TrainedConcept
from components.train.pack import train_pack
from components.train.progress import TrainEvent, make_board
from components.train.tracking import TrackingSettings
from model.adapter import load_adapter
from model.errors import InputError, ServiceError
from tests.integration.train.packs import (
    ITERATIONS,
    assert_equal,
    checked_concepts,
    states,
    tiny_spec,
    trained,
)
from tests.unit.train.ranks import on_ranks

pytestmark = pytest.mark.usefixtures("ray_cluster")


class _Remote:
    """An actor's method that ends its caller's process once, at an event of some iteration."""

    def __init__(self, put: Any, marker: Path, iteration: int) -> None:
        self._put, self._marker, self._iteration = put, marker, iteration

    def remote(self, events: list[TrainEvent]) -> None:
        if any(event.iteration >= self._iteration for event in events):
            try:
                self._marker.touch(exist_ok=False)
            except FileExistsError:
                pass
            else:
                os._exit(1)
        self._put.remote(events)


class DeadlyBoard:
    """The progress board, through which rank 0 dies."""

    def __init__(self, board: Any, marker: Path, iteration: int) -> None:
        self.put = _Remote(board.put, marker, iteration)
        self.fail, self.fatal = board.fail, board.fatal


def undisturbed(paths: Any, folder: Path, *sets: str) -> Any:
    return states(trained(tiny_spec(paths, *sets), checked_concepts(folder)))


def last_states(storage: Path) -> Path:
    return sorted(storage.glob("*/checkpoint_*/states"))[-1]


def check_adapters(results: list[TrainedConcept]) -> None:
    for result in results:
        assert (result.state, result.error, result.iterations) == ("trained", None, ITERATIONS)
        assert result.adapter_dir is not None and result.seconds > 0
        adapter = load_adapter(result.adapter_dir, result.sha256)
        assert adapter.meta["concept_digest"] == result.digest
        assert (result.adapter_dir / "preview.png").stat().st_size > 500
        assert any(delta.abs().max() > 0 for delta in adapter.kv_delta.values())


def test_a_pack_goes_on_after_a_worker_died(
    tiny_paths, concepts_folder, tmp_path, tracking_uri, monkeypatch
):
    given = ("teacher_lr=3e-4", "token_lr=1e-3", "student_lr=3e-5", "head_lr=1e-4", "scale_lr=true")
    how = ("train.workers=2", "train.zero_stage=2", "tracking.log_every=1")
    sets = (*how, *(f"train.{rate}" for rate in given))
    spec = tiny_spec(tiny_paths, *sets, "train.checkpoint_seconds=0", "train.max_failures=1")
    marker = tmp_path / "died"

    def deadly_job(**fields: Any) -> PackJob:
        return PackJob(**{**fields, "board": DeadlyBoard(fields["board"], marker, 3)})

    monkeypatch.setattr(pack_module, "PackJob", deadly_job)
    events: list[TrainEvent] = []
    results = train_pack(
        spec,
        checked_concepts(concepts_folder),
        storage_path=str(tmp_path / "runs"),
        tracking=TrackingSettings(tracking_uri, "tests"),
        progress=events.append,
    )
    assert marker.exists()
    check_adapters(results)
    expected = on_ranks(2, undisturbed, tiny_paths, concepts_folder, *sets)[0]
    for name, state in expected.items():
        assert_equal(read_state(last_states(tmp_path / "runs") / name), state)

    assert [e.stage for e in events if e.concept_id == "dog"].count("load") == 2
    dog = [e for e in events if e.concept_id == "dog" and e.losses]
    assert {e.iteration for e in dog} == set(range(1, ITERATIONS + 1))
    assert all(e.iterations == ITERATIONS and e.seconds_per_iteration > 0 for e in dog)
    assert dog[-1].stage == "echo" and "rec" in dog[-1].losses

    client = MlflowClient(tracking_uri)
    experiment = client.get_experiment_by_name("tests")
    runs = {run.info.run_id: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {result.run_id for result in results}
    for result in results:
        run = runs[result.run_id]
        assert run.info.status == "FINISHED" and run.data.params["train.iterations"] == "4"
        for name in ("loss/rec", "loss/mse", "loss/id", "loss/perc", "loss/adv", "loss/disc"):
            steps = {m.step for m in client.get_metric_history(result.run_id, name)}
            assert steps == set(range(1, ITERATIONS + 1)), name
        # Those at a batch of two; the heads' is not scaled. All fall for the last iteration.
        rates = {"lr/teacher": 6e-4, "lr/token": 2e-3, "lr/student": 6e-5, "lr/heads": 1e-4}
        for name, rate in rates.items():
            told = {m.step: m.value for m in client.get_metric_history(result.run_id, name)}
            falling = {step: 0.8 * rate if step == 5 else rate for step in told}
            assert told == pytest.approx(falling) and {4, 5} <= set(told)
        assert run.data.metrics["seconds_per_iteration"] > 0
        stored = {each.path for each in client.list_artifacts(result.run_id)}
        assert stored == {"adapter", "echo", "samples", "spec.yaml"}
        adapter = {each.path for each in client.list_artifacts(result.run_id, "adapter")}
        assert "adapter/adapter.safetensors" in adapter


def test_a_pack_on_s3_resumes_by_name_and_its_states_go_on_elsewhere(
    tiny_paths, concepts_folder, s3_server, s3_bucket, tmp_path
):
    spec = tiny_spec(tiny_paths)
    dog, robot = checked_concepts(concepts_folder)
    gone = replace(dog.images[0], path=str(tmp_path / "gone.png"), uri=str(tmp_path / "gone.png"))
    pack = [replace(dog, id="ghost", images=(gone,)), dog, robot]
    storage = f"{s3_bucket.uri}/runs"
    lost, *first = train_pack(spec, pack, storage_path=storage)
    check_adapters(first)
    assert lost.state == "failed" and lost.adapter_dir is None
    assert "gone.png" in (lost.error or "")  # and the others went on

    # A kill while Ray Train wrote its record has left half of it.
    keys = s3_bucket.client.list_objects_v2(Bucket=s3_bucket.name)["Contents"]
    (record,) = (key["Key"] for key in keys if key["Key"].endswith("_snapshot.json"))
    s3_bucket.client.put_object(Bucket=s3_bucket.name, Key=record, Body=b'{"ray_version": "2')
    again: list[TrainEvent] = []
    _, *second = train_pack(spec, pack, storage_path=storage, progress=again.append)
    assert [r.sha256 for r in second] == [r.sha256 for r in first]
    assert not any(event.losses for event in again)  # nothing was trained again

    keys = s3_bucket.client.list_objects_v2(Bucket=s3_bucket.name)["Contents"]
    checkpoint = sorted({key["Key"].rpartition("/states/")[0] for key in keys} - {""})[-1]
    moved: list[TrainEvent] = []
    alone = train_pack(
        tiny_spec(tiny_paths, "train.zero_stage=3"),
        [dog],
        storage_path=str(tmp_path),
        states=[f"{s3_bucket.uri}/{checkpoint}"],
        progress=moved.append,
    )
    assert alone[0].sha256 == first[0].sha256 and not any(event.losses for event in moved)


def test_a_wrong_base_is_the_users_error_and_not_tried_again(tiny_paths, concepts_folder, tmp_path):
    spec = tiny_spec(tiny_paths, f"base.student={tiny_paths.dino}", "train.max_failures=5")
    events: list[TrainEvent] = []
    with pytest.raises(InputError, match=r"config\.json|diffusers"):
        train_pack(
            spec,
            checked_concepts(concepts_folder),
            storage_path=str(tmp_path),
            progress=events.append,
        )
    assert events == []


def test_a_storage_that_cannot_be_written_is_refused_at_once(
    tiny_paths, concepts_folder, s3_bucket, tmp_path
):
    concepts = checked_concepts(concepts_folder)
    (tmp_path / "file").touch()
    places = {
        f"{tmp_path}/file/runs": "(train.storage_path) can't be written",
        "s3://there-is-no-such-bucket/runs": "there is no such bucket",
    }
    for storage, words in places.items():
        with pytest.raises(InputError) as caught:
            train_pack(tiny_spec(tiny_paths), concepts, storage_path=storage)
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (("train.workers=3",), "not a multiple"),
        (("batch_size=6", "train.items_at_once=4"), "does not divide"),
    ],
)
def test_a_batch_that_cannot_be_shared_is_refused(tiny_paths, concepts_folder, sets, words):
    concepts = checked_concepts(concepts_folder)
    with pytest.raises(InputError, match=words):
        train_pack(tiny_spec(tiny_paths, *sets), concepts)
    with pytest.raises(InputError, match="different ids"):
        train_pack(tiny_spec(tiny_paths), concepts + concepts[:1])


def test_a_full_disk_ends_the_run_without_another_try(
    tiny_paths: Any, concepts_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker can't be given a full disk here, so its training raises what one makes."""
    board = make_board()
    spec = tiny_spec(tiny_paths, f"train.storage_path={tmp_path}")
    concepts = tuple(checked_concepts(concepts_folder))
    job = PackJob(spec, concepts, BasePaths.from_spec(spec), "full", None, (), board)
    tries: list[int] = []

    def train(job: PackJob) -> None:
        tries.append(1)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(worker, "_train", train)
    with pytest.raises(OSError, match="No space"):
        worker.train_func({"job": job})
    worker.train_func({"job": job})  # Ray's next try
    assert len(tries) == 1
    with pytest.raises(ServiceError, match="no space left on the disk"):
        pack_module._raise_fatal(board)
