"""Catalogue, transfer, unpacking and verification of files that users download.

The names below are what the rest of proxydet, and its tests, use. Each is imported from its module when it is first
used, so that reading the catalogue loads nothing that only transfers need.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from proxydet.artifacts.catalogue import (
        Artifact,
        Catalogue,
        CatalogueFile,
        Content,
        Family,
        Login,
        Provided,
        Unpack,
        how_to_get,
    )
    from proxydet.artifacts.downloader import (
        Downloader,
        DownloadOptions,
        Outcome,
        Report,
        download,
        locate,
    )
    from proxydet.artifacts.http import TransferSettings, bytes_per_second
    from proxydet.artifacts.plan import Item, Plan, State

__all__ = [
    "Artifact", "Catalogue", "CatalogueFile", "Content", "DownloadOptions", "Downloader", "Family", "Item",
    "Login", "Outcome", "Plan", "Provided", "Report", "State", "TransferSettings", "Unpack", "bytes_per_second",
    "download", "how_to_get", "locate",
]  # fmt: skip
# No submodule of this package may have one of these names: importing it would hide the public one.
_HOME = {
    **dict.fromkeys(["Item", "Plan", "State"], "plan"),
    **dict.fromkeys(["TransferSettings", "bytes_per_second"], "http"),
    **dict.fromkeys(["DownloadOptions", "Downloader", "Outcome", "Report"], "downloader"),
    **dict.fromkeys(["download", "locate"], "downloader"),
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'proxydet.artifacts' has no attribute {name!r}")
    home = import_module(f"proxydet.artifacts.{_HOME.get(name, 'catalogue')}")
    globals()[name] = value = getattr(home, name)
    return value
