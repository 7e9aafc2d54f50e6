"""What one detectron2's ``layers/roi_align.py`` holds, without importing or changing anything."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from proxydet.compat import patch_source
from proxydet.compat.patch_disk import obstacle, unchecked_bytecode
from proxydet.errors import EnvironmentProblem, MissingDependencyError

PatchState = Literal["original", "applied", "half", "altered", "missing"]


@dataclass(frozen=True, kw_only=True)
class PatchRecord:
    """What ``apply`` did."""

    before: str
    """SHA-256 of the original file."""

    after: str
    """SHA-256 of the changed file."""

    applied_at: str
    """UTC time, ISO 8601."""

    proxydet: str
    """The version of proxydet that did it."""


@dataclass(frozen=True, kw_only=True)
class PatchStatus:
    """What one detectron2's ``layers/roi_align.py`` holds."""

    file: Path
    """The file, links resolved."""

    state: PatchState
    """``original``, ``applied``, ``half`` or ``altered`` code, or ``missing``."""

    reason: str
    """Why it counts as that, one sentence."""

    digest: str | None = None
    """SHA-256 of the file; None where it is missing."""

    record: PatchRecord | None = None
    """What ``apply`` recorded, where the file or its kept original still matches; None otherwise."""

    obstacle: str = ""
    """Why this user may not replace the file; empty where they may."""

    stale_bytecode: tuple[Path, ...] = ()
    """Compiled files that Python would run without looking at the source, and that are of another source."""

    diff: str = ""
    """For ``half`` and ``altered``: from what was expected to what is there."""

    notes: tuple[str, ...] = ()
    """What else the user should know."""

    @property
    def writable(self) -> bool:
        """Whether this user may replace the file."""
        return not self.obstacle

    def to_dict(self) -> dict[str, Any]:
        """Return the status as JSON values."""
        plain = {**asdict(self), "writable": self.writable}
        plain["file"] = str(self.file)
        plain["stale_bytecode"] = [str(path) for path in self.stale_bytecode]
        plain["notes"] = list(self.notes)
        return plain


def roi_align_files(search_path: Sequence[str] | None = None) -> tuple[Path, ...]:
    """Find the ``layers/roi_align.py`` of every detectron2 that Python could import.

    Args:
        search_path: Folders to look into, in order; None for ``sys.path``.

    Returns:
        The files, the one in use first; empty without detectron2. A file may not exist (a broken installation).
    """
    packages: list[Path] = []
    if search_path is None:
        in_use = package_folder("detectron2")
        if in_use is None:
            return ()
        packages.append(in_use)
    for entry in sys.path if search_path is None else search_path:
        package = Path(entry or ".") / "detectron2"
        if _can_be_imported(package):
            packages.append(package)
    files = [(package / "layers" / "roi_align.py").resolve() for package in packages]
    return tuple(dict.fromkeys(files))


def _can_be_imported(package: Path) -> bool:
    try:
        return (package / "__init__.py").is_file()
    except PermissionError:
        # Python, too, passes over folders of its path that this user may not read.
        return False


def package_folder(name: str) -> Path | None:
    """Return the folder of the package that Python would import, without importing it; None where there is none."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        # Something refuses its import, or put a module without a spec in its place.
        return None
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def file_in_use() -> Path:
    """Return the ``layers/roi_align.py`` of the detectron2 that Python imports.

    Raises:
        MissingDependencyError: There is no detectron2.
    """
    files = roi_align_files()
    if not files:
        raise MissingDependencyError("detectron2 is not installed.", hint="run: proxydet setup")
    return files[0]


def patch_status(file: Path) -> PatchStatus:
    """Say what a ``roi_align.py`` holds; changes nothing.

    Args:
        file: The file.

    Returns:
        Its state, with the reason, and for unexpected code a diff.
    """
    file = file.resolve()
    if not file.is_file():
        reason = "there is no such file"
        return PatchStatus(file=file, state="missing", reason=reason, obstacle=reason)
    source = file.read_bytes()
    reading = patch_source.read_source(source)
    record = _matching_record(file, source)
    diff = ""
    if reading.state in {"half", "altered"}:
        expected = kept_original(file) or patch_source.expected_text(source)
        if expected is not None:
            diff = patch_source.diff(expected, source, file.name, ("expected", "found"))
    return PatchStatus(
        file=file,
        state=reading.state,
        reason=reading.reason,
        digest=digest_of(source),
        record=record,
        obstacle=obstacle(file),
        stale_bytecode=unchecked_bytecode(file),
        diff=diff,
        notes=_notes(file, reading.state, record),
    )


def _notes(file: Path, state: PatchState, record: PatchRecord | None) -> tuple[str, ...]:
    notes = []
    installed = roi_align_files()
    if installed and file not in installed:
        notes.append(f"Python imports another detectron2: {installed[0]}")
    elif len(installed) > 1:
        listed = ", ".join(str(other) for other in installed if other != file)
        notes.append(f"there is more than one detectron2 on Python's path; also: {listed}")
    if "site-packages" not in file.parts and any((p / ".git").exists() for p in file.parents):
        notes.append("the file belongs to a source tree: its version control will show the change")
    if state == "applied" and record is None:
        notes.append("proxydet did not write this change: it can be verified, but not reverted")
    return tuple(notes)


def _matching_record(file: Path, source: bytes) -> PatchRecord | None:
    path, kept = record_path(file), kept_original(file)
    if not path.is_file() or kept is None:
        return None
    try:
        record = PatchRecord(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise EnvironmentProblem(
            f"{path} is damaged: {error}.",
            hint="reinstall detectron2, and delete that file and the kept original beside it",
            path=path,
        ) from error
    related = record.before == digest_of(kept)
    stale = patch_source.read_source(source).state == "original"
    return record if related and not stale else None


def kept_original(file: Path) -> bytes | None:
    """Content of the original that ``apply`` kept beside a file; None where there is none."""
    path = original_path(file)
    return path.read_bytes() if path.is_file() else None


def original_path(file: Path) -> Path:
    """Where the original of a file is kept."""
    return file.with_name(f"{file.name}.proxydet-original")


def record_path(file: Path) -> Path:
    """Where the record about a file is kept."""
    return file.with_name(f"{file.name}.proxydet-patch.json")


def digest_of(source: bytes) -> str:
    """SHA-256 of a text, in hexadecimal."""
    return hashlib.sha256(source).hexdigest()
