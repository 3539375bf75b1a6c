"""The benchmark of the training engine, against the plain loop of the same method.

First both train one concept from the same draws in float32 and their losses are compared; then the
plain loop is timed, then the engine at growing pack sizes. The document is handed out after every
measurement, so that an interrupted benchmark leaves what it had.
"""

from __future__ import annotations

import gc
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from components.spec import RunSpec
from components.train.engines import start_deepspeed
from components.train.job import total_iterations
from components.train.memory import is_out_of_memory, release
from model.acceleration import accelerate
from model.iteration import Frozen
from pipeline import bench_measure as measure
from pipeline.bench_bases import bench_spec, build_frozen
from pipeline.bench_loops import EngineRunner, NaiveRunner, Photos, Runner, compared
from pipeline.progress import Event, Progress

LARGEST = 256  # of a pack; as the run spec has it
PER_HOUR_ITERATIONS = 1000  # METHOD.md's main stage
CPU_PACKS = (1, 2, 4)
PARTS_ITERATIONS = 2
Write = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class BenchSettings:
    """What to measure.

    Attributes:
        base: `sd-turbo` or `sd-turbo-mini` (random weights), a preset or a base's folder.
        device: `auto`, `cpu` or `cuda`.
        packs: sizes in order; None means 1, 2, 4 on a CPU, and on a GPU doubles until one does not
            fit, then looks for the largest that does.
        iterations: timed, for each loop and pack size.
        warmup: done before them.
        precision: of the engine, `float32` or `bf16`; None is the preset's.
        sets: settings of the run spec, `a.b=value`.
        resolution: side of a picture; None is the preset's.
        profile: file for the profiler's tables of one iteration each, in a folder that exists, or
            None.
        seconds: after so many no other pack size is begun; None: no limit.
    """

    base: str = "pocket"
    device: str = "auto"
    packs: tuple[int, ...] | None = None
    iterations: int = 10
    warmup: int = 2
    precision: str | None = None
    sets: tuple[str, ...] = ()
    resolution: int | None = None
    profile: Path | None = None
    seconds: float | None = None


def bench_train(settings: BenchSettings, progress: Progress, write: Write) -> dict[str, Any]:
    """Check, then measure; returns the document, which `write` gets after every measurement too.

    Raises:
        InputError: for settings that can't be.
        ServiceError: when the base can't be fetched.
    """
    began = time.monotonic()
    device = measure.find_device(settings.device)
    spec = bench_spec(settings.base, settings.resolution, settings.precision, settings.sets)
    document = _header(settings, spec, device)
    if settings.profile is not None:
        settings.profile.write_text("")
    with tempfile.TemporaryDirectory(prefix="echodistill-bench-") as work, alone(device):
        bench = _Bench(settings, spec, device, Path(work), document, progress, write)
        document["matmul"] = measure.matmul_rate(device)
        bench.say("matmul", f"{document['matmul']['tflops']:.1f} TFLOP/s")
        frozen = bench.build("float32")
        bench.check(frozen)
        bench.naive(frozen, "float32")
        if spec.train.precision != "float32":
            del frozen
            release(device)
            frozen = bench.build(spec.train.precision)
            bench.naive(frozen, spec.train.precision)
        accelerate(frozen, spec.train.channels_last, spec.train.compile)
        bench.series(frozen, None if settings.seconds is None else began + settings.seconds)
    document["seconds"] = round(time.monotonic() - began, 1)
    write(document)
    return document


