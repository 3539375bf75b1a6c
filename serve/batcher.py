"""Pictures that wait are drawn together, as soon as the engine is free.

Ray Serve's own batching closes a batch when its waiting time is over, though the one before is
still being drawn. Under load answers then leave one at a time, so requests come one at a time, and
each is a batch of its own from then on: half of the engine's rate over HTTP. Here a batch is closed
when its turn has come.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batcher(Generic[Item, Result]):
    """Collects items of one event loop for a function that works on many at once.

    Args:
        work: gives one result for each item, in order; runs in a thread, one call at a time.
        largest: items in one call.
        wait_seconds: how long the first item waits for others where nothing is under way.
    """

    def __init__(
        self,
        work: Callable[[Sequence[Item]], Sequence[Result]],
        largest: int,
        wait_seconds: float = 0.0,
    ) -> None:
        self._work = work
        self._largest = largest
        self._wait_seconds = wait_seconds
        self._waiting: deque[tuple[Item, asyncio.Future[Result]]] = deque()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="draw")
        self._running: asyncio.Task[None] | None = None

    async def __call__(self, item: Item) -> Result:
        """Gives the item's result, or raises what its batch raised.

        Who is cancelled before its turn is left out.
        """
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())
        return await future

    async def _run(self) -> None:
        """Works until nothing waits."""
        if len(self._waiting) < self._largest:
            await asyncio.sleep(self._wait_seconds)
        loop = asyncio.get_running_loop()
        while batch := self._next():
            items = [item for item, _ in batch]
            try:
                results = await loop.run_in_executor(self._worker, self._work, items)
                assert len(results) == len(items), "one result for each item"
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), result in zip(batch, results, strict=True):
                if not future.done():
                    future.set_result(result)

    def _next(self) -> list[tuple[Item, asyncio.Future[Result]]]:
        batch: list[tuple[Item, asyncio.Future[Result]]] = []
        while self._waiting and len(batch) < self._largest:
            item, future = self._waiting.popleft()
            if not future.done():
                batch.append((item, future))
        return batch
