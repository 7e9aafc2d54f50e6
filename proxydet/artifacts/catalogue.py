"""What can be downloaded: files, families of files and groups, and how names of them are looked up.

The classes are read from TOML by `proxydet.config.from_mapping`, so a wrong key or value in a catalogue file is an error
that names its place. Everything in a catalogue is treated as hostile: its paths cannot leave the data root.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from graphlib import CycleError, TopologicalSorter
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Literal

from proxydet.artifacts.addresses import check_address
from proxydet.config import from_mapping, parse_toml
from proxydet.errors import ConfigError, TransferError
from proxydet.files import read_text
from proxydet.wording import nearest

CATALOGUE_VARIABLE = "PROXYDET_CATALOGUE"
"""Environment variable with further catalogue files, separated as in PATH."""

_LARGEST_CATALOGUE = 8 << 20
_LARGEST_FAMILY = 25_000
_LARGEST_FILE = 1 << 50
_LONGEST_PART = 180
_NAME = re.compile(r"[a-z0-9][a-z0-9._+-]{0,99}(/[A-Za-z0-9][A-Za-z0-9._+-]{0,99})?")


@dataclass(frozen=True, kw_only=True)
class Login:
    """A source that serves only those who have an account there."""

    site: str
    """Address of the page where one registers."""
    how: str
    """What to do, in one or two sentences."""


@dataclass(frozen=True, kw_only=True)
class Provided:
    """A file or folder that an archive unpacks to."""

    path: str
    """Relative to the folder that the archive is unpacked into."""
    files: int | None = None
    """Number of files in it, where it is a folder and the number is published."""
    size: int | None = None
    """Size in bytes, where it is a file and the size is published."""
    sha256: str | None = None
    """Digest, where it is a file and the digest is published."""

    def __post_init__(self) -> None:
        """Check the path and the numbers."""
        _check_path(self.path, "path")
        _check_count(self.files, "files")
        _check_published(self.size, self.sha256)


@dataclass(frozen=True, kw_only=True)
class Unpack:
    """How an archive is unpacked."""

    folder: str
    """Folder, relative to the data root, that its members are written into."""
    provides: tuple[Provided, ...]
    """What must be there afterwards. Members outside of these first folders or files are refused."""

    def __post_init__(self) -> None:
        """Check the folder, and that something is provided."""
        _check_path(self.folder, "folder")
        if not self.provides:
            raise ConfigError("provides must name at least one file or folder.")

    @property
    def tops(self) -> frozenset[str]:
        """First path parts under which members may lie."""
        return frozenset(PurePosixPath(provided.path).parts[0] for provided in self.provides)


@dataclass(frozen=True, kw_only=True)
class Content:
    """What a file without a published digest must hold."""

    kind: Literal["checkpoint", "tensors", "image-tar", "training-log"]
    """``checkpoint``: tensors of a published model; ``tensors``: any readable checkpoint; ``image-tar``: a tar of
    image files; ``training-log``: losses in a format of detectron2."""
    layout: Literal["r50", "swinb"] | None = None
    """The published model whose tensor names and shapes a checkpoint must have."""
    mixup_branch: bool = False
    """Whether the checkpoint holds the mixup branch too (ProxyDet), or not (BoxSup, Detic)."""
    any_shape: tuple[str, ...] = ()
    """Last name parts of tensors whose shape depends on the vocabulary trained on, which is another one here."""

    def __post_init__(self) -> None:
        """A checkpoint is checked against some layout."""
        if (self.kind == "checkpoint") != (self.layout is not None):
            raise ConfigError("layout is required for kind = 'checkpoint', and for no other kind.")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What a single file and the members of a family have in common."""

    name: str
    """Short name by which users ask for it; a member of a family is ``name/value``."""
    title: str
    """What it is, in a few words."""
    addresses: tuple[str, ...]
    """Where it is served, in the order to try."""
    target: str
    """Path of the file under the data root, with forward slashes."""
    licence: str
    """Licence or terms."""
    login: Login | None = None
    """The account that the source asks for."""
    may_be_missing: bool = False
    """Whether the source may lack it: reported then, but not a failure."""
    unpack: Unpack | None = None
    """How it is unpacked; None for a file that is used as it is."""
    content: Content | None = None
    """What it must hold, checked where there is no digest."""