@dataclass
class _Bench:
    """One benchmark under way."""

    settings: BenchSettings
    spec: RunSpec
    device: torch.device
    work: Path
    document: dict[str, Any]
    progress: Progress
    write: Write

    def say(self, subject: str, text: str) -> None:
        self.progress(Event("bench", subject, text))

    def build(self, precision: str) -> Frozen:
        self.say(self.settings.base, f"building the frozen networks in {precision}")
        return build_frozen(self.settings.base, self.spec, precision, self.device)

    def check(self, frozen: Frozen) -> None:
        """Compare engine and plain loop over a few iterations of one concept."""
        found = compared(self.spec, frozen, self._photos(frozen))
        self.document["check"] = found
        word = "agree" if found["passed"] else "DIFFER"
        self.say("check", f"losses {word}: largest relative error {found['loss_error']:.1e}")
        self.write(self.document)

    def naive(self, frozen: Frozen, precision: str) -> None:
        """Time the plain loop."""
        runner = NaiveRunner(self.spec, frozen, self._photos(frozen))
        result = {"precision": precision, **self._measured(runner, f"plain loop, {precision}")}
        self.document["naive"].append(result)
        if self.document["naive_ms"] is None:
            self.document["naive_ms"] = result["ms_per_concept"]
        self.say("plain loop", f"{precision}: {result['ms_per_concept']:.1f} ms per iteration")
        self.write(self.document)

    def series(self, frozen: Frozen, deadline: float | None) -> None:
        """Time the engine at one pack size after the other, up to the largest that fits."""
        given = self.settings.packs or (CPU_PACKS if self.device.type == "cpu" else None)
        fits, fails = 0, LARGEST + 1
        sizes = iter(given) if given else None
        while True:
            size = next(sizes, None) if sizes else _next_size(fits, fails)
            if size is None:
                return
            if deadline is not None and time.monotonic() > deadline:
                self.document["stopped"] = {"size": size, "reason": "the time is used up"}
                self.write(self.document)
                return
            error = self._pack(frozen, size)
            if error is None:
                fits = max(fits, size)
            else:
                fails = min(fails, size)
                self.document["stopped"] = {"size": fails, "reason": error}
            self.write(self.document)
            if error is not None and sizes:
                return

    def _pack(self, frozen: Frozen, size: int) -> str | None:
        """Measure one pack size; returns why it does not fit, or None."""
        message = None
        try:
            runner = EngineRunner(self.spec, frozen, self._photos(frozen), size)
            try:
                result = {"size": size, **self._measured(runner, f"pack of {size}")}
            finally:
                runner.free()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            message = f"out of memory: {str(error).splitlines()[0]}"
        else:
            slow, fast = self.document["naive_ms"], result["ms_per_concept"]
            result["speedup"] = round(slow / fast, 3)
            self.document["packs"].append(result)
            self.say(f"pack of {size}", f"{fast:.1f} ms per iteration and concept")
        release(self.device)  # here, where the error and its frames are gone
        if message:
            self.say(f"pack of {size}", message)
        return message

    def _measured(self, runner: Runner, title: str) -> dict[str, Any]:
        """Warm up, time, count and take apart; times are for one concept's iteration."""
        settings, device, n = self.settings, self.device, runner.concepts
        runner.run(settings.warmup)
        measure.reset_peak(device)
        times = measure.summary([each / n for each in runner.run(settings.iterations)])
        result: dict[str, Any] = {
            "ms_per_concept": times["ms"],
            "ms_per_concept_min": times["ms_min"],
            "ms_per_concept_max": times["ms_max"],
            "ms_per_iteration": round(times["ms"] * n, 3),
            "peak_gib": runner.peak_gib,
        }
        result |= self._rates(runner, times["ms"])
        result |= self._per_hour(runner, times["ms"])
        result["parts_ms"] = self._parts(runner)
        if settings.profile is not None:
            with settings.profile.open("a") as file:
                file.write(f"{title}, one iteration\n{runner.profile()}\n\n")
        return result

    def _rates(self, runner: Runner, ms: float) -> dict[str, Any]:
        tflop = measure.count_flops(lambda: runner.run(1)) / runner.concepts / 1e12
        rate = 1e3 * tflop / ms
        return {
            "tflop_per_concept": round(tflop, 9),
            "tflops": round(rate, 6),
            "share_of_matmul": round(rate / self.document["matmul"]["tflops"], 4),
        }

    def _per_hour(self, runner: Runner, ms: float) -> dict[str, Any]:
        """Concepts an hour, for 1000 iterations and for the preset's whole recipe."""
        hour = 3.6e6
        found: dict[str, Any] = {"thousand_iterations": round(hour / ms / PER_HOUR_ITERATIONS, 3)}
        echo_ms = runner.echo_ms()
        if echo_ms is not None:
            whole = total_iterations(self.spec) * ms + self.spec.echo.rounds * echo_ms
            found["recipe"] = round(hour / whole, 3)
        return {"concepts_per_hour": found}

    def _parts(self, runner: Runner) -> dict[str, float]:
        parts = measure.Parts(self.device)
        with parts.watching(runner.calls()):
            whole = sum(runner.run(1)[0] for _ in range(PARTS_ITERATIONS))
        per = 1e3 / PARTS_ITERATIONS / runner.concepts
        found = {name: round(per * seconds, 3) for name, seconds in parts.seconds.items()}
        found["rest"] = round(per * (whole - sum(parts.seconds.values())), 3)
        return found

    def _photos(self, frozen: Frozen) -> Photos:
        return Photos(self.work, frozen)


def _next_size(fits: int, fails: int) -> int | None:
    """Give the next pack size: double until one fails, then halve the gap; None when it is shut."""
    if fits + 1 >= fails:
        return None
    return min(max(1, 2 * fits), LARGEST) if fails > LARGEST else (fits + fails) // 2


def _header(settings: BenchSettings, spec: RunSpec, device: torch.device) -> dict[str, Any]:
    return {
        "base": settings.base,
        **measure.environment(device),
        "precision": spec.train.precision,
        "settings": list(settings.sets),
        "resolution": spec.resolution,
        "batch_size": spec.batch_size,
        "iterations": settings.iterations,
        "warmup": settings.warmup,
        "recipe_iterations": total_iterations(spec),
        "matmul": None,
        "check": None,
        "naive_ms": None,
        "naive": [],
        "packs": [],
        "stopped": None,
    }


@contextmanager
def alone(device: torch.device) -> Iterator[None]:
    """Be the only rank of a process group of one while the block runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    os.environ.update(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    start_deepspeed(device)
    try:
        yield
    finally:
        gc.collect()
        torch.distributed.destroy_process_group()
