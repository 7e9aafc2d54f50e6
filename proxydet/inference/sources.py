"""Finds what a user names: image files, folders, patterns, lists, tars and object stores; videos and cameras."""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import glob
import gzip
import heapq
import json
import logging
import math
import os
import platform
import re
import stat
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple, TypeVar

from proxydet.data.images import Pixels, read_image, readable_suffixes
from proxydet.errors import DataError, MissingDependencyError, ProxydetError, UnreachableError
from proxydet.files import open_regular, read_errors, tar_members
from proxydet.wording import size_text

logger = logging.getLogger(__name__)

T = TypeVar("T")

VIDEO_SUFFIXES = frozenset([
    ".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg",
    ".mts", ".ogv", ".ts", ".webm", ".wmv",
])  # fmt: skip
"""Suffixes of files that count as videos where images may be meant too."""

RETRY_WAITS_S = (1.0, 5.0)
"""Seconds between the attempts to read from an object store."""
ANSWER_S = 60.0
"""Seconds that a store has to answer each of them; of an object whose size is known, one more for each MiB."""
LARGEST_IMAGE = 1 << 30
"""Bytes of an image in a tar or a store, which is read into memory as a whole."""

TAG_AGE_S = 60.0
"""Seconds that the tag of a tar in a store is trusted, before the store is asked for it again."""

_CAMERA = re.compile(r"webcam(?::(\d{1,3}))?")
_LONGEST_NAME = 1 << 16
_AGAIN = "put the tar back, or list it again: in another --output folder, or with --overwrite"
_SORTED_AT_ONCE = 500_000
# A network disk that does not answer, not a file that is damaged.
_OUTAGE = frozenset(
    {errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.ECONNRESET}
)
# The packages that fsspec reads these stores with; others are called as the protocol is.
_PACKAGES = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "az": "adlfs",
    "http": "aiohttp",
    "https": "aiohttp",
}


# --- Images ------------------------------------------------------------------------------------------------------------


class SourceImage(NamedTuple):
    """An image, wherever it is: a file, an object of a store that fsspec knows, or a member of a tar in either."""

    name: str
    """The file's path as it was given or found, the object's URL, or ``TAR/MEMBER``: how results call the image."""
    size: int | None = None
    """Bytes; None: not known."""
    stamp: str = ""
    """What changes when the file, or the tar, does: its time of modification in ns, or the store's tag; empty: not known."""
    tar: str = ""
    """Path or URL of the tar; empty: the image is not in one."""
    offset: int = 0
    """Where the image begins in the tar, in bytes."""

    @property
    def is_file(self) -> bool:
        """Whether it is a file of its own on this machine's file systems."""
        return not self.tar and "://" not in self.name

    def changed(self, root: str = "") -> bool:
        """Whether a file is not the one that was found: its size or time differs; False where that is not known."""
        if not (self.is_file and self.stamp):
            return False
        now = file_state(os.path.join(root, self.name))  # noqa: PTH118 of millions of images
        # Of one that is not there reading says why.
        return now is not None and (now[0], str(now[1])) != (self.size, self.stamp)

    def encoded(self, root: str = "") -> bytes | Path:
        """Return what `read_image` takes: the file, or the bytes of what is in a tar or a store.

        Args:
            root: The folder that relative paths start from; empty: the current one.

        Raises:
            UnreachableError: The store does not answer, or refuses to.
            DataError: It is not there, too large, or its tar changed since the image was found.
        """
        if self.is_file:
            return Path(root, self.name)
        place = self.tar or self.name
        if (self.size or 0) > LARGEST_IMAGE:
            raise self._too_large()
        length = LARGEST_IMAGE + 1 if self.size is None else self.size
        if "://" in place:
            if self.tar and self.stamp not in ("", _tag_now(place)):
                raise DataError(
                    f"cannot read {self.name}: the tar has changed since it was listed", hint=_AGAIN
                )
            end = self.offset + length + (not self.tar)
            # Fewer bytes where the object ends before; a server that knows no ranges gives all.
            data: bytes = _asked(
                place,
                lambda store, path: store.cat_file(path, start=self.offset, end=end),
                size=self.size or 0,
            )
            if not self.tar and len(data) > length:  # another object than was listed
                data = _asked(
                    place, lambda store, path: store.cat_file(path, end=LARGEST_IMAGE + 1)
                )
            if len(data) > LARGEST_IMAGE:
                raise self._too_large()
        else:
            try:
                with open_regular(Path(root, place)) as file:
                    if self.stamp not in ("", str(os.fstat(file.fileno()).st_mtime_ns)):
                        raise DataError(
                            f"cannot read {self.name}: the tar has changed since it was listed",
                            hint=_AGAIN,
                        )
                    data = os.pread(file.fileno(), length, self.offset)
            except OSError as error:
                raise DataError(
                    f"cannot read {self.name}: {error.strerror or error}", hint=_AGAIN
                ) from error
        if self.tar and len(data) != length:
            raise DataError(f"cannot read {self.name}: the tar is truncated here", hint=_AGAIN)
        return data

    def _too_large(self) -> DataError:
        return DataError(
            f"{self.name} is larger than {size_text(LARGEST_IMAGE)}", hint="give it as a file"
        )

    def decoded(self, root: str = "") -> tuple[bytes | Path, Pixels]:
        """Return what `encoded` returns, and the image; errors as of it and of `proxydet.data.images.read_image`."""
        try:
            encoded = self.encoded(root)
            return encoded, read_image(encoded, name=self.name)
        except DataError as error:
            cause = error.__cause__
            if isinstance(cause, OSError) and cause.errno in _OUTAGE:
                raise UnreachableError(error.message, hint=error.hint, path=error.path) from cause
            raise

    def read(self, root: str = "") -> Pixels:
        """Decode the image, as `decoded` does."""
        return self.decoded(root)[1]


