"""The HTTP face over a real engine, store and registry, in this process: no Ray, no sockets."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from model.adapter import load_adapter
from serve.api import ApiError, ConceptCard, ImageResponse, ModelList
from serve.auth import ApiKeys, key_digest
from serve.engine import Engine, PictureRequest
from serve.gateway import IMAGES_PATH, make_http
from serve.orders import Order, Painted, Shown
from serve.painter import Painter
from serve.pointers import Pointers
from serve.registry import Registry
from serve.settings import ServeSettings, load_settings
from serve.store import AdapterStore
from tests.unit.serve.world import BASE, Shelf, alone

PROMPT = "a photo of a dog"


class Here:
    """A painter in this process; `gate` holds its orders back, `trouble` is raised by it."""

    def __init__(self, shelf: Shelf, settings: ServeSettings) -> None:
        self.engine = Engine(shelf.pair)
        registry = Registry(shelf.tracking_uri)
        store = AdapterStore(
            registry,
            settings.cache,
            base_hash=shelf.pair.hash,
            memory_bytes=settings.adapter_bytes,
            check=self.engine.check,
        )
        pointers = Pointers(registry, alias_seconds=settings.alias_seconds, registry_seconds=5)
        self.painter = Painter(self.engine, store, pointers, alone(self.engine))
        self.gate = asyncio.Event()
        self.gate.set()
        self.trouble: Exception | None = None

    async def paint(self, order: Order) -> Painted | ApiError:
        await self.gate.wait()
        if self.trouble is not None:
            raise self.trouble
        return await self.painter.paint(order)

    async def models(self, shown: Shown) -> ModelList | ApiError:
        return await self.painter.models(shown)

    async def concept(self, concept: str) -> ConceptCard | ApiError:
        return await self.painter.concept(concept)

    async def preview(self, concept: str) -> bytes | ApiError:
        return await self.painter.preview(concept)

    async def health(self) -> dict[str, Any]:
        if self.trouble is not None:
            raise self.trouble
        return await self.painter.health(10.0)


class World:
    def __init__(self, shelf: Shelf, here: Here, client: httpx.AsyncClient, log: Path) -> None:
        self.shelf = shelf
        self.here = here
        self.client = client
        self._log = log

    async def post(self, **body: Any) -> httpx.Response:
        return await self.client.post(IMAGES_PATH, json=body)

    def log_lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._log.read_text().splitlines()]


Use = Callable[[World], Awaitable[None]]
Run = Callable[..., None]


@asynccontextmanager
async def opened(
    shelf: Shelf, folder: Path, keys: ApiKeys, options: dict[str, Any]
) -> AsyncIterator[World]:
    settings = load_settings(
        base=BASE,
        student=folder,
        tracking_uri=shelf.tracking_uri,
        cache=folder / "cache",
        access_log=folder / "access.log",
        **options,
    )
    here = Here(shelf, settings)
    transport = httpx.ASGITransport(make_http(here, settings, keys), raise_app_exceptions=True)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield World(shelf, here, client, folder / "access.log")


@pytest.fixture
def run(shelf: Shelf, tmp_path: Path) -> Run:
    """Runs a coroutine against a fresh application."""

    def runner(use: Use, keys: ApiKeys | None = None, **options: Any) -> None:
        async def whole() -> None:
            async with opened(shelf, tmp_path, keys or ApiKeys(), options) as world:
                await use(world)

        asyncio.run(whole())

    return runner


def refused(response: httpx.Response, status: int, code: str, param: str | None = None) -> str:
    """Checks an error's whole shape; returns its message."""
    assert response.status_code == status, response.text
    body = response.json()
    assert list(body) == ["error"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert (body["error"]["code"], body["error"]["param"]) == (code, param), body
    message = body["error"]["message"]
    assert message and "Traceback" not in response.text and "\n" not in message
    return message


def pixels(datum: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(datum["b64_json"]))))