@dataclass(frozen=True, kw_only=True)
class Artifact(Entry):
    """One file that can be downloaded."""

    size: int | None = None
    """Size in bytes; None where none is published."""
    sha256: str | None = None
    """Digest in lower-case hexadecimal; None where none is published (the artifact is unpinned)."""
    page: str | None = None
    """A page from which a person can fetch it in a browser when everything else fails."""

    def __post_init__(self) -> None:
        """Check every field against what a hostile catalogue could try."""
        if not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"name {self.name!r} may hold only lower-case letters, digits and . _ + - ."
            )
        _check_path(self.target, "target")
        _check_published(self.size, self.sha256)
        if not self.addresses:
            raise ConfigError("addresses must name at least one address.")
        for address in self.addresses:
            try:
                check_address(address, pinned=self.pinned)
            except TransferError as error:
                raise ConfigError(f"addresses: {error.message}", hint=error.hint) from error

    @property
    def pinned(self) -> bool:
        """Whether its digest is published."""
        return self.sha256 is not None

    @property
    def file_name(self) -> str:
        """Last part of its path."""
        return PurePosixPath(self.target).name


def _check_path(path: str, what: str) -> None:
    """Check that a path stays inside the folder that it is relative to, and is plain."""
    for part in path.split("/"):
        bad = not part or part.startswith(".") or "\\" in part or not part.isprintable()
        if bad or len(part.encode()) > _LONGEST_PART:
            break
    else:
        if not re.match(r"[A-Za-z]:", path) and len(path) <= 1000:
            return
    raise ConfigError(
        f"{what} {path!r} is not a plain relative path.",
        hint="Give a path inside the data root with forward slashes, without '..' or hidden parts.",
    )


def _check_count(value: int | None, what: str) -> None:
    if value is not None and not 0 <= value <= _LARGEST_FILE:
        raise ConfigError(f"{what} must be between 0 and {_LARGEST_FILE}; it is {value}.")


def _check_published(size: int | None, sha256: str | None) -> None:
    _check_count(size, "size")
    if sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise ConfigError("sha256 must be 64 lower-case hexadecimal digits.")


@dataclass(frozen=True, kw_only=True)
class Family(Entry):
    """Many files of one kind, such as the 997 ImageNet tars, one a WordNet id.

    They differ by one value, written ``{variable}`` in addresses, target and what they unpack to.
    """

    variable: str
    """Name of the value that differs."""
    first: int | None = None
    """First value, where the values are numbers in a row."""
    last: int | None = None
    """Last value, included."""
    values: tuple[str, ...] = ()
    """The values, where they are listed."""
    values_from: Literal["imagenet-lvis-synsets"] | None = None
    """A list that comes with the package: the 997 WordNet ids of LVIS classes in ImageNet-21K, as Detic has them."""

    def __post_init__(self) -> None:
        """Check that there is exactly one list of values, of a sensible length."""
        numbered = self.first is not None and self.last is not None
        if [numbered, bool(self.values), self.values_from is not None].count(True) != 1:
            raise ConfigError("give either first and last, or values, or values_from.")
        if (self.first is None) != (self.last is None):
            raise ConfigError("first and last must be given together.")
        count = (self.last or 0) - (self.first or 0) + 1 if numbered else len(self._values())
        if not 0 < count <= _LARGEST_FAMILY:
            raise ConfigError(f"a family has 1 to {_LARGEST_FAMILY} members.")
        if not all("{" + self.variable + "}" in text for text in (*self.addresses, self.target)):
            raise ConfigError(
                f"{{{self.variable}}} must appear in the target and in every address."
            )

    @functools.cached_property
    def members(self) -> tuple[Artifact, ...]:
        """One artifact per value.

        Raises:
            ConfigError: A member would not be a valid artifact.
        """
        common = {each.name: getattr(self, each.name) for each in fields(Entry)}
        made = []
        for value in map(str, self._values()):

            def fill(text: str, value: str = value) -> str:
                return text.replace("{" + self.variable + "}", value)

            unpack = self.unpack
            if unpack is not None:
                provides = tuple(replace(p, path=fill(p.path)) for p in unpack.provides)
                unpack = Unpack(folder=fill(unpack.folder), provides=provides)
            filled = {
                "name": f"{self.name}/{value}",
                "title": f"{self.title}: {value}",
                "addresses": tuple(map(fill, self.addresses)),
                "target": fill(self.target),
                "unpack": unpack,
            }
            made.append(Artifact(**{**common, **filled}))
        return tuple(made)

    def _values(self) -> range | tuple[str, ...]:
        if self.first is not None and self.last is not None:
            return range(self.first, self.last + 1)
        if self.values_from is None:
            return self.values
        synsets = resources.files("proxydet.artifacts").joinpath("synsets.txt")
        return tuple(synsets.read_text(encoding="ascii").split())


