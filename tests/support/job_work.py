"""A cheap job, importable by worker processes: the mean of each image, with the faults that tests ask for."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from proxydet.inference.sharded import Row, RunOptions, Shard, open_job, run_job
from proxydet.inference.sources import SourceImage

FATAL = 255
"""An image of this value alone kills the process that prepares it."""


@dataclasses.dataclass(frozen=True)
class OpenMean:
    """Opens the work.

    Attributes:
        pause: Seconds for each image.
        lethal: How many times an image of `FATAL` kills its process, counted by files in ``folder``.
        folder: Where that is counted.
    """

    pause: float = 0.0
    lethal: int = 0
    folder: str = ""
    large: bool = False

    def __call__(self, number: int) -> OpenMean:
        return self

    def read(self, image: SourceImage, root: str) -> Any:
        pixels = image.read(root)
        if pixels.min() == FATAL and len([*Path(self.folder).iterdir()]) < self.lethal:
            Path(self.folder, str(os.getpid())).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return pixels

    def shape(self, read: Any) -> Any:
        return read.shape

    def run(self, batch: list[Any]) -> list[float]:
        time.sleep(self.pause * len(batch))
        return [float(pixels.mean()) for pixels in batch]


@dataclasses.dataclass(frozen=True)
class Lines:
    """A line of JSON an image; ``full``: the part at whose end the disk is full."""

    full: str = ""
    name: str = "lines"
    suffix: str = ".jsonl"

    def write(self, target: Path, rows: Iterable[Row]) -> int:
        with target.open("w") as file:
            for row in rows:
                file.write(json.dumps([row.image.name, row.content, row.error]) + "\n")
        if self.full and self.full in target.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return 1


def main(folder: str, source: str, pause: str, workers: str, shard: str = "0/1") -> None:
    """Run the job of a folder in this process: what tests kill."""
    job = open_job(Path(folder), [source], identity={}, parts=Lines(), part_images=5)
    run_job(
        job,
        OpenMean(float(pause)),
        options=RunOptions(workers=int(workers)),
        shard=Shard.parse(shard),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
