"""One replica that knows thousands of concepts: what listing, loading and mixing them cost.

    python -m tests.bench.many_concepts --known 10000 --warm 1000 --clients 8

A real `mlflow server` over SQLite knows them all (its tables are filled directly: registering ten
thousand takes hours). The adapters of those that are asked for lie on the endpoint's disk, as after
a restart; they are made up, of rank 16. Prints one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import torch

from model.names import BASE_HASH_TAG, CHAMPION, MODEL_PREFIX, SHA256_TAG
from pipeline import bench_serve_parts as parts
from pipeline.services import local_ray, quiet_libraries
from serve.registry import Pinned
from tests.services import mlflow_process


def main() -> None:
    """Measure, and print the document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--known", type=int, default=10_000)
    parser.add_argument("--warm", type=int, default=1_000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument(
        "--alias-seconds", type=float, default=3600.0, help="see `echodistill serve`"
    )
    asked = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory(prefix="echodistill-bench-") as work:
        print(json.dumps(measure(asked, Path(work)), indent=2))


def measure(asked: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Make registry and adapters, start both servers, and ask."""
    from serve.endpoint import start
    from serve.settings import load_settings

    pair = parts.served_base("pocket", torch.float32, torch.device("cpu")).pair
    warm = list(parts.write_adapters(work / "cache", pair, asked.warm, rank=16))
    fill_registry(work / "mlflow.db", warm, asked.known)
    say(f"{asked.known} concepts in the registry, {len(warm)} adapters on disk")
    with mlflow_process(work / "mlflow.db", work) as uri, local_ray(cpus=2):
        began = time.perf_counter()
        endpoint = start(
            load_settings(
                host="127.0.0.1",
                port=0,
                tracking_uri=uri,
                cache=work / "cache",
                access_log=work / "access.log",
                alias_seconds=asked.alias_seconds,
            )
        )
        started = time.perf_counter() - began
        say(f"the endpoint answers after {started:.1f} s")
        try:
            found = asyncio.run(ask_everything(endpoint.url, warm, asked.clients))
        finally:
            endpoint.stop()
    return {
        "cores": os.cpu_count(),
        "known": asked.known,
        "start_seconds": round(started, 1),
        "adapter_bytes": sum(f.stat().st_size for f in adapter_folder(work, warm[0]).iterdir()),
        **found,
    }


def adapter_folder(work: Path, pinned: Pinned) -> Path:
    """Give the place of an adapter on the endpoint's disk."""
    return work / "cache" / "adapters" / pinned.concept / pinned.sha256


def fill_registry(database: Path, warm: list[Pinned], known: int) -> None:
    """Write `known` registered models with a champion each, the first of them with adapters."""
    from mlflow.store.model_registry.dbmodels import models as rows
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from sqlalchemy.orm import Session

    store = SqlAlchemyStore(f"sqlite:///{database}", str(database.parent / "artifacts"))
    cold = (
        Pinned(f"concept-{n:05d}", "1", f"{n:064x}", warm[0].base_hash)
        for n in range(len(warm), known)
    )
    with Session(store.engine) as session:
        for each in (*warm, *cold):
            name = MODEL_PREFIX + each.concept
            session.add(rows.SqlRegisteredModel(name=name))
            session.add(rows.SqlModelVersion(name=name, version=1, source="file:///nowhere"))
            session.add(rows.SqlRegisteredModelAlias(name=name, alias=CHAMPION, version=1))
            for key, value in ((SHA256_TAG, each.sha256), (BASE_HASH_TAG, each.base_hash)):
                session.add(rows.SqlModelVersionTag(name=name, version=1, key=key, value=value))
        session.commit()
    store.engine.dispose()


async def ask_everything(url: str, warm: list[Pinned], clients: int) -> dict[str, Any]:
    """List, load every adapter by a first picture, then ask for any of them."""
    connector = aiohttp.TCPConnector(limit=clients)
    async with aiohttp.ClientSession(url, connector=connector) as session:
        found: dict[str, Any] = {"first_page_ms": await timed(lambda: get(session, "/v1/models"))}
        pages = [await timed(lambda: get(session, "/v1/models?limit=100")) for _ in range(10)]
        found["page_of_100_ms"] = statistics.median(pages)
        began, count, after = time.perf_counter(), 0, ""
        while True:
            page = await get(session, f"/v1/models{after}")
            count += len(page["data"])
            if not page["has_more"]:
                break
            after = f"?after={page['data'][-1]['id']}"
        found["whole_list"] = {"models": count, "seconds": round(time.perf_counter() - began, 2)}
        say(f"listed {count}")
        before = replica_bytes()
        found["first_pictures"] = await draw(session, warm, clients)
        grown = replica_bytes() - before
        found["replica_bytes"] = {"before": before, "each_concept": grown // len(warm)}
        say("every adapter is loaded")
        again = random.Random(0).choices(warm, k=len(warm))
        found["pictures_of_any"] = await draw(session, again, clients)
        found["adapters_from"] = await levels(session)
    return found


async def draw(session: aiohttp.ClientSession, wanted: Iterable[Pinned], clients: int) -> Any:
    """Ask for one picture of each; the figures. Raises for an answer of another adapter."""
    left, times = iter(list(wanted)), []
    began = time.perf_counter()

    async def client() -> None:
        for pinned in left:
            number = int(pinned.concept.rpartition("-")[2])
            body = {
                "model": pinned.concept,
                "prompt": parts.prompt(number),
                "seed": number,
                "output_format": "jpeg",
            }
            start = time.perf_counter()
            async with session.post("/v1/images/generations", json=body) as answer:
                told = await answer.json()
                assert answer.status == 200, told
                assert told["adapter_sha256"] == pinned.sha256, told["model"]
            times.append(1e3 * (time.perf_counter() - start))

    await asyncio.gather(*(client() for _ in range(clients)))
    times.sort()
    return {
        "pictures": len(times),
        "clients": clients,
        "images_per_s": round(len(times) / (time.perf_counter() - began), 2),
        "ms_median": round(statistics.median(times), 1),
        "ms_95": round(times[int(0.95 * (len(times) - 1))], 1),
    }


async def get(session: aiohttp.ClientSession, path: str) -> Any:
    """Ask for a JSON document."""
    async with session.get(path) as answer:
        assert answer.status == 200, await answer.text()
        return await answer.json()


async def timed(ask: Callable[[], Coroutine[Any, Any, Any]]) -> float:
    """Give the milliseconds of one question."""
    began = time.perf_counter()
    await ask()
    return round(1e3 * (time.perf_counter() - began), 1)


async def levels(session: aiohttp.ClientSession) -> dict[str, int]:
    """Say where adapters were found, by the endpoint's own metrics."""
    async with session.get("/metrics") as answer:
        lines = (await answer.text()).splitlines()
    counts = [line for line in lines if line.startswith("echodistill_adapter") and "level=" in line]
    return {
        line.split('level="')[1].split('"')[0]: int(float(line.rsplit(" ", 1)[1]))
        for line in counts
        if "_created" not in line
    }


def replica_bytes() -> int:
    """Give the memory of the one replica that draws."""
    from serve.app import PAINTER_NAME

    for process in psutil.process_iter():
        try:
            if f":{PAINTER_NAME}" in " ".join(process.cmdline()):
                return int(process.memory_info().rss)
        except psutil.Error:
            continue
    raise SystemExit("there is no replica")


def say(text: str) -> None:
    """Tell how far it is."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
