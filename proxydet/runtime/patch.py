"""Writes the published RoIAlign change into an installed detectron2, and takes it out again byte for byte.

``proxydet patch`` is for other code that uses detectron2: proxydet's own training makes the change at run time
(:mod:`proxydet.runtime.modes`). The change (detectron2 issue 4723) has three parts: features and boxes are cast to
half and then to double, and the result is cast back to the dtype of the features.

A file is recognised by the digest of its code, without comments, docstrings and layout; the change is three
replacements in its text. Next to ``roi_align.py`` two files are kept while the change is in place: the original
(``roi_align.py.proxydet-original``) and a record of both digests (``roi_align.py.proxydet-patch.json``). The file is
replaced, never written in place: installers such as uv link one file into many environments.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib.util
import json
import os
import re
import stat
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from proxydet._version import __version__
from proxydet.errors import RuntimeEnvironmentError
from proxydet.files import staged
from proxydet.runtime.detectron2 import locate_detectron2, package_folder

PatchState = Literal["original", "applied", "half", "altered", "missing"]
"""As detectron2 0.6 ships it; with the published change; with a part of it; anything else; no such file."""

_CODE = "899ff35f83fbc019cef9e08ed344f59df9e5973234bf77db40e5b47c38c312f2"
"""SHA-256 of the code of detectron2 0.6's ``layers/roi_align.py`` without comments, docstrings and layout."""

_FORWARD = """\
def forward(self, input, rois):
    assert rois.dim() == 2 and rois.size(1) == 5
    if input.is_quantized:
        input = input.dequantize()
    return roi_align(input, rois.to(dtype=input.dtype), self.output_size, self.spatial_scale, self.sampling_ratio, \
self.aligned)"""
"""The method that the change is made in, as `ast.unparse` gives it: what a diff of other code starts from."""

_GAP = rb"(?:\s|#[^\n]*\n)*"
_PARTS = {
    "features": (
        rb"(\breturn roi_align\(" + _GAP + rb")input(?=\s*,)",
        rb"\1input.half().double()",
        ("roi_align(input.half().double(), ", "roi_align(input, "),
    ),
    "boxes": (
        rb"()\brois\.to\((?:dtype=)?input\.dtype\)",
        rb"\1rois.half().double()",
        (" rois.half().double(), ", " rois.to(dtype=input.dtype), "),
    ),
    "result": (
        rb"(self\.aligned,?" + _GAP + rb"\))",
        rb"\1.to(dtype=input.dtype)",
        ("self.aligned).to(dtype=input.dtype)", "self.aligned)"),
    ),
}
"""Part of the change -> pattern and replacement in a file's text; the changed and the original form in its code."""

_ORIGINAL = ".proxydet-original"
_RECORD = ".proxydet-patch.json"

_UNCHECKED_HASH = 0b01
"""Flags of a compiled file that names a hash of its source and asks Python not to compare it (PEP 552)."""

_RUN_TIME = (
    "training needs no edit: its reproducibility mode 'published' makes the change at run time"
)


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
    """Why, one sentence."""
    digest: str | None = None
    """SHA-256 of the file; None where it is missing."""
    record: PatchRecord | None = None
    """What ``apply`` recorded, where the file or its kept original still matches; None otherwise."""
    obstacle: str = ""
    """Why this user may not replace the file; empty where they may."""
    stale_bytecode: tuple[Path, ...] = ()
    """Compiled files that Python would run without reading the source, and that are of another source."""
    diff: str = ""
    """For ``half`` and ``altered``: from what was expected to what is there."""
    notes: tuple[str, ...] = ()
    """What else the user should know."""
    writable: bool = False
    """Whether this user may replace the file."""


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


# ---- which files -----------------------------------------------------------------------------------------------------


