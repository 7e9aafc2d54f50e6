"""One thread that looks at pictures, one after the other, and a bounded number of requests that wait for it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Generic, TypeVar

from proxydet.serving.refusals import Refusal

T = TypeVar("T")

logger = logging.getLogger(__name__)

_LONGEST_RETRY = 60
# How fast the remembered time of a job follows the last ones.
_FOLLOW = 0.2


class _Job(Generic[T]):
    """A piece of work, and who waits for it."""

    def __init__(self, work: Callable[[], T], answer: asyncio.Future[T]) -> None:
        self.work = work
        self.answer = answer


class WorkQueue:
    """Runs jobs in the order in which they come. Used from one event loop.

    A job that nobody waits for any more (timeout, client gone) leaves the queue with all that it holds; one that is
    already running is finished and its result dropped.

    Args:
        places: Jobs that may wait, besides the one that runs.
    """

    def __init__(self, places: int) -> None:
        self._places = places
        self._waiting: deque[_Job[object]] = deque()
        self._busy = False
        self._stopped = False
        self._seconds = 1.0
        self._thread = ThreadPoolExecutor(1, "look")

    @property
    def waiting(self) -> int:
        """Jobs that wait."""
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        """Whether a job runs."""
        return self._busy

    @property
    def stopped(self) -> bool:
        """Whether nothing more is accepted."""
        return self._stopped

    async def run(self, work: Callable[[], T], *, patience: float) -> T:
        """Run a job when its turn comes.

        Args:
            work: Called in the thread.
            patience: Longest time until the result, in seconds.

        Raises:
            Refusal: 503 where all places are taken, the turn did not come in time or the server stops; 504 where the
                job itself took too long.
        """
        self.admit()
        job = _Job(work, asyncio.get_running_loop().create_future())
        self._waiting.append(job)
        if not self._busy:
            self._start_next()
        try:
            return await asyncio.wait_for(job.answer, patience)
        except asyncio.TimeoutError:
            raise self._too_late(patience, started=job not in self._waiting) from None
        finally:
            if job in self._waiting:
                self._waiting.remove(job)

    def admit(self) -> None:
        """Refuse at once what could not wait.

        Raises:
            Refusal: 503.
        """
        if self._stopped:
            raise _stopping()
        if len(self._waiting) >= self._places:
            raise Refusal(
                503,
                "busy",
                f"{self._places} requests are waiting already",
                hint="ask again later",
                retry_after=self._retry_after(),
            )

    def stop(self) -> None:
        """Accept nothing more and refuse what waits; what runs goes on."""
        self._stopped = True
        for job in self._waiting:
            if not job.answer.done():
                job.answer.set_exception(_stopping())
        self._waiting.clear()

    async def close(self) -> None:
        """Stop, and wait for the job that runs."""
        self.stop()
        await asyncio.to_thread(self._thread.shutdown)

    def _start_next(self) -> None:
        while self._waiting:
            job = self._waiting.popleft()
            if job.answer.done():
                continue
            self._busy = True
            running = asyncio.get_running_loop().run_in_executor(self._thread, job.work)
            running.add_done_callback(partial(self._finish, job, time.perf_counter()))
            return
        self._busy = False

    def _finish(self, job: _Job[object], began: float, done: asyncio.Future[object]) -> None:
        self._seconds += _FOLLOW * (time.perf_counter() - began - self._seconds)
        error = done.exception()
        if job.answer.done():
            if error is not None:
                logger.warning("a request that was given up failed: %s", error)
        elif error is not None:
            job.answer.set_exception(error)
        else:
            job.answer.set_result(done.result())
        self._start_next()

    def _retry_after(self) -> int:
        return min(max(round(self._seconds * (len(self._waiting) + 1)), 1), _LONGEST_RETRY)

    def _too_late(self, patience: float, *, started: bool) -> Refusal:
        if started:
            return Refusal(
                504,
                "timeout",
                f"the answer took longer than {patience:g} seconds",
                hint="send a smaller picture or fewer words, or start the server with a longer --timeout",
            )
        return Refusal(
            503,
            "busy",
            f"the request waited longer than {patience:g} seconds for its turn",
            hint="ask again later",
            retry_after=self._retry_after(),
        )


def _stopping() -> Refusal:
    return Refusal(503, "stopping", "the server is being stopped", hint="start it again")
