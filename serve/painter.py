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
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from model.adapter import Adapter, prompt_for
from model.errors import EchoDistillError, InputError, ServiceError
from model.names import CHAMPION, CONCEPT_ID, METRIC_TAG, SHA256_TAG
from model.text import check_length
from serve.api import (
    ApiError,
    ConceptCard,
    ModelCard,
    ModelList,
    ModelRef,
    OutputFormat,
    VersionCard,
    busy,
    no_version,
    parse_model,
    server_error,
    unknown_model,
)
from serve.cutover import CutOver
from serve.engine import Engine, PictureRequest
from serve.orders import Order, Painted, Shown
from serve.pictures import encode_picture
from serve.pointers import Pointers
from serve.registry import BadVersionError, Pinned
from serve.safety import Checker, held_back
from serve.store import AdapterStore

log = logging.getLogger("echodistill.serve")

NOT_TO_BE_HAD = "What this needs cannot be had just now; the endpoint's log says why. Try again."
OWNER = "echodistill"
T = TypeVar("T")


@dataclass(frozen=True)
class Drawn:
    """A picture [H, W, 3] uint8 and how it came about."""

    picture: np.ndarray
    queue_seconds: float
    draw_seconds: float
    batch: int  # pictures that were drawn with it
    mix: int = 1  # adapters among them
    kept: bool = False  # whether its keys and values were at hand
    device_bytes: int | None = None


Draw = Callable[[PictureRequest], Awaitable[Drawn]]


