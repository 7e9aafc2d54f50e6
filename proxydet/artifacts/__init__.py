"""Catalogue, transfer, unpacking and verification of files that users download.

The names below are what the rest of proxydet, and its tests, use. Each is imported from its module when it is first
used, so that reading the catalogue loads nothing that only transfers need.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from proxydet.artifacts.artifact import Artifact, Content, Login, Provided, Unpack
    from proxydet.artifacts.catalogue import Catalogue, CatalogueFile
    from proxydet.artifacts.downloader import Downloader, DownloadOptions, download, locate
    from proxydet.artifacts.family import Family
    from proxydet.artifacts.fetch import Report
    from proxydet.artifacts.look import Item, State
    from proxydet.artifacts.obtain import Outcome
    from proxydet.artifacts.plan import Plan
    from proxydet.artifacts.settings import TransferSettings, bytes_per_second
    from proxydet.artifacts.verify import Finding

# No submodule of this package may have one of these names: importing it would hide the public one.
_HOME = {
    "Artifact": "artifact",
    "Catalogue": "catalogue",
    "CatalogueFile": "catalogue",
    "Content": "artifact",
    "DownloadOptions": "downloader",
    "Downloader": "downloader",
    "Family": "family",
    "Finding": "verify",
    "Item": "look",
    "Login": "artifact",
    "Outcome": "obtain",
    "Plan": "plan",
    "Provided": "artifact",
    "Report": "fetch",
    "State": "look",
    "TransferSettings": "settings",
    "Unpack": "artifact",
    "bytes_per_second": "settings",
    "download": "downloader",
    "locate": "downloader",
}

__all__ = [
    "Artifact",
    "Catalogue",
    "CatalogueFile",
    "Content",
    "DownloadOptions",
    "Downloader",
    "Family",
    "Finding",
    "Item",
    "Login",
    "Outcome",
    "Plan",
    "Provided",
    "Report",
    "State",
    "TransferSettings",
    "Unpack",
    "bytes_per_second",
    "download",
    "locate",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'proxydet.artifacts' has no attribute {name!r}")
    value = getattr(import_module(f"proxydet.artifacts.{_HOME[name]}"), name)
    globals()[name] = value
    return value