def roi_align_files(search_path: Sequence[str] | None = None) -> tuple[Path, ...]:
    """Find the ``layers/roi_align.py`` of every detectron2 that Python could import.

    Args:
        search_path: Folders to search, in order; None for ``sys.path``.

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
        try:
            if (package / "__init__.py").is_file():
                packages.append(package)
        except PermissionError:
            continue  # Python, too, skips folders of its path that this user may not read.
    files = [(package / "layers" / "roi_align.py").resolve() for package in packages]
    return tuple(dict.fromkeys(files))


def file_in_use() -> Path:
    """Return the ``layers/roi_align.py`` of the detectron2 that Python imports.

    Raises:
        MissingDependencyError: There is no detectron2.
    """
    return (locate_detectron2() / "layers" / "roi_align.py").resolve()


# ---- what a file holds -----------------------------------------------------------------------------------------------


def patch_status(file: Path) -> PatchStatus:
    """Read what a ``roi_align.py`` holds; changes nothing.

    Args:
        file: The file.

    Returns:
        Its state, with the reason, and for unexpected code a diff.

    Raises:
        RuntimeEnvironmentError: The record of the change is damaged.
    """
    file = file.resolve()
    if not file.is_file():
        reason = "there is no such file"
        return PatchStatus(file=file, state="missing", reason=reason, obstacle=reason)
    source = file.read_bytes()
    state, reason, diff = _recognise(source)
    record = None
    kept_file, path = (file.with_name(f"{file.name}{suffix}") for suffix in (_ORIGINAL, _RECORD))
    kept = kept_file.read_bytes() if kept_file.is_file() else None
    if path.is_file() and kept is not None:
        try:
            record = PatchRecord(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise RuntimeEnvironmentError(
                f"{path} is damaged: {error}.",
                hint="reinstall detectron2, and delete that file and the kept original next to it",
                path=path,
            ) from error
        # A file that was installed again, or an original that is not the recorded one, makes the record void.
        if record.before != _digest(kept) or state == "original":
            record = None
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
    if diff and kept is not None:
        diff = _diff(kept, source, file.name, ("expected", "found"))
    obstacle = _obstacle(file)
    source_hash = importlib.util.source_hash(source)
    stale = []
    for compiled in _bytecode_files(file):
        header = compiled.read_bytes()[:16]
        unchecked = int.from_bytes(header[4:8], "little") == _UNCHECKED_HASH
        if unchecked and header[8:16] != source_hash:
            stale.append(compiled)
    return PatchStatus(
        file=file,
        state=state,
        reason=reason,
        digest=_digest(source),
        record=record,
        obstacle=obstacle,
        stale_bytecode=tuple(stale),
        diff=diff,
        notes=tuple(notes),
        writable=not obstacle,
    )


def _recognise(source: bytes) -> tuple[PatchState, str, str]:
    """Return the state of a source text, the reason, and for unexpected code a diff of the method."""
    # The code without comments, docstrings and layout, and that of its method `forward`.
    method = ""
    try:
        module = ast.parse(source)
        for node in ast.walk(module):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                if ast.get_docstring(node, clean=False) is not None:
                    node.body = node.body[1:] or [ast.Pass()]
                if isinstance(node, ast.FunctionDef) and node.name == "forward":
                    method = ast.unparse(node)
        original = ast.unparse(module)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return "altered", f"it is not valid Python: {error}", ""
    done = []
    for part, (_, _, (changed, unchanged)) in _PARTS.items():
        if changed in original:
            done.append(part)
            original = original.replace(changed, unchanged)
    original = original.replace("rois.to(input.dtype)", "rois.to(dtype=input.dtype)")
    diff = _diff(_FORWARD.encode(), method.encode(), "forward", ("expected", "found"))
    if _digest(original.encode()) != _CODE:
        where = "in ROIAlign.forward" if diff else "outside ROIAlign.forward"
        return "altered", f"its code differs from detectron2 0.6's {where}", diff
    if not done:
        return "original", "the call is unchanged", ""
    if len(done) == len(_PARTS):
        return "applied", "the call has the published change", ""
    missing = ", ".join(part for part in _PARTS if part not in done)
    reason = f"only a part of the published change is present: {', '.join(done)}, but not {missing}"
    return "half", reason, diff


def _with_change(source: bytes) -> bytes:
    """Return the text of an original file with the published change."""
    for pattern, replacement, _ in _PARTS.values():
        source = re.sub(pattern, replacement, source, count=1)
    if _recognise(source)[0] != "applied":
        raise RuntimeEnvironmentError(
            "The lines to change were not found in the text of roi_align.py.",
            hint=f"reinstall detectron2 to have its original file; {_RUN_TIME}",
        )
    return source


def _diff(before: bytes, after: bytes, name: str, labels: tuple[str, str]) -> str:
    old, new = (text.decode("utf-8", errors="replace").splitlines() for text in (before, after))
    headers = (f"{name} ({labels[0]})", f"{name} ({labels[1]})")
    return "\n".join(difflib.unified_diff(old, new, *headers, lineterm=""))


def _digest(source: bytes) -> str:
    return hashlib.sha256(source).hexdigest()


def _obstacle(file: Path) -> str:
    """Return why this user may not replace a file and delete its compiled forms; empty where they may."""

    def may_change(folder: Path) -> bool:
        return os.access(folder, os.W_OK | os.X_OK)

    if not (os.access(file, os.W_OK) and may_change(file.parent)):
        return "the file or its folder is read-only"
    if hasattr(os, "geteuid") and os.geteuid() != 0:
        owner = file.stat()
        mine = owner.st_uid == os.geteuid() and owner.st_gid in {os.getegid(), *os.getgroups()}
        if not mine:
            return "it belongs to another user or group, which the new file cannot belong to"
    fixed = [path for path in _bytecode_files(file) if not may_change(path.parent)]
    return f"its compiled file may not be deleted: {fixed[0]}" if fixed else ""


def _bytecode_files(file: Path) -> tuple[Path, ...]:
    """Compiled forms of a source file: of every Python and optimisation level, and under PYTHONPYCACHEPREFIX."""
    found = sorted((file.parent / "__pycache__").glob(f"{file.stem}.*.pyc"))
    mine = Path(importlib.util.cache_from_source(str(file)))
    if mine not in found and mine.is_file():
        found.append(mine)
    return tuple(found)


# ---- changing it -----------------------------------------------------------------------------------------------------


def apply_patch(file: Path, *, dry_run: bool = False) -> PatchChange:
    """Write the published change into a ``roi_align.py``; does nothing where it is present already.

    Args:
        file: The file.
        dry_run: Only return what would change.

    Returns:
        What was done, with the diff.

    Raises:
        RuntimeEnvironmentError: The file is not the expected code, or may not be replaced.
    """
    return _change(file, "apply", dry_run=dry_run)


def revert_patch(file: Path, *, dry_run: bool = False) -> PatchChange:
    """Restore the original ``roi_align.py``, byte for byte; does nothing where it is present already.

    Arguments and result as of :func:`apply_patch`.

    Raises:
        RuntimeEnvironmentError: The file was changed since, the change is not proxydet's own, or it may not be replaced.
    """
    return _change(file, "revert", dry_run=dry_run)


def _change(file: Path, action: Literal["apply", "revert"], *, dry_run: bool) -> PatchChange:
    status = patch_status(file)
    file = status.file
    if status.state not in {"original", "applied"}:
        shown = f"\n\n{status.diff}" if status.diff else ""
        raise RuntimeEnvironmentError(
            f"{file} was not changed: {status.reason}.{shown}",
            hint=f"reinstall detectron2 to have its original file; {_RUN_TIME}",
            path=file,
        )
    before = after = file.read_bytes()
    kept, recorded = (file.with_name(file.name + suffix) for suffix in (_ORIGINAL, _RECORD))
    if action == "apply" and status.state == "original":
        after = _with_change(before)
    elif action == "revert" and status.state == "applied":
        if status.record is None:
            raise RuntimeEnvironmentError(
                f"{file} cannot be reverted: proxydet did not write the change, or its kept original "
                "is missing or altered.",
                hint="reinstall detectron2 to have its original file",
                path=file,
            )
        after = kept.read_bytes()
        if status.record.after != _digest(before):
            changes = _diff(_with_change(after), before, file.name, ("as applied", "found"))
            raise RuntimeEnvironmentError(
                f"{file} was changed after the patch was applied, so it was not reverted.\n\n{changes}",
                hint="undo that change, or reinstall detectron2",
                path=file,
            )
    change = PatchChange(
        file=file,
        action=action,
        changed=before != after,
        dry_run=dry_run,
        before=_digest(before),
        after=_digest(after),
        diff=_diff(before, after, file.name, ("before", "after")),
    )
    if dry_run:
        return change
    if before != after or status.stale_bytecode:
        if not status.writable:
            raise RuntimeEnvironmentError(
                f"{file} cannot be changed by this user: {status.obstacle}.",
                hint=f"use an environment of your own; {_RUN_TIME}",
                path=file,
            )
        if action == "apply" and before != after:
            record = PatchRecord(
                before=change.before,
                after=change.after,
                applied_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                proxydet=__version__,
            )
            # The original and the record come first: an interruption after them leaves a file that they describe.
            _replace(kept, before, like=file)
            text = json.dumps(asdict(record), indent=2) + os.linesep
            _replace(recorded, text.encode(), like=file)
        if before != after:
            _replace(file, after, like=file)
        # Compiled files that Python would run instead of the new text.
        change = replace(change, removed_bytecode=_bytecode_files(file))
        for compiled in change.removed_bytecode:
            compiled.unlink(missing_ok=True)
    if action == "revert" and status.writable:
        for path in (recorded, kept):
            path.unlink(missing_ok=True)
    return change


def _replace(file: Path, content: bytes, *, like: Path) -> None:
    """Replace a file, with the owner and permissions of ``like``; hard links keep the old content."""
    info = like.stat()
    # A link may lead to a copy that other environments share.
    with staged(file, follow_links=False) as temporary:
        temporary.write_bytes(content)
        if hasattr(os, "chown"):
            own = temporary.stat()
            if (info.st_uid, info.st_gid) != (own.st_uid, own.st_gid):
                os.chown(temporary, info.st_uid, info.st_gid)
        temporary.chmod(stat.S_IMODE(info.st_mode))
