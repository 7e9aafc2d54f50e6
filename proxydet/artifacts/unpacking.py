"""From an archive to the files that are used: unpacked once, checked against the catalogue, listed for later checks."""

from __future__ import annotations

import logging
from pathlib import Path

from proxydet.artifacts.artifact import Artifact, Unpack
from proxydet.artifacts.files import require_room, write_text
from proxydet.artifacts.root import Root
from proxydet.artifacts.staging import Staging, Unpacked, listing
from proxydet.artifacts.untar import untar
from proxydet.artifacts.unzip import unzip, zip_members
from proxydet.errors import ArchiveError
from proxydet.reporting import Progress
from proxydet.wording import counted

_logger = logging.getLogger(__name__)


def unpack(artifact: Artifact, digest: str, root: Root, progress: Progress) -> int:
    """Unpack an archive whose digest has been checked; go on where an earlier run stopped.

    Args:
        artifact: The artifact; it must say what it unpacks to.
        digest: Digest of the archive.
        root: Where files lie.
        progress: Where to show how far it is.

    Returns:
        How many files the archive holds.

    Raises:
        ArchiveError: It is damaged, hostile, or does not hold what the catalogue says.
        DiskFullError: There is no room.
    """
    rule = artifact.unpack
    if rule is None:
        raise ArchiveError(f"{artifact.name} is not an archive.")
    path, folder = root.path(artifact.target), root.path(rule.folder)
    staging = Staging(folder, path.name, digest)
    try:
        names = _write_all(path, rule, staging, progress)
        files = {name: staging.done[name] for name in names}
        _check_provided(artifact, rule, files)
        staging.publish(names)
    except ArchiveError:
        # Unlike an interruption, this cannot be gone on from.
        staging.discard()
        raise
    finally:
        staging.close()
    write_text(root.listing(artifact), listing(digest, files))
    _logger.info("%s: %d files in %s", artifact.name, len(files), folder)
    return len(files)


def _write_all(path: Path, rule: Unpack, staging: Staging, progress: Progress) -> list[str]:
    title = f"unpacking {path.name}"
    if path.suffix == ".zip":
        members = zip_members(path, rule.tops)
        total = sum(entry.file_size for entry in members.values())
        done = sum(unpacked.size for unpacked in staging.done.values())
        require_room(staging.path / "files", total - done)
        with progress.task(title, total=total, unit="B") as task:
            unzip(path, members, staging, task)
        return list(members)
    with progress.task(title, total=path.stat().st_size, unit="B") as task:
        return untar(path, rule.tops, staging, task)


def _check_provided(artifact: Artifact, rule: Unpack, files: dict[str, Unpacked]) -> None:
    """Check that what came out is what the catalogue says, before it gets its final place."""
    for provided in rule.provides:
        inside = [name for name in files if name.startswith(provided.path + "/")]
        single = files.get(provided.path)
        if not inside and single is None:
            raise ArchiveError(f"{artifact.file_name} does not hold {provided.path}.")
        if provided.files is not None and len(inside) != provided.files:
            count = counted(len(inside), "file")
            raise ArchiveError(
                f"{artifact.file_name} holds {count} in {provided.path}, not {provided.files}."
            )
        if provided.size is not None and (single is None or single.size != provided.size):
            raise ArchiveError(
                f"{provided.path} in {artifact.file_name} has not the published size."
            )
