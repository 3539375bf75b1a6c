"""What gateway and painters tell each other. No torch here: a gateway needs none."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from serve.api import ApiError, ConceptCard, ModelList, OutputFormat
from serve.limits import Limits
from serve.registry import Pinned


@dataclass(frozen=True)
class Order:
    """One request, its limits checked: `n` pictures of seeds `seed`, `seed + 1`, ..."""

    model: str | None
    prompt: str
    n: int
    seed: int
    steps: int
    size: str | None
    output_format: OutputFormat


@dataclass(frozen=True)
class Shown:
    """Which models to list: at most `limit` after an id, of those that a key may know of."""

    limits: Limits
    limit: int
    after: str | None = None


@dataclass(frozen=True)
class Painted:
    """The answer to an order: encoded pictures, and what drew them.

    Attributes:
        files: n encoded pictures.
        prompt: with the concept's token in it.
        size: e.g. `512x512`.
        base: name of the base.
        pinned: the concept's version that drew; None for the bare base.
        level: where the adapter was found: memory, disk, registry, or none for the base.
        seconds: time by stage: resolve, queue, draw, encode.
        batches: for each picture, how many were drawn with it.
        mixes: for each picture, by how many different adapters those were drawn.
        kept: how many of the pictures found their keys and values at hand.
        device_bytes: of the GPU that the replica's tensors take; None without one.
    """

    files: list[bytes]
    prompt: str
    size: str
    base: str
    pinned: Pinned | None
    level: str
    seconds: dict[str, float]
    batches: list[int]
    mixes: list[int] = field(default_factory=list)
    kept: int = 0
    device_bytes: int | None = None


class PainterClient(Protocol):
    """The painter as the HTTP side sees it, in this process or another."""

    async def paint(self, order: Order) -> Painted | ApiError:
        """The pictures of an order, or why there are none."""

    async def models(self, shown: Shown) -> ModelList | ApiError:
        """A page of what can be asked for."""

    async def concept(self, concept: str) -> ConceptCard | ApiError:
        """What there is to know of a concept."""

    async def preview(self, concept: str) -> bytes | ApiError:
        """The PNG that came with a concept's champion."""

    async def health(self) -> dict[str, Any]:
        """Facts for `/healthz`; raises when the painter cannot draw."""
