"""Networks made fast on a GPU: channels last, compiled, captured as CUDA graphs.

Everything here keeps the face of `model.base_pair.BasePair`, so that what draws does not know of
it. Shapes must be static for it: the engine pads its batches to a few sizes.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from diffusers import AutoencoderTiny

from model.base_pair import BasePair, freeze, load_part
from model.compiling import allow_variants
from model.errors import InputError
from serve.steady import steady, ways_taken

log = logging.getLogger("echodistill.serve")
Speed = Literal["eager", "graphs", "compile"]
_SHAPES = 64  # that one network may be compiled for
_WARM_UPS = 3  # calls before a capture: kernels are chosen and workspaces made in them


def quicken(pair: BasePair, speed: Speed, *, channels_last: bool = False) -> BasePair:
    """The pair with a faster student and decoder; the same networks, whose weights stay shared.

    On a CUDA device their convolutions are made steady too, at any speed (`serve.steady`): in
    place, as the layout is changed.

    Args:
        pair: the loaded base pair.
        speed: `eager` leaves the calls as they are; `graphs` replays them as CUDA graphs, one for
            each shape; `compile` compiles them first (minutes at the first batch of each shape).
            Where there is no CUDA device the calls stay eager.
        channels_last: lay convolutions' weights out as NHWC, on any device. What is compiled for a
            CUDA device always is, as a compiler would lay it out.
    """
    if channels_last or (speed == "compile" and pair.device.type == "cuda"):
        layout: Any = torch.channels_last  # torch's own types miss this argument
        for network in (pair.student, pair.vae):
            network.to(memory_format=layout)
    if pair.device.type == "cuda":
        for network in (pair.student, pair.vae):
            steady(network)
    if speed == "eager":
        return pair
    if pair.device.type != "cuda":
        log.warning("speed '%s' is for CUDA devices: drawing eagerly on %s", speed, pair.device)
        return pair
    student: Any = _Student(_fast(_denoiser(pair.student), speed), pair.student)
    vae: Any = _Decoder(_fast(_decoder(pair.vae), speed), pair.vae)
    return replace(pair, student=student, vae=vae)


def with_tiny_decoder(pair: BasePair, folder: Path) -> BasePair:
    """The pair with an AutoencoderTiny in place of its VAE: faster, and not the same pictures.

    Raises InputError when the directory does not hold one of the pair's latents.
    """
    decoder = load_part(AutoencoderTiny, folder)
    found, wanted = decoder.config.latent_channels, pair.latent_shape[0]
    if found != wanted:
        raise InputError(
            f"the tiny decoder in {folder} reads latents of {found} channels, but the base's have "
            f"{wanted}: give one that was made for this base."
        )
    tiny: Any = torch.nn.Module.to(freeze(decoder), pair.device, pair.dtype)
    return replace(pair, vae=tiny)


def fallbacks(pair: BasePair) -> list[str]:
    """What of a pair from `quicken` runs slower than it was asked to, and why; empty at best."""
    networks = [each for each in (pair.student, pair.vae) if isinstance(each, _Student | _Decoder)]
    return [reason for network in networks for reason in network.call.fallbacks]


def convolutions(pair: BasePair) -> dict[str, int]:
    """How many layers of a pair from `quicken` convolve in each way, counted once for each shape.

    There are none on a CPU; see `serve.steady`.
    """
    found: Counter[str] = Counter()
    for each in (pair.student, pair.vae):
        found.update(ways_taken(each.network if isinstance(each, _Student | _Decoder) else each))
    return dict(found)


def _fast(function: Callable[..., torch.Tensor], speed: Speed) -> Captured:
    if speed != "compile":
        return Captured(function, function)
    allow_variants(_SHAPES)  # one for every padded size
    return Captured(torch.compile(function, dynamic=False), function)


def _denoiser(unet: Any) -> Callable[..., torch.Tensor]:
    def denoise(states: torch.Tensor, t: torch.Tensor, *kv: torch.Tensor) -> torch.Tensor:
        # One tensor or the layers' pieces of it, as the pair hands them over.
        given = kv[0] if len(kv) == 1 else kv
        return unet(states, t, encoder_hidden_states=given, return_dict=False)[0]

    return denoise


def _decoder(vae: Any) -> Callable[..., torch.Tensor]:
    def decode(latents: torch.Tensor) -> torch.Tensor:
        return vae.decode(latents, return_dict=False)[0]

    return decode


class Captured:
    """A function of tensors, replayed as a CUDA graph: one for each set of shapes.

    A function that cannot be captured is called as it is from then on, and a compiled one that
    cannot be compiled is replaced by its plain self; the log says so once.

    Attributes:
        fallbacks: what could not be done, and why.
    """

    def __init__(
        self, function: Callable[..., torch.Tensor], plain: Callable[..., torch.Tensor]
    ) -> None:
        self._function = function
        self._plain = plain
        self.fallbacks: list[str] = []
        self._graphs: dict[tuple[Any, ...], _Graph | None] = {}
        self._pool: Any = None
        self._lock = threading.Lock()

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The function's result, in memory of its own."""
        if inputs[0].device.type != "cuda":
            return self._plain(*inputs)
        key = tuple((tuple(each.shape), each.dtype) for each in inputs)
        with self._lock:
            if key not in self._graphs:
                self._graphs[key] = self._capture(inputs)
            graph = self._graphs[key]
            if graph is None:
                return self._function(*inputs)
            return graph.replay(inputs)

    def _capture(self, inputs: tuple[torch.Tensor, ...]) -> _Graph | None:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        if self._function is not self._plain:
            self._plain(*inputs)  # steady convolutions choose their ways, to be compiled
        while True:
            try:
                return _Graph.of(self._function, inputs, self._pool)
            except Exception as error:  # compilers and drivers raise of every kind
                reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            # Here the error is gone, and the memory that its frames held.
            if self._function is self._plain:
                self._fall_back(f"a network cannot be captured as a CUDA graph ({reason})")
                return None
            self._fall_back(f"a network cannot be compiled, it runs without ({reason})")
            self._function = self._plain

    def _fall_back(self, why: str) -> None:
        log.warning(why)
        self.fallbacks.append(why)