def test_answer_carries_pictures_and_their_origin(run: Run, shelf: Shelf) -> None:
    version, sha256 = shelf.add("rex", 1)

    async def use(world: World) -> None:
        response = await world.post(prompt=PROMPT, model="rex", n=2, seed=5, size="32x32")
        assert response.status_code == 200, response.text
        body = response.json()
        ImageResponse.model_validate(body)
        origin = {
            "model": f"rex@{version}",
            "base": BASE,
            "concept": "rex",
            "version": version,
            "adapter_sha256": sha256,
        }
        assert {name: body[name] for name in origin} == origin
        headers = response.headers
        assert headers["x-echodistill-adapter-sha256"] == sha256
        assert headers["x-echodistill-concept"] == "rex"
        assert headers["x-echodistill-version"] == version
        assert headers["x-echodistill-seeds"] == "5,6"
        assert "draw;dur=" in headers["server-timing"] and headers["x-request-id"]
        assert set(body["timing_ms"]) == {"resolve", "queue", "draw", "encode", "total"}
        adapter = load_adapter(shelf.folder / "rex-1/artifacts/adapter")
        for seed, datum in zip((5, 6), body["data"], strict=True):
            assert datum["seed"] == seed
            assert datum["revised_prompt"] == "a photo of a <new1> dog"
            request = PictureRequest(datum["revised_prompt"], seed, 1, adapter)
            assert np.array_equal(pixels(datum), world.here.engine.draw([request])[0])

    run(use)


def test_bare_base_has_no_origin_of_a_concept(run: Run) -> None:
    async def use(world: World) -> None:
        pictures = []
        for model in ({}, {"model": BASE}, {"model": None}):
            response = await world.post(prompt=PROMPT, seed=1, **model)
            body = response.json()
            assert body["concept"] is body["version"] is body["adapter_sha256"] is None
            assert body["model"] == body["base"] == BASE
            assert "x-echodistill-concept" not in response.headers
            pictures.append(pixels(body["data"][0]))
        assert all(np.array_equal(picture, pictures[0]) for picture in pictures)

    run(use)


def test_formats_steps_and_default_seeds(run: Run) -> None:
    async def use(world: World) -> None:
        for output_format in ("png", "jpeg", "webp"):
            body = (await world.post(prompt=PROMPT, output_format=output_format, seed=1)).json()
            assert body["output_format"] == output_format
            picture = Image.open(io.BytesIO(base64.b64decode(body["data"][0]["b64_json"])))
            assert (picture.format or "").lower() == output_format and picture.size == (32, 32)
        drawn = []
        for steps in (1, 2, 4):
            body = (await world.post(prompt=PROMPT, seed=1, num_inference_steps=steps)).json()
            assert body["num_inference_steps"] == steps
            drawn.append(pixels(body["data"][0]))
        assert not np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[1], drawn[2])
        seeds = {(await world.post(prompt=PROMPT)).json()["data"][0]["seed"] for _ in range(3)}
        assert len(seeds) == 3

    run(use)


def test_versions_and_aliases_are_named_in_the_model(run: Run, shelf: Shelf) -> None:
    first, sha_1 = shelf.add("rex", 1)
    second, sha_2 = shelf.add("rex", 2, alias="candidate")

    async def use(world: World) -> None:
        for name, sha256 in (
            ("rex", sha_1),
            ("rex@champion", sha_1),
            ("rex@candidate", sha_2),
            (f"rex@{first}", sha_1),
            (f"rex@{second}", sha_2),
        ):
            body = (await world.post(prompt=PROMPT, model=name)).json()
            assert body["adapter_sha256"] == sha256

    run(use)


@pytest.mark.parametrize(
    "model",
    ["wolf", "rex@none", "rex@99", "rex@", "rex@a/b", f"{BASE}@1", "../rex", "REX", "a b", "\u00e9",
     "rex@champion@1", "x" * 100, "@", "http://127.0.0.1/x", "rex\u0000"],
)  # fmt: skip
def test_model_that_does_not_exist(run: Run, shelf: Shelf, model: str) -> None:
    shelf.add("rex", 1)

    async def use(world: World) -> None:
        message = refused(
            await world.post(prompt=PROMPT, model=model), 404, "model_not_found", "model"
        )
        assert len(message) < 250

    run(use)


def test_concept_cannot_be_named_like_the_base(run: Run, shelf: Shelf) -> None:
    shelf.add(BASE, 1)

    async def use(world: World) -> None:
        body = (await world.post(prompt=PROMPT, model=BASE)).json()
        assert body["concept"] is None and body["adapter_sha256"] is None
        listed = (await world.client.get("/v1/models")).json()["data"]
        assert [item["id"] for item in listed] == [BASE]

    run(use)


