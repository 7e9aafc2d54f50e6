"""Making many artifacts ready: several at a time, going on after a failure, and saying in the end what became of each."""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from proxydet.artifacts.addresses import host_of
from proxydet.artifacts.artifact import Artifact
from proxydet.artifacts.look import Item
from proxydet.artifacts.obtain import Job, Outcome, obtain
from proxydet.artifacts.patience import Stopped
from proxydet.artifacts.workers import run_workers
from proxydet.errors import ArtifactError, DigestError, DiskFullError, ProxydetError

_logger = logging.getLogger(__name__)

_REFUSALS = 3


@dataclass(frozen=True)
class Failure:
    """An artifact that could not be had."""

    name: str
    """The artifact."""
    error: ProxydetError
    """Why."""


@dataclass
class Report:
    """What became of all artifacts of a job."""

    outcomes: list[Outcome] = field(default_factory=list)
    """Those that ended without an error, in the order in which they ended."""
    failures: list[Failure] = field(default_factory=list)
    """Those that did not."""

    def raise_for_failures(self) -> None:
        """Raise what went wrong, if anything did: the one error, or one that sums them up.

        Raises:
            DiskFullError: The disk is full.
            ArtifactError: Anything else.
        """
        if not self.failures:
            return
        full = next((f.error for f in self.failures if isinstance(f.error, DiskFullError)), None)
        if full is not None or len(self.failures) == 1:
            raise full or self.failures[0].error
        done = len(self.outcomes)
        lines = "\n".join(
            f"  {failure.name}: {failure.error.message}" for failure in self.failures[:10]
        )
        more = len(self.failures) - 10
        raise ArtifactError(
            f"{len(self.failures)} of {done + len(self.failures)} files could not be had:\n{lines}"
            + (f"\n  and {more} more" if more > 0 else ""),
            hint=self.failures[0].error.hint
            or "Run the same command again: what was fetched is kept.",
        )


def fetch_all(items: Sequence[Item], job: Job) -> Report:
    """Make artifacts ready, several at a time.

    A failure of one does not stop the others, except for a full disk. A host that refuses or fails several files in a
    row is not asked for more.

    Args:
        items: What `proxydet.artifacts.look.look` found for each.
        job: What they share.

    Raises:
        KeyboardInterrupt: Ctrl-C; what was fetched so far is kept.
    """
    queue = _Queue(items, job)
    sizes = [item.to_fetch for item in items]
    # What an earlier run fetched is counted as soon as it is taken up.
    kept = sum(item.kept for item in items if item.must_fetch)
    known = None if None in sizes else sum(size or 0 for size in sizes) + kept
    stop = job.line.client.stop
    try:
        if len(items) == 1:
            queue.work(job)
        else:
            with job.progress.task("all files", total=known, unit="B") as task:
                shared = replace(job, total=task)
                workers = min(job.line.client.settings.jobs, len(items))
                run_workers([lambda: queue.work(shared)] * workers, stop)
    except BaseException:
        stop.set()
        raise
    return queue.report


class _Queue:
    """Artifacts that are still to be made ready."""

    def __init__(self, items: Sequence[Item], job: Job) -> None:
        self._waiting = deque(items)
        self._stop = job.line.client.stop
        self._lock = threading.Lock()
        self._refusals: Counter[str] = Counter()
        self._full = False
        self.report = Report()

    def work(self, job: Job) -> None:
        """Make one after another ready until none is left."""
        while (item := self._next()) is not None:
            artifact = item.artifact
            try:
                outcome = obtain(artifact, job, announced=item.announced)
            except Stopped:
                return
            except ProxydetError as error:
                self._failed(artifact, error)
            else:
                with self._lock:
                    self._refusals[_host(artifact)] = 0
                    self.report.outcomes.append(outcome)

    def _next(self) -> Item | None:
        with self._lock:
            while self._waiting and not self._full and not self._stop.is_set():
                item = self._waiting.popleft()
                artifact = item.artifact
                if self._refusals[_host(artifact)] < _REFUSALS:
                    return item
                error = ArtifactError(
                    f"not tried, because {_host(artifact)} failed several times in a row."
                )
                self.report.failures.append(Failure(artifact.name, error))
            return None

    def _failed(self, artifact: Artifact, error: ProxydetError) -> None:
        _logger.info("%s: %s", artifact.name, error.message)
        with self._lock:
            self._full = self._full or isinstance(error, DiskFullError)
            if not isinstance(error, DigestError):
                self._refusals[_host(artifact)] += 1
            self.report.failures.append(Failure(artifact.name, error))


def _host(artifact: Artifact) -> str:
    return host_of(artifact.addresses[0])
