"""Jobs over many images, alike in every command that runs one: their options, their checks, and what is printed at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from proxydet.wording import counted, json_text
from proxydet_cli.options import panel
from proxydet_cli.output import Output

if TYPE_CHECKING:
    from proxydet.inference.sharded import (
        Job,
        JobSummary,
        OpenWork,
        PartFormat,
        RunOptions,
        Shard,
    )
    from proxydet.models import NamedDetector

_many = panel("Many images")


class Engine(str, Enum):
    """What runs the workers."""

    processes = "processes"
    ray = "ray"


@dataclass(frozen=True, kw_only=True)
class ShardOptions:
    """Options of any job over many images: what runs it, and how much of it."""

    shard: Annotated[
        str | None,
        _many(
            "--shard",
            metavar="I/N",
            help="Run one of N shards, 0/N to (N-1)/N, next to processes that run the others. auto: as SLURM or SkyPilot numbers "
            "this task; auto/N: as an indexed Job of Kubernetes does.",
        ),
    ] = None
    workers: Annotated[
        int | None,
        _many(
            "--workers",
            min=1,
            help="Processes of this machine, which share its cores; with --engine ray, actors.",
        ),
    ] = None
    gpus: Annotated[
        int | None,
        _many("--gpus", min=1, help="Instead of --workers: a process for each of N GPUs."),
    ] = None
    engine: Annotated[
        Engine,
        _many(
            "--engine",
            help="What runs the workers: processes of this machine, or actors of Ray (of the cluster that RAY_ADDRESS names).",
        ),
    ] = Engine.processes
    max_errors: Annotated[
        int | None,
        _many(
            "--max-errors",
            min=0,
            help="Stop where more images cannot be read. [default: never]",
            show_default=False,
        ),
    ] = None

    @property
    def here(self) -> bool:
        """Whether this process does the work, and starts no others."""
        return (self.workers or self.gpus or 1) == 1 and self.engine is Engine.processes

    def check(self, folder: Path, sources: Sequence[str], *, overwrite: bool = False) -> Shard:
        """Check what can be checked before a detector is opened.

        Args:
            folder: Of the job.
            sources: What the user named.
            overwrite: Replace the job that is there.

        Returns:
            The shard.

        Raises:
            ConfigError: Options contradict each other, or videos are among the sources.
            LockedError: Another process runs the shard.
            RuntimeEnvironmentError: Files cannot be saved in the folder.
        """
        from proxydet.errors import ConfigError
        from proxydet.inference.sharded import Shard, require_free
        from proxydet.inference.sources import is_video
        from proxydet.inference.writers import check_folder

        shard = Shard.parse(self.shard) if self.shard is not None else Shard()
        video = next(filter(is_video, sources), None)
        if video is not None:
            raise ConfigError(
                f"{video} is a video, and a job runs on images",
                hint="run on videos by themselves: proxydet predict VIDEO --save images,json",
            )
        if self.workers is not None and self.gpus is not None:
            raise ConfigError("--workers cannot be combined with --gpus", hint="leave one out")
        check_folder(folder)
        if overwrite and self.shard is not None:
            raise ConfigError(
                "--overwrite with --shard would remove what other shards have done",
                hint="remove the folder, or choose another one with --output",
            )
        require_free(folder, shard)
        return shard

    def load(self) -> None:
        """Begin to load what worker processes need."""
        from proxydet.inference.sharded import load_ahead

        if not self.here and self.engine is Engine.processes:
            load_ahead("proxydet.detector")

    def spread(self, device: str) -> dict[str, Any]:
        """Return on which ``device``, and over how many ``gpus``, workers open their detectors."""
        spread = self.gpus if self.gpus and self.engine is Engine.processes else 0
        return {"device": "cuda:0" if self.gpus else device, "gpus": spread}

    def options(self, batch_size: int) -> RunOptions:
        """Return how the job runs.

        Args:
            batch_size: Images in the network at once.

        Raises:
            RuntimeEnvironmentError: There are fewer GPUs.
        """
        from proxydet.errors import RuntimeEnvironmentError
        from proxydet.inference.sharded import RunOptions

        if self.gpus is not None and self.engine is Engine.processes:
            import torch

            if torch.cuda.device_count() < self.gpus:
                raise RuntimeEnvironmentError(
                    f"--gpus is {self.gpus}, and torch sees {counted(torch.cuda.device_count(), 'GPU')}",
                    hint="give fewer, or --workers N for processes on the CPU; proxydet env reports the GPUs",
                )
        return RunOptions(
            batch_size=batch_size,
            max_errors=self.max_errors,
            workers=self.workers or self.gpus or 1,
            gpus=0 if self.gpus is None else 1,
        )


@dataclass(frozen=True, kw_only=True)
class JobOptions(ShardOptions):
    """Options of a job whose parts are files of results."""

    part_size: Annotated[
        int | None,
        _many(
            "--part-size",
            min=1,
            help="Images in a file of results. [default: 1000; fewer where there are less than 64,000]",
            show_default=False,
        ),
    ] = None
    retry_errors: Annotated[
        bool,
        _many("--retry-errors", help="Run again on the parts with images that could not be read."),
    ] = False

    def run(
        self,
        out: Output,
        folder: Path,
        sources: Sequence[str],
        prepare: Callable[[], tuple[OpenWork, dict[str, Any]]],
        *,
        request: str,
        parts: PartFormat,
        overwrite: bool,
        batch_size: int,
    ) -> None:
        """Plan or continue a job, run it, and print its summary; of one that the same command has finished, print only that.

        Args:
            out: Where it is printed.
            folder: Of the job.
            sources: What the user named; ``-``: the list on stdin.
            prepare: Opens the detector, where there is something to be done; returns what opens the work, in this process or in
                others, and what the results depend on, see `open_job`.
            request: What `request_of` returned.
            parts: How results are written.
            overwrite: Replace the job that is there, once the images of the new one are found.
            batch_size: Images in the network at once.

        Raises:
            DataError: Images could not be read; the others are done.
            ProxydetError: As of `check`, `open_job` and `run_job`.
        """
        from proxydet.inference.sharded import finished_job, open_job, run_job
        from proxydet_cli.progress import show_progress

        shard = self.check(folder, sources, overwrite=overwrite)
        retry = self.retry_errors
        asked: dict[str, Any] = {"request": request, "parts": parts}
        if not overwrite:
            found = finished_job(folder, sources, **asked, shard=shard, retry_errors=retry)
            if found is not None:
                out.message(f"the job in {folder} is finished")
                _report(out, *found, shard)
                return
        self.load()
        open_work, identity = prepare()
        options, progress = self.options(batch_size), show_progress()
        with list_on_stdin(sources) as stdin:
            job = open_job(
                folder,
                sources,
                **asked,
                identity=identity,
                part_images=self.part_size,
                stdin=stdin,
                overwrite=overwrite,
                progress=progress,
            )
        report_plan(out, job)
        done = run_job(
            job,
            open_work,
            options=options,
            shard=shard,
            engine=self.engine.value,
            retry_errors=retry,
            progress=progress,
        )
        _report(out, job, done, shard)


def request_of(named: NamedDetector, *options: Any) -> str:
    """Return a digest of what a command asks for: equal ones ask for the same, though the same may be asked for in several ways.

    Args:
        named: The detector; its files count by path, size and time.
        *options: Values that the results depend on, or dataclasses of them; texts that name files count as those files, too.

    Returns:
        Empty where a file of the detector is not there.
    """
    from proxydet._version import __version__
    from proxydet.errors import ProxydetError
    from proxydet.inference.sources import file_state
    from proxydet.models import locate_published, newest_weights

    try:
        weights = named.weights
        if weights is None and named.run is not None:
            weights = newest_weights(named.run)
        elif weights is None and named.published is not None:
            weights = locate_published(named.published)
    except ProxydetError:  # opening it says why
        return ""
    values: list[Any] = []
    for option in options:
        fields = dataclasses.fields(option) if dataclasses.is_dataclass(option) else ()
        values += [getattr(option, field.name) for field in fields] or [option]
    places = [weights, named.config, *(v for v in values if isinstance(v, str | Path))]
    if named.run is not None:
        places += sorted(path for path in named.run.iterdir() if path.suffix != ".jsonl")
    states = [(os.path.abspath(str(place)), file_state(str(place))) for place in places]  # noqa: PTH100
    content = json_text([__version__, states, [*map(str, values)]])
    return hashlib.sha256(content.encode("utf-8", "surrogateescape")).hexdigest()


def report_plan(out: Output, job: Job) -> None:
    """Print what was left out of a plan, and whether it is an earlier one."""
    from proxydet.inference.sources import describe_left_out

    if job.left_out:
        out.message(f"left out: {describe_left_out(job.left_out)}")
    if job.duplicates:
        out.message(f"{counted(job.duplicates, 'image')} named again: each is run on once")
    if not job.planned:
        out.message(
            f"continuing the job in {job.folder}: {counted(job.images, 'image')} as they were found then"
        )


def _report(out: Output, job: Job, done: JobSummary, shard: Shard) -> None:
    from proxydet.errors import DataError

    summary = f"{counted(done.images, 'image')}, {counted(done.objects, 'object')}"
    if shard.count > 1:
        summary = f"shard {shard}: {summary}"
    if done.before:
        summary += f" ({done.before} images before this run)"
    out.data(
        {
            **dataclasses.asdict(done),
            "left_out": dict(job.left_out),
            "duplicates": job.duplicates,
            "parts": len(job.offsets),
        },
        f"{summary}: {job.folder / 'parts'}",
    )
    if done.unfinished:
        out.message(f"{counted(done.unfinished, 'part')} of other shards not finished yet")
    if done.changed:
        out.warning(
            f"{counted(done.changed, 'image')} changed after the job was planned; results are of what is there now"
        )
    if done.errors:
        for text in done.failures:
            out.warning(text)
        again = "run the same command again: what a store did not hand out is read again"
        rows = "their rows have an error; when they can be read: --retry-errors"
        raise DataError(
            f"{done.errors} of {counted(done.images, 'image')} could not be read; the rest is done",
            hint=again if done.unreachable else rows,
        )


@contextlib.contextmanager
def list_on_stdin(sources: Sequence[str]) -> Iterator[Path | None]:
    """Copy the list on stdin, which may be long, to a file; None where ``-`` is not among the sources."""
    if "-" not in sources:
        yield None
        return
    with tempfile.NamedTemporaryFile() as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
        file.flush()
        yield Path(file.name)
