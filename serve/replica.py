"""A painter as a Ray Serve deployment: loads the base, and batches pictures of any concepts."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.base_pair import BasePair, load_base_pair
from model.errors import ServiceError
from serve.api import ApiError, ConceptCard, ModelList
from serve.batcher import Batcher
from serve.engine import BATCH_SIZES, COMPILED_SIZES, DrawError, Engine, PictureRequest
from serve.fast import quicken, with_tiny_decoder
from serve.orders import Order, Painted, Shown
from serve.painter import Drawn, Painter
from serve.pointers import Pointers
from serve.registry import Registry
from serve.safety import load_checker
from serve.settings import ServeSettings
from serve.store import AdapterStore

Queued = tuple[PictureRequest, float]
"""A request, and since when it waits."""


def load_base(settings: ServeSettings) -> BasePair:
    """The base that the settings name, on their device. Raises InputError when it is not whole."""
    pair = _loaded(settings)
    if settings.tiny_decoder is not None:
        pair = with_tiny_decoder(pair, settings.tiny_decoder)
    return quicken(pair, settings.speed, channels_last=settings.channels_last)


def sizes_to_prepare(settings: ServeSettings, device: str) -> tuple[int, ...] | None:
    """Padded sizes that are compiled or captured before the first request.

    None where nothing is: then the engine chooses its sizes.
    """
    if settings.speed == "eager" or device == "cpu":
        return None
    if settings.batch_sizes:
        return settings.padded_sizes
    sizes = COMPILED_SIZES if settings.speed == "compile" else BATCH_SIZES
    steps = zip(sizes, (0, *sizes), strict=False)
    return tuple(size for size, below in steps if below < settings.max_batch)


def _loaded(settings: ServeSettings) -> BasePair:
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
        sizes = sizes_to_prepare(settings, pair.device.type)
        self._engine = Engine(
            pair,
            keys_values_bytes=settings.keys_values_bytes,
            device_bytes=settings.device_bytes,
            batch_sizes=sizes,
        )
        if sizes:
            self._engine.warm()
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
        with contextlib.suppress(ServiceError):  # it may come later; the base draws without it
            pointers.concepts()
        self._painter = Painter(
            self._engine,
            store,
            pointers,
            self._queue,
            cutover_seconds=settings.cutover_seconds,
            encoders=settings.encoders,
            checker=load_checker(settings.safety_checker),
        )
        self._painter.prewarm(settings.prewarm)
        self._batcher = Batcher(self._draw, settings.max_batch, settings.batch_wait_seconds)

    async def paint(self, order: Order) -> Painted | ApiError:
        """The pictures of an order, or why there are none."""
        return await self._painter.paint(order)

    async def models(self, shown: Shown) -> ModelList | ApiError:
        """A page of what can be asked for."""
        return await self._painter.models(shown)

    async def concept(self, concept: str) -> ConceptCard | ApiError:
        """What there is to know of a concept."""
        return await self._painter.concept(concept)

    async def preview(self, concept: str) -> bytes | ApiError:
        """The PNG that came with a concept's champion."""
        return await self._painter.preview(concept)

    async def health(self) -> dict[str, Any]:
        """Facts for `/healthz`; raises when this replica cannot draw."""
        return await self._painter.health(self._health_seconds)

    async def check_health(self) -> None:
        """Ray Serve calls this and replaces a replica for which it raises."""
        await self._painter.health(self._health_seconds)

    async def _queue(self, request: PictureRequest) -> Drawn:
        drawn = await self._batcher((request, time.perf_counter()))
        if isinstance(drawn, DrawError):
            raise drawn
        return drawn

    def _draw(self, queued: Sequence[Queued]) -> list[Drawn | DrawError]:
        start = time.perf_counter()
        requests = [request for request, _ in queued]
        kept = [self._engine.keeps(request) for request in requests]
        pictures = self._pictures(requests)
        spent = time.perf_counter() - start
        mix = len({request.drawer for request in requests})
        memory = self._engine.device_memory()
        return [
            picture
            if isinstance(picture, DrawError)
            else Drawn(picture, start - since, spent, len(requests), mix, known, memory)
            for picture, (_, since), known in zip(pictures, queued, kept, strict=True)
        ]

    def _pictures(self, requests: list[PictureRequest]) -> list[np.ndarray | DrawError]:
        """Pictures of a batch; where it cannot be drawn, who spoils it does so for itself alone."""
        try:
            return list(self._engine.draw(requests))
        except DrawError as error:
            if len(requests) == 1:
                return [error]
        return [self._pictures([request])[0] for request in requests]
