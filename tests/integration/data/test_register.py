"""Registering adapters: SQLite, a real MLflow server, two processes at once, a fresh reader."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path

import mlflow
import numpy as np
import pytest
from PIL import Image

from components.ingest.concept_folder import Concept
from components.register.connection import DEFAULT_EXPERIMENT
from components.register.registry import (
    CANDIDATE,
    RegisteredVersion,
    fetch_adapter,
    find_version_by_digest,
    get_version,
    register_adapter,
    set_metrics,
)
from model.adapter import load_adapter
from model.base_pair import BasePair
from model.errors import InputError, ServiceError
from model.sampler import draw
from tests.conftest import S3Bucket
from tests.integration.data.conftest import MakeAdapter
from tests.tiny import TinyPaths


@pytest.fixture(params=["sqlite", "http"])
def server(request: pytest.FixtureRequest, concept: Concept) -> str:
    """Each kind of tracking URI, without versions of the concept."""
    if request.param == "sqlite":
        return str(request.getfixturevalue("tracking_uri"))
    uri = str(request.getfixturevalue("mlflow_server"))
    client = mlflow.MlflowClient(uri, uri)
    for model in client.search_registered_models():
        client.delete_registered_model(model.name)
    return uri


def picture(data: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(data))).transpose(2, 0, 1)


def test_a_version_has_everything_a_reader_needs(
    server: str, make_adapter: MakeAdapter, concept: Concept, pair: BasePair, tmp_path: Path
) -> None:
    folder = make_adapter()
    made = register_adapter(folder, concept, tracking_uri=server)
    adapter = load_adapter(folder)
    assert (made.name, made.version) == ("echodistill.tiny-dog", 1)
    assert made.sha256 == adapter.sha256
    assert get_version("tiny-dog", CANDIDATE, tracking_uri=server) == made
    digest = adapter.meta["concept_digest"]
    assert find_version_by_digest("tiny-dog", digest, tracking_uri=server) == made
    assert find_version_by_digest("tiny-dog", "0" * 64, tracking_uri=server) is None
    assert get_version("tiny-dog", 7, tracking_uri=server) is None
    assert get_version("nobody", "champion", tracking_uri=server) is None
    expected = {
        "concept_digest": digest,
        "spec_digest": "spec",
        "base_hash": pair.hash,
        "adapter_sha256": adapter.sha256,
        "class_noun": "dog",
        "token": "<new1>",
    }
    assert expected.items() <= made.tags.items()
    fetched = fetch_adapter(made, tmp_path / "down", tracking_uri=server)
    assert {path.name for path in fetched.iterdir()} == {path.name for path in folder.iterdir()}
    assert load_adapter(fetched).sha256 == adapter.sha256


def test_registering_the_same_digest_again_makes_no_version(
    server: str, make_adapter: MakeAdapter, concept: Concept
) -> None:
    first = register_adapter(make_adapter(), concept, tracking_uri=server)
    other = register_adapter(make_adapter(seed=2, spec="other"), concept, tracking_uri=server)
    assert (first.version, other.version) == (1, 2)
    assert register_adapter(make_adapter(), concept, tracking_uri=server) == first
    candidate = get_version("tiny-dog", CANDIDATE, tracking_uri=server)
    assert candidate is not None and candidate.version == 1, "what was asked for last"
    forced = register_adapter(make_adapter(seed=3), concept, tracking_uri=server, force=True)
    assert forced.version == 3
    digest = first.tags["concept_digest"]
    assert find_version_by_digest("tiny-dog", digest, tracking_uri=server) == forced


def _register(arguments: tuple[Path, Concept, str]) -> RegisteredVersion:
    folder, concept, uri = arguments
    return register_adapter(folder, concept, tracking_uri=uri)


def test_processes_that_register_one_digest_at_once_keep_one_version(
    server: str, make_adapter: MakeAdapter, concept: Concept
) -> None:
    jobs = [(make_adapter(seed=seed), concept, server) for seed in (1, 2)]
    if server.startswith("sqlite"):
        with multiprocessing.get_context("spawn").Pool(2) as processes:
            made = processes.map(_register, jobs, chunksize=1)
    else:  # clients of a server share nothing, so that threads are as good and start at once
        with ThreadPool(2) as threads:
            made = threads.map(_register, jobs, chunksize=1)
    client = mlflow.MlflowClient(server, server)
    left = client.search_model_versions("name = 'echodistill.tiny-dog'")
    assert len(left) == 1
    assert {item.version for item in made} == {int(left[0].version)}
    assert {item.sha256 for item in made} == {left[0].tags["adapter_sha256"]}


def test_the_registered_model_draws_in_a_fresh_process(
    server: str,
    make_adapter: MakeAdapter,
    concept: Concept,
    pair: BasePair,
    tmp_path: Path,
) -> None:
    folder = make_adapter()
    made = register_adapter(folder, concept, tracking_uri=server)
    mlflow.MlflowClient(server, server).set_registered_model_alias(made.name, "champion", "1")
    script = (
        "import json, sys\n"
        # What other extras than `serve` bring.
        "sys.modules |= dict.fromkeys(['deepspeed', 'moto', 'ray.train', 'kfp'])\n"
        "import mlflow\n"
        "m = mlflow.pyfunc.load_model('models:/echodistill.tiny-dog@champion')\n"
        "a = m.predict({'prompt': 'a dog in the snow', 'seed': 3})['image'][0]\n"
        "b = m.predict([{'prompt': 'a <new1> dog', 'seed': 7, 'steps': 2}])['image'][0]\n"
        "open(sys.argv[1], 'wb').write(a); open(sys.argv[2], 'wb').write(b)\n"
        "print(json.dumps(m.metadata.signature.to_dict()))\n"
    )
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, paths)],
        env={**os.environ, "MLFLOW_TRACKING_URI": server, "MLFLOW_REGISTRY_URI": server},
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[3],
    )
    assert done.returncode == 0, done.stderr
    adapter = load_adapter(folder)
    expected = draw(pair, [adapter], ["a <new1> dog in the snow"], [3], 1)[0].numpy()
    assert np.array_equal(picture(paths[0].read_bytes()), expected)
    expected = draw(pair, [adapter], ["a <new1> dog"], [7], 2)[0].numpy()
    assert np.array_equal(picture(paths[1].read_bytes()), expected)
    signature = json.loads(done.stdout)
    assert [column["name"] for column in json.loads(signature["inputs"])] == [
        "prompt",
        "seed",
        "steps",
    ]


def test_the_base_of_the_registered_model_may_lie_elsewhere(
    tracking_uri: str,
    make_adapter: MakeAdapter,
    concept: Concept,
    tiny: TinyPaths,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = make_adapter()
    facts = json.loads((folder / "adapter.json").read_text())
    facts["base"]["student"] = "some-org/some-model"
    (folder / "adapter.json").write_text(json.dumps(facts))
    register_adapter(folder, concept, tracking_uri=tracking_uri)
    uri = "models:/echodistill.tiny-dog@candidate"
    with pytest.raises(InputError, match="set ECHODISTILL_BASE_STUDENT"):
        mlflow.pyfunc.load_model(uri)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(tiny.student, elsewhere)
    model = mlflow.pyfunc.load_model(uri, model_config={"student": str(elsewhere)})
    first = model.predict({"prompt": "a dog"})["image"][0]
    monkeypatch.setenv("ECHODISTILL_BASE_STUDENT", str(elsewhere))
    monkeypatch.setenv("ECHODISTILL_BASE_TEACHER", str(tiny.teacher))
    assert mlflow.pyfunc.load_model(uri).predict({"prompt": "a dog"})["image"][0] == first


def test_an_adapter_that_changed_in_the_store_is_refused(
    tracking_uri: str, make_adapter: MakeAdapter, concept: Concept, tmp_path: Path
) -> None:
    made = register_adapter(make_adapter(), concept, tracking_uri=tracking_uri)
    stored = next((tmp_path / "mlartifacts").rglob("adapter.safetensors"))
    other = make_adapter(seed=2)
    for name in ("adapter.safetensors", "adapter.json"):  # whole in itself, but another one
        shutil.copyfile(other / name, stored.parent / name)
    with pytest.raises(InputError, match="is not what its tag adapter_sha256 says"):
        fetch_adapter(made, tmp_path / "down", tracking_uri=tracking_uri)
    assert not (tmp_path / "down" / "adapter").exists()
    with pytest.raises(InputError, match="not the expected"):
        mlflow.pyfunc.load_model("models:/echodistill.tiny-dog@candidate")


def test_artifacts_may_lie_on_s3(
    tracking_uri: str,
    make_adapter: MakeAdapter,
    concept: Concept,
    s3_bucket: S3Bucket,
    tmp_path: Path,
) -> None:
    client = mlflow.MlflowClient(tracking_uri, tracking_uri)
    client.create_experiment(DEFAULT_EXPERIMENT, artifact_location=f"{s3_bucket.uri}/mlflow")
    made = register_adapter(make_adapter(), concept, tracking_uri=tracking_uri)
    keys = [
        item["Key"] for item in s3_bucket.client.list_objects_v2(Bucket=s3_bucket.name)["Contents"]
    ]
    assert any(key.endswith("artifacts/adapter/adapter.safetensors") for key in keys)
    fetched = fetch_adapter(made, tmp_path / "down", tracking_uri=tracking_uri)
    assert load_adapter(fetched).sha256 == made.sha256


def test_metrics_become_tags_and_figures_of_the_run(
    server: str, make_adapter: MakeAdapter, concept: Concept
) -> None:
    made = register_adapter(make_adapter(), concept, tracking_uri=server)
    measured = set_metrics(made, {"clip_i": 0.75, "dino": 0.5}, tracking_uri=server)
    read = get_version("tiny-dog", made.version, tracking_uri=server)
    assert read == measured
    assert read is not None and read.metrics == {"clip_i": 0.75, "dino": 0.5}
    run = mlflow.MlflowClient(server, server).get_run(made.run_id)
    assert run.data.metrics == {"eval.clip_i": 0.75, "eval.dino": 0.5}


def test_a_foreign_or_broken_adapter_is_not_registered(
    tracking_uri: str, make_adapter: MakeAdapter, concept: Concept
) -> None:
    from dataclasses import replace

    folder = make_adapter()
    with pytest.raises(InputError, match="is the adapter of 'tiny-dog', not of 'other'"):
        register_adapter(folder, replace(concept, id="other"), tracking_uri=tracking_uri)
    weights = folder / "adapter.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(InputError, match="sha256"):
        register_adapter(folder, concept, tracking_uri=tracking_uri)
    assert mlflow.MlflowClient(tracking_uri, tracking_uri).search_registered_models() == []


def test_a_server_out_of_reach_is_a_service_error(
    make_adapter: MakeAdapter, concept: Concept, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        uri = f"http://user:secret@127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ServiceError, match="did not answer") as caught:
            find_version_by_digest("tiny-dog", "0" * 64, tracking_uri=uri)
    assert "secret" not in str(caught.value)
    with pytest.raises(InputError, match="is no MLflow server"):
        register_adapter(make_adapter(), concept, tracking_uri="redis://somewhere")
