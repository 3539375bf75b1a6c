"""The benchmark of the whole endpoint: HTTP, Ray Serve and a registry, by numbers of clients."""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from components.train.memory import release
from model.errors import ServiceError
from model.names import MODEL_PREFIX
from pipeline import bench_serve_parts as parts
from pipeline.bench_serve_ways import CHANNELS_LAST
from pipeline.progress import Event, Progress

if TYPE_CHECKING:
    from pipeline.bench_serve import ServeBenchSettings, Write
    from serve.endpoint import Endpoint

_LEAST = 4  # requests of each client
_PATIENCE = 120.0  # seconds for one request


def bench_http(
    settings: ServeBenchSettings, progress: Progress, document: dict[str, Any], write: Write
) -> None:
    """Start the endpoint, ask it by the settings' numbers of clients, and add to the document.

    The endpoint draws in the way, and in forwards of the sizes, that the engine did in its best row
    of the largest batch. `write` gets the document after every number of clients.

    Raises:
        ServiceError: when Ray or the endpoint does not start, or Ray sees no GPU where one is asked
            for.
    """
    from pipeline.services import local_ray
    from serve.endpoint import prepare_environment

    prepare_environment()
    torch.compiler.reset()  # what the engine compiled and captured: the endpoint needs the memory
    release(torch.device(document["device"]))
    progress(Event("bench", "endpoint", "starting Ray"))
    with tempfile.TemporaryDirectory(prefix="echodistill-bench-") as work, local_ray(cpus=2):
        if document["device"] == "cuda":
            _need_gpu()
        endpoint = _start(settings, progress, document, Path(work))
        try:
            for clients in settings.clients:
                load = Load(endpoint.url, settings, clients)
                asyncio.run(load.run())
                row = load.row()
                row["over_engine"] = round(row["images_per_s"] / document["images_per_s"], 3)
                document["http"].append(row)
                write(document)
                words = f"{row['images_per_s']:.2f} images/s, {row['ms_median']:.0f} ms"
                progress(Event("bench", f"{clients} HTTP clients", words))
        finally:
            endpoint.stop()


def _need_gpu() -> None:
    """Raise ServiceError where Ray has no GPU: the endpoint would wait for one for ever."""
    import ray

    if not ray.cluster_resources().get("GPU"):
        raise ServiceError("Ray sees no GPU here")


def _start(
    settings: ServeBenchSettings, progress: Progress, document: dict[str, Any], work: Path
) -> Endpoint:
    from serve.endpoint import start
    from serve.settings import load_settings

    dtype, device = getattr(torch, document["dtype"]), torch.device(document["device"])
    progress(Event("bench", "endpoint", f"registering {settings.concepts} concepts"))
    served = parts.saved_base(settings.base, dtype, device, work / "base")
    release(device)
    uri = f"sqlite:///{work / 'mlflow.db'}"
    _register(served, settings, work, uri)
    own: dict[str, Any] = {}
    if settings.base != "pocket":
        own = {"base": served.pair.name, "student": served.student}
    speed, *switches = str(document["fastest"]).split(":")
    progress(Event("bench", "endpoint", f"starting ({speed}; half a minute, compiled: minutes)"))
    return start(
        load_settings(
            **own,
            host="127.0.0.1",
            port=0,
            tracking_uri=uri,
            cache=work / "cache",
            access_log=work / "access.log",
            device=document["device"],
            dtype=document["dtype"],
            speed=speed,
            channels_last=settings.channels_last or CHANNELS_LAST in switches,
            max_batch=max(document["batches"]),
            batch_sizes=",".join(map(str, document["batches"])),
            max_queue=max(256, 2 * max(settings.clients)),
        )
    )


def _register(served: parts.ServedBase, settings: ServeBenchSettings, work: Path, uri: str) -> None:
    """Register the concepts, each with a champion."""
    from components.ingest.concept_folder import Concept
    from components.register.connection import connect
    from components.register.registry import register_adapter
    from model.names import CHAMPION

    client = connect(uri)
    made = parts.write_adapters(work / "made", served.pair, settings.concepts, settings.rank)
    for pinned in made:
        place = work / "made" / "adapters" / pinned.concept / pinned.sha256
        concept = Concept(pinned.concept, parts.NOUN, parts.TOKEN, parts.NOUN, True, ())
        version = register_adapter(place, concept, tracking_uri=uri)
        name = MODEL_PREFIX + pinned.concept
        client.set_registered_model_alias(name, CHAMPION, str(version.version))


@dataclass
class Load:
    """Clients that each ask again as soon as they have their answer.

    Attributes:
        url: of the endpoint.
        settings: of the benchmark.
        clients: how many at once.
        times: seconds of each answer.
        refused: answers of status 429 or 503, which were asked for again.
        stages: milliseconds that the endpoint says it spent in each stage, of each answer.
    """

    url: str
    settings: ServeBenchSettings
    clients: int
    times: list[float] = field(default_factory=list)
    refused: int = 0
    stages: list[dict[str, float]] = field(default_factory=list)
    _spent: float = 0.0

    async def run(self) -> None:
        """Ask until the time is up.

        Raises:
            ServiceError: for an answer that is neither a picture nor a refusal.
        """
        import aiohttp

        limit = aiohttp.TCPConnector(limit=self.clients)
        patience = aiohttp.ClientTimeout(total=_PATIENCE)
        async with aiohttp.ClientSession(connector=limit, timeout=patience) as session:
            for number in range(self.settings.concepts):  # every concept's adapter is loaded
                await self._ask(session, number)
            self.times.clear()
            self.stages.clear()
            began = time.perf_counter()
            await asyncio.gather(*(self._client(session, n, began) for n in range(self.clients)))
            self._spent = time.perf_counter() - began

    def row(self) -> dict[str, Any]:
        """Give the figures."""
        ms = sorted(1e3 * each for each in self.times)
        return {
            "clients": self.clients,
            "requests": len(ms),
            "images_per_s": round(len(ms) / self._spent, 3),
            "ms_median": round(statistics.median(ms), 3),
            "ms_95": round(ms[int(0.95 * (len(ms) - 1))], 3),
            "refused": self.refused,
            "stages_ms": {
                name: round(statistics.median(each[name] for each in self.stages), 1)
                for name in self.stages[0]
            },
            "cores": os.cpu_count(),
        }

    async def _client(self, session: Any, number: int, began: float) -> None:
        asked = 0
        while asked < _LEAST or time.perf_counter() - began < self.settings.seconds:
            await self._ask(session, number + asked * self.clients)
            asked += 1

    async def _ask(self, session: Any, number: int) -> None:
        concept = number % self.settings.concepts
        body = {
            "model": f"concept-{concept:04d}",
            "prompt": parts.prompt(concept),
            "seed": number,
            "output_format": "jpeg",
        }
        began = time.perf_counter()
        while True:
            async with session.post(f"{self.url}/v1/images/generations", json=body) as answer:
                data = await answer.read()
                if answer.status in (429, 503):
                    self.refused += 1
                    await asyncio.sleep(float(answer.headers.get("retry-after", 1)))
                    continue
                if answer.status != 200:
                    raise ServiceError(f"the endpoint answered {answer.status}: {data[:300]!r}")
            self.times.append(time.perf_counter() - began)
            self.stages.append(_stages(answer.headers["server-timing"]))
            return


def _stages(header: str) -> dict[str, float]:
    """Read a Server-Timing header: milliseconds by stage."""
    pairs = (part.strip().split(";dur=") for part in header.split(","))
    return {name: float(ms) for name, ms in pairs}
