"""Checkpoints: written whole or not at all, rotated, checked when read.

A checkpoint ``step_0001000.pth`` is what torch.save writes: a zip archive whose every record carries a checksum. It is
written beside its final name, flushed to the disk and renamed, so that a file with that name is complete; the
checksums tell when it was damaged afterwards.
"""

from __future__ import annotations

import errno
import logging
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch

from proxydet.errors import CheckpointError, DiskFullError
from proxydet.training.config import CheckpointConfig

logger = logging.getLogger(__name__)

FORMAT = 1
_NAME = re.compile(r"step_(\d{7,})\.pth")
# Room for what else a run writes between two checkpoints.
_DISK_MARGIN = 64 * 2**20


class CheckpointFolder:
    """The checkpoints of one run.

    Args:
        folder: Where they lie; made when the first one is written.
        config: Which are kept.
    """

    def __init__(self, folder: Path, config: CheckpointConfig) -> None:
        self.folder = folder
        self._config = config

    def path(self, iteration: int) -> Path:
        """Return the name of the checkpoint after a number of steps."""
        return self.folder / f"step_{iteration:07d}.pth"

    def list(self) -> list[tuple[int, Path]]:
        """Return (iteration, path) of the complete checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        named = ((_NAME.fullmatch(path.name), path) for path in self.folder.iterdir())
        return sorted((int(match[1]), path) for match, path in named if match)

    def save(self, state: dict[str, Any], iteration: int, best: int | None = None) -> Path:
        """Write the checkpoint of an iteration, then remove those that need not be kept.

        Args:
            state: What `load_checkpoint` shall return.
            iteration: Steps taken.
            best: Iteration of the best checkpoint so far, which is kept.

        Raises:
            DiskFullError: There is no room for it; nothing is left of it, and the earlier ones are untouched.
        """
        path = self.path(iteration)
        write_checkpoint({"format": FORMAT, **state}, path)
        self.rotate(best)
        return path

    def load_newest(self) -> tuple[dict[str, Any], Path] | None:
        """Read the newest checkpoint that is whole, saying so when a newer one is damaged.

        Returns:
            The state and its file; None when there is no checkpoint at all.

        Raises:
            CheckpointError: There are checkpoints, and all of them are damaged.
        """
        found = self.list()
        for _, path in reversed(found):
            try:
                return load_checkpoint(path), path
            except CheckpointError as error:
                reason = error.message.rstrip(".")
                logger.warning("%s. Falling back to the checkpoint before it.", reason)
        if found:
            raise CheckpointError(
                f"None of the {len(found)} checkpoints in {self.folder} can be read.",
                hint="Start again in another folder (--output), or give a checkpoint with --resume PATH.",
                path=self.folder,
            )
        return None

    def set_aside_after(self, iteration: int) -> None:
        """Rename the checkpoints after an iteration that a run goes back to: they are no longer its newest ones.

        Left as they are they would count among the last that are kept, and push out those that the run now writes.
        """
        for later, path in self.list():
            if later > iteration:
                aside = path.with_name(f"{path.name}.aside")
                path.replace(aside)
                logger.warning(
                    "The run goes back to iteration %d; %s is now %s.", iteration, path, aside.name
                )

    def rotate(self, best: int | None) -> None:
        """Remove the checkpoints that need not be kept; ``best`` is the best one's iteration, if any."""
        found = self.list()
        every = self._config.keep_every
        for iteration, path in found[: -self._config.keep_last]:
            milestone = every is not None and iteration % every == 0
            if not milestone and not (self._config.keep_best and iteration == best):
                path.unlink(missing_ok=True)


def write_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write a state so that ``path`` either holds all of it or is as it was.

    Raises:
        DiskFullError: There is no room.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _check_room(_size(state), path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        if _is_full(error):
            raise _disk_full(path) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)
    _flush_folder(path.parent)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a training checkpoint, checking that it is whole and holds plain data only.

    Raises:
        CheckpointError: The file is absent, damaged, unsafe, or no training checkpoint of this program.
    """
    return _read(path, whole=True)


def read_iteration(path: Path) -> int:
    """Return how many steps a training checkpoint was written after, without reading its weights.

    Raises:
        CheckpointError: The file is absent, cut off, unsafe, or no training checkpoint of this program.
    """
    return int(_read(path, whole=False)["iteration"])


def _read(path: Path, *, whole: bool) -> dict[str, Any]:
    """Read a checkpoint: all of it, compared with its checksums; or its structure, tensors being left on the disk."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip() if whole else None
        if damaged is not None:
            raise CheckpointError(
                f"{path} is damaged: {damaged} fails its checksum.",
                hint="go on with an older one: --resume RUN/checkpoints/step_....pth",
                path=path,
            )
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=not whole)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"There is no checkpoint {path}.", hint="checkpoints lie in RUN/checkpoints", path=path
        ) from error
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}",
            hint="go on with an older one: --resume RUN/checkpoints/step_....pth",
            path=path,
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is not a training checkpoint of this program.",
            hint="To start from its weights give it with --weights; --resume goes on with a run.",
            path=path,
        )
    return state


def _size(value: Any) -> int:
    """Bytes of all tensors in a nested state."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(_size(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return sum(_size(item) for item in value)
    return 0


def _check_room(size: int, path: Path) -> None:
    if shutil.disk_usage(path.parent).free < size + _DISK_MARGIN:
        raise _disk_full(path, size)


def _is_full(error: BaseException) -> bool:
    """Whether a failed write failed for lack of room; torch may wrap the system's error."""
    full = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, OSError) and chain.errno in full:
            return True
        chain = chain.__cause__ or chain.__context__
    return False


def _disk_full(path: Path, size: int = 0) -> DiskFullError:
    need = (
        f" It needs {size / 2**20:.0f} MiB and {_DISK_MARGIN // 2**20} MiB to spare."
        if size
        else ""
    )
    return DiskFullError(
        f"There is no room on the disk for {path}.{need} The checkpoints before it are untouched.",
        hint="Make room and start the same command again: it goes on from the newest checkpoint.",
        path=path,
    )


def _flush_folder(folder: Path) -> None:
    """Make a rename outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
