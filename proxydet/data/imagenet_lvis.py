"""Which ImageNet-21K classes are LVIS classes, as a table in the package: no WordNet is needed at run time."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from types import MappingProxyType


@cache
def synset_of_wnid() -> Mapping[str, str]:
    """Return the synset (``aerosol.n.02``, as LVIS categories have it) of each of the 997 WordNet ids."""
    text = (files("proxydet.data") / "imagenet_lvis.txt").read_text(encoding="utf-8")
    lines = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    return MappingProxyType(dict(lines))