def file_state(path: str | Path) -> tuple[int, int] | None:
    """Return the bytes of a file and when it was last changed, in nanoseconds; None: there is none."""
    try:
        status = os.stat(path)  # noqa: PTH116
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns


@dataclass(frozen=True)
class ImageFile:
    """An image to run on."""

    source: SourceImage
    name: Path
    """Where its results go below the output folder: relative, without suffix, different for every image."""

    @property
    def path(self) -> Path:
        """Its file; of what is in a tar or a store, its name."""
        return Path(self.source.name)


@dataclass(frozen=True, kw_only=True)
class Unreadable:
    """An image that could not be read."""

    file: str
    reason: str


def find_images(
    sources: Iterable[str | Path],
    left_out: Counter[str] | None = None,
    *,
    reserved: Iterable[str] = (),
    listed: Collection[str] = (),
) -> tuple[ImageFile, ...]:
    """Find images, and give each a name of its own for its results; for millions there is `stream_images`.

    Args:
        sources: As for `stream_images`.
        left_out: As for `stream_images`; None: they are not counted.
        reserved: Names in the output folder that other results have; an image or folder of that name gets a number.
        listed: Those of the sources that come from a long list: one that is not there is found out when it is read, like
            an image that cannot be read.

    Returns:
        Each image once, in the order given; those of a folder or a pattern by name.

    Raises:
        DataError: A source is not there or holds no images, or nothing was given.
    """
    found: dict[Path, tuple[SourceImage, Path]] = {}
    counts = Counter() if left_out is None else left_out
    for source in sources:
        for image, name in _expand(str(source), counts, listed=source in listed):
            path = Path(image.name)
            plain = image._replace(name=str(path)) if image.is_file else image  # a.jpg, not ./a.jpg
            found.setdefault(path, (plain, name))
    if not found:
        raise DataError("no images were given", hint="name files, folders or patterns")
    taken: set[Path] = set()
    avoided = frozenset(reserved)
    return tuple(
        ImageFile(image, unique_name(_clear_of(name, avoided), taken))
        for image, name in found.values()
    )


