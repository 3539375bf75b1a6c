"""The painters behind a Ray Serve handle."""

from __future__ import annotations

import asyncio
from typing import Any

import ray.exceptions
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from serve.api import ApiError, ConceptCard, ModelList, busy
from serve.orders import Order, Painted, Shown


class RemotePainter:
    """The painters behind a deployment handle, as the gateway sees them."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def paint(self, order: Order) -> Painted | ApiError:
        """The pictures of an order, or why there are none."""
        return await self._call("paint", order)

    async def models(self, shown: Shown) -> ModelList | ApiError:
        """A page of what can be asked for."""
        return await self._call("models", shown)

    async def concept(self, concept: str) -> ConceptCard | ApiError:
        """What there is to know of a concept."""
        return await self._call("concept", concept)

    async def preview(self, concept: str) -> bytes | ApiError:
        """The PNG that came with a concept's champion."""
        return await self._call("preview", concept)

    async def health(self) -> dict[str, Any]:
        """Facts for `/healthz`."""
        facts = await self._call("health")
        if isinstance(facts, ApiError):
            raise facts
        return facts

    async def _call(self, method: str, *args: Any) -> Any:
        # An order names its seed, so drawing it again on another replica gives the same pictures.
        for _ in range(2):
            response = getattr(self._handle, method).remote(*args)
            try:
                return await response
            except asyncio.CancelledError:
                response.cancel()
                raise
            except ray.exceptions.RayActorError:
                continue
            except (BackPressureError, DeploymentUnavailableError):
                break
        return busy("No replica can draw now: try again later.", status=503, retry_after=5)
