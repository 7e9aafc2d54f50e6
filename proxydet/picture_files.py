"""Finds the pictures that a user names: files, folders, patterns."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from proxydet.errors import DataError

SUFFIXES = frozenset(
    {
        ".avif",
        ".bmp",
        ".gif",
        ".jfif",
        ".jpeg",
        ".jpg",
        ".pgm",
        ".png",
        ".ppm",
        ".tif",
        ".tiff",
        ".webp",
    }
)
"""Endings of the files of a folder that count as pictures; a file that is named itself may have any."""


@dataclass(frozen=True)
class PictureFile:
    """A picture to look at."""

    path: Path
    name: Path
    """Where its results go below the output folder: relative, without ending, different for every picture."""


def find_pictures(
    sources: Iterable[str | Path], *, reserved: Iterable[str] = ()
) -> tuple[PictureFile, ...]:
    """Find pictures.

    Args:
        sources: Files, folders (searched at any depth), and patterns such as ``photos/*.jpg`` or ``**/*.png``.
        reserved: Names in the output folder that other results have; a picture or folder of that name gets a number.

    Returns:
        Each file once, in the order given; those of a folder or a pattern by name.

    Raises:
        DataError: A source is not there or holds no pictures, or nothing was given.
    """
    found: dict[Path, Path] = {}
    for source in sources:
        for path, name in _expand(source):
            found.setdefault(path, name)
    if not found:
        raise DataError("no pictures were given", hint="name files, folders or patterns")
    taken: set[Path] = set()
    avoided = frozenset(reserved)
    return tuple(
        PictureFile(path, named_apart(clear_of(name, avoided), taken))
        for path, name in found.items()
    )


def _expand(source: str | Path) -> list[tuple[Path, Path]]:
    path = Path(source)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not files:
            raise DataError(
                f"the folder {path} holds no pictures",
                hint="name the folder that holds them; what is a picture is told by its ending",
                path=path,
            )
        return [(file, file.relative_to(path).with_suffix("")) for file in files]
    if not path.exists() and glob.has_magic(str(source)):
        files = sorted(
            Path(name)
            for name in glob.glob(str(source), recursive=True)  # noqa: PTH207 absolute patterns too
            if Path(name).is_file()
        )
        if not files:
            raise DataError(
                f"no file matches {str(source)!r}",
                hint="put the pattern in quotes, and check the folder that it starts from",
            )
        return [(file, Path(file.stem)) for file in files]
    if not path.exists():
        raise DataError(f"there is no file or folder {path}", hint="check its spelling", path=path)
    return [(path, Path(path.stem))]


def clear_of(name: Path, reserved: frozenset[str]) -> Path:
    """Number a name whose first part is reserved; any other stays as it is.

    Args:
        name: Relative to the output folder, without ending.
        reserved: Names in the output folder.
    """
    first, *rest = name.parts
    return Path(f"{first}_2", *rest) if first in reserved else name


def named_apart(name: Path, taken: set[Path]) -> Path:
    """Number a name that is taken already, and note the one that is given.

    Args:
        name: The wanted name.
        taken: Names that are in use; the given one is added.
    """
    unique, number = name, 1
    while unique in taken:
        number += 1
        unique = name.with_name(f"{name.name}_{number}")
    taken.add(unique)
    return unique