def stream_images(
    sources: Iterable[str], left_out: Counter[str], *, stdin: Path | None = None
) -> Iterator[SourceImage]:
    """Find any number of images, one after the other: no list of them is in memory.

    A name that exists is taken as it is, whatever is in it; else ``~`` is expanded, and patterns are. Folders are searched
    at any depth, through links to folders too; what Pillow cannot read there is counted by kind, and names that begin with
    a dot (AppleDouble files ``._photo.jpg`` among them) are passed over. Files of a folder or a pattern come by name, those
    of lists and tars as they stand there. An image that is named twice comes twice. Of a store, the names in one folder
    are in memory at once, as fsspec lists them.

    Args:
        sources: Files, folders, and patterns such as ``photos/*.jpg`` or ``**/*.png``; URLs of those in object stores
            (``s3://bucket/photos/``); tars, whose members are the images; ``@FILE``: a list of all these, one a line or
            separated by NUL, perhaps compressed (``.gz``); ``-``: the list ``stdin``. What a list names and is not there
            is found out when it is read.
        left_out: Files that are not read are counted here, by kind: ``".heic"``, ``"broken link"``, ...
        stdin: What came on stdin.

    Raises:
        DataError: A source, but for those in lists, is not there or holds no images.
        MissingDependencyError: The package that reads such a store is not installed.
        UnreachableError: A store does not answer.
    """
    for source in sources:
        if source == "-" and stdin is not None:
            for line in read_list(stdin):
                yield from (image for image, _ in _expand(line, left_out, listed=True))
        else:
            yield from (image for image, _ in _expand(source, left_out))


def read_list(path: Path) -> Iterator[str]:
    """Yield the names in a list: one a line, or separated by NUL as ``find -print0`` writes them.

    Of lines, empty ones and those that start with ``#`` are skipped; ``./#1.jpg`` names a file that does.

    Args:
        path: The file; ``.gz`` is unpacked.

    Raises:
        DataError: It cannot be read, or a line is longer than any name.
    """
    with read_errors(path, error=DataError), contextlib.ExitStack() as stack:
        file: Any = stack.enter_context(open_regular(path))
        if path.suffix == ".gz":
            file = stack.enter_context(gzip.GzipFile(fileobj=file))
        rest, mark = b"", b""
        while block := _block(file):
            mark = mark or (b"\0" if b"\0" in block else b"\n")
            *names, rest = (rest + block).split(mark)
            if len(rest) > _LONGEST_NAME:
                raise ValueError("it is not a list of files: a line is too long for a path")
            yield from _names(names, mark)
        yield from _names([rest], mark)


def _block(file: Any) -> bytes:
    try:
        data: bytes = file.read(1 << 20)
    except (EOFError, zlib.error) as error:
        raise ValueError(f"it is damaged: {error}") from error
    return data


def _names(raw: Iterable[bytes], mark: bytes) -> Iterator[str]:
    for data in raw:
        name = os.fsdecode(data if mark == b"\0" else data.rstrip(b"\r"))
        if mark != b"\0" and name.strip() != name and not os.path.lexists(name):
            name = name.strip()
        if name and (mark == b"\0" or not name.startswith("#")):
            yield name


def _expand(
    source: str, left_out: Counter[str], *, listed: bool = False
) -> Iterator[tuple[SourceImage, Path]]:
    """Yield the images that a source stands for, each with a name for its results."""
    path = Path(source)
    status = None
    with contextlib.suppress(OSError, ValueError):
        status = path.stat()
    if status is None and not os.path.lexists(source):
        if "://" in source:
            yield from _in_store(source, left_out, listed=listed)
            return
        if source.startswith("@") and not listed:
            for line in read_list(Path(source[1:])):
                yield from _expand(line, left_out, listed=True)
            return
        if source.startswith("~"):
            try:
                path = path.expanduser()  # the shell has not expanded it, for it was in quotes
            except RuntimeError as error:
                raise DataError(
                    f"no home folder for {path.parts[0]}", hint="write the whole path", path=path
                ) from error
            with contextlib.suppress(OSError, ValueError):
                status = path.stat()
    if status is not None and not stat.S_ISDIR(status.st_mode):
        if path.suffix == ".tar":
            yield from _in_tar(str(path), left_out)
        else:
            yield _found(str(path), status), Path(path.stem)
        return
    none = True
    if status is not None:
        for image in _in_folder(str(path), left_out):
            none = False
            yield image, Path(image.name).relative_to(path).with_suffix("")
        what = f"the folder {path} holds no images"
        hint = "name the folder that holds them; images are recognised by their suffixes"
    elif glob.has_magic(str(path)):
        for image in _matching(str(path), left_out):
            none = False
            if image.name.endswith(".tar"):
                yield from _in_tar(image.name, left_out)
            else:
                yield image, Path(Path(image.name).stem)
        what = f"no image matches {source!r}"
        hint = "put the pattern in quotes, and check the folder that it starts from"
    elif listed:
        none = False
        yield SourceImage(str(path)), Path(path.stem)
    else:
        link = "is a broken link: its target is not there" if os.path.islink(path) else None  # noqa: PTH114
        what = f"{path} {link}" if link else f"there is no file or folder {str(path)[:500]}"
        raise DataError(what, hint="check its spelling", path=path)
    if none and not listed:
        raise DataError(f"{what}{_among(left_out)}", hint=hint, path=path)