@dataclass(frozen=True, kw_only=True)
class Group:
    """A name for several artifacts, families or groups."""

    title: str
    """What it is for, in a few words."""
    holds: tuple[str, ...]
    """Names of artifacts, families and groups."""

    def __post_init__(self) -> None:
        """A group of nothing is a mistake."""
        if not self.holds:
            raise ConfigError("holds must name something.")


@dataclass(frozen=True, kw_only=True)
class CatalogueFile:
    """What one catalogue file holds."""

    artifacts: tuple[Artifact, ...] = ()
    """Single files."""
    families: tuple[Family, ...] = ()
    """Many files of one kind."""
    groups: dict[str, Group] = field(default_factory=dict)
    """Names for several of them."""


class Catalogue:
    """Artifacts by name, with families and groups.

    Args:
        files: Catalogue files in order, each with the name that messages call it by.

    Raises:
        ConfigError: A name is given twice, a group names nothing that exists or itself, or two files share a place.
    """

    def __init__(self, files: Iterable[tuple[str, CatalogueFile]]) -> None:
        self.artifacts: dict[str, Artifact] = {}
        self.families: dict[str, tuple[Artifact, ...]] = {}
        self.titles: dict[str, str] = {}
        self.groups: dict[str, tuple[str, ...]] = {}
        for where, content in files:
            named = [(each.name, each.title) for each in (*content.artifacts, *content.families)]
            for name, title in (*named, *((name, g.title) for name, g in content.groups.items())):
                if name in self.titles:
                    raise ConfigError(
                        f"{where}: the name {name!r} is already used.", hint="Choose another name."
                    )
                self.titles[name] = title
            self.artifacts.update((artifact.name, artifact) for artifact in content.artifacts)
            for family in content.families:
                with _located(f"{where}: {family.name}"):
                    self.families[family.name] = family.members
            self.groups.update((name, group.holds) for name, group in content.groups.items())
        self._singles = {artifact.file_name: artifact for artifact in self.every()}
        self._singles.update((artifact.name, artifact) for artifact in self.every())
        try:
            TopologicalSorter(self.groups).prepare()
        except CycleError as error:
            raise ConfigError(f"The group {error.args[1][0]!r} contains itself.") from error
        inner = {name for holds in self.groups.values() for name in holds}
        self.resolve(inner - self.titles.keys())
        owners: dict[str, str] = {}
        for artifact in self.every():
            if artifact.target in owners:
                both = f"{owners[artifact.target]} and {artifact.name}"
                raise ConfigError(f"{both} would both be written to {artifact.target}.")
            owners[artifact.target] = artifact.name
        for target, name in owners.items():
            parent = target
            while parent := parent.rpartition("/")[0]:
                if parent in owners:
                    raise ConfigError(f"{name} would be written below the file {parent}.")

    @classmethod
    def load(cls, extra: Iterable[Path] = ()) -> Catalogue:
        """Read the catalogue of the package, then those named by the environment, then ``extra``.

        Raises:
            ConfigError: A file cannot be read or is not a catalogue.
        """
        files = [("the built-in catalogue", _built_in())]
        named = os.environ.get(CATALOGUE_VARIABLE, "")
        for path in (*(Path(part) for part in named.split(os.pathsep) if part), *extra):
            try:
                text = read_text(path, limit=_LARGEST_CATALOGUE)
            except (OSError, ValueError) as error:
                raise ConfigError(
                    f"The catalogue file {path} cannot be read: {getattr(error, 'strerror', None) or error}.",
                    hint=f"Check the path given, and {CATALOGUE_VARIABLE}.",
                    path=path,
                ) from error
            files.append((str(path), _parse(text, str(path))))
        return cls(files)

    def every(self) -> Iterator[Artifact]:
        """Yield every single file, members of families included, in catalogue order."""
        yield from self.artifacts.values()
        for members in self.families.values():
            yield from members

    def resolve(self, names: Iterable[str]) -> tuple[Artifact, ...]:
        """Return the files that names stand for, each once, in the order asked for.

        Args:
            names: Names of artifacts, family members, families or groups, or file names.

        Raises:
            ConfigError: A name is not in the catalogue; the message names the nearest one that is.
        """
        found: dict[str, Artifact] = {}
        waiting, seen = list(names)[::-1], set[str]()
        while waiting:
            name = waiting.pop()
            if name in self.groups:
                if name not in seen:
                    waiting.extend(self.groups[name][::-1])
                seen.add(name)
                continue
            if name not in self.families and name not in self._singles:
                known = [*self.groups, *self.families, *self._singles]
                raise ConfigError(
                    f"There is no artifact called {name!r}.{nearest(name, known, 2)}",
                    hint="proxydet download --list shows all names.",
                )
            for artifact in self.families.get(name) or (self._singles[name],):
                found.setdefault(artifact.name, artifact)
        return tuple(found.values())

    def name_of_source(self, path: Path) -> str | None:
        """Return the name to download by which a file of the published layout comes, unpacked ones included.

        Args:
            path: Where the file is or should be, under any data root; recognised by how its path ends.
        """
        asked = f"/{path.as_posix()}/"
        for artifact in self.every():
            places = [artifact.target]
            if artifact.unpack is not None:
                places += [f"{artifact.unpack.folder}/{p.path}" for p in artifact.unpack.provides]
            # Without the first part, which stands for the data root whatever its name.
            if any(f"/{place.partition('/')[2]}/" in asked for place in places):
                family = artifact.name.partition("/")[0]
                return family if family in self.families else artifact.name
        return None


@contextlib.contextmanager
def _located(where: str) -> Iterator[None]:
    """Name the place in front of a `ConfigError`."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{where}: {error.message}", hint=error.hint) from error


@functools.cache
def _built_in() -> CatalogueFile:
    text = resources.files("proxydet.artifacts").joinpath("catalogue.toml").read_text("utf-8")
    return _parse(text, "the built-in catalogue")


def _parse(text: str, where: str) -> CatalogueFile:
    table = parse_toml(text, where)
    with _located(where):
        return from_mapping(CatalogueFile, table)


def how_to_get(path: Path | None) -> str | None:
    """Return the command that fetches a file of the published layout; None for any other file.

    Args:
        path: Where it should be; None where that is not known.

    Raises:
        ConfigError: A catalogue file that the environment names cannot be read.
    """
    name = None if path is None else Catalogue.load().name_of_source(path)
    return None if name is None else f"get it with: proxydet download {name}"
