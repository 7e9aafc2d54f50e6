"""Finds the image files that a user names: files, folders, patterns."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from proxydet.data.images import readable_suffixes
from proxydet.errors import DataError


@dataclass(frozen=True)
class ImageFile:
    """An image to run on."""

    path: Path
    name: Path
    """Where its results go below the output folder: relative, without ending, different for every image."""


@dataclass(frozen=True, kw_only=True)
class FoundImages:
    """What a user's sources stand for."""

    files: tuple[ImageFile, ...] = ()
    """Each file once, in the order given; those of a folder or a pattern by name."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Files of folders and patterns that are not read, by kind: ``".heic"``, ``"broken link"``, ..."""


def find_images(sources: Iterable[str | Path], *, reserved: Iterable[str] = ()) -> FoundImages:
    """Find images.

    A name that exists is taken as it is, whatever is in it; else ``~`` is expanded, and patterns are. Folders are searched
    at any depth, through links to folders too; what Pillow cannot read there is counted by kind, and names that begin with
    a dot (AppleDouble files ``._photo.jpg`` among them) are passed over.

    Args:
        sources: Files, folders, and patterns such as ``photos/*.jpg`` or ``**/*.png``.
        reserved: Names in the output folder that other results have; an image or folder of that name gets a number.

    Raises:
        DataError: A source is not there or holds no images, or nothing was given.
    """
    found: dict[Path, Path] = {}
    left_out: Counter[str] = Counter()
    for source in sources:
        for path, name in _expand(source, left_out):
            found.setdefault(path, name)
    if not found:
        raise DataError("no images were given", hint="name files, folders or patterns")
    taken: set[Path] = set()
    avoided = frozenset(reserved)
    files = tuple(
        ImageFile(path, unique_name(clear_of(name, avoided), taken)) for path, name in found.items()
    )
    return FoundImages(files=files, left_out=left_out)


def _expand(source: str | Path, left_out: Counter[str]) -> Iterator[tuple[Path, Path]]:
    path = Path(source)
    # Not Path's own, which raises an error for a name too long for the disk.
    exists = os.path.exists
    if str(source).startswith("~") and not exists(path):
        path = _at_home(path)
    if os.path.isdir(path):  # noqa: PTH112
        files = sorted(_files_of(path, left_out))
        if not files:
            raise DataError(
                f"the folder {path} holds no images{_among(left_out)}",
                hint="name the folder that holds them; images are recognised by the ending of their names",
                path=path,
            )
        yield from ((file, file.relative_to(path).with_suffix("")) for file in files)
    elif not exists(path) and glob.has_magic(str(path)):
        named = [Path(name) for name in glob.iglob(str(path), recursive=True)]  # noqa: PTH207 absolute patterns too
        # photos/* stands for whatever is there; photos/*.dng says what is wanted.
        any_kind = not path.suffix or glob.has_magic(path.suffix)
        files = sorted(
            file for file in named if file.is_file() and (not any_kind or _is_read(file, left_out))
        )
        if not files:
            raise DataError(
                f"no image matches {str(source)!r}{_among(left_out)}",
                hint="put the pattern in quotes, and check the folder that it starts from",
            )
        yield from ((file, Path(file.stem)) for file in files)
    elif not exists(path):
        link = "is a broken link: its target is not there" if os.path.islink(path) else None  # noqa: PTH114
        raise DataError(
            f"{path} {link}" if link else f"there is no file or folder {str(path)[:500]}",
            hint="download it first and give the file"
            if "://" in str(source)
            else "check its spelling",
            path=path,
        )
    else:
        yield path, Path(path.stem)


def _at_home(path: Path) -> Path:
    """Expand a ``~`` that the shell has not, for it was in quotes."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise DataError(
            f"there is no home folder for {path.parts[0]}", hint="write the whole path", path=path
        ) from error


def _files_of(folder: Path, left_out: Counter[str]) -> Iterator[Path]:
    """Find the images in a folder at any depth, each folder once, however links lead to it."""

    def unopened(_: OSError) -> None:
        left_out["folder that cannot be opened"] += 1

    visited: set[tuple[int, int]] = set()
    for root, folders, names in os.walk(folder, onerror=unopened, followlinks=True):
        status = os.stat(root)  # noqa: PTH116
        again = (status.st_dev, status.st_ino) in visited
        visited.add((status.st_dev, status.st_ino))
        folders[:] = [] if again else [name for name in folders if not name.startswith(".")]
        for name in () if again else names:
            file = Path(root, name)
            if not name.startswith(".") and _is_read(file, left_out):
                yield file


def _is_read(file: Path, left_out: Counter[str]) -> bool:
    """Whether a file of a folder is an image that can be read; others are counted."""
    suffix = file.suffix.lower()
    if suffix not in readable_suffixes():
        left_out[suffix or "without ending"] += 1
        return False
    if not file.is_file():
        left_out["broken link" if file.is_symlink() else "not a regular file"] += 1
        return False
    return True


def describe_left_out(left_out: Counter[str]) -> str:
    """Say what was left out, in one line: ``2 .heic, 1 .dng (not images that can be read; ...)``."""
    shown = [f"{count} {kind}" for kind, count in left_out.most_common(8)]
    if len(left_out) > len(shown):
        shown.append(f"{left_out.total() - sum(c for _, c in left_out.most_common(8))} others")
    text = ", ".join(shown)
    if any(kind.startswith(".") for kind in left_out):
        text += " (not images that can be read here"
        if left_out.keys() & {".heic", ".heif", ".hif"}:
            text += "; for HEIC: pip install pillow-heif"
        text += ")"
    return text


def _among(left_out: Counter[str]) -> str:
    return f": {describe_left_out(left_out)}" if left_out else ""


def clear_of(name: Path, reserved: frozenset[str]) -> Path:
    """Number a name whose first part is reserved; any other stays as it is.

    Args:
        name: Relative to the output folder, without ending.
        reserved: Names in the output folder.
    """
    first, *rest = name.parts
    return Path(f"{first}_2", *rest) if first in reserved else name


def unique_name(name: Path, taken: set[Path]) -> Path:
    """Number a name that is taken already, and add the result to those that are.

    Args:
        name: The desired name.
        taken: Names that are in use.
    """
    unique, number = name, 1
    while unique in taken:
        number += 1
        unique = name.with_name(f"{name.name}_{number}")
    taken.add(unique)
    return unique