def _found(name: str, status: os.stat_result) -> SourceImage:
    return SourceImage(name, status.st_size, str(status.st_mtime_ns))


def _in_folder(folder: str, left_out: Counter[str]) -> Iterator[SourceImage]:
    """Find the images in a folder at any depth by name, each folder once, however links lead to it."""
    visited: set[tuple[int, int]] = set()
    stack = [iter([folder])]
    while stack:
        name = next(stack[-1], None)
        if name is None:
            stack.pop()
            continue
        try:
            status: os.stat_result | None = os.stat(name)  # noqa: PTH116 of millions of images
        except OSError:
            status = None
        if status is None or not stat.S_ISDIR(status.st_mode):
            if _is_read(name, status, left_out) and status is not None:
                yield _found(name, status)
        elif (key := (status.st_dev, status.st_ino)) not in visited:
            visited.add(key)
            stack.append(_names_in(name, left_out))


def _names_in(folder: str, left_out: Counter[str], pattern: str = "*") -> Iterator[str]:
    """Yield the paths in a folder by name, without hidden ones; a folder that cannot be opened is counted."""
    matches = re.compile(fnmatch.translate(pattern)).match

    def names() -> Iterator[str]:
        try:
            with os.scandir(folder or ".") as entries:
                for entry in entries:
                    shown = entry.name[0] != "." or pattern[0] == "."
                    if shown and matches(entry.name):
                        yield entry.name
        except OSError:
            left_out["folder that cannot be opened"] += 1

    return (os.path.join(folder, name) for name in _ordered(names()))  # noqa: PTH118 as it was given


def _matching(pattern: str, left_out: Counter[str]) -> Iterator[SourceImage]:
    """Find the files that a pattern stands for. Of glob only the folders, for it has all names in a folder in memory."""
    head, tail = os.path.split(pattern)
    if tail == "**":
        head, tail = pattern, "*"
    folders: Iterable[str] = [head]
    if glob.has_magic(head):
        below = glob.iglob(os.path.join(head, ""), recursive=True)  # noqa: PTH118, PTH207 absolute patterns too
        folders = _ordered({name.rstrip(os.sep) or name for name in below})
    # photos/* stands for whatever is there; photos/*.dng names a kind.
    suffix = Path(tail).suffix
    any_kind = not suffix or glob.has_magic(suffix)
    for folder in folders:
        if folder and not os.path.isdir(folder):  # noqa: PTH112
            continue
        for name in _names_in(folder, left_out, tail or "*"):
            try:
                status = os.stat(name)  # noqa: PTH116 of millions of images
            except OSError:
                continue
            if stat.S_ISREG(status.st_mode) and (not any_kind or _is_read(name, status, left_out)):
                yield _found(name, status)


def _ordered(names: Iterable[str]) -> Iterator[str]:
    """Sort any number of names: a bounded number in memory, the others in temporary files."""
    upcoming = iter(names)
    chunk = sorted(islice(upcoming, _SORTED_AT_ONCE))
    if len(chunk) < _SORTED_AT_ONCE:
        yield from chunk
        return
    with contextlib.ExitStack() as stack:
        runs = []
        while chunk:
            file = stack.enter_context(tempfile.TemporaryFile("w+", encoding="ascii"))
            file.writelines(json.dumps(name) + "\n" for name in chunk)
            file.seek(0)
            runs.append(map(json.loads, file))
            chunk = sorted(islice(upcoming, _SORTED_AT_ONCE))
        yield from heapq.merge(*runs)


def _is_read(name: str, status: os.stat_result | None, left_out: Counter[str]) -> bool:
    """Whether a file of a folder is an image that can be read; others are counted. Without status it is not there."""
    suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122 of millions of images
    if suffix not in readable_suffixes():
        left_out[suffix or "without suffix"] += 1
        return False
    if status is None or not stat.S_ISREG(status.st_mode):
        left_out["broken link" if os.path.islink(name) else "not a regular file"] += 1  # noqa: PTH114
        return False
    return True


