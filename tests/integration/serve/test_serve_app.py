"""The Ray Serve application over real HTTP: one endpoint for the whole file."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from model.adapter import Adapter, load_adapter
from model.base_pair import BasePair
from model.errors import InputError, ServiceError
from serve.auth import new_key
from serve.endpoint import start
from serve.engine import Engine, PictureRequest
from serve.gateway import IMAGES_PATH
from serve.settings import ServeSettings, load_settings
from tests.unit.serve.world import BASE, Shelf, copy_database

ALIAS_SECONDS = 0.2
MOVES = 50
QUEUE = 16
PROMPTS = ("a photo of a dog", "the red dog on the beach")


@dataclass
class Running:
    url: str
    key: str
    shelf: Shelf
    log: Path
    adapters: dict[str, Adapter]  # by sha256
    versions: dict[tuple[str, str], str]  # (concept, version) -> sha256
    engine: Engine  # draws what the endpoint should have drawn, one picture at a time

    def client(self, **options: Any) -> httpx.Client:
        headers = {"authorization": f"Bearer {self.key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, **options)

    def expected(self, sha256: str | None, prompt: str, seed: int, steps: int) -> np.ndarray:
        adapter = None if sha256 is None else self.adapters[sha256]
        return self.engine.draw([PictureRequest(prompt, seed, steps, adapter)])[0]


def test_base_that_cannot_be_loaded_is_one_sentence(
    ray_cluster: None, tmp_path: Path, mlflow_template: Path
) -> None:
    settings = load_settings(
        base=BASE, student=tmp_path, tracking_uri=copy_database(mlflow_template, tmp_path), port=0
    )
    with pytest.raises(InputError) as caught:
        start(settings)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def running(
    ray_cluster: None,
    tmp_path_factory: pytest.TempPathFactory,
    mlflow_template: Path,
    tiny_student: Path,
    tiny_pair: BasePair,
) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("endpoint")
    shelf = Shelf(copy_database(mlflow_template, folder), folder / "models", tiny_pair)
    versions = {}
    for seed, concept in enumerate(("rex", "tom", "kit", "rex", "mover", "mover")):
        version, sha256 = shelf.add(concept, seed)
        versions[concept, version] = sha256
    adapters = {
        adapter.sha256: adapter
        for adapter in map(load_adapter, (folder / "models").glob("*/artifacts/adapter"))
    }
    key, line = new_key("tests")
    (folder / "keys.txt").write_text(line + "\n")
    endpoint = start(
        ServeSettings(
            base=BASE,
            student=tiny_student,
            tracking_uri=shelf.tracking_uri,
            cache=folder / "cache",
            port=0,
            api_keys_file=folder / "keys.txt",
            access_log=folder / "access.log",
            alias_seconds=ALIAS_SECONDS,
            health_seconds=1.0,
            max_queue=QUEUE,
        )
    )
    yield Running(
        endpoint.url, key, shelf, folder / "access.log", adapters, versions, Engine(tiny_pair)
    )
    endpoint.stop()


def pixels(b64_json: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64_json))))


def off(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def test_unmodified_openai_client_draws(running: Running) -> None:
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key=running.key)
    listed = [model.id for model in client.models.list()]
    assert listed == [BASE, "kit", "mover", "rex", "tom"]
    result = client.images.generate(
        model="rex@1",
        prompt=PROMPTS[0],
        n=2,
        size="32x32",  # type: ignore[call-overload]
        response_format="b64_json",
        output_format="png",
        user="someone",
        extra_body={"seed": 4, "num_inference_steps": 2},
    )
    sha256 = running.versions["rex", "1"]
    assert result.model_extra["adapter_sha256"] == sha256
    assert len(result.data) == 2
    for seed, datum in zip((4, 5), result.data, strict=True):
        assert datum.revised_prompt == "a photo of a <new1> dog"
        drawn = running.expected(sha256, datum.revised_prompt, seed, 2)
        assert off(pixels(datum.b64_json), drawn) <= 1


def test_openai_client_raises_its_own_errors(running: Running) -> None:
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key=running.key, max_retries=0)
    with pytest.raises(openai.NotFoundError) as missing:
        client.images.generate(model="wolf", prompt=PROMPTS[0])
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.images.generate(model="rex", prompt=PROMPTS[0], quality="hd")
    assert wrong.value.code == "unknown_parameter" and wrong.value.param == "quality"
    stranger = openai.OpenAI(base_url=f"{running.url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        stranger.images.generate(prompt=PROMPTS[0])


def test_concurrent_mixture_never_gets_another_concepts_picture(running: Running) -> None:
    orders = [
        (model, sha256, prompt, seed, steps)
        for seed, (model, sha256) in enumerate(
            [
                ("rex", running.versions["rex", "2"]),
                ("rex@1", running.versions["rex", "1"]),
                ("tom", running.versions["tom", "1"]),
                ("kit@champion", running.versions["kit", "1"]),
                (BASE, None),
            ]
            * 2
        )
        for prompt in PROMPTS
        for steps in (1, 2, 4)
    ]

    def check(order: tuple[str, str | None, str, int, int]) -> None:
        model, sha256, prompt, seed, steps = order
        body = {"model": model, "prompt": prompt, "seed": seed, "num_inference_steps": steps}
        response = client.post(IMAGES_PATH, json={**body, "n": 2})
        assert response.status_code == 200, response.text
        answer = response.json()
        assert answer["adapter_sha256"] == sha256
        assert response.headers.get("x-echodistill-adapter-sha256") == sha256
        for i, datum in enumerate(answer["data"]):
            drawn = running.expected(sha256, datum["revised_prompt"], seed + i, steps)
            assert off(pixels(datum["b64_json"]), drawn) <= 1

    with running.client() as client, ThreadPoolExecutor(8) as threads:
        assert len(list(threads.map(check, orders))) == 60
    lines = [json.loads(line) for line in running.log.read_text().splitlines()]
    batches = [batch for line in lines for batch in line.get("batches", [])]
    assert max(batches) > 2  # more than one request's pictures in one forward


def test_moved_champion_is_picked_up_under_load(running: Running) -> None:
    """Every answer is by a version that was champion from just before its request to its end."""
    reigns: list[tuple[str, float]] = [("2", 0.0)]  # version, from when it may have been champion
    ends: list[float] = []  # until when the version of the same place may have been
    stop, answered = threading.Event(), threading.Event()
    answers: list[tuple[float, float, dict[str, Any]]] = []

    def ask() -> None:
        with running.client() as client:
            while not stop.is_set():
                begun = time.monotonic()
                body = {"model": "mover", "prompt": PROMPTS[0], "seed": 1}
                response = client.post(IMAGES_PATH, json=body)
                assert response.status_code == 200, response.text
                answers.append((begun, time.monotonic(), response.json()))
                answered.set()

    def served() -> str:
        return answers[-1][2]["version"]

    with running.client() as client:  # once loaded, a version is followed at once
        for model in ("mover@1", "mover@2"):
            client.post(IMAGES_PATH, json={"model": model, "prompt": PROMPTS[0]}).raise_for_status()
    with ThreadPoolExecutor(3) as threads:
        asking = [threads.submit(ask) for _ in range(3)]
        try:
            for move in range(MOVES):
                version = "1" if move % 2 == 0 else "2"
                reigns.append((version, time.monotonic()))
                running.shelf.point("mover", "champion", version)
                ends.append(time.monotonic())
                deadline = time.monotonic() + 30
                while True:
                    answered.clear()
                    assert answered.wait(30) and not any(item.done() for item in asking)
                    # Every fifth move is waited for; the others come while one is on its way.
                    if move % 5 or served() == version or time.monotonic() > deadline:
                        break
                assert move % 5 or served() == version
        finally:
            stop.set()
        for item in asking:
            item.result()
    ends.append(float("inf"))
    assert len(answers) >= MOVES
    drawn_by = {
        sha256: running.expected(sha256, answers[0][2]["data"][0]["revised_prompt"], 1, 1)
        for (concept, _), sha256 in running.versions.items()
        if concept == "mover"
    }
    for begun, ended, answer in answers:
        version, sha256 = answer["version"], answer["adapter_sha256"]
        assert sha256 == running.versions["mover", version]
        assert any(
            name == version and since <= ended and until >= begun - ALIAS_SECONDS
            for (name, since), until in zip(reigns, ends, strict=True)
        )
        assert off(pixels(answer["data"][0]["b64_json"]), drawn_by[sha256]) <= 1


def test_ten_times_more_than_it_takes_is_refused_and_then_all_is_well(running: Running) -> None:
    """Every request is answered rightly or told to come back, and the queue empties."""
    body = {"model": "kit", "prompt": PROMPTS[0], "seed": 3}

    async def ask(client: httpx.AsyncClient) -> httpx.Response:
        return await client.post(IMAGES_PATH, json=body)

    async def flood() -> list[httpx.Response]:
        headers = {"authorization": f"Bearer {running.key}"}
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=running.url, headers=headers, timeout=300, limits=limits
        ) as client:
            return await asyncio.gather(*(ask(client) for _ in range(10 * QUEUE)))

    responses = asyncio.run(flood())
    drawn = running.expected(running.versions["kit", "1"], "a photo of a <new1> dog", 3, 1)
    for response in responses:
        if response.status_code == 200:
            assert off(pixels(response.json()["data"][0]["b64_json"]), drawn) <= 1
        else:
            assert response.status_code in (429, 503), response.text
            assert int(response.headers["retry-after"]) >= 1
    counts = Counter(response.status_code for response in responses)
    assert counts[200] >= QUEUE and counts[429] + counts[503] > 0, counts
    with running.client() as client:
        assert client.post(IMAGES_PATH, json=body).status_code == 200
        assert "echodistill_pending_pictures 0.0" in client.get("/metrics").text


def test_second_endpoint_on_the_same_ray_is_refused_and_harms_nobody(running: Running) -> None:
    with pytest.raises(ServiceError, match="already runs"):
        start(load_settings(port=0))
    with running.client() as client:
        assert client.get("/healthz").status_code == 200


def test_keys_health_metrics_and_log_over_http(running: Running) -> None:
    with httpx.Client(base_url=running.url, timeout=60) as stranger:
        assert stranger.post(IMAGES_PATH, json={"prompt": PROMPTS[0]}).status_code == 401
        assert stranger.get("/v1/models").status_code == 401
        health = stranger.get("/healthz")
        assert health.status_code == 200 and health.json()["registry"] == "ok"
    with running.client() as client:
        response = client.post(IMAGES_PATH, json={"prompt": "a photo of a cat", "model": "tom"})
        assert response.status_code == 400 and response.json()["error"]["param"] == "prompt"
        assert response.headers.get_list("x-request-id", split_commas=True) != []
        assert "echodistill_pictures_total" in client.get("/metrics").text
        assert client.get("/openapi.json").json()["info"]["title"] == "EchoDistill"
        assert client.get("/v1/none").json()["error"]["code"] == "unknown_url"
    text = running.log.read_text()
    assert running.key not in text and "beach" not in text and '"key": "tests"' in text


def test_killed_painter_is_replaced_and_no_answer_is_wrong(running: Running) -> None:
    import ray
    from ray.util.state import list_actors

    address = ray.get_runtime_context().gcs_address
    sha256 = running.versions["tom", "1"]
    name = "ServeReplica:echodistill:painter"
    alive = [("class_name", "=", name), ("state", "=", "ALIVE")]
    (before,) = (actor.pid for actor in list_actors(address, filters=alive))
    answered = refused = 0
    deadline = time.monotonic() + 120
    with running.client() as client, ThreadPoolExecutor(4) as threads:

        def ask(seed: int) -> httpx.Response:
            body = {"model": "tom", "prompt": PROMPTS[0], "seed": seed, "n": 2}
            return client.post(IMAGES_PATH, json=body)

        asked = [threads.submit(ask, seed) for seed in range(8)]
        os.kill(before, signal.SIGKILL)
        while asked:
            for seed, item in enumerate(asked):
                response = item.result()
                if response.status_code == 200:
                    answered += 1
                    answer = response.json()
                    assert answer["adapter_sha256"] == sha256
                    prompt = answer["data"][0]["revised_prompt"]
                    drawn = running.expected(sha256, prompt, seed, 1)
                    assert off(pixels(answer["data"][0]["b64_json"]), drawn) <= 1
                else:
                    refused += 1
                    assert response.status_code == 503, response.text
                    assert response.json()["error"]["code"] == "unavailable"
                    assert response.headers["retry-after"]
            again = time.monotonic() < deadline and response.status_code != 200
            asked = [threads.submit(ask, 0)] if again else []
        assert response.status_code == 200
    (after,) = (actor.pid for actor in list_actors(address, filters=alive))
    assert after != before and answered >= 1
