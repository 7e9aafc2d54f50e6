"""The list of everything that can be downloaded, and how names in it are looked up."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path, PurePosixPath

from proxydet.artifacts.artifact import Artifact
from proxydet.artifacts.family import Family
from proxydet.config import from_mapping, parse_toml
from proxydet.errors import ConfigError
from proxydet.files import read_text

CATALOGUE_VARIABLE = "PROXYDET_CATALOGUE"
"""Environment variable with further catalogue files, separated as in PATH."""

_LARGEST_FILE = 8 << 20


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
            self._add(where, content)
        self._by_file_name = {artifact.file_name: artifact for artifact in self.every()}
        self._check_groups()
        self._check_places()

    @classmethod
    def load(cls, extra: Iterable[Path] = ()) -> Catalogue:
        """Read the catalogue of the package, then those named by the environment, then ``extra``.

        Raises:
            ConfigError: A file cannot be read or is not a catalogue.
        """
        built_in = (
            resources.files("proxydet.artifacts").joinpath("catalogue.toml").read_text("utf-8")
        )
        files = [("the built-in catalogue", _parse(built_in, "the built-in catalogue"))]
        named = os.environ.get(CATALOGUE_VARIABLE, "")
        paths = [Path(part) for part in named.split(os.pathsep) if part]
        files.extend((str(path), _read(path)) for path in (*paths, *extra))
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
        for name in names:
            for artifact in self._expand(name):
                found.setdefault(artifact.name, artifact)
        return tuple(found.values())

    def name_of_source(self, path: Path) -> str | None:
        """Return the name to download by which a file of the published layout comes, unpacked ones included.

        Args:
            path: Where the file is or should be, under any data root; told by how its path ends.
        """
        wanted = f"/{path.as_posix()}/"
        for artifact in self.every():
            places = [artifact.target]
            if artifact.unpack is not None:
                places += [f"{artifact.unpack.folder}/{p.path}" for p in artifact.unpack.provides]
            # Without the first part, which stands for the data root whatever its name.
            if any(f"/{place.partition('/')[2]}/" in wanted for place in places):
                family = artifact.name.partition("/")[0]
                return family if family in self.families else artifact.name
        return None

    def _expand(self, name: str) -> Iterator[Artifact]:
        if name in self.groups:
            for inner in self.groups[name]:
                yield from self._expand(inner)
        elif name in self.families:
            yield from self.families[name]
        elif name in self.artifacts:
            yield self.artifacts[name]
        else:
            yield self._single(name)

    def _single(self, name: str) -> Artifact:
        family = name.partition("/")[0]
        for member in self.families.get(family, ()):
            if member.name == name:
                return member
        if name in self._by_file_name:
            return self._by_file_name[name]
        known = [*self.groups, *self.families, *self.artifacts, *self._by_file_name]
        close = difflib.get_close_matches(name, known, n=2)
        nearest = f" Did you mean {' or '.join(close)}?" if close else ""
        raise ConfigError(
            f"There is no artifact called {name!r}.{nearest}",
            hint="proxydet download --list shows all names.",
        )

    def _add(self, where: str, content: CatalogueFile) -> None:
        for artifact in content.artifacts:
            self._claim(where, artifact.name, artifact.title)
            self.artifacts[artifact.name] = artifact
        for family in content.families:
            self._claim(where, family.name, family.title)
            try:
                self.families[family.name] = family.members()
            except ConfigError as error:
                raise ConfigError(
                    f"{where}: {family.name}: {error.message}", hint=error.hint
                ) from error
        for name, group in content.groups.items():
            self._claim(where, name, group.title)
            self.groups[name] = group.holds

    def _claim(self, where: str, name: str, title: str) -> None:
        if name in self.titles:
            raise ConfigError(
                f"{where}: the name {name!r} is taken already.", hint="Choose another name."
            )
        self.titles[name] = title

    def _check_groups(self) -> None:
        for name in self.groups:
            self._check_group(name, (name,))

    def _check_group(self, name: str, above: tuple[str, ...]) -> None:
        for inner in self.groups[name]:
            if inner in above:
                raise ConfigError(f"The group {inner!r} contains itself.")
            if inner in self.groups:
                self._check_group(inner, (*above, inner))
            elif inner not in self.titles:
                self._single(inner)

    def _check_places(self) -> None:
        owners: dict[str, str] = {}
        for artifact in self.every():
            if artifact.target in owners:
                both = f"{owners[artifact.target]} and {artifact.name}"
                raise ConfigError(f"{both} would both be written to {artifact.target}.")
            owners[artifact.target] = artifact.name
        for target, name in owners.items():
            for parent in PurePosixPath(target).parents:
                if str(parent) in owners:
                    raise ConfigError(f"{name} would be written below the file {parent}.")


def _read(path: Path) -> CatalogueFile:
    try:
        return _parse(read_text(path, limit=_LARGEST_FILE), str(path))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"The catalogue file {path} cannot be read: {getattr(error, 'strerror', None) or error}.",
            hint=f"Check the path given, and {CATALOGUE_VARIABLE}.",
            path=path,
        ) from error


def _parse(text: str, where: str) -> CatalogueFile:
    table = parse_toml(text, where)
    try:
        return from_mapping(CatalogueFile, table)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error.message}", hint=error.hint) from error
