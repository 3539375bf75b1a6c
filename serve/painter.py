"""From an order to finished picture files: version, adapter, prompt rule, drawing, encoding.

A plain asyncio class: the Ray Serve deployment around it only adds batching. Refusals are returned,
not raised, since they travel between processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from model.adapter import Adapter, prompt_for
from model.errors import EchoDistillError, InputError, ServiceError
from model.names import CHAMPION, CONCEPT_ID, METRIC_TAG, SHA256_TAG
from serve.api import (
    ApiError,
    ConceptCard,
    ModelCard,
    ModelRef,
    VersionCard,
    busy,
    parse_model,
    server_error,
    unknown_model,
)
from serve.engine import Engine, PictureRequest
from serve.orders import Order, Painted
from serve.pictures import encode_picture
from serve.pointers import Pointers
from serve.registry import BadVersionError, Pinned
from serve.store import AdapterStore

log = logging.getLogger("echodistill.serve")
OWNER = "echodistill"
T = TypeVar("T")


@dataclass(frozen=True)
class Drawn:
    """A picture [H, W, 3] uint8 and how it came about."""

    picture: np.ndarray
    queue_seconds: float
    draw_seconds: float
    batch: int  # pictures in its forward


Draw = Callable[[PictureRequest], Awaitable[Drawn]]


class Painter:
    """Draws orders with one engine.

    Args:
        engine: what draws, already loaded.
        store: where adapters are.
        pointers: what aliases mean.
        draw: hands one picture request to the engine, perhaps with others in one batch.
    """

    def __init__(self, engine: Engine, store: AdapterStore, pointers: Pointers, draw: Draw) -> None:
        self._engine = engine
        self._store = store
        self._pointers = pointers
        self._draw = draw
        self._base = engine.pair.name
        self._size = f"{engine.pair.resolution}x{engine.pair.resolution}"
        # Loading and encoding have threads of their own: a slow registry never delays a drawing.
        self._loaders = ThreadPoolExecutor(max_workers=8, thread_name_prefix="load")
        self._encoders = ThreadPoolExecutor(max_workers=4, thread_name_prefix="encode")

    async def paint(self, order: Order) -> Painted | ApiError:
        """The pictures of an order, or why there are none."""
        return await _or_refusal(self._paint(order))

    async def models(self) -> list[ModelCard] | ApiError:
        """The base, then every concept with a champion."""
        # The base was not made at a time that matters: 0, as it has no history here.
        cards = [ModelCard(id=self._base, created=0, owned_by=OWNER)]
        listed = await _or_refusal(self._in_loader(self._pointers.concepts))
        if isinstance(listed, ApiError):
            return listed
        for item in listed:
            if item.concept == self._base or not CONCEPT_ID.fullmatch(item.concept):
                log.warning("registered concept '%s' cannot be served: its name", item.concept)
                continue
            cards.append(
                ModelCard(
                    id=item.concept,
                    created=item.created,
                    owned_by=OWNER,
                    version=item.champion,
                )
            )
        return cards

    async def concept(self, concept: str) -> ConceptCard | ApiError:
        """What there is to know of a concept, or why there is nothing."""
        return await _or_refusal(self._card(concept))

    async def preview(self, concept: str) -> bytes | ApiError:
        """The PNG that came with a concept's champion, or why there is none."""
        return await _or_refusal(self._preview(concept))

    async def health(self, max_age: float) -> dict[str, Any]:
        """What `/healthz` tells, with a picture at most `max_age` seconds old as its proof.

        Raises what `Engine.prove` raises.
        """
        age = await asyncio.get_running_loop().run_in_executor(None, self._engine.prove, max_age)
        return {
            "status": "ok",
            "base": self._base,
            "base_hash": self._engine.pair.hash,
            "registry": "away" if self._pointers.registry_away else "ok",
            "drew_seconds_ago": round(age, 3),
            "keys_values": {
                "hits": self._engine.keys_values_hits,
                "misses": self._engine.keys_values_misses,
            },
        }

    async def _paint(self, order: Order) -> Painted:
        if order.size not in (None, "auto", self._size):
            raise ApiError(
                400,
                f"Invalid value for 'size': this base draws '{self._size}' only.",
                code="invalid_value",
                param="size",
            )
        clock = time.perf_counter
        start = clock()
        pinned, adapter, level = await self._adapter(parse_model(order.model, self._base))
        prompt = self._prompt(order.prompt, adapter)
        ready = clock()
        drawn = await asyncio.gather(
            *(
                self._draw(PictureRequest(prompt, order.seed + i, order.steps, adapter))
                for i in range(order.n)
            )
        )
        done = clock()
        loop = asyncio.get_running_loop()
        files = await asyncio.gather(
            *(
                loop.run_in_executor(
                    self._encoders, encode_picture, item.picture, order.output_format
                )
                for item in drawn
            )
        )
        seconds = {
            "resolve": ready - start,
            "queue": max(item.queue_seconds for item in drawn),
            "draw": max(item.draw_seconds for item in drawn),
            "encode": clock() - done,
        }
        batches = [item.batch for item in drawn]
        return Painted(list(files), prompt, self._size, self._base, pinned, level, seconds, batches)

    async def _card(self, concept: str) -> ConceptCard:
        facts = await self._in_loader(self._pointers.versions, self._known_id(concept))
        if not facts:
            raise unknown_model(concept, "no such concept is registered")
        champion = next((each for each in facts if CHAMPION in each.aliases), None)
        told = (champion or facts[0]).tags
        return ConceptCard(
            id=concept,
            class_noun=told.get("class_noun", ""),
            token=told.get("token", ""),
            base=self._base,
            size=self._size,
            champion=champion and champion.version,
            versions=[
                VersionCard(
                    version=each.version,
                    adapter_sha256=each.tags.get(SHA256_TAG, ""),
                    created=each.created,
                    aliases=list(each.aliases),
                    metrics=_metrics(each.tags),
                )
                for each in facts
            ],
        )

    async def _preview(self, concept: str) -> bytes:
        pinned = await self._in_loader(self._pointers.resolve, self._known_id(concept), CHAMPION)
        if pinned is None:
            raise unknown_model(concept, "no such concept has a champion")
        picture = await self._in_loader(self._store.preview, pinned)
        if picture is None:
            raise unknown_model(concept, "its champion has no preview")
        return bytes(picture)

    def _known_id(self, concept: str) -> str:
        ref = parse_model(concept, self._base)
        if ref.concept is None or "@" in concept:
            raise unknown_model(concept, "give a concept's id")
        return ref.concept

    async def _adapter(self, ref: ModelRef) -> tuple[Pinned | None, Adapter | None, str]:
        if ref.concept is None:
            return None, None, "none"
        concept, pointer = ref.concept, ref.pointer
        # What is at hand costs no change of thread.
        pinned = self._pointers.known(concept, pointer)
        if pinned is None:
            pinned = await self._in_loader(self._pointers.resolve, concept, pointer)
        if pinned is None:
            raise unknown_model(f"{concept}@{pointer}", "no such version is registered")
        adapter = self._store.warm(pinned)
        if adapter is not None:
            return pinned, adapter, "memory"
        adapter, level = await self._in_loader(self._store.adapter, pinned)
        return pinned, adapter, level

    def _prompt(self, prompt: str, adapter: Adapter | None) -> str:
        if not prompt.strip():
            raise _bad_prompt("it is empty")
        if adapter is not None:
            try:
                prompt = prompt_for(adapter.meta, prompt)
            except InputError as error:
                raise _bad_prompt(str(error).rstrip(".")) from None
        excess = self._engine.excess_tokens(prompt, adapter)
        if excess:
            raise _bad_prompt(
                f"it is {excess} tokens longer than the {self._engine.prompt_tokens} that this "
                "base reads"
            )
        return prompt

    async def _in_loader(self, call: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._loaders, call, *args)


async def _or_refusal(answer: Awaitable[T]) -> T | ApiError:
    try:
        return await answer
    except ApiError as error:
        return error
    except BadVersionError as error:
        return server_error(str(error), 502)
    except ServiceError as error:
        return busy(str(error), status=503, retry_after=5)
    except EchoDistillError as error:
        return server_error(str(error))


def _metrics(tags: Mapping[str, str]) -> dict[str, float]:
    """The figures among a version's tags that JSON can write."""
    found = {}
    for name, text in tags.items():
        if name.startswith(METRIC_TAG):
            with contextlib.suppress(ValueError):
                found[name.removeprefix(METRIC_TAG)] = float(text)
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _bad_prompt(why: str) -> ApiError:
    return ApiError(400, f"Invalid 'prompt': {why}.", code="invalid_prompt", param="prompt")
