"""The Kubeflow pipeline, every step for real: by kfp's local runner, and with a RayJob's driver."""

from __future__ import annotations

import json
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from components.evaluate.step import evaluate_batch
from components.ingest.step import ingest_prefix
from components.promote.step import promote_batch
from components.register.step import register_batch
from components.report.step import report_run
from components.train.batch import load_batch, plan_batch, save_batch
from components.train.claims import end_lease
from components.train.handover import TO_JUDGE
from components.train.rayjob import drive_as_rayjob
from components.train.rayjob_api import RayJobs, connect
from components.train.state import BatchView, ConceptState, write_states
from pipeline.drive import drive
from pipeline.progress import silent
from tests.conftest import S3Bucket
from tests.integration.pipeline.commands import run
from tests.integration.pipeline.test_run import spec_for
from tests.kubernetes_api import kubernetes_api
from tests.unit.kubeflow.test_kubeflow_rayjob import COMPLETE, MANIFEST, RUNNING
from tests.unit.pipeline.test_batch import checked, spec_at

QUICK = ("train.iterations=2", "echo.rounds=0", "evaluate.prompts=1", "evaluate.seeds=1")


def champions(tracking_uri: str) -> dict[str, str]:
    client = MlflowClient(tracking_uri, tracking_uri)
    found = client.search_registered_models()
    return {model.name: str(model.aliases.get("champion")) for model in found}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kfp_runs_every_step_on_this_machine(
    tiny_base: Path,
    concepts: Path,
    s3_bucket: S3Bucket,
    s3_server: dict[str, str],
    tracking_uri: str,
    ray_cluster: None,
    tmp_path: Path,
) -> None:
    import ray

    (concepts / "my-broken").mkdir()
    (concepts / "my-broken" / "0.png").write_bytes(b"no picture")
    prefix = s3_bucket.upload_folder(concepts, "photos")
    sets = [word for setting in QUICK for word in ("--set", setting)]
    words = ("pipeline", "run", "--local", prefix, "--base", str(tiny_base), *sets, "--json")
    env = {
        **s3_server,
        "MLFLOW_TRACKING_URI": tracking_uri,
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
    }
    done = run(*words, cwd=tmp_path, timeout=400, **env)
    assert done.code == 1, done.stderr  # of the one that is not valid, and of nothing else
    document = done.document
    assert document["counts"] == {"invalid": 1, "trained": 2} and document["state"] == "done"
    for one in (one for one in document["concepts"] if one["id"] != "my-broken"):
        assert (one["state"], one["version"], one["promoted"]) == ("trained", "1", True), one
    assert champions(tracking_uri) == {"echodistill.my-dog": "1", "echodistill.my-robot": "1"}
    assert document["uri"].startswith(f"{s3_bucket.uri}/.echodistill/batches/photos-")
    assert "my-broken: 0.png" in done.stderr and "register: my-dog: version 1" in done.stderr
    assert "report: | my-robot | trained | 1 | yes |" in done.stderr

    # What every step gave out, by kfp's own account.
    folder = tmp_path / "runs" / "pipeline" / document["run"]
    (evaluated,) = folder.rglob("evaluate/executor_output.json")
    (figures,) = json.loads(evaluated.read_text())["artifacts"]["figures"]["artifacts"]
    assert set(figures["metadata"]) >= {"clip_i", "dino", "clip_t", "before_clip_i"}
    (planned,) = folder.rglob("concepts")
    assert set(json.loads(planned.read_text())) == {"my-dog", "my-robot"}

    # What is wrong with a step is told as by every command, and by the step's own exit code.
    wrong = run(*words[:3], f"{prefix}-not", *words[4:], cwd=tmp_path, **env)
    assert wrong.code == 2 and "photos-not holds no files" in wrong.error
    assert wrong.error.endswith("(the step ingest)")


