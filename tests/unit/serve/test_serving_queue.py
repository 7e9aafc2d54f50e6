"""The queue alone, without a server: who waits, who leaves, who is refused."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from functools import partial

import pytest

from proxydet.serve.app import RequestError, WorkQueue

SECONDS = 10
"""No test takes that long unless it is broken; then it ends."""


@pytest.fixture
def release() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def within_seconds(test: Callable[[], Awaitable[None]], release: threading.Event) -> None:
    async def bounded() -> None:
        try:
            await asyncio.wait_for(test(), SECONDS)
        finally:
            release.set()

    asyncio.run(bounded())


async def settle() -> None:
    """Let everything run that can."""
    for _ in range(5):
        await asyncio.sleep(0)


def ask(queue: WorkQueue, work: Callable[[], object]) -> asyncio.Task[object]:
    return asyncio.create_task(queue.run(work, timeout=SECONDS))


def test_as_many_wait_as_there_are_places(release):
    async def test() -> None:
        queue, order = WorkQueue(2), []
        hold = partial(release.wait, SECONDS)
        asked = [ask(queue, hold), *(ask(queue, partial(order.append, i)) for i in range(2))]
        await settle()
        assert (queue.busy, queue.waiting) == (True, 2)
        with pytest.raises(RequestError, match="2 requests are waiting"):
            await queue.run(hold, timeout=0.01)
        release.set()
        await asyncio.gather(*asked)
        assert order == [0, 1]

    within_seconds(test, release)


def test_who_gives_up_leaves_its_place(release):
    async def test() -> None:
        queue, done = WorkQueue(1), []
        first = ask(queue, partial(release.wait, SECONDS))
        second = ask(queue, partial(done.append, "given up"))
        await settle()
        second.cancel()
        await settle()
        assert queue.waiting == 0
        third = ask(queue, partial(done.append, "third"))
        await settle()
        release.set()
        await asyncio.gather(first, third)
        assert done == ["third"]

    within_seconds(test, release)


def test_stopping_refuses_who_waits_and_who_comes(release):
    async def test() -> None:
        queue = WorkQueue(1)
        first = ask(queue, partial(release.wait, SECONDS))
        second = ask(queue, partial(pytest.fail, "it waited when the server stopped"))
        await settle()
        queue.stop()
        await asyncio.wait([second], timeout=1)
        assert second.done()
        for refused in (second, queue.run(int, timeout=0.01)):
            with pytest.raises(RequestError, match="shutting down"):
                await refused
        assert (queue.stopped, queue.waiting) == (True, 0)
        release.set()
        assert await first is True
        await queue.close()
        assert not queue.busy

    within_seconds(test, release)