def test_models_are_the_base_and_the_champions(run: Run, shelf: Shelf) -> None:
    version, sha256 = shelf.add("rex", 1)
    shelf.add("tom", 2, alias="candidate")
    shelf.add_folder("Bad Name", shelf.folder / "rex-1", sha256)

    async def use(world: World) -> None:
        body = (await world.client.get("/v1/models")).json()
        assert body["object"] == "list"
        assert [(item["id"], item["version"]) for item in body["data"]] == [
            (BASE, None),
            ("rex", version),
        ]
        assert all(
            item["object"] == "model" and item["owned_by"] == "echodistill" for item in body["data"]
        )

    run(use)


def test_prompt_rule(run: Run, shelf: Shelf) -> None:
    shelf.add("rex", 1)

    async def use(world: World) -> None:
        for prompt, revised in (
            ("a photo of <new1> dog", "a photo of <new1> dog"),
            ("the red dog on the beach", "the red <new1> dog on the beach"),
        ):
            body = (await world.post(prompt=prompt, model="rex")).json()
            assert body["data"][0]["revised_prompt"] == revised
        answer = await world.post(prompt="a photo of a cat", model="rex")
        message = refused(answer, 400, "invalid_prompt", "prompt")
        assert "<new1>" in message and "dog" in message
        answer = await world.post(prompt="dog " * 20, model="rex")
        assert "tokens" in refused(answer, 400, "invalid_prompt", "prompt")
        refused(await world.post(prompt="  "), 400, "invalid_prompt", "prompt")

    run(use)


WRONG = [
    ({}, "missing_required_parameter", "prompt"),
    ({"prompt": ""}, "invalid_value", "prompt"),
    ({"prompt": 3}, "invalid_value", "prompt"),
    ({"prompt": ["a"]}, "invalid_value", "prompt"),
    ({"prompt": None}, "invalid_value", "prompt"),
    ({"prompt": "a" * 1001}, "invalid_value", "prompt"),
    ({"prompt": PROMPT, "n": 0}, "invalid_value", "n"),
    ({"prompt": PROMPT, "n": -1}, "invalid_value", "n"),
    ({"prompt": PROMPT, "n": 11}, "invalid_value", "n"),
    ({"prompt": PROMPT, "n": 10**30}, "invalid_value", "n"),
    ({"prompt": PROMPT, "n": True}, "invalid_value", "n"),
    ({"prompt": PROMPT, "n": "2"}, "invalid_value", "n"),
    ({"prompt": PROMPT, "n": 1.5}, "invalid_value", "n"),
    ({"prompt": PROMPT, "size": "512x512"}, "invalid_value", "size"),
    ({"prompt": PROMPT, "size": "big"}, "invalid_value", "size"),
    ({"prompt": PROMPT, "size": 32}, "invalid_value", "size"),
    ({"prompt": PROMPT, "response_format": "url"}, "invalid_value", "response_format"),
    ({"prompt": PROMPT, "output_format": "gif"}, "invalid_value", "output_format"),
    ({"prompt": PROMPT, "num_inference_steps": 3}, "invalid_value", "num_inference_steps"),
    ({"prompt": PROMPT, "num_inference_steps": True}, "invalid_value", "num_inference_steps"),
    ({"prompt": PROMPT, "num_inference_steps": 1.0}, "invalid_value", "num_inference_steps"),
    ({"prompt": PROMPT, "seed": -1}, "invalid_value", "seed"),
    ({"prompt": PROMPT, "seed": 2**53}, "invalid_value", "seed"),
    ({"prompt": PROMPT, "seed": 2**53 - 1, "n": 2}, "invalid_value", "seed"),
    ({"prompt": PROMPT, "model": 7}, "invalid_value", "model"),
    ({"prompt": PROMPT, "model": ""}, "invalid_value", "model"),
    ({"prompt": PROMPT, "user": "u" * 300}, "invalid_value", "user"),
    ({"prompt": PROMPT, "quality": "hd"}, "unknown_parameter", "quality"),
    ({"prompt": PROMPT, "image_url": "http://169.254.169.254/"}, "unknown_parameter", "image_url"),
]


def test_wrong_fields_are_refused_by_name(run: Run) -> None:
    async def use(world: World) -> None:
        for body, code, param in WRONG:
            refused(await world.post(**body), 400, code, param)
        assert world.here.engine.keys_values_misses == 0

    run(use)