def test_a_rayjobs_driver_trains_and_the_steps_take_over(
    tiny_base: Path, concepts: Path, tmp_path: Path, tracking_uri: str, ray_cluster: None
) -> None:
    """The operator of this cluster runs the entrypoint's driver in a thread of this process."""
    said: list[str] = []
    spec = spec_for(tiny_base, tmp_path)
    ingest = partial(ingest_prefix, str(concepts), spec, said.append, run="run-1")
    batch, _ = ingest()
    threads: list[threading.Thread] = []

    def starts() -> dict[str, Any]:
        (made,) = api.made
        assert made["spec"]["entrypoint"].split()[-2:] == [batch.uri, "--failed"]
        work = partial(drive, batch.uri, silent, threading.Event(), failed=True, look_seconds=0.3)
        threads.append(threading.Thread(target=work))
        threads[0].start()
        return RUNNING

    def ends() -> dict[str, Any]:
        threads[0].join()
        return COMPLETE

    with kubernetes_api() as api:
        jobs = RayJobs("team", connect(api.url, pause=0.0), pause=0.0)
        api.script += [starts, ends]
        trained = drive_as_rayjob(batch.uri, MANIFEST, jobs, said.append, run="run-1")
        assert trained.counts == {"trained": 2} and not api.jobs
        assert champions(tracking_uri) == {}  # the driver left that to the steps

        registered = register_batch(batch.uri, said.append)
        assert [one.version for one in registered.concepts] == ["1", "1"]
        client = MlflowClient(tracking_uri, tracking_uri)
        candidate = client.get_model_version_by_alias("echodistill.my-dog", "candidate")
        assert float(candidate.tags["train_seconds"]) > 0 and candidate.run_id
        assert set(champions(tracking_uri).values()) == {"None"}

        figures = evaluate_batch(batch.uri, said.append)
        assert set(figures) == {"my-dog", "my-robot"} and "clip_t" in figures["my-dog"]
        promoted = promote_batch(batch.uri, said.append)
        assert all(one.good and not one.note for one in promoted.concepts)
        assert set(champions(tracking_uri).values()) == {"1"}

        # Once more: the same batch, in which nothing is left to do.
        again, _ = ingest()
        assert again.uri == batch.uri and load_batch(again.uri).train_only
        before, requests = len(said), len(api.asked)
        drive_as_rayjob(batch.uri, MANIFEST, jobs, said.append, run="run-2")
        register_batch(batch.uri, said.append)
        assert evaluate_batch(batch.uri, said.append) == figures  # of the registry
        promote_batch(batch.uri, said.append)
        assert len(api.asked) == requests and "nothing is left to train" in said[before]
        assert not any("clip" in line.lower() for line in said[before:])

    told = report_run(
        str(concepts), spec, said.append, run="run-1", state="SUCCEEDED", namespace=None
    )
    assert "| my-dog | trained | 1 | yes |" in told
    assert BatchView(batch.uri).read().counts == {"trained": 2}


def test_what_a_person_rolled_back_stays_so(tmp_path: Path, tracking_uri: str) -> None:
    batch, concepts = plan_batch("p", [checked("a")], spec_at(tmp_path), registry=tracking_uri)
    save_batch(batch, concepts)
    end_lease(batch.uri, "done")  # as its driver did
    client = MlflowClient(tracking_uri, tracking_uri)
    client.create_registered_model("echodistill.a")
    for gain in (0.1, 0.2):
        figures = {"clip_i": 0.5 + gain, "dino": 0.5, "clip_t": 0.3, "before_clip_i": 0.5}
        tags = {f"metric.{name}": str(value) for name, value in figures.items()}
        client.create_model_version("echodistill.a", str(tmp_path), tags=tags)
    client.set_registered_model_alias("echodistill.a", "champion", "1")
    said: list[str] = []

    def promoted(note: str) -> ConceptState:
        write_states(batch, [ConceptState("a", "trained", version="2", promoted=True, note=note)])
        return promote_batch(batch.uri, said.append).concepts[0]

    # It was champion, and somebody has given the place back to version 1 since.
    assert not promoted("").promoted and champions(tracking_uri) == {"echodistill.a": "1"}
    one = promoted(TO_JUDGE)  # this one waits for its gate
    assert one.promoted and not one.note and champions(tracking_uri) == {"echodistill.a": "2"}
