"""Writes the published RoIAlign change into an installed detectron2, and takes it out again byte for byte.

``proxydet patch`` is for other detectron2 code: proxydet's own training applies the change at run time
(:mod:`proxydet.compat.roi_align`). Beside ``roi_align.py`` two files are kept while the change is in place: the
original (``roi_align.py.proxydet-original``) and a record of both digests (``roi_align.py.proxydet-patch.json``).
The file is replaced, never written in place: installers such as uv link one file into many environments.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from proxydet._version import __version__
from proxydet.compat import patch_source
from proxydet.compat.patch_disk import remove_bytecode, replace_file
from proxydet.compat.patch_status import (
    PatchRecord,
    PatchState,
    PatchStatus,
    digest_of,
    kept_original,
    original_path,
    patch_status,
    record_path,
)
from proxydet.errors import EnvironmentProblem

_RUN_TIME = (
    "training needs no edit: its reproducibility mode 'published' applies the change at run time"
)


@dataclass(frozen=True, kw_only=True)
class PatchChange:
    """What ``apply`` or ``revert`` did, or would do."""

    file: Path
    """The file, links resolved."""

    action: Literal["apply", "revert"]
    """Which of the two."""

    changed: bool
    """False where there was nothing to do."""

    dry_run: bool
    """Whether the disk was left alone."""

    before: str
    """SHA-256 before."""

    after: str
    """SHA-256 after."""

    diff: str
    """Unified diff of the change; empty where there is none."""

    removed_bytecode: tuple[Path, ...] = ()
    """Compiled files that were deleted, so that Python compiles the new source."""

    def to_dict(self) -> dict[str, Any]:
        """Return the change as JSON values."""
        plain = asdict(self)
        plain["file"] = str(self.file)
        plain["removed_bytecode"] = [str(path) for path in self.removed_bytecode]
        return plain


def apply_patch(file: Path, *, dry_run: bool = False) -> PatchChange:
    """Write the published change into a ``roi_align.py``; does nothing where it is there already.

    Args:
        file: The file.
        dry_run: Only say what would change.

    Returns:
        What was done, with the diff.

    Raises:
        EnvironmentProblem: The file is not the expected code, or may not be replaced.
    """
    status = _expect(patch_status(file), {"original", "applied"})
    source = status.file.read_bytes()
    if status.state == "applied":
        removed = _remove_stale(status, dry_run=dry_run)
        return _change(status.file, "apply", source, source, dry_run=dry_run, removed=removed)
    changed = patch_source.with_change(source)
    if dry_run:
        return _change(status.file, "apply", source, changed, dry_run=True)
    _require_writable(status)
    record = PatchRecord(
        before=digest_of(source),
        after=digest_of(changed),
        applied_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        proxydet=__version__,
    )
    # The original and the record come first: whatever stops us later, they describe the file truly.
    replace_file(original_path(status.file), source, like=status.file)
    replace_file(record_path(status.file), _to_json(record), like=status.file)
    replace_file(status.file, changed, like=status.file)
    return _change(status.file, "apply", source, changed, removed=remove_bytecode(status.file))


def revert_patch(file: Path, *, dry_run: bool = False) -> PatchChange:
    """Put the original ``roi_align.py`` back, byte for byte; does nothing where it is there already.

    Args:
        file: The file.
        dry_run: Only say what would change.

    Returns:
        What was done, with the diff.

    Raises:
        EnvironmentProblem: The file was changed since, the change is not proxydet's own, or it may not be replaced.
    """
    status = _expect(patch_status(file), {"original", "applied"})
    source = status.file.read_bytes()
    if status.state == "original":
        if not dry_run and status.writable:
            _forget(status.file)
        removed = _remove_stale(status, dry_run=dry_run)
        return _change(status.file, "revert", source, source, dry_run=dry_run, removed=removed)
    original = _original_to_restore(status, source)
    if dry_run:
        return _change(status.file, "revert", source, original, dry_run=True)
    _require_writable(status)
    replace_file(status.file, original, like=status.file)
    _forget(status.file)
    return _change(status.file, "revert", source, original, removed=remove_bytecode(status.file))


def _original_to_restore(status: PatchStatus, source: bytes) -> bytes:
    kept = kept_original(status.file)
    if status.record is None or kept is None:
        raise EnvironmentProblem(
            f"{status.file} carries the published change, but proxydet did not write it (or its kept original "
            "is gone), so there is nothing to restore.",
            hint="reinstall detectron2 to have its original file",
            path=status.file,
        )
    if status.record.after != digest_of(source):
        written = patch_source.with_change(kept)
        changes = patch_source.diff(written, source, status.file.name, ("as applied", "found"))
        raise EnvironmentProblem(
            f"{status.file} was changed after the patch was applied; it is left alone.\n\n{changes}",
            hint="undo that change, or reinstall detectron2",
            path=status.file,
        )
    return kept


def _remove_stale(status: PatchStatus, *, dry_run: bool) -> tuple[Path, ...]:
    """Delete the compiled files where one of them is of another source: the text is right, and Python would not run it."""
    if dry_run or not status.stale_bytecode:
        return ()
    _require_writable(status)
    return remove_bytecode(status.file)


def _expect(status: PatchStatus, states: set[PatchState]) -> PatchStatus:
    if status.state in states:
        return status
    shown = f"\n\n{status.diff}" if status.diff else ""
    raise EnvironmentProblem(
        f"{status.file} is not the code that was expected, so it is left alone: {status.reason}.{shown}",
        hint=f"reinstall detectron2 to have its original file; {_RUN_TIME}",
        path=status.file,
    )


def _require_writable(status: PatchStatus) -> None:
    if not status.writable:
        raise EnvironmentProblem(
            f"{status.file} may not be changed by this user: {status.obstacle}.",
            hint=f"use an environment of your own; {_RUN_TIME}",
            path=status.file,
        )


def _change(
    file: Path,
    action: Literal["apply", "revert"],
    before: bytes,
    after: bytes,
    *,
    dry_run: bool = False,
    removed: tuple[Path, ...] = (),
) -> PatchChange:
    return PatchChange(
        file=file,
        action=action,
        changed=before != after,
        dry_run=dry_run,
        before=digest_of(before),
        after=digest_of(after),
        diff=patch_source.diff(before, after, file.name, ("before", "after")),
        removed_bytecode=removed,
    )


def _forget(file: Path) -> None:
    record_path(file).unlink(missing_ok=True)
    original_path(file).unlink(missing_ok=True)


def _to_json(record: PatchRecord) -> bytes:
    return (json.dumps(asdict(record), indent=2) + os.linesep).encode()