BODIES: list[tuple[bytes, str]] = [
    (b"", "application/json"),
    (b"{", "application/json"),
    (b"[]", "application/json"),
    (b"null", "application/json"),
    (b'"prompt"', "application/json"),
    (b"\xff\xfe\x00", "application/json"),
    (b'{"prompt": "\\ud800"}', "application/json"),
    (b'{"prompt": "a", "\\ud800": 1}', "application/json"),
    (b'{"prompt": "a", "n": NaN}', "application/json"),
    (b'{"prompt": "a", "seed": 1e400}', "application/json"),
    (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "application/json"),
    (b'{"prompt": ' + b"[" * 30000 + b"]" * 30000 + b"}", "application/json"),
    (b"prompt=a", "application/x-www-form-urlencoded"),
    (b'{"prompt": "a"}', "text/plain"),
    (b'{"prompt": "a"}', "application/json; charset=nonsense; =\xff"),
]


def test_bodies_of_all_kinds_are_refused_in_the_same_shape(run: Run) -> None:
    async def use(world: World) -> None:
        for content, kind in BODIES[:-1]:
            response = await world.client.post(
                IMAGES_PATH, content=content, headers={"content-type": kind}
            )
            assert response.status_code == 400, (content[:60], response.text)
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        content, kind = BODIES[-1]
        headers = {b"content-type": kind.encode("latin-1")}
        response = await world.client.post(IMAGES_PATH, content=content, headers=headers)
        assert response.status_code < 500

    run(use)


def test_body_over_the_limit_is_not_read_to_its_end(run: Run) -> None:
    async def use(world: World) -> None:
        sent = 0

        async def endless() -> AsyncIterator[bytes]:
            nonlocal sent
            while True:
                sent += 1024
                yield b" " * 1024

        response = await world.client.post(IMAGES_PATH, content=b" " * 5000)
        refused(response, 413, "request_too_large")
        response = await world.client.post(IMAGES_PATH, content=endless())
        refused(response, 413, "request_too_large")
        assert sent <= 8 * 1024
        response = await world.client.post(IMAGES_PATH, headers={"content-length": "many"})
        refused(response, 413, "request_too_large")

    run(use, max_body=4096)


def test_routes_that_are_not_there(run: Run) -> None:
    async def use(world: World) -> None:
        refused(await world.client.get("/v1/nothing"), 404, "unknown_url")
        refused(await world.client.get("/docs"), 404, "unknown_url")
        response = await world.client.get(IMAGES_PATH)
        refused(response, 405, "method_not_allowed")
        assert response.headers["allow"] == "POST"

    run(use)


def test_error_of_ours_tells_clients_nothing(run: Run) -> None:
    async def use(world: World) -> None:
        world.here.trouble = RuntimeError("secret detail")
        response = await world.post(prompt=PROMPT)
        message = refused(response, 500, "internal_error")
        assert "secret" not in response.text and response.headers["x-request-id"] in message
        refused(await world.client.get("/healthz"), 503, "unavailable")
        world.here.trouble = None
        assert (await world.post(prompt=PROMPT)).status_code == 200

    run(use)


def test_full_queue_is_refused_and_empties(run: Run) -> None:
    async def use(world: World) -> None:
        world.here.gate.clear()
        waiting = [asyncio.create_task(world.post(prompt=PROMPT, n=2)) for _ in range(2)]
        while "echodistill_pending_pictures 4.0" not in (await world.client.get("/metrics")).text:
            await asyncio.sleep(0)
        response = await world.post(prompt=PROMPT)
        refused(response, 429, "queue_full")
        assert int(response.headers["retry-after"]) >= 1
        world.here.gate.set()
        assert [item.status_code for item in await asyncio.gather(*waiting)] == [200, 200]
        assert (await world.post(prompt=PROMPT)).status_code == 200
        text = (await world.client.get("/metrics")).text
        assert "echodistill_pending_pictures 0.0" in text
        assert f'echodistill_requests_total{{route="{IMAGES_PATH}",status="429"}} 1.0' in text
        assert 'echodistill_pictures_total{steps="1"} 5.0' in text
        assert 'echodistill_adapters_total{level="none"} 3.0' in text

    run(use, max_queue=4, max_n=4)