# --- Tars and object stores ----------------------------------------------------------------------------------------------


def _in_tar(place: str, left_out: Counter[str]) -> Iterator[tuple[SourceImage, Path]]:
    """Yield the images in a tar; what follows a damaged header is not found, which is logged and counted."""
    remote = "://" in place
    try:
        with contextlib.ExitStack() as stack:
            if remote:
                info = _info(place)
                if info.get("size") is None:
                    raise DataError(
                        f"cannot read {place[:500]}: its server does not state its size",
                        hint="download it first and give the file",
                    )
                file: BinaryIO = _asked(place, lambda store, key: store.open(key, "rb"))
                stack.enter_context(file)
                length, stamp = int(info["size"]), _tag(info)
            else:
                file = stack.enter_context(open_regular(Path(place)))
                status = os.fstat(file.fileno())
                length, stamp = status.st_size, str(status.st_mtime_ns)
            members = tar_members(file, length)
            upcoming = partial(next, members, None)
            while member := _answer(upcoming, ANSWER_S) if remote else upcoming():
                path = PurePosixPath(member.name)
                suffix = path.suffix.lower()
                if member.isdir() or path.name.startswith("."):
                    continue
                if not member.isreg() or member.sparse is not None:
                    left_out["link in a tar"] += 1
                elif suffix not in readable_suffixes():
                    left_out[suffix or "without suffix"] += 1
                else:
                    name = f"{place}/{member.name}"
                    image = SourceImage(name, member.size, stamp, place, member.offset_data)
                    parts = [part for part in path.parts if part not in ("/", "..")]
                    yield image, Path(*parts).with_suffix("")
    except ProxydetError:
        raise
    except ValueError as error:
        reason: Exception = error
    except OSError as error:
        if remote:
            raise _unreachable(place, error) from error
        reason = error
    else:
        return
    left_out["damaged tar"] += 1
    logger.warning("%s: %s; only the images before that are found", place, reason)


def _in_store(
    url: str, left_out: Counter[str], *, listed: bool
) -> Iterator[tuple[SourceImage, Path]]:
    """Yield the images of an object, a folder or a pattern in a store; an object of a list is not asked for."""
    bare = PurePosixPath(url.partition("?")[0])
    # A page of the web has no folders, and ? in its address is no pattern.
    web = url.startswith(("http://", "https://"))
    if web or (listed and bare.suffix.lower() in readable_suffixes()):
        if bare.suffix == ".tar":
            yield from _in_tar(url, left_out)
        else:
            yield SourceImage(url), Path(bare.stem)
        return

    def found(store: Any, root: str) -> tuple[str, list[dict[str, Any]]]:
        if glob.has_magic(root) and not store.exists(root):
            return "pattern", list(store.glob(root, detail=True).values())
        return ("folder", []) if store.isdir(root) else ("object", [store.info(root)])

    kind, entries = _asked(url, found)
    store, root = _store(url)
    none = True
    for batch in _folders_in(url) if kind == "folder" else [entries]:
        for entry in sorted(batch, key=lambda entry: str(entry["name"])):
            path = PurePosixPath(str(entry["name"]))
            suffix = path.suffix.lower()
            if entry["type"] == "directory" or path.name.startswith("."):
                continue
            place = str(store.unstrip_protocol(str(entry["name"])))
            if suffix == ".tar" and kind != "folder":
                none = False
                yield from _in_tar(place, left_out)
            elif kind == "object" or suffix in readable_suffixes():
                none = False
                inside = path.relative_to(root) if kind == "folder" else PurePosixPath(path.name)
                yield (
                    SourceImage(place, entry.get("size"), _tag(entry)),
                    Path(inside).with_suffix(""),
                )
            else:
                left_out[suffix or "without suffix"] += 1
    if none and not listed:
        raise DataError(
            f"there are no images {url[:500]}{_among(left_out)}",
            hint="check the URL; images are recognised by their suffixes",
        )


def _folders_in(url: str) -> Iterator[list[dict[str, Any]]]:
    """Yield what is in each folder of a store: one folder is in memory at once."""

    def listed(store: Any, root: str) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = store.ls(folder or root)
        store.invalidate_cache()
        return entries

    folders = [""]
    while folders:
        folder = folders.pop()
        entries = _asked(url, listed)
        below = [str(entry["name"]) for entry in entries if entry["type"] == "directory"]
        folders += sorted((name for name in below if name != folder), reverse=True)
        yield entries


