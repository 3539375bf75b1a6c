"""The engine: pictures of any concepts, versions and seeds in one batch.

Plain Python over `model/`; it knows nothing of HTTP, Ray or the registry. Keys and values depend
on (adapter, prompt) alone, so they are computed once, kept, and mixed freely in a forward of the
base networks, which never change. Forwards have one of a few padded sizes: shapes are static, and
within one size a picture is the same to the last bit whatever it was drawn with.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from model.adapter import Adapter
from model.base_pair import BasePair
from model.cross_attention import keys_values
from model.errors import EchoDistillError, InputError
from model.low_rank import DOWN, UP, WHOLE
from model.sampler import picture_noise, sample_student, text_states
from serve.lru import ByteLru

PROOF_PROMPT = "a photo of a dog"
PROOF_SEED = 0
# The proof is drawn alone each time; another picture than the first one means broken weights or
# hardware. Kernels may be chosen anew between calls, which moves a value by round-off.
PROOF_TOLERANCE = 2
# Padding costs a fifth at most, but for batches of three, and so few sizes are soon captured.
BATCH_SIZES = (1, 2, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64)
# Compiling takes a minute for each size before the first request: fewer sizes, more padding.
COMPILED_SIZES = (1, 2, 4, 8, 16, 32, 64)
# A CPU draws a picture of a larger forward more slowly, for what lies between its layers no longer
# fits into its caches.
LARGEST = {"cpu": 8}
# Prompts are encoded so many at a time, always: their keys and values are kept, and must not depend
# on what else was new. A GPU encodes eight in the time of one.
TEXT_BATCH = {"cpu": 1, "cuda": 8}
Drawer = tuple[str, str] | None


class DrawError(EchoDistillError):
    """The engine drew something that cannot be right."""


@dataclass(frozen=True)
class PictureRequest:
    """One picture.

    Attributes:
        prompt: holds the adapter's token (see `model.adapter.prompt_for`).
        seed: of the start noise.
        steps: network evaluations: 1, 2 or 4.
        adapter: None draws with the bare base.
    """

    prompt: str
    seed: int
    steps: int = 1
    adapter: Adapter | None = None

    @property
    def drawer(self) -> Drawer:
        """Concept and sha256 of the adapter: what keys and values are kept under."""
        if self.adapter is None:
            return None
        return self.adapter.meta["concept"]["id"], self.adapter.sha256


class Engine:
    """Draws with one base pair. Calls from many threads go to the device one after the other.

    Args:
        pair: the loaded base pair, perhaps made fast (`serve.fast`).
        keys_values_bytes: budget for keys and values that are kept, on the pair's device.
        device_bytes: budget for adapters on a GPU; on a CPU they are there already.
        batch_sizes: sizes that a forward may have; the largest bounds it. None leaves the choice
            to the device.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        pair: BasePair,
        *,
        keys_values_bytes: int = 2**30,
        device_bytes: int = 4 * 2**30,
        batch_sizes: Sequence[int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.pair = pair
        if batch_sizes is None:
            largest = LARGEST.get(pair.device.type, BATCH_SIZES[-1])
            batch_sizes = [size for size in BATCH_SIZES if size <= largest]
        self.batch_sizes = tuple(sorted(batch_sizes))
        self.keys_values_hits = 0
        self.keys_values_misses = 0
        self._text_batch = TEXT_BATCH.get(pair.device.type, 1)
        self._keys_values: ByteLru[tuple[Drawer, str], torch.Tensor] = ByteLru(keys_values_bytes)
        self._on_device: ByteLru[Drawer, Adapter] = ByteLru(device_bytes)
        self._lock = threading.Lock()
        self._clock = clock
        self._drew_at: float | None = None
        self._proof: np.ndarray | None = None

    def draw(self, requests: Sequence[PictureRequest]) -> np.ndarray:
        """The pictures of R requests, uint8 [R, S, S, 3].

        Requests of one number of steps share forwards of a padded size. A picture equals
        `model.sampler.draw`'s but for the round-off of the size (at most one level of 255 in
        float32). Raises DrawError when the networks give values that are not finite.
        """
        with self._lock:
            drawn, finite = self._submit(requests)
            pictures = _fetched(drawn)
        if not finite.item():
            raise DrawError("the networks gave values that are not finite: use another dtype.")
        self._drew_at = self._clock()
        return pictures

    def forwards(self, steps: Sequence[int]) -> list[tuple[list[int], int]]:
        """How requests of these steps are drawn: for each forward its rows and padded size."""
        largest = self.batch_sizes[-1]
        found = []
        for count in dict.fromkeys(steps):
            rows = [row for row, each in enumerate(steps) if each == count]
            for first in range(0, len(rows), largest):
                part = rows[first : first + largest]
                found.append((part, next(s for s in self.batch_sizes if s >= len(part))))
        return found

    def keeps(self, request: PictureRequest) -> bool:
        """Whether the request's keys and values are at hand. Never waits for a drawing."""
        return (request.drawer, request.prompt) in self._keys_values

    def device_memory(self) -> int | None:
        """Bytes of the GPU that tensors take; None without one."""
        device = self.pair.device
        return torch.cuda.memory_allocated(device) if device.type == "cuda" else None

    def prepare(self, adapter: Adapter) -> None:
        """Puts an adapter on the device, so that its first picture need not wait for that."""
        if self.pair.device.type != "cpu":
            with self._lock:
                self._placed(adapter)

    def warm(self) -> None:
        """Draws a batch of each size, so that no request waits for compiling and capturing."""
        for size in self.batch_sizes:
            self.draw([PictureRequest(PROOF_PROMPT, PROOF_SEED)] * size)

    def prove(self, max_age: float = 0.0) -> float:
        """Shows that the engine draws; returns the seconds since it last did.

        When its last picture is older than `max_age` seconds it draws the proof picture, which
        must be the one that it first drew. Raises DrawError otherwise.
        """
        now = self._clock()
        if self._proof is not None and self._drew_at is not None and now - self._drew_at < max_age:
            return now - self._drew_at
        picture = self.draw([PictureRequest(PROOF_PROMPT, PROOF_SEED)])[0]
        if self._proof is None:
            self._proof = picture
        off = int(np.abs(picture.astype(np.int16) - self._proof.astype(np.int16)).max())
        if off > PROOF_TOLERANCE:
            raise DrawError(
                f"the proof picture is off by {off} of 255 from the first one: restart the replica."
            )
        return 0.0

    def check(self, adapter: Adapter) -> None:
        """Raises InputError for an adapter that cannot draw with this pair.

        Factors are not multiplied for it: where they are finite, so is their product in float32.
        """
        adapter.check_base(self.pair)
        width = self.pair.student_kv.shape[1]
        layout = self.pair.student_layout
        rows = zip(layout.names, layout.slices, strict=True)
        expected = {name: (part.stop - part.start, width) for name, part in rows}
        tensors = [*adapter.kv_delta.values(), adapter.token_rows]
        finite = all(bool(torch.isfinite(each).all()) for each in tensors)
        fits = dict(_delta_shapes(adapter.kv_delta)) == expected
        if not fits or adapter.token_rows.shape[1] != width or not finite:
            raise InputError(
                f"The adapter of {adapter.meta['concept']['id']!r} has values that are not finite "
                "or of another size than its base's; train the concept again."
            )

    @torch.inference_mode()
    def _submit(self, requests: Sequence[PictureRequest]) -> tuple[torch.Tensor, torch.Tensor]:
        """Hands a batch to the device; pictures [R, S, S, 3] uint8 there, and if all is finite."""
        known = self._known(requests)
        noise = picture_noise(self.pair, [request.seed for request in requests])
        drawn: list[torch.Tensor] = [noise] * len(requests)
        finite = torch.ones((), dtype=torch.bool, device=self.pair.device)
        for rows, size in self.forwards([request.steps for request in requests]):
            # Any row fills the empty places: a row's picture does not depend on the others.
            filled = [*rows, *rows[:1] * (size - len(rows))]
            kv = torch.stack([known[row] for row in filled])
            images = sample_student(self.pair, kv, noise[filled], requests[rows[0]].steps)
            images = images[: len(rows)]
            finite &= torch.isfinite(images).all()
            levels = ((images + 1) * 127.5).round().to(torch.uint8)
            for row, picture in zip(rows, levels.permute(0, 2, 3, 1), strict=True):
                drawn[row] = picture
        return torch.stack(drawn), finite

    def _known(self, requests: Sequence[PictureRequest]) -> list[torch.Tensor]:
        """Keys and values [L, C] of each request; what is not kept is computed and kept."""
        keys = [(request.drawer, request.prompt) for request in requests]
        found: dict[tuple[Drawer, str], torch.Tensor] = {}
        new: dict[tuple[Drawer, str], PictureRequest] = {}
        for key, request in zip(keys, requests, strict=True):
            kept = self._keys_values.get(key)
            if kept is None:
                new.setdefault(key, request)
            else:
                found[key] = kept
        self.keys_values_misses += len(new)
        self.keys_values_hits += len(requests) - len(new)
        for key, kv in zip(new, self._computed(list(new.values())), strict=True):
            self._keys_values.put(key, kv, kv.numel() * kv.element_size())
            found[key] = kv
        return [found[key] for key in keys]

    def _computed(self, requests: list[PictureRequest]) -> Iterator[torch.Tensor]:
        """Keys and values of requests, in such a way that none of them can touch another's."""
        size = self._text_batch
        alone = torch.zeros(1, dtype=torch.long)
        for first in range(0, len(requests), size):
            part = requests[first : first + size]
            filled = [*part, *part[:1] * (size - len(part))]
            adapters = [request.adapter for request in filled]
            states = text_states(self.pair, adapters, [request.prompt for request in filled])
            for row, adapter in enumerate(adapters[: len(part)]):
                weight = self.pair.student_kv
                if adapter is not None:
                    weight = self._placed(adapter).student_weight(self.pair)
                yield keys_values(states[row : row + 1], weight[None], alone)[0]

    def _placed(self, adapter: Adapter) -> Adapter:
        """The adapter with its deltas on the pair's device."""
        device = self.pair.device
        if device.type == "cpu":
            return adapter
        key = (str(adapter.meta["concept"]["id"]), adapter.sha256)
        there = self._on_device.get(key)
        if there is None:
            # Factors stay factors: a thousand low-rank adapters take a few GB.
            delta = {name: part.to(device) for name, part in adapter.kv_delta.items()}
            there = replace(adapter, kv_delta=delta)
            self._on_device.put(key, there, adapter_bytes(there))
        return there


def adapter_bytes(adapter: Adapter) -> int:
    """Bytes that an adapter's tensors take in memory."""
    tensors = [*adapter.kv_delta.values(), adapter.token_rows]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _fetched(pictures: torch.Tensor) -> np.ndarray:
    """Pictures from the device; through pinned memory, which is many times faster, from a GPU."""
    if pictures.device.type != "cuda":
        return pictures.cpu().numpy()
    held = torch.empty(pictures.shape, dtype=pictures.dtype, pin_memory=True)
    held.copy_(pictures, non_blocking=True)
    torch.cuda.synchronize(pictures.device)
    return held.numpy()


def _delta_shapes(parts: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, tuple[int, int]]]:
    """Names and sizes of the deltas that `model.low_rank.whole` would give; (0, 0) for odd ones."""
    for name, part in parts.items():
        layer = name.removesuffix(DOWN).removesuffix(UP).removesuffix(WHOLE)
        down, up = parts.get(layer + DOWN), parts.get(layer + UP)
        if down is None and up is None:
            yield layer + WHOLE, (part.shape[0], part.shape[1])
        elif down is None or up is None or layer + WHOLE in parts or len(down) != up.shape[1]:
            yield layer + WHOLE, (0, 0)
        elif name.endswith(DOWN):
            yield layer + WHOLE, (up.shape[0], down.shape[1])
