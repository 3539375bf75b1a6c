"""What waits is worked on together, as soon as its turn has come."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest

from serve.batcher import Batcher


class Slow:
    """Doubles numbers, a batch at a time, each when it may."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.begun = threading.Semaphore(0)
        self.may = threading.Semaphore(0)

    def __call__(self, items: Sequence[int]) -> list[int]:
        self.batches.append(list(items))
        self.begun.release()
        assert self.may.acquire(timeout=30)
        if 13 in items:
            raise ValueError("thirteen")
        return [2 * item for item in items]

    async def has_begun(self) -> None:
        assert await asyncio.to_thread(self.begun.acquire, timeout=30)


def test_all_that_comes_while_a_batch_is_worked_on_is_the_next_one() -> None:
    async def ask() -> list[int]:
        slow = Slow()
        batcher = Batcher(slow, largest=4)
        first = asyncio.create_task(batcher(0))
        await slow.has_begun()
        # One after the other, each in its own turn of the loop.
        rest = []
        for item in range(1, 7):
            rest.append(asyncio.create_task(batcher(item)))
            await asyncio.sleep(0)
        slow.may.release(3)
        found = await asyncio.gather(first, *rest)
        assert slow.batches == [[0], [1, 2, 3, 4], [5, 6]]
        return found

    assert asyncio.run(ask()) == [0, 2, 4, 6, 8, 10, 12]


def test_a_batch_that_fails_fails_alone_and_who_has_gone_is_left_out() -> None:
    async def ask() -> None:
        slow = Slow()
        batcher = Batcher(slow, largest=2)
        first = asyncio.create_task(batcher(0))
        await slow.has_begun()
        bad, gone, good = (asyncio.create_task(batcher(item)) for item in (13, 7, 8))
        await asyncio.sleep(0)
        gone.cancel()
        slow.may.release(3)
        assert await first == 0
        for each in (bad, good):
            with pytest.raises(ValueError, match="thirteen"):
                await each
        assert slow.batches == [[0], [13, 8]]
        assert await batcher(4) == 8  # and it goes on

    asyncio.run(ask())


def test_the_first_waits_for_a_full_batch_where_nothing_is_under_way() -> None:
    async def ask() -> list[int]:
        slow = Slow()
        slow.may.release(1)
        batcher = Batcher(slow, largest=2, wait_seconds=60)
        first = asyncio.create_task(batcher(1))
        for _ in range(5):
            await asyncio.sleep(0)
        assert slow.batches == []
        found = await asyncio.wait_for(asyncio.gather(first, batcher(2)), 30)
        assert slow.batches == [[1, 2]]
        return found

    assert asyncio.run(ask()) == [2, 4]


@pytest.mark.parametrize("error", [StopIteration("end"), asyncio.CancelledError("gone")])
def test_whatever_the_work_raises_somebody_is_told(error: BaseException) -> None:
    async def ask() -> None:
        def work(items: Sequence[int]) -> list[int]:
            if items == [13]:
                raise error
            return list(items)

        batcher = Batcher(work, largest=1)
        for item, told in ((13, True), (1, False)):
            if told:
                with pytest.raises(RuntimeError):
                    await asyncio.wait_for(batcher(item), 30)
            else:
                assert await asyncio.wait_for(batcher(item), 30) == item

    asyncio.run(ask())
