"""The Ray Serve application: a gateway that speaks HTTP, and painters that draw.

Two deployments, so that HTTP and drawing scale and fail apart. A painter batches pictures of any
concepts; Ray's multiplexing is not used, for it splits batches by model.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray.exceptions
import torch
from pydantic import SecretStr
from ray import serve as ray_serve
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from model.base_pair import BasePair, load_base_pair
from serve.api import ApiError, ModelCard, busy
from serve.auth import ApiKeys, read_keys
from serve.engine import Engine, PictureRequest
from serve.gateway import make_http
from serve.guard import App
from serve.painter import Drawn, Order, Painted, Painter
from serve.pointers import Pointers
from serve.registry import Registry
from serve.settings import ServeSettings
from serve.store import AdapterStore

APP_NAME = "echodistill"
PAINTER_NAME = "painter"
GATEWAY_NAME = "gateway"
# A gateway only waits: it takes many more requests than its queue holds, to refuse them itself, in
# the API's own shape.
GATEWAY_REQUESTS = 2000


def load_base(settings: ServeSettings) -> BasePair:
    """The base that the settings name, on their device. Raises InputError when it is not whole."""
    student = settings.student or _pocket_student()
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, settings.dtype)
    # The teacher draws nothing here, so the student stands in for it.
    return load_base_pair(student, student, name=settings.base, dtype=dtype, device=device)


def _pocket_student() -> Path:
    from model.pocket import pocket_paths

    return Path(pocket_paths().student)


class PainterReplica:
    """Ray Serve deployment around `serve.painter.Painter`: loads the base, and batches pictures."""

    def __init__(self, settings: ServeSettings) -> None:
        pair = load_base(settings)
        self._health_seconds = settings.health_seconds
        self._engine = Engine(pair, keys_values_bytes=settings.keys_values_bytes)
        self._engine.prove()
        registry = Registry(settings.tracking_uri)
        store = AdapterStore(
            registry,
            settings.cache,
            base_hash=pair.hash,
            memory_bytes=settings.adapter_bytes,
            check=self._engine.check,
        )
        pointers = Pointers(
            registry,
            alias_seconds=settings.alias_seconds,
            registry_seconds=settings.registry_seconds,
        )
        self._painter = Painter(self._engine, store, pointers, self._queue)
        self._drawing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="draw")
        self._batched.set_max_batch_size(settings.max_batch)
        self._batched.set_batch_wait_timeout_s(settings.batch_wait_seconds)

    async def paint(self, order: Order) -> Painted | ApiError:
        """The pictures of an order, or why there are none."""
        return await self._painter.paint(order)

    async def models(self) -> list[ModelCard] | ApiError:
        """What can be asked for."""
        return await self._painter.models()

    async def health(self) -> dict[str, Any]:
        """Facts for `/healthz`; raises when this replica cannot draw."""
        return await self._painter.health(self._health_seconds)

    async def check_health(self) -> None:
        """Ray Serve calls this and replaces a replica for which it raises."""
        await self._painter.health(self._health_seconds)

    async def _queue(self, request: PictureRequest) -> Drawn:
        return await self._batched((request, time.perf_counter()))

    @ray_serve.batch
    async def _batched(self, queued: list[tuple[PictureRequest, float]]) -> list[Drawn]:
        start = time.perf_counter()
        requests = [request for request, _ in queued]
        loop = asyncio.get_running_loop()
        pictures = await loop.run_in_executor(self._drawing, self._engine.draw, requests)
        spent = time.perf_counter() - start
        return [
            Drawn(picture, start - since, spent, len(requests))
            for picture, (_, since) in zip(pictures, queued, strict=True)
        ]


class RemotePainter:
    """The painters behind a deployment handle, as the gateway sees them."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def paint(self, order: Order) -> Painted | ApiError:
        """The pictures of an order, or why there are none."""
        return await self._call("paint", order)

    async def models(self) -> list[ModelCard] | ApiError:
        """What can be asked for."""
        return await self._call("models")

    async def health(self) -> dict[str, Any]:
        """Facts for `/healthz`."""
        facts = await self._call("health")
        if isinstance(facts, ApiError):
            raise facts
        return facts

    async def _call(self, method: str, *args: Any) -> Any:
        # An order names its seed, so drawing it again on another replica gives the same pictures.
        for _ in range(2):
            response = getattr(self._handle, method).remote(*args)
            try:
                return await response
            except asyncio.CancelledError:
                response.cancel()
                raise
            except ray.exceptions.RayActorError:
                continue
            except (BackPressureError, DeploymentUnavailableError):
                break
        return busy("No replica can draw now: try again later.", status=503, retry_after=5)


def build_app(settings: ServeSettings, keys: ApiKeys | None = None) -> ray_serve.Application:
    """The Ray Serve application of the settings.

    Args:
        settings: all settings; keys in them do not travel, only their digests do.
        keys: accepted API keys, read from the settings when not given.

    Raises:
        InputError: when others could reach the endpoint but no key is set.
    """
    accepted = read_keys(settings) if keys is None else keys
    travelling = settings.model_copy(update={"api_keys": SecretStr("")})

    def make_gateway() -> App:
        handle = ray_serve.get_deployment_handle(PAINTER_NAME, app_name=APP_NAME)
        return make_http(RemotePainter(handle), travelling, accepted)

    gpus = settings.replica_gpus
    if gpus is None:
        gpus = 1.0 if settings.device.startswith("cuda") else 0.0
    painter = ray_serve.deployment(
        PainterReplica,
        name=PAINTER_NAME,
        num_replicas=settings.replicas,
        ray_actor_options={"num_cpus": settings.replica_cpus, "num_gpus": gpus},
        # The gateway bounds what waits; a few more calls leave room for health and lists.
        max_ongoing_requests=settings.max_queue + 16,
        max_queued_requests=settings.max_queue + 16,
        health_check_period_s=settings.health_seconds,
        health_check_timeout_s=max(30.0, 3 * settings.health_seconds),
        # What is wrong with a base stays wrong: one more try is for what passes.
        max_constructor_retry_count=2,
    )
    gateway = ray_serve.deployment(
        ray_serve.ingress(make_gateway)(),
        name=GATEWAY_NAME,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=GATEWAY_REQUESTS,
        max_queued_requests=GATEWAY_REQUESTS,
    )
    return gateway.bind(painter.bind(travelling))
