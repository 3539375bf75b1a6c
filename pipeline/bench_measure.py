"""Measures of a benchmark: the time of parts, floating-point operations, memory, matmul rate."""

from __future__ import annotations

import re
import resource
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from model.errors import InputError

GIB = 2**30


class OutOfTime(BaseException):
    """Something took longer than it may: no Exception, so that no library takes it for its own."""


_TOP = 60  # operators of a profile


class Parts:
    """Adds up the seconds that calls of functions take, by part of an iteration."""

    def __init__(self, device: torch.device) -> None:
        """Start at nothing."""
        self.seconds: dict[str, float] = {}
        self._device = device
        self._inner = [0.0]
        self._thread = threading.get_ident()

    @contextmanager
    def watching(self, calls: Iterable[tuple[Any, str, str]]) -> Iterator[None]:
        """Time functions while the block runs, where their callers look them up.

        The loops stay free of timers so. A call inside another one counts for its own part only.

        Args:
            calls: (module or object, name of its function, part); a name that is not there is
                passed over.
        """
        before: list[tuple[Any, str, Any, bool]] = []
        try:
            for owner, name, part in calls:
                if hasattr(owner, name):
                    before.append((owner, name, getattr(owner, name), name in vars(owner)))
                    setattr(owner, name, self._timed(getattr(owner, name), part))
            yield
        finally:
            for owner, name, function, own in reversed(before):
                if own:
                    setattr(owner, name, function)
                else:
                    delattr(owner, name)

    def _timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self._thread:  # done meanwhile: it takes no time of its own
                return function(*args, **kwargs)
            wait(self._device)
            began = time.perf_counter()
            self._inner.append(0.0)
            result = function(*args, **kwargs)
            wait(self._device)
            whole = time.perf_counter() - began
            own = whole - self._inner.pop()
            self._inner[-1] += whole
            self.seconds[part] = self.seconds.get(part, 0.0) + own
            return result

        return timed


def wait(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the block when it takes longer; for a program's main thread.

    What waits inside a library's call is interrupted when that returns.
    """

    def stop(*_: Any) -> None:
        raise OutOfTime(f"it took longer than {seconds:.0f} s")

    before, began = signal.signal(signal.SIGALRM, stop), time.monotonic()
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left:  # whoever else waits for the clock goes on
            left = max(left - (time.monotonic() - began), 0.001)
            signal.setitimer(signal.ITIMER_REAL, left)


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Give the median and the spread of times, in milliseconds."""
    ms = [1e3 * each for each in seconds]
    return {
        "ms": round(statistics.median(ms), 3),
        "ms_min": round(min(ms), 3),
        "ms_max": round(max(ms), 3),
    }


def matmul_rate(device: torch.device) -> dict[str, Any]:
    """Measure a large square product of random matrices: bf16 on a GPU, float32 on a CPU."""
    on_gpu = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if on_gpu else (2048, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(13 if on_gpu else 5):
        wait(device)
        began = time.perf_counter()
        torch.matmul(a, b)
        wait(device)
        times.append(time.perf_counter() - began)
    rate = 2 * size**3 / statistics.median(times[2:]) / 1e12
    return {"size": size, "dtype": str(dtype).removeprefix("torch."), "tflops": round(rate, 4)}


def count_flops(function: Callable[[], Any]) -> int:
    """Count the floating-point operations of a call: products, convolutions and attention."""

    # The CPU's attention is the one kernel that torch's counter does not know.
    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return 5 * sdpa_flop_count(query, key, value) // 2  # five products where forward has two

    aten = torch.ops.aten
    known = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    # Left to itself torch skips what it would compile while the counter watches, and does so ever
    # after.
    eager = torch.compiler.set_stance("force_eager")
    with eager, FlopCounterMode(display=False, custom_mapping=known) as counter:
        function()
    return int(counter.get_total_flops())


def reset_peak(device: torch.device) -> None:
    """Begin to look for the largest memory in use anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # Linux only; elsewhere the peak is the process's
        Path("/proc/self/clear_refs").write_text("5")


def peak_gib(device: torch.device) -> float:
    """Give the largest memory in use since the reset: of the GPU's tensors, or resident."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / GIB, 3)
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        found = None
    kib = int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(kib * 1024 / GIB, 3)


class Profile:
    """The torch profiler over some part of a run, as tables of the top operators."""

    def __init__(self, device: torch.device) -> None:
        """Start."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._sort = f"self_{device.type}_time_total"
        self._device = device
        self._profiler = torch.profiler.profile(activities=activities, record_shapes=True)
        self._profiler.start()

    def stop(self) -> str:
        """Stop; returns the table, and a second one by the shapes that operators were given."""
        wait(self._device)
        self._profiler.stop()
        tables = [
            self._profiler.key_averages(group_by_input_shape=by_shape).table(
                sort_by=self._sort, row_limit=_TOP, max_name_column_width=160
            )
            for by_shape in (False, True)
        ]
        return "\n".join(tables)


def find_device(name: str) -> torch.device:
    """Give the device of a name: `auto`, `cpu` or `cuda`.

    Raises:
        InputError: for another name, and for a device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise InputError(f"there is no device {name!r}: give auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("torch finds no CUDA device here: give --device cpu")
    return torch.device("cuda", 0) if name == "cuda" else torch.device("cpu")


def environment(device: torch.device) -> dict[str, Any]:
    """Tell what was measured on."""
    on_gpu = device.type == "cuda"
    return {
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if on_gpu else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else "CPU"
