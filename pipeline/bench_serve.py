"""The benchmark of the endpoint's engine, against plain diffusers on the same base and machine.

Pictures go all the way to JPEG files, by as many encoder threads for both. The document is handed
out after every measurement, so that an interrupted benchmark leaves what it had.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from model.adapter import Adapter
from model.errors import InputError
from pipeline import bench_measure as measure
from pipeline import bench_serve_parts as parts
from pipeline.bench_serve_parts import ServedBase, plain_pictures, prompt
from pipeline.progress import Event, Progress
from serve.engine import Engine, PictureRequest, adapter_bytes
from serve.fast import Speed, quicken
from serve.pictures import encode_picture
from serve.registry import Pinned
from serve.store import AdapterStore

ENCODERS = 4  # threads, as the endpoint has
DTYPES = ("float32", "bfloat16", "float16")
LEAST = 3  # repetitions of whatever is timed
ACROSS_SIZES = 1  # levels of 255 that float32 pictures may differ by, one padded size to another
_PLENTY = 2**40  # bytes: nothing is thrown out while it is measured
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
        speeds: of `serve.fast`; None means eager on a CPU, and all of them on a GPU.
        channels_last: convolutions as NHWC; what is compiled always has them so.
        rank: of the adapters.
        resident: adapters that are loaded from disk and kept at once; 0 leaves this out.
        seconds: of each measurement.
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


def bench_serve(settings: ServeBenchSettings, progress: Progress, write: Write) -> dict[str, Any]:
    """Check, then measure; returns the document, which `write` gets after every measurement too.

    Raises:
        InputError: for settings that can't be.
    """
    began = time.monotonic()
    device = measure.find_device(settings.device)
    on_gpu = device.type == "cuda"
    speeds = settings.speeds or (get_args(Speed) if on_gpu else ("eager",))
    dtype = settings.dtype or ("float16" if on_gpu else "float32")
    _refuse_unknown(speeds, dtype)
    document = _header(settings, device, dtype)
    with tempfile.TemporaryDirectory(prefix="echodistill-bench-") as work:
        progress(Event("bench", settings.base, f"making the networks in {dtype}"))
        served = parts.served_base(settings.base, getattr(torch, dtype), device)
        bench = _Bench(settings, served, Path(work), document, progress, write)
        bench.check()
        bench.plain()
        for speed in speeds:
            bench.engine(speed)
        bench.plain()  # again: what else the machine did meanwhile must not favour anyone
        bench.latency()
        bench.adapters()
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
        self.write = write
        self.batches: Sequence[int] = document["batches"]
        self.pool = ThreadPoolExecutor(ENCODERS)
        most = min(settings.concepts, max(self.batches))
        pinned = list(parts.write_adapters(work, served.pair, most, settings.rank))
        self.concepts = [parts.read_adapter(work, each) for each in pinned]
        self.fastest: Engine | None = None

    def say(self, subject: str, text: str) -> None:
        self.progress(Event("bench", subject, text))

    def check(self) -> None:
        """Compare pictures of a mixed batch with each one's own, and with plain diffusers'."""
        pair, largest = self.served.pair, max(self.batches)
        document = self.document
        document["matmul"] = measure.matmul_rate(self.device)
        engine = Engine(pair, batch_sizes=(1, largest))
        requests = self._requests(largest, self.concepts)
        mixed = engine.draw(requests)
        turned = engine.draw(requests[::-1])[::-1]
        alone = np.stack([engine.draw([request])[0] for request in requests[:LEAST]])
        bare = PictureRequest("a photo of a dog", 0)
        plain = plain_pictures(self.served.plain(), pair, [bare.prompt], bare.seed)
        found = {
            "within_size": _off(mixed, turned),
            "across_sizes": _off(mixed[: len(alone)], alone),
            "plain_diffusers": _off(engine.draw([bare]), np.stack([np.asarray(plain[0])])),
        }
        exact = pair.dtype == torch.float32
        found["float32"] = 0 if exact else _off(alone, self._in_float32(requests[:LEAST]))
        across = not exact or found["across_sizes"] <= ACROSS_SIZES
        document["check"] = {**found, "passed": found["within_size"] == 0 and across}
        document["tflop_per_image"] = round(
            measure.count_flops(lambda: engine.draw(requests)) / largest / 1e12, 6
        )
        self.say("check", f"levels of 255 apart: {found}")
        self.write(document)

    def _in_float32(self, requests: list[PictureRequest]) -> np.ndarray:
        served = parts.served_base(self.settings.base, torch.float32, self.device)
        # Adapters name the base by its values at float16, which are the same.
        engine = Engine(served.pair)
        pictures = np.stack([engine.draw([request])[0] for request in requests])
        return pictures

    def plain(self) -> None:
        """Time plain diffusers, without an adapter; of all its rows the best counts."""
        pipeline = self.served.plain()
        for size in self.batches:
            prompts = ["a photo of a dog on the beach"] * size

            def draw(prompts: list[str] = prompts) -> list[np.ndarray]:
                images = plain_pictures(pipeline, self.served.pair, prompts, 0)
                return [np.asarray(image) for image in images]

            row = {"batch": size, **self._rate(draw, size)}
            self.document["plain_diffusers"].append(row)
            self.say("plain diffusers", f"batch {size}: {row['images_per_s']:.2f} images/s")
        best = max(row["images_per_s"] for row in self.document["plain_diffusers"])
        self.document["plain_diffusers_images_per_s"] = best
        if self.document["images_per_s"] is not None:
            over = self.document["images_per_s"] / best
            self.document["over_plain_diffusers"] = round(over, 3)
        self.write(self.document)

    def engine(self, speed: Any) -> None:
        """Time the engine: one concept and many, known prompts and new ones."""
        last = self.settings.channels_last or speed == "compile"
        fast = quicken(self.served.pair, speed, channels_last=last)
        engine = Engine(fast, keys_values_bytes=_PLENTY)
        for size in self.batches:
            one = self._requests(size, self.concepts[:1])
            many = self._requests(size, self.concepts)
            measure.reset_peak(self.device)
            single, mixed = self._alternately(partial(engine.draw, r) for r in (one, many))
            eager = Engine(self.served.pair)
            row = {
                "speed": speed,
                "batch": size,
                "concepts": min(size, len(self.concepts)),
                **self._rate(partial(engine.draw, many), size),
                "draw_ms": mixed,
                "one_concept_draw_ms": single,
                "mixed_over_single": round(single["ms"] / mixed["ms"], 4),
                "new_prompts_draw_ms": self._new_prompts(engine, size),
                "peak_gib": measure.peak_gib(self.device),
                "levels_from_eager": _off(engine.draw(many), eager.draw(many)),
            }
            rate = row["images_per_s"] * self.document["tflop_per_image"]
            row["share_of_matmul"] = round(rate / self.document["matmul"]["tflops"], 4)
            self.document["engine"].append(row)
            self.say(f"engine, {speed}", f"batch {size}: {row['images_per_s']:.2f} images/s")
            self._headline(row, engine)
            self.write(self.document)

    def latency(self) -> None:
        """Time single pictures to JPEG by steps, and one of a new prompt."""
        engine = self.fastest
        assert engine is not None
        found: dict[str, Any] = {}
        for steps in (1, 2, 4):
            request = self._requests(1, self.concepts, steps)

            def draw(request: list[PictureRequest] = request) -> None:
                encode_picture(engine.draw(request)[0], "jpeg")

            found[f"steps_{steps}"] = measure.summary(self._times(draw))
        self.document["latency_ms"] = found
        self.say("one picture to JPEG", f"{found['steps_1']['ms']:.1f} ms")
        self.write(self.document)

    def adapters(self) -> None:
        """Load many adapters from disk and keep them; then draw a batch of any of them."""
        pair, count = self.served.pair, max(self.settings.resident, 3)
        pinned = list(
            parts.write_adapters(
                self.cache, pair, count, self.settings.rank, first=len(self.concepts)
            )
        )
        engine = Engine(pair, device_bytes=_PLENTY)
        store = AdapterStore(
            _Nowhere(),
            self.cache,
            base_hash=pair.hash,
            memory_bytes=_PLENTY,
            check=engine.check,
        )
        seconds, kept = [], []
        for each in pinned:
            began = time.perf_counter()
            adapter, level = store.adapter(each)
            engine.prepare(adapter)
            measure.wait(self.device)
            seconds.append(time.perf_counter() - began)
            kept.append(adapter)
            assert level == "disk", level
        loads = measure.summary(seconds)
        self.document["cold_load_ms"] = loads["ms"]
        size = sum(adapter_bytes(adapter) for adapter in kept)
        any_of_them = kept[:: max(1, len(kept) // max(self.batches))][: max(self.batches)]
        began = time.perf_counter()
        engine.draw(self._requests(len(any_of_them), any_of_them))
        self.document["resident"] = {
            "adapters": len(kept),
            "rank": self.settings.rank,
            "bytes": size,
            "bytes_each": size // len(kept),
            "load_ms": loads,
            "still_in_memory": sum(store.warm(each) is not None for each in pinned),
            "first_batch_ms": round(1e3 * (time.perf_counter() - began), 3),
        }
        self.say("adapters", f"{len(kept)} in memory, {loads['ms']:.1f} ms each from disk")
        self.write(self.document)

    def _requests(
        self, size: int, concepts: Sequence[Adapter], steps: int = 1
    ) -> list[PictureRequest]:
        # Prompts repeat with the concepts: as many keys and values are read in every case.
        return [
            PictureRequest(prompt(n % len(self.concepts)), n, steps, concepts[n % len(concepts)])
            for n in range(size)
        ]

    def _headline(self, row: dict[str, Any], engine: Engine) -> None:
        """Keep the fastest row's figures on top of the document."""
        if row["batch"] == max(self.batches) and row["images_per_s"] > (
            self.document["images_per_s"] or 0
        ):
            self.fastest = engine
            self.document |= {
                "images_per_s": row["images_per_s"],
                "mixed_over_single": row["mixed_over_single"],
            }

    def _rate(self, draw: Callable[[], Iterable[np.ndarray]], size: int) -> dict[str, Any]:
        """Images a second to JPEG files, encoded while the next batch is drawn."""
        draw()
        files: list[Future[bytes]] = []
        count, began = 0, time.perf_counter()
        while count < LEAST or time.perf_counter() - began < self.settings.seconds:
            files += [self.pool.submit(encode_picture, each, "jpeg") for each in draw()]
            count += 1
        for file in files:
            file.result()
        spent = time.perf_counter() - began
        return {"images_per_s": round(count * size / spent, 3), "repeated": count}

    def _times(self, call: Callable[[], Any]) -> list[float]:
        call()
        found: list[float] = []
        while len(found) < LEAST or sum(found) < self.settings.seconds:
            began = time.perf_counter()
            call()
            found.append(time.perf_counter() - began)
        return found

    def _alternately(self, given: Iterable[Callable[[], Any]]) -> list[dict[str, float]]:
        """Time calls in turns, so that what the machine does besides touches all of them alike."""
        calls = list(given)
        for call in calls:
            call()
        found: list[list[float]] = [[] for _ in calls]
        while len(found[0]) < LEAST or sum(map(sum, found)) < self.settings.seconds:
            for call, times in zip(calls, found, strict=True):
                began = time.perf_counter()
                call()
                times.append(time.perf_counter() - began)
        return [measure.summary(times) for times in found]

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


class _Nowhere:
    """A registry that is never asked: what is measured lies on the disk."""

    def download(self, pinned: Pinned, folder: Path) -> Path:
        raise AssertionError(f"{pinned} is not where it was written")


def _off(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(np.int16) - b.astype(np.int16)).max())


def _refuse_unknown(speeds: Sequence[str], dtype: str) -> None:
    unknown = [name for name in speeds if name not in get_args(Speed)]
    if unknown:
        raise InputError(f"there is no speed {unknown[0]!r}: give {', '.join(get_args(Speed))}")
    if dtype not in DTYPES:
        raise InputError(f"there is no dtype {dtype!r}: give {', '.join(DTYPES)}")


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