def _tag(info: Mapping[str, Any]) -> str:
    keys = ("ETag", "etag", "mtime", "LastModified", "Last-Modified", "updated", "created")
    return next((str(info[key]) for key in keys if info.get(key)), "")


def _info(url: str) -> Mapping[str, Any]:
    """Return what a store says of an object now, not what fsspec remembers of it."""

    def info(store: Any, path: str) -> Mapping[str, Any]:
        store.invalidate_cache()
        found: Mapping[str, Any] = store.info(path)
        return found

    return _asked(url, info)


_tags: dict[str, tuple[float, str]] = {}  # when it was asked for, and the tag


def _tag_now(url: str) -> str:
    """Return the tag of a tar, as it was `TAG_AGE_S` ago at most."""
    now = time.monotonic()
    asked, tag = _tags.get(url, (-math.inf, ""))
    if now - asked >= TAG_AGE_S:
        if len(_tags) > 1000:
            _tags.clear()
        tag = _tag(_info(url))
        _tags[url] = now, tag
    return tag


def _store(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, and the path in it."""
    import fsspec

    try:
        store, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        protocol = url.partition("://")[0]
        raise MissingDependencyError(
            f"reading {url[:500]} needs a package that is not installed: {error}",
            hint=f"run: pip install {_PACKAGES.get(protocol, protocol)}; or download it first and give the file",
        ) from error
    except ValueError as error:
        raise DataError(
            f"there is no file {url[:500]}, nor a store of that kind: {error}",
            hint="check its spelling, or download it first and give the file",
        ) from error
    return store, str(path)


def _asked(url: str, action: Callable[[Any, str], T], *, size: int = 0) -> T:
    """Return what a store answers; one that does not within `ANSWER_S` is asked again, after `RETRY_WAITS_S`.

    Args:
        url: What is asked for.
        action: Is given the store and the path in it.
        size: Bytes of the answer, where they are known.

    Raises:
        DataError: What is asked for is not there.
        UnreachableError: The store does not answer, or refuses to.
    """
    for wait in (*RETRY_WAITS_S, None):
        try:
            store, path = _store(url)
            try:
                return _answer(partial(action, store, path), ANSWER_S + size / (1 << 20))
            except TimeoutError:
                type(store).clear_instance_cache()  # the next attempt has a connection of its own
                raise
        except ProxydetError:
            raise
        except (FileNotFoundError, IsADirectoryError) as error:
            raise DataError(
                f"there is no file {url[:500]}",
                hint="check its spelling; the URL of a folder ends with /",
            ) from error
        except PermissionError as error:
            raise _unreachable(url, error) from error
        except Exception as error:
            if wait is None:
                raise _unreachable(url, error) from error
            time.sleep(wait)
    raise AssertionError


def _answer(action: Callable[[], T], seconds: float) -> T:
    """Return what a function returns, or raises, within so many seconds.

    Raises:
        TimeoutError: It takes longer; its thread is left alone, and not waited for at the end of the process.
    """
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(action())
        except BaseException as error:  # noqa: BLE001 raised where it is waited for
            answer.set_exception(error)

    threading.Thread(target=run, name="store", daemon=True).start()
    if wait_for([answer], seconds).not_done:
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    return answer.result()


def _unreachable(url: str, error: Exception) -> UnreachableError:
    return UnreachableError(
        f"cannot read {url[:500]}: {str(error) or type(error).__name__}",
        hint="check the connection and the store's credentials, and run the same command again",
    )


def _among(left_out: Counter[str]) -> str:
    return f": {describe_left_out(left_out)}" if left_out else ""


def describe_left_out(left_out: Counter[str]) -> str:
    """Describe what was left out, in one line: ``2 .heic, 1 .dng (not images that can be read; ...)``."""
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


def _clear_of(name: Path, reserved: frozenset[str]) -> Path:
    """Number a name whose first part is reserved; any other stays as it is."""
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


# --- Videos and cameras ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class VideoSource:
    """A video that PyAV can open."""

    name: str
    """What it is called in results and messages."""
    url: str
    """What PyAV opens."""
    path: Path | None = None
    """The file; None for a camera."""
    format: str | None = None
    """FFmpeg's name of the input device; None: found out from the file's content."""
    options: tuple[tuple[str, str], ...] = ()
    """Names and values of options of FFmpeg's input."""

    @property
    def live(self) -> bool:
        """Whether frames come at their own pace, so that those that come too fast are dropped."""
        return self.path is None


@dataclass(frozen=True, kw_only=True)
class VideoFile:
    """A video to run on."""

    source: VideoSource
    name: Path
    """Where its results go below the output folder: relative, without suffix."""


def pyav() -> ModuleType:
    """Import PyAV.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise MissingDependencyError(
            f"videos and cameras need the package av (PyAV), which cannot be imported: {error}",
            hint="run: pip install 'proxydet[video]' (or: pip install av)",
        ) from error
    module: ModuleType = av
    return module


def is_video(source: str | Path) -> bool:
    """Whether a source is meant as a video: a file with one of `VIDEO_SUFFIXES`, or ``webcam`` where no such file is."""
    path = Path(source)
    if _CAMERA.fullmatch(str(source)) and not path.exists():
        return True
    return path.suffix.lower() in VIDEO_SUFFIXES and not os.path.isdir(path)  # noqa: PTH112


def split_sources(sources: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split what a user names into images and videos.

    Patterns that match videos are expanded; videos inside folders are left alone.

    Args:
        sources: Files, folders, patterns, cameras.

    Returns:
        Sources for `find_images`, and videos.
    """
    images: list[str] = []
    videos: list[str] = []
    for source in sources:
        names = [source]
        if not os.path.exists(source) and glob.has_magic(source):  # noqa: PTH110
            matches = sorted(glob.glob(source, recursive=True))  # noqa: PTH207 absolute patterns too
            files = [name for name in matches if Path(name).is_file()]
            names = files if any(map(is_video, files)) else names
        for name in names:
            (videos if is_video(name) else images).append(name)
    return images, videos


def name_videos(
    sources: Sequence[str | Path], *, reserved: Iterable[str] = ()
) -> tuple[VideoFile, ...]:
    """Open what a user calls videos, and give each a name of its own.

    Args:
        sources: Files and cameras.
        reserved: Names in the output folder that other results have; a video of that name gets a number.

    Raises:
        DataError: A file or camera is not there.
    """
    taken: set[Path] = set()
    videos = []
    for source in map(open_source, dict.fromkeys(sources)):
        plain = Path(source.path.stem if source.path else source.name.replace(":", "_"))
        name = unique_name(_clear_of(plain, frozenset(reserved)), taken)
        videos.append(VideoFile(source=source, name=name))
    return tuple(videos)


def open_source(source: str | Path | VideoSource) -> VideoSource:
    """Find out how a video is opened.

    Args:
        source: A file; ``webcam``, or ``webcam:1`` for the second camera; or a source as it is.

    Raises:
        DataError: There is no such file or camera.
    """
    if isinstance(source, VideoSource):
        return source
    path = Path(source)
    camera = _CAMERA.fullmatch(str(source))
    if camera and not path.exists():
        return _camera(int(camera[1] or 0))
    if not path.is_file():
        raise DataError(
            f"there is no video file {path}",
            hint="name a video, or a camera: webcam, webcam:1",
            path=path,
        )
    # Nothing but files: a playlist that calls itself a video shall not reach for addresses.
    return VideoSource(
        name=str(path),
        url=str(path.absolute()),
        path=path,
        options=(("protocol_whitelist", "file"),),
    )


def _camera(number: int) -> VideoSource:
    name = f"webcam:{number}"
    system = platform.system()
    if system == "Linux":
        return VideoSource(name=name, url=f"/dev/video{number}", format="v4l2")
    if system == "Darwin":
        # AVFoundation refuses to open a camera without a rate that it supports.
        return VideoSource(
            name=name, url=f"{number}:none", format="avfoundation", options=(("framerate", "30"),)
        )
    # DirectShow knows cameras by name.
    devices = [
        device.description or device.name
        for device in pyav().device.enumerate_input_devices("dshow")
        if "video" in getattr(device, "media_types", ["video"])
    ]
    if number >= len(devices):
        raise DataError(
            f"camera {number} not found",
            hint=f"{len(devices)} cameras are connected, counted from 0",
        )
    return VideoSource(name=name, url=f"video={devices[number]}", format="dshow")
