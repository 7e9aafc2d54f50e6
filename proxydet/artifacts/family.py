"""Families: many files of one kind under one entry, such as the 997 ImageNet tars, one a WordNet id."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import resources
from typing import Literal

from proxydet.artifacts.artifact import Artifact, Content, Login, Unpack
from proxydet.errors import ConfigError

_LARGEST_FAMILY = 25_000


@dataclass(frozen=True, kw_only=True)
class Family:
    """Files that differ by one value, written ``{variable}`` in addresses, target and what they unpack to."""

    name: str
    """Short name of the whole family; a member is ``name/value``."""
    title: str
    """What it is, in a few words."""
    variable: str
    """Name of the value that differs."""
    first: int | None = None
    """First value, where the values are numbers in a row."""
    last: int | None = None
    """Last value, included."""
    values: tuple[str, ...] = ()
    """The values, where they are listed."""
    values_from: Literal["imagenet-lvis-synsets"] | None = None
    """A list that comes with the package."""
    addresses: tuple[str, ...]
    """Addresses of a member."""
    target: str
    """Path of a member under the data root."""
    licence: str
    """Licence or terms."""
    login: Login | None = None
    """The account that the source asks for."""
    may_be_missing: bool = False
    """Whether the source may lack some members."""
    unpack: Unpack | None = None
    """How a member is unpacked."""
    content: Content | None = None
    """What a member must hold."""

    def __post_init__(self) -> None:
        """Check that there is exactly one list of values, of a sensible length."""
        numbered = self.first is not None and self.last is not None
        if [numbered, bool(self.values), self.values_from is not None].count(True) != 1:
            raise ConfigError("give either first and last, or values, or values_from.")
        if (self.first is None) != (self.last is None):
            raise ConfigError("first and last belong together.")
        if not 0 < self._count() <= _LARGEST_FAMILY:
            raise ConfigError(
                f"a family has 1 to {_LARGEST_FAMILY} members; this one has {self._count()}."
            )
        if not all("{" + self.variable + "}" in text for text in (*self.addresses, self.target)):
            raise ConfigError(
                f"{{{self.variable}}} must appear in the target and in every address."
            )

    def members(self) -> tuple[Artifact, ...]:
        """Return one artifact per value.

        Raises:
            ConfigError: A member would not be a valid artifact.
        """
        return tuple(self._member(value) for value in self._values())

    def _count(self) -> int:
        if self.first is not None and self.last is not None:
            return self.last - self.first + 1
        return len(self._values())

    def _values(self) -> tuple[str, ...]:
        if self.first is not None and self.last is not None:
            return tuple(str(number) for number in range(self.first, self.last + 1))
        return imagenet_synsets() if self.values_from else self.values

    def _member(self, value: str) -> Artifact:
        def fill(text: str) -> str:
            return text.replace("{" + self.variable + "}", value)

        unpack = self.unpack
        if unpack is not None:
            provides = tuple(replace(p, path=fill(p.path)) for p in unpack.provides)
            unpack = Unpack(folder=fill(unpack.folder), provides=provides)
        return Artifact(
            name=f"{self.name}/{value}",
            title=f"{self.title}: {value}",
            addresses=tuple(fill(address) for address in self.addresses),
            target=fill(self.target),
            licence=self.licence,
            login=self.login,
            may_be_missing=self.may_be_missing,
            unpack=unpack,
            content=self.content,
        )


def imagenet_synsets() -> tuple[str, ...]:
    """Return the 997 WordNet ids of the LVIS classes that ImageNet-21K has, as published with Detic."""
    text = resources.files("proxydet.artifacts").joinpath("synsets.txt").read_text(encoding="ascii")
    return tuple(text.split())
