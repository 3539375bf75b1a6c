"""The painter itself: moved aliases, loading beforehand, the safety hook; traces and metrics."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny

from model.base_pair import BasePair, load_base_pair
from model.errors import InputError
from serve import gateway
from serve.api import ApiError
from serve.cutover import CutOver
from serve.engine import Engine, PictureRequest
from serve.fast import with_tiny_decoder
from serve.gateway import IMAGES_PATH
from serve.orders import Order, Painted
from serve.painter import Painter
from serve.pointers import Pointers
from serve.registry import Pinned, Registry
from serve.safety import load_checker
from serve.store import AdapterStore
from serve.traces import open_tracer
from tests.unit.serve.test_serve_gateway import PROMPT, Run, World, run
from tests.unit.serve.world import BASE, Shelf, alone

__all__ = ["run"]


class Slow:
    """A registry whose downloads wait until `go` is set."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.go = threading.Event()
        self.go.set()
        self.downloads = 0

    def download(self, pinned: Pinned, folder: Path) -> Path:
        self.downloads += 1
        self.go.wait(60)
        return self.registry.download(pinned, folder)


class Studio:
    """A painter over a real engine and registry; every alias is asked for anew."""

    def __init__(self, shelf: Shelf, cache: Path, **options: Any) -> None:
        registry = Registry(shelf.tracking_uri)
        self.slow = Slow(registry)
        self.engine = Engine(shelf.pair)
        self.store = AdapterStore(
            self.slow, cache, base_hash=shelf.pair.hash, memory_bytes=2**30, check=self.engine.check
        )
        pointers = Pointers(registry, alias_seconds=0.0, registry_seconds=60.0)
        self.painter = Painter(self.engine, self.store, pointers, alone(self.engine), **options)

    async def paint(self, model: str) -> Painted | ApiError:
        return await self.painter.paint(Order(model, PROMPT, 1, 0, 1, None, "png"))

    async def sha256(self, model: str) -> str | None:
        painted = await self.paint(model)
        assert isinstance(painted, Painted) and painted.pinned is not None, painted
        return painted.pinned.sha256


def test_an_alias_is_followed_until_it_was_last_known_too_long_ago() -> None:
    now = 0.0
    cutover = CutOver(10.0, lambda: now)
    one, two = (Pinned("rex", version, version * 64, "h") for version in "12")
    assert cutover.before("rex", "champion", one) is None
    cutover.serves("rex", "champion", one)
    assert cutover.before("rex", "champion", one) is None
    assert cutover.before("rex", "candidate", two) is None
    now = 9.0
    assert cutover.before("rex", "champion", two) == one
    now = 10.0
    assert cutover.before("rex", "champion", two) is None
    cutover.serves("rex", "champion", two)
    assert cutover.before("rex", "champion", one) == two  # back again, likewise


def test_nobody_waits_for_a_moved_champion_and_then_all_have_it(
    shelf: Shelf, tmp_path: Path
) -> None:
    _, first = shelf.add("rex", 1)
    studio = Studio(shelf, tmp_path / "cache", cutover_seconds=600.0)

    async def use() -> None:
        assert await studio.sha256("rex") == first
        studio.slow.go.clear()
        version, second = shelf.add("rex", 2)
        for _ in range(3):
            assert await studio.sha256("rex") == first
        named = asyncio.create_task(studio.sha256(f"rex@{version}"))  # its version is waited for
        assert await studio.sha256("rex") == first and not named.done()
        studio.slow.go.set()
        assert await named == second
        assert await studio.sha256("rex") == second
        assert studio.slow.downloads == 2
        shelf.point("rex", "champion", "1")
        assert await studio.sha256("rex") == first  # it is still in memory

    asyncio.run(use())


def test_a_champion_that_moved_long_ago_is_waited_for(shelf: Shelf, tmp_path: Path) -> None:
    shelf.add("rex", 1)
    studio = Studio(shelf, tmp_path / "cache", cutover_seconds=0.0)

    async def use() -> None:
        await studio.sha256("rex")
        _, second = shelf.add("rex", 2)
        assert await studio.sha256("rex") == second

    asyncio.run(use())


