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
from contextlib import suppress
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batcher(Generic[Item, Result]):
    """Collects items of one event loop for a function that works on many at once.

    Args:
        work: gives one result for each item, in order; runs in a thread, one call at a time.
        largest: items in one call.
        wait_seconds: how long the first item waits for a full batch where nothing is under way.
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
        self._full = asyncio.Event()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="draw")
        self._running: asyncio.Task[None] | None = None

    async def __call__(self, item: Item) -> Result:
        """Gives the item's result, or raises what its batch raised.

        Who is cancelled before its turn is left out.
        """
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if len(self._waiting) >= self._largest:
            self._full.set()
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())
        return await future

    async def _run(self) -> None:
        """Works until nothing waits."""
        if self._wait_seconds:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._full.wait(), self._wait_seconds)
        loop = asyncio.get_running_loop()
        while batch := self._next():
            items = [item for item, _ in batch]
            results, error = await loop.run_in_executor(self._worker, self._try, items)
            for place, (_, future) in enumerate(batch):
                if future.done():
                    continue
                if error is None:
                    future.set_result(results[place])
                else:
                    future.set_exception(error)

    def _try(self, items: list[Item]) -> tuple[Sequence[Result], Exception | None]:
        """The work's results, or what went wrong."""
        try:
            results = self._work(items)
            assert len(results) == len(items), "one result for each item"
        except BaseException as error:  # of any kind: somebody waits for each item
            if isinstance(error, Exception) and not isinstance(error, StopIteration):
                return (), error
            # A future takes none of these as what they are.
            return (), RuntimeError(f"{type(error).__name__}: {error}")
        return results, None

    def _next(self) -> list[tuple[Item, asyncio.Future[Result]]]:
        self._full.clear()
        batch: list[tuple[Item, asyncio.Future[Result]]] = []
        while self._waiting and len(batch) < self._largest:
            item, future = self._waiting.popleft()
            if not future.done():
                batch.append((item, future))
        return batch
