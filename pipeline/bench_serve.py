"""The benchmark of the endpoint's engine, against plain diffusers on the same base and machine.

Pictures go all the way to JPEG files, by as many encoder threads for both. The document is handed
out after every measurement, so that an interrupted benchmark leaves what it had. What is worth most
is measured first.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from components.train.memory import release
from model.adapter import Adapter
from model.errors import InputError
from pipeline import bench_measure as measure
from pipeline import bench_serve_parts as parts
from pipeline.bench_serve_adapters import PLENTY, load_adapters
from pipeline.bench_serve_clock import ENCODERS, LEAST, Clock
from pipeline.bench_serve_parts import ServedBase, plain_pictures, prompt
from pipeline.bench_serve_ways import Way, ways_of
from pipeline.progress import Event, Progress
from serve.engine import Engine, PictureRequest
from serve.fast import Speed, convolutions, fallbacks
from serve.pictures import encode_picture

DTYPES = ("float32", "bfloat16", "float16")
ACROSS_SIZES = 1  # levels of 255 that float32 pictures may differ by, one padded size to another
SERVED = Way("eager", "eager")  # what is checked: on a GPU, bare networks promise less
_LEAST_SECONDS = 20  # left for a part: with less it is not begun
Write = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class ServeBenchSettings:
    """What to measure.

    Attributes:
        base: `pocket`, `sd-turbo` or `sd-turbo-mini` (random weights), or a base's folder.
        device: `auto`, `cpu` or `cuda`.
        concepts: different concepts in a batch (as many as it has places, at most).
        batches: sizes; None means 1, 8 on a CPU and 1, 8, 32 on a GPU.
        clients: numbers of HTTP clients (`bench_serve_http`).
        dtype: of the networks; None means float32 on a CPU and float16 on a GPU.
        speeds: names of ways (`bench_serve_ways`); None means eager on a CPU, and on a GPU every
            speed of `serve.fast`.
        channels_last: convolutions as NHWC; what is compiled always has them so.
        rank: of the adapters.
        resident: adapters that are loaded from disk and kept at once; 0 leaves this out.
        seconds: of each measurement.
        minutes: for all. Each part then has its own time as well, and one that outlasts it or
            fails is passed over: the document's `failed` says why. None: no bound, and errors are
            raised.
        patience: factor on each part's time.
    """

    base: str = "pocket"
    device: str = "auto"
    concepts: int = 8
    batches: tuple[int, ...] | None = None
    clients: tuple[int, ...] = ()
    dtype: str | None = None
    speeds: tuple[str, ...] | None = None
    channels_last: bool = False
    rank: int = 16
    resident: int = 100
    seconds: float = 2.0
    minutes: float | None = None
    patience: float = 1.0


@dataclass(frozen=True)
class Part:
    """A part of the benchmark, and the seconds that it may take where there is a bound."""

    name: str
    seconds: float
    work: Callable[[], None]


def bench_serve(settings: ServeBenchSettings, progress: Progress, write: Write) -> dict[str, Any]:
    """Check, then measure; returns the document, which `write` gets after every measurement too.

    Raises:
        InputError: for settings that can't be.
    """
    began = time.monotonic()
    device = measure.find_device(settings.device)
    on_gpu = device.type == "cuda"
    ways = ways_of(
        settings.speeds or (get_args(Speed) if on_gpu else ("eager",)), settings.channels_last
    )
    dtype = settings.dtype or ("float16" if on_gpu else "float32")
    if dtype not in DTYPES:
        raise InputError(f"there is no dtype {dtype!r}: give {', '.join(DTYPES)}")
    document = _header(settings, device, dtype)
    with tempfile.TemporaryDirectory(prefix="echodistill-bench-") as work:
        progress(Event("bench", settings.base, f"making the networks in {dtype}"))
        served = parts.served_base(settings.base, getattr(torch, dtype), device)
        bench = _Bench(settings, served, Path(work), document, progress, write)
        for part in bench.parts(ways):
            bench.do(part, began)
    document["seconds"] = round(time.monotonic() - began, 1)
    write(document)
    return document


class _Bench:
    """One benchmark under way."""

    def __init__(
        self,
        settings: ServeBenchSettings,
        served: ServedBase,
        work: Path,
        document: dict[str, Any],
        progress: Progress,
        write: Write,
    ) -> None:
        self.settings = settings
        self.served = served
        self.device = served.pair.device
        self.cache = work
        self.document = document
        self.progress = progress
        self._write = write
        self.batches: Sequence[int] = document["batches"]
        self.largest = max(self.batches)
        self.clock = Clock(settings.seconds)
        most = min(settings.concepts, self.largest)
        pinned = list(parts.write_adapters(work, served.pair, most, settings.rank))
        self.concepts = [parts.read_adapter(work, each) for each in pinned]
        self._eager: dict[int, np.ndarray] = {}  # pictures by batch size
        self._engine: tuple[Way, Engine] | None = None

    def parts(self, ways: Sequence[Way]) -> Iterator[Part]:
        """Give all parts, those first that are worth most; what is compiled takes minutes."""
        yield Part("operations", 30, self.operations)
        yield Part("check", 60, self.check)
        yield Part("plain diffusers", 45, self.plain)
        for way in ways:
            if way.speed != "compile":
                yield from self._of(way, 40)
        yield Part("adapters", 100, self.adapters)
        # Again: what else the machine did meanwhile must not favour anyone.
        yield Part("plain diffusers, again", 45, self.plain)
        yield Part("float32", 40, self.float32)
        for way in ways:
            if way.speed == "compile":
                yield from self._of(way, 180)

    def _of(self, way: Way, seconds: float) -> Iterator[Part]:
        def rate(size: int) -> Part:
            name = f"engine, {way.name}, batch {size}"
            return Part(name, seconds, partial(self.engine, way, size))

        yield rate(self.largest)
        yield Part(f"latency, {way.name}", seconds, partial(self.latency, way))
        yield from (rate(size) for size in self.batches if size != self.largest)

    def do(self, part: Part, began: float) -> None:
        """Do a part; within its time, and whatever it meets, where there is a bound."""
        if self.settings.minutes is None:
            part.work()
            return
        left = 60 * self.settings.minutes - (time.monotonic() - began)
        seconds = min(part.seconds * self.settings.patience, left)
        error = None
        if left < _LEAST_SECONDS:
            error = "the time is used up"
        else:
            try:
                with measure.within(seconds):
                    part.work()
            except (Exception, measure.OutOfTime) as met:  # the next parts may do
                where = "".join(traceback.format_tb(met.__traceback__)[-4:])
                error = f"{type(met).__name__}: {str(met)[:600]}\n{where}"
        if error is not None:
            self.document.setdefault("failed", {})[part.name] = error
            self.say(part.name, error)
        release(self.device)
        self.write()

    def say(self, subject: str, text: str) -> None:
        self.progress(Event("bench", subject, text))

    def write(self) -> None:
        """Hand the document out, with what follows from its rows."""
        document = self.document
        plain = [row["images_per_s"] for row in document["plain_diffusers"]]
        document["plain_diffusers_images_per_s"] = max(plain, default=None)
        if plain and document["images_per_s"] is not None:
            document["over_plain_diffusers"] = round(document["images_per_s"] / max(plain), 3)
        self._write(document)

    def operations(self) -> None:
        """Measure what the device can do, and count what a picture takes of it."""
        self.document["matmul"] = measure.matmul_rate(self.device)
        engine = Engine(self.served.pair, batch_sizes=(1,))
        request = self._requests(1, self.concepts)
        engine.draw(request)  # its keys and values are kept then
        tflop = measure.count_flops(lambda: engine.draw(request)) / 1e12
        self.document["tflop_per_image"] = round(tflop, 6)
        self.write()

    def check(self) -> None:
        """Compare pictures of a mixed batch with each one's own, and with plain diffusers'."""
        pair = self.served.pair
        engine = Engine(SERVED.pair(pair), batch_sizes=(1, self.largest))
        requests = self._requests(self.largest, self.concepts)
        mixed = engine.draw(requests)
        turned = engine.draw(requests[::-1])[::-1]
        alone = np.stack([engine.draw([request])[0] for request in requests[:LEAST]])
        bare = PictureRequest("a photo of a dog", 0)
        plain = plain_pictures(self.served.plain(), pair, [bare.prompt], bare.seed)
        within, across = _off(mixed, turned), _off(mixed[: len(alone)], alone)
        found = {
            "within_size": within,
            "across_sizes": across,
            "plain_diffusers": _off(engine.draw([bare]), np.stack([np.asarray(plain[0])])),
            "float32": None,
        }
        passed = within == 0 and (pair.dtype != torch.float32 or across <= ACROSS_SIZES)
        self.document["check"] = {**found, "passed": passed}
        self.say("check", f"levels of 255 apart: {found}")
        self.write()

    def float32(self) -> None:
        """Compare pictures of the served type with those of float32."""
        exact = self.served.pair.dtype == torch.float32
        requests = self._requests(1, self.concepts)
        off = 0
        if not exact:
            served = parts.served_base(self.settings.base, torch.float32, self.device)
            # Adapters name the base by its values at float16, which are the same.
            drawn = [Engine(pair).draw(requests) for pair in (self.served.pair, served.pair)]
            off = _off(*drawn)
        if self.document["check"] is not None:
            self.document["check"]["float32"] = off
        self.write()

    def plain(self) -> None:
        """Time plain diffusers, without an adapter; of all its rows the best counts."""
        pipeline = self.served.plain()
        for size in self.batches:
            prompts = ["a photo of a dog on the beach"] * size

            def draw(prompts: list[str] = prompts) -> list[np.ndarray]:
                images = plain_pictures(pipeline, self.served.pair, prompts, 0)
                return [np.asarray(image) for image in images]

            row = {"batch": size, **self.clock.rate(draw, size)}
            self.document["plain_diffusers"].append(row)
            self.say("plain diffusers", f"batch {size}: {row['images_per_s']:.2f} images/s")
            self.write()

    def engine(self, way: Way, size: int) -> None:
        """Time the engine: one concept and many, known prompts and new ones."""
        one = self._requests(size, self.concepts[:1])
        many = self._requests(size, self.concepts)
        if size not in self._eager:
            self._eager[size] = Engine(self.served.pair).draw(many)
        measure.reset_peak(self.device)
        engine = self._engine_of(way)
        with way.on():
            began = time.perf_counter()
            mine = engine.draw(many)
            first = time.perf_counter() - began
            turned = engine.draw(many[::-1])[::-1]
            single, mixed = self.clock.in_turns(partial(engine.draw, r) for r in (one, many))
            row = {
                "speed": way.name,
                "batch": size,
                "concepts": min(size, len(self.concepts)),
                "first_seconds": round(first, 1),
                **self.clock.rate(partial(engine.draw, many), size),
                "draw_ms": mixed,
                "one_concept_draw_ms": single,
                "mixed_over_single": round(single["ms"] / mixed["ms"], 4),
                "new_prompts_draw_ms": self._new_prompts(engine, size),
                "peak_gib": measure.peak_gib(self.device),
                "within_size": _off(mine, turned),
                "levels_from_eager": _off(mine, self._eager[size]),
                "fell_back": fallbacks(engine.pair),
                "convolutions": convolutions(engine.pair),
            }
        if self.document["tflop_per_image"] and self.document["matmul"]:
            rate = row["images_per_s"] * self.document["tflop_per_image"]
            row["share_of_matmul"] = round(rate / self.document["matmul"]["tflops"], 4)
        if self.document["check"] is not None and row["within_size"]:
            self.document["check"]["passed"] = False
        self.document["engine"].append(row)
        self.say(f"engine, {way.name}", f"batch {size}: {row['images_per_s']:.2f} images/s")
        self._headline(row)
        self.write()

    def _engine_of(self, way: Way) -> Engine:
        """Give the engine of a way; what the one of another way kept is given back."""
        if self._engine is None or self._engine[0] != way:
            self._engine = None
            release(self.device)
            self._engine = way, Engine(way.pair(self.served.pair), keys_values_bytes=PLENTY)
        return self._engine[1]

    def latency(self, way: Way) -> None:
        """Time single pictures to JPEG by steps; the fastest way's are kept."""
        engine = self._engine_of(way)
        found: dict[str, Any] = {"speed": way.name}
        with way.on():
            for steps in (1, 2, 4):
                request = self._requests(1, self.concepts, steps)

                def draw(request: list[PictureRequest] = request) -> None:
                    encode_picture(engine.draw(request)[0], "jpeg")

                found[f"steps_{steps}"] = self.clock.each(draw)
        ms, best = found["steps_1"]["ms"], self.document["latency_ms"]
        if best is None or ms < best["steps_1"]["ms"]:
            self.document["latency_ms"] = found
        self.say(f"one picture to JPEG, {way.name}", f"{ms:.1f} ms")
        self.write()

    def adapters(self) -> None:
        """Load many adapters from disk and keep them; then draw a batch of any of them."""
        pair, count = self.served.pair, max(self.settings.resident, LEAST)
        engine = Engine(pair, device_bytes=PLENTY)
        loaded = load_adapters(engine, self.cache, count, self.settings.rank, len(self.concepts))
        any_of_them = loaded.adapters[:: max(1, count // self.largest)][: self.largest]
        began = time.perf_counter()
        engine.draw(self._requests(len(any_of_them), any_of_them))
        first = round(1e3 * (time.perf_counter() - began), 3)
        ms = loaded.load_ms["ms"]
        self.document["cold_load_ms"] = ms
        self.document["resident"] = {
            **loaded.document(),
            "rank": self.settings.rank,
            "first_batch_ms": first,
        }
        self.say("adapters", f"{count} in memory, {ms:.1f} ms each from disk")
        self.write()

    def _requests(
        self, size: int, concepts: Sequence[Adapter], steps: int = 1
    ) -> list[PictureRequest]:
        # Prompts repeat with the concepts: as many keys and values are read in every case.
        return [
            PictureRequest(prompt(n % len(self.concepts)), n, steps, concepts[n % len(concepts)])
            for n in range(size)
        ]

    def _headline(self, row: dict[str, Any]) -> None:
        """Keep the fastest row's figures on top of the document."""
        fastest = self.document["images_per_s"] or 0
        if row["batch"] == self.largest and row["images_per_s"] > fastest:
            self.document |= {
                "images_per_s": row["images_per_s"],
                "fastest": row["speed"],
                "mixed_over_single": row["mixed_over_single"],
            }

    def _new_prompts(self, engine: Engine, size: int) -> float:
        """Milliseconds of a batch whose every prompt is new, each of its own concept."""
        found = []
        for n in range(LEAST):
            requests = [
                PictureRequest(f"{prompt(i)} {n} {time.monotonic_ns()}"[:200], i, 1, concept)
                for i, concept in enumerate(self.concepts * size)
            ][:size]
            began = time.perf_counter()
            engine.draw(requests)
            found.append(time.perf_counter() - began)
        return round(1e3 * statistics.median(found), 3)


def _off(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(np.int16) - b.astype(np.int16)).max())


def _header(settings: ServeBenchSettings, device: torch.device, dtype: str) -> dict[str, Any]:
    return {
        "base": settings.base,
        **measure.environment(device),
        "dtype": dtype,
        "concepts": settings.concepts,
        "batches": list(settings.batches or ((1, 8) if device.type == "cpu" else (1, 8, 32))),
        "encoders": ENCODERS,
        "channels_last": settings.channels_last,
        "images_per_s": None,
        "fastest": None,
        "mixed_over_single": None,
        "plain_diffusers_images_per_s": None,
        "over_plain_diffusers": None,
        "cold_load_ms": None,
        "tflop_per_image": None,
        "matmul": None,
        "check": None,
        "plain_diffusers": [],
        "engine": [],
        "latency_ms": None,
        "resident": None,
        "http": [],
    }
