"""Jobs over many images, alike in every command that runs one: their options, their checks, and what is printed at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from proxydet.wording import counted
from proxydet_cli.options import panel
from proxydet_cli.output import Output

if TYPE_CHECKING:
    from proxydet.inference.sharded import ImageWork, OpenWork, PartFormat, Shard

_many = panel("Many images")


class Engine(str, Enum):
    """What runs the workers."""

    processes = "processes"
    ray = "ray"


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """Options of a job over many images."""

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
    part_size: Annotated[
        int | None,
        _many(
            "--part-size",
            min=1,
            help="Images in a file of results. [default: 1000; fewer where there are less than 64,000]",
            show_default=False,
        ),
    ] = None
    max_errors: Annotated[
        int | None,
        _many(
            "--max-errors",
            min=0,
            help="Stop where more images cannot be read. [default: never]",
            show_default=False,
        ),
    ] = None
    retry_errors: Annotated[
        bool,
        _many("--retry-errors", help="Run again on the parts with images that could not be read."),
    ] = False

    @property
    def here(self) -> bool:
        """Whether this process does the work, and starts no others."""
        return (self.workers or self.gpus or 1) == 1 and self.engine is Engine.processes

    def check(self, folder: Path, sources: Sequence[str], *, overwrite: bool, module: str) -> Shard:
        """Check what can be checked before a detector is opened, and begin to load workers.

        Args:
            folder: Of the job.
            sources: What the user named.
            overwrite: Replace the job that is there.
            module: What the workers load.

        Returns:
            The shard.

        Raises:
            ConfigError: Options contradict each other, or videos are among the sources.
            RuntimeEnvironmentError: Files cannot be saved in the folder.
        """
        from proxydet.errors import ConfigError
        from proxydet.inference.sharded import Shard, load_ahead
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
        if not self.here and self.engine is Engine.processes:
            load_ahead(module)
        return shard

    def run(
        self,
        out: Output,
        folder: Path,
        sources: Sequence[str],
        *,
        work: ImageWork,
        elsewhere: OpenWork,
        identity: dict[str, Any],
        parts: PartFormat,
        shard: Shard,
        overwrite: bool,
        batch_size: int,
    ) -> None:
        """Plan or continue a job, run it, and print its summary.

        Args:
            out: Where it is printed.
            folder: Of the job.
            sources: What the user named; ``-``: the list on stdin.
            work: The work, opened in this process.
            elsewhere: Opens it in worker processes.
            identity: What the results depend on; see `open_job`.
            parts: How results are written.
            shard: Which parts.
            overwrite: Replace the job that is there, once the images of the new one are found.
            batch_size: Images in the network at once.

        Raises:
            DataError: Images could not be read; the others are done.
            ProxydetError: As of `open_job` and `run_job`.
        """
        from proxydet.errors import DataError, RuntimeEnvironmentError
        from proxydet.inference.sharded import RunOptions, open_job, run_job
        from proxydet.inference.sources import describe_left_out
        from proxydet_cli.progress import show_progress

        if self.gpus is not None and self.engine is Engine.processes:
            import torch

            if torch.cuda.device_count() < self.gpus:
                raise RuntimeEnvironmentError(
                    f"--gpus is {self.gpus}, and torch sees {counted(torch.cuda.device_count(), 'GPU')}",
                    hint="give fewer, or --workers N for processes on the CPU; proxydet env reports the GPUs",
                )
        progress = show_progress()
        with _list_on_stdin(sources) as stdin:
            job = open_job(
                folder,
                sources,
                identity=identity,
                parts=parts,
                part_images=self.part_size,
                stdin=stdin,
                overwrite=overwrite,
                progress=progress,
            )
        if job.left_out:
            out.message(f"left out: {describe_left_out(job.left_out)}")
        if job.duplicates:
            out.message(f"{counted(job.duplicates, 'image')} named again: each is run on once")
        if not job.planned:
            out.message(
                f"continuing the job in {folder}: {counted(job.images, 'image')} as they were found then"
            )
        done = run_job(
            job,
            (lambda _: work) if self.here else elsewhere,
            options=RunOptions(
                batch_size=batch_size,
                max_errors=self.max_errors,
                workers=self.workers or self.gpus or 1,
                gpus=0 if self.gpus is None else 1,
            ),
            shard=shard,
            engine=self.engine.value,
            retry_errors=self.retry_errors,
            progress=progress,
        )
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
            f"{summary}: {folder / 'parts'}",
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
def _list_on_stdin(sources: Sequence[str]) -> Iterator[Path | None]:
    """Copy the list on stdin, which may be long, to a file; None where ``-`` is not among the sources."""
    if "-" not in sources:
        yield None
        return
    with tempfile.NamedTemporaryFile() as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
        file.flush()
        yield Path(file.name)
