"""Reading files through again: is every byte still what it was?"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from proxydet.artifacts.artifact import Artifact
from proxydet.artifacts.content import content_check
from proxydet.artifacts.digest import file_digest
from proxydet.artifacts.look import useful_path
from proxydet.artifacts.patience import Stopped
from proxydet.artifacts.root import Root
from proxydet.artifacts.staging import Unpacked, read_listing
from proxydet.errors import ArtifactError, ProxydetError
from proxydet.reporting import SILENT, Progress

Verdict = Literal["sound", "damaged", "absent", "unproven"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What verification found for one artifact."""

    name: str
    """The artifact."""
    verdict: Verdict
    """``sound``: every byte is right; ``damaged``; ``absent``; ``unproven``: it is there, but nothing is known to
    check its bytes against."""
    path: Path
    """The file or folder."""
    detail: str = ""
    """What was checked, or what is wrong."""


def verify_all(
    artifacts: Iterable[Artifact],
    root: Root,
    progress: Progress = SILENT,
    stop: threading.Event | None = None,
) -> Iterator[Finding]:
    """Check each artifact's bytes against its digest, or its unpacked files against their check sums.

    Damage is remembered: a damaged artifact no longer counts as ready.

    Args:
        artifacts: What to check.
        root: Where files lie.
        progress: Where to show how far it is.
        stop: Ends the reading when set.
    """
    for artifact in artifacts:
        try:
            finding = verify(artifact, root, progress, stop)
        except Stopped:
            raise
        except ProxydetError as error:
            finding = _finding(artifact, "damaged", useful_path(artifact, root), error.message)
        if finding.verdict in ("sound", "damaged"):
            root.records(artifact).record_damage(
                artifact.name, damaged=finding.verdict == "damaged"
            )
        yield finding


def verify(
    artifact: Artifact, root: Root, progress: Progress = SILENT, stop: threading.Event | None = None
) -> Finding:
    """Check one artifact; see `verify_all`.

    Raises:
        ArtifactError: A file or record cannot be read.
    """
    path = useful_path(artifact, root)
    if artifact.unpack is not None:
        there = read_listing(root.listing(artifact))
        if there is not None:
            return _verify_listed(artifact, root, there[1], progress, stop)
        if not root.path(artifact.target).is_file():
            return _verify_placed(artifact, root, progress, stop)
    return _verify_file(artifact, root, progress, stop) or _finding(artifact, "absent", path)


def _verify_file(
    artifact: Artifact, root: Root, progress: Progress, stop: threading.Event | None
) -> Finding | None:
    path = root.path(artifact.target)
    if not path.is_file():
        return None
    seen = None if artifact.pinned else root.records(artifact).first_seen(artifact.name)
    expected = artifact.sha256 if seen is None else seen.sha256
    digest = file_digest(path, progress, stop)
    if expected is None:
        check = content_check(artifact)
        detail = f"{check.run(path)}; " if check is not None else ""
        return _finding(artifact, "unproven", path, f"{detail}no digest is published or recorded")
    if digest != expected:
        return _finding(artifact, "damaged", path, f"expected sha256 {expected}, got {digest}")
    root.records(artifact).record_digest(path, digest)
    return _finding(
        artifact, "sound", path, "published digest" if seen is None else "digest of first use"
    )


def _verify_listed(
    artifact: Artifact,
    root: Root,
    files: dict[str, Unpacked],
    progress: Progress,
    stop: threading.Event | None,
) -> Finding:
    folder = (
        root.path(artifact.unpack.folder)
        if artifact.unpack is not None
        else root.base(artifact.target)
    )
    wrong: list[str] = []
    total = sum(unpacked.size for unpacked in files.values())
    with progress.task(f"checking {artifact.name}", total=total, unit="B") as task:
        for name, unpacked in files.items():
            if stop is not None and stop.is_set():
                raise Stopped
            if not _same(folder / name, unpacked):
                wrong.append(name)
            task.advance(unpacked.size)
    path = useful_path(artifact, root)
    if wrong:
        detail = f"{len(wrong)} of {len(files)} files are missing or changed, such as {wrong[0]}"
        return _finding(artifact, "damaged", path, detail)
    return _finding(artifact, "sound", path, f"check sums of {len(files)} files")


def _verify_placed(
    artifact: Artifact, root: Root, progress: Progress, stop: threading.Event | None
) -> Finding:
    """Check unpacked files that somebody placed by hand."""
    path, rule = useful_path(artifact, root), artifact.unpack
    proven = True
    for provided in rule.provides if rule is not None else ():
        place = (root.path(rule.folder) if rule is not None else path) / provided.path
        if not place.exists():
            return _finding(artifact, "absent", path)
        if provided.sha256 is None or not place.is_file():
            proven = False
        elif (digest := file_digest(place, progress, stop)) != provided.sha256:
            return _finding(
                artifact, "damaged", place, f"expected sha256 {provided.sha256}, got {digest}"
            )
    detail = "published digests" if proven else "placed by hand; no check sums are known"
    return _finding(artifact, "sound" if proven else "unproven", path, detail)


def _same(path: Path, unpacked: Unpacked) -> bool:
    try:
        with path.open("rb") as file:
            crc = size = 0
            while block := file.read(1 << 20):
                crc, size = zlib.crc32(block, crc), size + len(block)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return False
    except OSError as error:
        raise ArtifactError(
            f"{path} cannot be read: {error.strerror or error}.", path=path
        ) from error
    return (size, crc) == (unpacked.size, unpacked.crc)


def _finding(artifact: Artifact, verdict: Verdict, path: Path, detail: str = "") -> Finding:
    return Finding(name=artifact.name, verdict=verdict, path=path, detail=detail)