@dataclass(frozen=True)
class _Graph:
    """A captured call: its inputs are copied in, its output out."""

    graph: Any
    inputs: tuple[torch.Tensor, ...]
    output: torch.Tensor

    @classmethod
    def of(
        cls, function: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...], pool: Any
    ) -> _Graph:
        held = tuple(each.clone() for each in inputs)
        # Warm-ups belong on another stream, as torch's notes on CUDA graphs say.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                function(*held)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads may copy adapters to the device meanwhile: that is no part of this graph.
        # The graphs of all sizes work in the same memory: they run one after the other, and what
        # one gives is copied out at once.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            output = function(*held)
        return cls(graph, held, output)

    def replay(self, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        for held, given in zip(self.inputs, inputs, strict=True):
            held.copy_(given)
        self.graph.replay()
        return self.output.clone()  # the next replay writes over it


@dataclass(frozen=True)
class _Student:
    """The student as `BasePair.denoise` calls it."""

    call: Captured
    network: Any

    @property
    def config(self) -> Any:
        return self.network.config

    def __call__(
        self,
        states: torch.Tensor,
        t: torch.Tensor,
        encoder_hidden_states: torch.Tensor | Sequence[torch.Tensor],
    ) -> SimpleNamespace:
        kv = encoder_hidden_states
        pieces = (kv,) if isinstance(kv, torch.Tensor) else tuple(kv)
        return SimpleNamespace(sample=self.call(states, t, *pieces))


@dataclass(frozen=True)
class _Decoder:
    """The VAE as `BasePair.decode` calls it."""

    call: Captured
    network: Any

    @property
    def config(self) -> Any:
        return self.network.config

    def decode(self, latents: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=self.call(latents))