def test_client_that_leaves_gives_its_place_back(run: Run) -> None:
    async def use(world: World) -> None:
        world.here.gate.clear()
        leaving = asyncio.create_task(world.post(prompt=PROMPT, n=4))
        while "echodistill_pending_pictures 4.0" not in (await world.client.get("/metrics")).text:
            await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.wait([leaving])
        assert "echodistill_pending_pictures 0.0" in (await world.client.get("/metrics")).text
        assert world.log_lines()[-2]["status"] == 499

    run(use, max_queue=4, max_n=4)


def test_answer_that_takes_too_long_is_given_up(run: Run) -> None:
    async def use(world: World) -> None:
        world.here.gate.clear()
        response = await world.post(prompt=PROMPT)
        refused(response, 503, "unavailable")
        assert response.headers["retry-after"]
        assert "echodistill_pending_pictures 0.0" in (await world.client.get("/metrics")).text

    run(use, request_seconds=0.05)


def test_version_that_cannot_be_served_says_so(run: Run, shelf: Shelf) -> None:
    shelf.add("rex", 1, tags={"adapter_sha256": "0" * 64})
    shelf.add("tom", 2, tags={"base_hash": "1" * 64})
    shelf.add("kit", 3, tags={"adapter_sha256": ""})

    async def use(world: World) -> None:
        for concept in ("rex", "tom", "kit"):
            answer = await world.post(prompt=PROMPT, model=concept)
            assert concept in refused(answer, 502, "internal_error")

    run(use)


def test_keys_are_asked_for_everywhere_but_for_health(run: Run) -> None:
    keys = ApiKeys({key_digest("k" * 30): "ann", key_digest("m" * 30): "bob"})

    async def use(world: World) -> None:
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "Bearer "},
            {"authorization": "Basic " + "k" * 30},
            {"authorization": "k" * 30},
            {"authorization": "Bearer k\u00e9".encode("latin-1")},
        ):
            for method, path in (
                ("POST", IMAGES_PATH),
                ("GET", "/v1/models"),
                ("GET", "/metrics"),
                ("GET", "/openapi.json"),
                ("GET", "/nothing"),
            ):
                answer = await world.client.request(method, path, headers=headers)
                refused(answer, 401, "invalid_api_key")
        assert (await world.client.get("/healthz")).status_code == 200
        world.client.headers["authorization"] = "Bearer " + "m" * 30
        assert (await world.post(prompt=PROMPT)).status_code == 200
        assert world.log_lines()[-1]["key"] == "bob"

    run(use, keys=keys)


def test_without_keys_only_names_of_this_machine_are_answered(run: Run) -> None:
    async def use(world: World) -> None:
        for host in ("evil.example", "localhost.evil.example:80", "", "127.0.0.1.evil.example"):
            answer = await world.client.get("/v1/models", headers={"host": host})
            refused(answer, 403, "host_refused")
        for host in ("localhost:8000", "127.0.0.1", "[::1]:9"):
            answer = await world.client.get("/v1/models", headers={"host": host})
            assert answer.status_code == 200

    run(use)


def test_access_log_tells_everything_but_prompts(run: Run, shelf: Shelf) -> None:
    version, sha256 = shelf.add("rex", 1)

    async def use(world: World) -> None:
        prompt = "the dog on the beach"
        given = {"x-request-id": "abc-1"}
        body = {"prompt": prompt, "model": "rex", "seed": 3, "n": 2, "user": "someone"}
        await world.client.post(IMAGES_PATH, json=body, headers=given)
        await world.client.get("/secret/path?prompt=" + prompt)
        drawn, lost = world.log_lines()
        expected = {
            "method": "POST",
            "route": IMAGES_PATH,
            "status": 200,
            "request_id": "abc-1",
            "n": 2,
            "steps": 1,
            "seed": 3,
            "model": f"rex@{version}",
            "adapter_sha256": sha256,
        }
        assert {name: drawn[name] for name in expected} == expected
        assert (lost["route"], lost["status"]) == ("other", 404)
        text = json.dumps([drawn, lost])
        assert "beach" not in text and "secret" not in text and "someone" not in text

    run(use)


def test_health_shows_a_picture_and_the_registry(run: Run) -> None:
    async def use(world: World) -> None:
        body = (await world.client.get("/healthz")).json()
        assert (body["status"], body["base"], body["registry"]) == ("ok", BASE, "ok")
        assert body["base_hash"] == world.shelf.pair.hash

    run(use)