def test_clients_are_not_told_where_the_registry_is(
    shelf: Shelf, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    away = Registry("http://127.0.0.1:9")
    engine = Engine(shelf.pair)
    store = AdapterStore(
        away, tmp_path, base_hash=shelf.pair.hash, memory_bytes=2**30, check=engine.check
    )
    pointers = Pointers(away, alias_seconds=0.0, registry_seconds=60.0)
    painter = Painter(engine, store, pointers, alone(engine))
    refused = asyncio.run(painter.paint(Order("rex", PROMPT, 1, 0, 1, None, "png")))
    assert isinstance(refused, ApiError) and refused.status == 503 and refused.retry_after
    assert "127.0.0.1" not in refused.message and "log" in refused.message
    assert "http://127.0.0.1:9 did not answer" in caplog.text


def test_champions_are_loaded_beforehand(shelf: Shelf, tmp_path: Path) -> None:
    for seed, concept in enumerate(("rex", "tom", "kit")):
        shelf.add(concept, seed)
    shelf.add("bad", 4, tags={"adapter_sha256": "0" * 64})

    async def levels(studio: Studio) -> list[str]:
        painted = [await studio.paint(concept) for concept in ("rex", "tom", "kit")]
        return [each.level for each in painted if isinstance(each, Painted)]

    studio = Studio(shelf, tmp_path / "some")
    studio.painter.prewarm("rex,bad,nobody,kit")
    assert asyncio.run(levels(studio)) == ["memory", "registry", "memory"]
    studio = Studio(shelf, tmp_path / "all")
    studio.painter.prewarm("*")
    assert asyncio.run(levels(studio)) == ["memory"] * 3


def dark_only(picture: np.ndarray, prompt: str) -> str | None:
    assert picture.dtype == np.uint8 and picture.ndim == 3
    return "it is of a dog" if "dog" in prompt else None


def test_the_safety_hook_holds_pictures_back(shelf: Shelf, tmp_path: Path) -> None:
    checker = load_checker(f"{__name__}:dark_only")
    studio = Studio(shelf, tmp_path, checker=checker)
    painted = asyncio.run(studio.paint(BASE))
    assert isinstance(painted, ApiError)
    assert (painted.status, painted.code) == (400, "content_policy_violation")
    assert "it is of a dog" in painted.message
    cat = Order(BASE, "a cat", 1, 0, 1, None, "png")
    assert isinstance(asyncio.run(studio.painter.paint(cat)), Painted)
    assert load_checker("") is None
    for wrong in ("no.such.module:f", f"{__name__}:nothing", f"{__name__}:__name__"):
        with pytest.raises(InputError, match="safety checker"):
            load_checker(wrong)


def test_an_answer_is_one_trace_with_its_stages(
    run: Run, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    _, sha256 = shelf.add("rex", 1)
    spans, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    monkeypatch.setattr(gateway, "open_tracer", lambda kind: provider.get_tracer(kind))

    async def use(world: World) -> None:
        caller = f"00-{'a' * 32}-{'b' * 16}-01"
        body = {"prompt": PROMPT, "model": "rex"}
        await world.client.post(IMAGES_PATH, json=body, headers={"traceparent": caller})
        await world.client.post(IMAGES_PATH, json={"prompt": ""})

    run(use, traces="console")
    *stages, whole = spans.get_finished_spans()
    assert [span.name for span in stages] == ["resolve", "queue", "draw", "encode"]
    assert (whole.name, whole.attributes["echodistill.adapter_sha256"]) == ("images", sha256)
    assert all(span.parent.span_id == whole.context.span_id for span in stages)
    assert whole.context.trace_id == int("a" * 32, 16)
    assert PROMPT not in "".join(span.to_json() for span in spans.get_finished_spans())


def test_traces_that_cannot_be_sent_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_tracer("") is None
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(InputError, match="not installed"):
        open_tracer("otlp")


def test_metrics_tell_mixes_and_kept_keys_and_values(run: Run) -> None:
    async def use(world: World) -> None:
        await world.post(prompt=PROMPT, n=2)
        text = (await world.client.get("/metrics")).text
        assert "echodistill_batch_adapters_count 2.0" in text
        assert 'echodistill_keys_values_total{found="no"} 2.0' in text
        for stage in ("resolve", "queue", "draw", "encode"):
            assert f'echodistill_stage_seconds_count{{stage="{stage}"}} 1.0' in text

    run(use)


def test_a_tiny_decoder_draws_in_place_of_the_vae(
    tmp_path: Path, tiny_student: Path, tiny_pair: BasePair
) -> None:
    def write(name: str, channels: int) -> Path:
        torch.manual_seed(0)
        AutoencoderTiny(
            latent_channels=channels,
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            num_encoder_blocks=(1, 1, 1),
            num_decoder_blocks=(1, 1, 1),
        ).save_pretrained(tmp_path / name)
        return tmp_path / name

    pair = load_base_pair(tiny_student, tiny_student, name=BASE)
    request = [PictureRequest("a photo of a dog", 1)]
    drawn = Engine(with_tiny_decoder(pair, write("fits", 4))).draw(request)
    whole = Engine(tiny_pair).draw(request)
    assert drawn.shape == whole.shape and not np.array_equal(drawn, whole)
    with pytest.raises(InputError, match="latents of 5 channels"):
        with_tiny_decoder(pair, write("other", 5))
    with pytest.raises(InputError, match="config.json"):
        with_tiny_decoder(pair, tmp_path / "none")
