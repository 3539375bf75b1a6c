"""What an answer costs the processes between the painter and a client (SERVE.md).

The painter draws nothing, so that the rest of the endpoint is what is measured, by its processor
time: gateway, Ray Serve's proxy, Ray itself. Ray's environment variables are taken as they are set,
and from `serve.endpoint.RAY_ENVIRONMENT` otherwise.

    python -m tests.bench.http_chain --kilobytes 382 --clients 64
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from serve import app
from serve.batcher import Batcher
from serve.endpoint import start
from serve.orders import Order, Painted
from serve.registry import Pinned
from serve.settings import ServeSettings, load_settings

_PARTS = ("ProxyActor", "gateway", "painter", "ServeController", "raylet")
_PINNED = Pinned("dog", "1", "0" * 64, "0" * 64)
_SECONDS = dict.fromkeys(("resolve", "queue", "draw", "encode"), 0.0)


class Painter:
    """Answers every order with the same bytes."""

    def __init__(self, settings: ServeSettings) -> None:
        self._file = os.urandom(int(os.environ["CHAIN_BYTES"]))
        self._batcher: Batcher[Order, Order] = Batcher(list, settings.max_batch)

    async def paint(self, order: Order) -> Painted:
        """What the gateway gets for an order."""
        await self._batcher(order)
        return Painted(
            files=[self._file],
            prompt=order.prompt,
            size="512x512",
            base="pocket",
            pinned=_PINNED,
            level="memory",
            seconds=_SECONDS,
            batches=[1],
            mixes=[1],
            kept=1,
            device_bytes=None,
        )

    async def health(self) -> dict[str, Any]:
        """Always well."""
        return {"status": "ok"}


def main() -> None:
    """Ask, and print the rate and each part's milliseconds of processor time an answer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kilobytes", type=int, default=382, help="of a picture's file")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--answers", type=int, default=512)
    given = parser.parse_args()
    os.environ["CHAIN_BYTES"] = str(1000 * given.kilobytes)
    app.PainterReplica = Painter  # type: ignore[assignment,misc]
    with tempfile.TemporaryDirectory() as work:
        settings = load_settings(
            port=0, cache=Path(work), access_log=Path(work) / "log", max_batch=32, max_queue=256
        )
        endpoint = start(settings)
        try:
            asyncio.run(_ask(endpoint.url, given.clients, given.clients))  # connections are made
            before, began = _spent(), time.perf_counter()
            asyncio.run(_ask(endpoint.url, given.clients, given.answers))
            seconds, after = time.perf_counter() - began, _spent()
        finally:
            endpoint.stop()
    print(f"{given.answers / seconds:.1f} answers/s; processor time an answer in ms:")
    for part in _PARTS:
        print(f"  {part:16} {1e3 * (after[part] - before[part]) / given.answers:6.2f}")


def _spent() -> Counter[str]:
    """Seconds of processor time by part, so far."""
    found: Counter[str] = Counter()
    for process in psutil.process_iter(["cmdline", "cpu_times"]):
        line = " ".join(process.info["cmdline"] or [])
        times = process.info["cpu_times"]
        for part in _PARTS:
            if part in line and times is not None:
                found[part] += times.user + times.system
                break
    return found


async def _ask(url: str, clients: int, answers: int) -> None:
    import aiohttp

    body = {"model": "dog", "prompt": "a photo of a dog", "output_format": "jpeg"}

    async def client(session: aiohttp.ClientSession) -> None:
        for _ in range(answers // clients):
            async with session.post(f"{url}/v1/images/generations", json=body) as answer:
                answer.raise_for_status()
                await answer.read()

    limit = aiohttp.TCPConnector(limit=clients)
    async with aiohttp.ClientSession(connector=limit) as session:
        await asyncio.gather(*(client(session) for _ in range(clients)))


if __name__ == "__main__":
    main()
