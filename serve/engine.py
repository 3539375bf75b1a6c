"""The engine: pictures of any concepts, versions, seeds and step counts in one batch.

Plain Python over `model/`; it knows nothing of HTTP, Ray or the registry. Keys and values depend
on (adapter, prompt) alone, so they are computed once, kept, and mixed freely in a forward of the
base networks, which never change.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from model.adapter import Adapter
from model.base_pair import BasePair
from model.cross_attention import join
from model.errors import EchoDistillError, InputError
from model.low_rank import whole
from model.sampler import picture_noise, sample_student, student_keys_values, to_uint8
from serve.lru import ByteLru

PROOF_PROMPT = "a photo of a dog"
PROOF_SEED = 0
# The proof is drawn alone each time; another picture than the first one means broken weights or
# hardware. Kernels may be chosen anew between calls, which moves a value by round-off.
PROOF_TOLERANCE = 2


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
    def drawer(self) -> tuple[str, str] | None:
        """Concept and sha256 of the adapter: what keys and values are kept under."""
        if self.adapter is None:
            return None
        return self.adapter.meta["concept"]["id"], self.adapter.sha256


class Engine:
    """Draws with one base pair. Calls from many threads go one after the other.

    Args:
        pair: the loaded base pair.
        keys_values_bytes: budget for keys and values that are kept, on the pair's device.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        pair: BasePair,
        *,
        keys_values_bytes: int = 2**30,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.pair = pair
        self.prompt_tokens = int(pair.tokenizer.model_max_length) - 2  # without start and end
        self.keys_values_hits = 0
        self.keys_values_misses = 0
        self._keys_values: ByteLru[tuple[tuple[str, str] | None, str], torch.Tensor] = ByteLru(
            keys_values_bytes
        )
        self._lock = threading.Lock()
        self._clock = clock
        self._drew_at: float | None = None
        self._proof: np.ndarray | None = None

    def draw(self, requests: Sequence[PictureRequest]) -> np.ndarray:
        """The pictures of R requests, uint8 [R, S, S, 3].

        A picture equals `model.sampler.draw`'s; the other requests change it by round-off only.
        Raises DrawError when the networks give values that are not finite.
        """
        with self._lock:
            pictures = self._draw(requests)
            self._drew_at = self._clock()
        return pictures

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
        """Raises InputError for an adapter that cannot draw with this pair."""
        adapter.check_base(self.pair)
        delta = join(self.pair.student_layout, whole(adapter.kv_delta))
        finite = torch.isfinite(delta).all() and torch.isfinite(adapter.token_rows).all()
        width = self.pair.student_kv.shape[1]
        if delta.shape[1] != width or adapter.token_rows.shape[1] != width or not finite:
            raise InputError(
                f"The adapter of {adapter.meta['concept']['id']!r} has values that are not finite "
                "or of another size than its base's; train the concept again."
            )

    def excess_tokens(self, prompt: str, adapter: Adapter | None) -> int:
        """How many tokens of a prompt the text encoder would not read; 0 when it reads all."""
        for token in () if adapter is None else adapter.tokens:
            prompt = prompt.replace(token, " a ")  # as a concept's token, one place in the context
        tokens = self.pair.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return max(0, len(tokens) - self.prompt_tokens)

    @torch.inference_mode()
    def _draw(self, requests: Sequence[PictureRequest]) -> np.ndarray:
        kv = torch.stack([self._kv(request) for request in requests])
        noise = picture_noise(self.pair, [request.seed for request in requests])
        images = sample_student(self.pair, kv, noise, [request.steps for request in requests])
        if not torch.isfinite(images).all():
            raise DrawError("the networks gave values that are not finite: use another dtype.")
        pictures = to_uint8(images)
        return np.ascontiguousarray(pictures.permute(0, 2, 3, 1).numpy())

    def _kv(self, request: PictureRequest) -> torch.Tensor:
        """Keys and values [L, C] of a request, computed alone so that no other can touch them."""
        key = (request.drawer, request.prompt)
        kv = self._keys_values.get(key)
        if kv is None:
            self.keys_values_misses += 1
            kv = student_keys_values(self.pair, [request.adapter], [request.prompt])[0]
            self._keys_values.put(key, kv, kv.numel() * kv.element_size())
        else:
            self.keys_values_hits += 1
        return kv