class Painter:
    """Draws orders with one engine.

    Args:
        engine: what draws, already loaded.
        store: where adapters are.
        pointers: what aliases mean.
        draw: hands one picture request to the engine, perhaps with others in one batch.
        cutover_seconds: how long a moved alias may draw with the version before.
        encoders: threads that write picture files.
        checker: looks at every picture (`serve.safety`).
    """

    def __init__(
        self,
        engine: Engine,
        store: AdapterStore,
        pointers: Pointers,
        draw: Draw,
        *,
        cutover_seconds: float = 10.0,
        encoders: int = 4,
        checker: Checker | None = None,
    ) -> None:
        self._engine = engine
        self._store = store
        self._pointers = pointers
        self._draw = draw
        self._base = engine.pair.name
        self._size = f"{engine.pair.resolution}x{engine.pair.resolution}"
        # Loading and encoding have threads of their own: a slow registry never delays a drawing.
        self._loaders = ThreadPoolExecutor(max_workers=8, thread_name_prefix="load")
        self._encoders = ThreadPoolExecutor(max_workers=encoders, thread_name_prefix="encode")
        self._cutover = CutOver(cutover_seconds)
        self._loading: dict[Pinned, asyncio.Future[Any]] = {}
        self._checker = checker

    def prewarm(self, concepts: str) -> None:
        """Loads the champions of concepts (by comma; `*` means all) until memory is full. Blocks.

        What cannot be loaded is told in the log, and by the answer to who asks for it.
        """
        with contextlib.suppress(ServiceError):
            names = concepts.split(",")
            if concepts == "*":
                names = [item.concept for item in self._pointers.concepts()]
            for name in filter(None, names):
                try:
                    pinned = self._pointers.resolve(name, CHAMPION)
                    if pinned is None:
                        log.warning("'%s' has no champion to load beforehand", name)
                    elif not self._store.room():
                        return
                    else:
                        self._engine.prepare(self._store.adapter(pinned)[0])
                except EchoDistillError as error:
                    log.warning("'%s' cannot be loaded beforehand: %s", name, error)

    async def paint(self, order: Order) -> Painted | ApiError:
        """The pictures of an order, or why there are none."""
        return await _or_refusal(self._paint(order), order.model)

    async def models(self, shown: Shown) -> ModelList | ApiError:
        """A page of the base and every concept with a champion that the key may know of."""
        listed = await _or_refusal(self._in_loader(self._pointers.concepts), "models")
        if isinstance(listed, ApiError):
            return listed
        cards = []
        if shown.after is None:
            # The base was not made at a time that matters: 0, as it has no history here.
            cards.append(ModelCard(id=self._base, created=0, owned_by=OWNER))
        after = "" if shown.after in (None, self._base) else shown.after
        for item in listed[bisect_right(listed, after, key=lambda each: each.concept) :]:
            if not shown.limits.allow(item.concept):
                continue
            if item.concept == self._base or not CONCEPT_ID.fullmatch(item.concept):
                log.warning("registered concept '%s' cannot be served: its name", item.concept)
                continue
            if len(cards) == shown.limit:
                return ModelList(data=cards, has_more=True)
            cards.append(
                ModelCard(
                    id=item.concept,
                    created=item.created,
                    owned_by=OWNER,
                    version=item.champion,
                )
            )
        return ModelList(data=cards)

    async def concept(self, concept: str) -> ConceptCard | ApiError:
        """What there is to know of a concept, or why there is nothing."""
        return await _or_refusal(self._card(concept), concept)

    async def preview(self, concept: str) -> bytes | ApiError:
        """The PNG that came with a concept's champion, or why there is none."""
        return await _or_refusal(self._preview(concept), concept)

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
                    self._encoders, self._file, item.picture, prompt, order.output_format
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
        return Painted(
            files=list(files),
            prompt=prompt,
            size=self._size,
            base=self._base,
            pinned=pinned,
            level=level,
            seconds=seconds,
            batches=[item.batch for item in drawn],
            mixes=[item.mix for item in drawn],
            kept=sum(item.kept for item in drawn),
            device_bytes=drawn[0].device_bytes,
        )

    def _file(self, picture: np.ndarray, prompt: str, output_format: OutputFormat) -> bytes:
        reason = None if self._checker is None else self._checker(picture, prompt)
        if reason is not None:
            raise held_back(reason)
        return encode_picture(picture, output_format)

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
            raise no_version(ref)
        adapter = self._store.warm(pinned)
        level = "memory"
        if adapter is None:
            before = self._cutover.before(concept, pointer, pinned)
            old = None if before is None else self._store.warm(before)
            if old is not None:
                self._load_meanwhile(pinned)
                return before, old, level
            adapter, level = await self._in_loader(self._load, pinned)
        self._cutover.serves(concept, pointer, pinned)
        return pinned, adapter, level

    def _load_meanwhile(self, pinned: Pinned) -> None:
        """Begins to load a version that nobody waits for, once."""
        if pinned in self._loading:
            return
        loop = asyncio.get_running_loop()
        loading = loop.run_in_executor(self._loaders, self._load, pinned)
        self._loading[pinned] = loading

        def done(_: asyncio.Future[Any]) -> None:
            del self._loading[pinned]
            if loading.exception() is not None:
                log.warning("the new version of '%s': %s", pinned.concept, loading.exception())

        loading.add_done_callback(done)

    def _load(self, pinned: Pinned) -> tuple[Adapter, str]:
        adapter, level = self._store.adapter(pinned)
        self._engine.prepare(adapter)
        return adapter, level

    def _prompt(self, prompt: str, adapter: Adapter | None) -> str:
        if not prompt.strip():
            raise _bad_prompt("it is empty")
        try:
            if adapter is not None:
                prompt = prompt_for(adapter.meta, prompt)
            tokens = () if adapter is None else adapter.tokens
            check_length(self._engine.pair.tokenizer, prompt, tokens)
        except InputError as error:
            raise _bad_prompt(str(error).rstrip(".")) from None
        return prompt

    async def _in_loader(self, call: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._loaders, call, *args)


async def _or_refusal(answer: Awaitable[T], asked: str | None) -> T | ApiError:
    try:
        return await answer
    except ApiError as error:
        return error
    except BadVersionError as error:
        return server_error(str(error), 502)
    except ServiceError as error:
        # Where the registry is, and what of the disk is full, is for the log and not for clients.
        log.warning("asked for %r: %s", asked, error)
        return busy(NOT_TO_BE_HAD, status=503, retry_after=5)
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
