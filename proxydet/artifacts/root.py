"""Where files of the catalogue lie on this machine."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from proxydet.artifacts.artifact import Artifact
from proxydet.artifacts.records import HIDDEN_FOLDER, Records
from proxydet.paths import datasets_folder, models_folder


class Root:
    """The folders that catalogue paths (``models/...``, ``datasets/...``) are relative to.

    Args:
        folder: One folder for all; None for those that `proxydet.paths` names.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._records: dict[Path, Records] = {}

    def base(self, target: str) -> Path:
        """Return the folder that the first part of a catalogue path stands for; records lie there."""
        first = PurePosixPath(target).parts[0]
        if self.folder is not None:
            return self.folder / first
        known = {"models": models_folder, "datasets": datasets_folder}
        return known[first]() if first in known else Path(first)

    def path(self, target: str) -> Path:
        """Return where a catalogue path lies."""
        return self.base(target).joinpath(*PurePosixPath(target).parts[1:])

    def records(self, artifact: Artifact) -> Records:
        """Return what is remembered about an artifact and its neighbours."""
        return self.records_at(artifact.target)

    def records_at(self, place: str) -> Records:
        """Return what is remembered about the files under the first part of a catalogue path."""
        base = self.base(place)
        return self._records.setdefault(base, Records(base))

    def listing(self, artifact: Artifact) -> Path:
        """Return where the list of the files that an archive unpacked to is kept."""
        name = artifact.name.replace("/", "__")
        return self.base(artifact.target) / HIDDEN_FOLDER / "unpacked" / f"{name}.tsv"
