"""What is remembered about files between runs.

Two records lie in each folder of downloads:

``artifacts.lock.json``
    For each artifact without a published digest: digest, size and source of the file that was seen first. Every later
    file of that name must be the same. It may be shared with others, who then get the same guarantee.
``.proxydet/ledger.json``
    For each file that was checked: its size, time stamp and digest, so that it is not read through again, and
    whether it was fetched here; and which artifacts verification found damaged.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from proxydet.artifacts.files import FileLock, read_json, write_json
from proxydet.errors import ArtifactError

LOCK_FILE = "artifacts.lock.json"
HIDDEN_FOLDER = ".proxydet"

_DAMAGED = "damaged: "


@dataclass(frozen=True, kw_only=True)
class FirstSeen:
    """The file of an unpinned artifact that was seen first."""

    sha256: str
    """Digest in lower-case hexadecimal."""
    size: int
    """Size in bytes."""
    address: str | None = None
    """Where it came from; None for a file that was already there."""
    etag: str | None = None
    """The server's name for that version, where it gave one."""
    holds: str | None = None
    """What the check of its content found."""
    when: str = ""
    """Date, ISO 8601, UTC."""


class Records:
    """Both records of one data root.

    Args:
        root: The data root.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock_file = root / LOCK_FILE
        self._ledger = root / HIDDEN_FOLDER / "ledger.json"
        self._cache: dict[Path, tuple[tuple[int, int, int], dict[str, Any]]] = {}

    def first_seen(self, name: str) -> FirstSeen | None:
        """Return what was recorded for an unpinned artifact, if anything.

        Raises:
            ArtifactError: The lock file is damaged.
        """
        entry = self._read(self._lock_file).get(name)
        if entry is None:
            return None
        try:
            seen = FirstSeen(**entry)
            if len(bytes.fromhex(seen.sha256)) != 32 or seen.size < 0:
                raise ValueError("not a digest")
        except (TypeError, ValueError) as error:
            raise ArtifactError(
                f"The entry of {name} in {self._lock_file} is damaged: {error}.",
                hint="Remove that entry; the digest is then recorded anew.",
                path=self._lock_file,
            ) from error
        return seen

    def record_first(self, name: str, seen: FirstSeen) -> None:
        """Record an unpinned artifact on first use; an entry that is there already stays."""
        today = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        entry = {key: value for key, value in vars(seen).items() if value is not None}
        self._update(self._lock_file, {name: {**entry, "when": today}}, keep_old=True)

    def forget_first(self, name: str) -> None:
        """Take back what `record_first` recorded."""
        with FileLock(self.root / HIDDEN_FOLDER / f"{LOCK_FILE}.lock"):
            entries = read_json(self._lock_file)
            if entries.pop(name, None) is not None:
                write_json(self._lock_file, entries)

    def known_digest(self, path: Path) -> str | None:
        """Return the digest that a file had when it was last checked, if it has not changed since."""
        entry = self._entry(path)
        digest = entry.get("sha256")
        return digest if isinstance(digest, str) else None

    def was_fetched(self, path: Path) -> bool:
        """Tell whether a file was fetched here, and not put there by somebody."""
        return self._entry(path).get("fetched") is True

    def is_passing(self, path: Path) -> bool:
        """Tell whether a file is an archive that was to be removed as soon as it is unpacked."""
        return self._entry(path).get("passing") is True

    def record_digest(
        self, path: Path, sha256: str, *, fetched: bool = False, passing: bool = False
    ) -> None:
        """Remember the digest of a file as it is now, whether it was fetched here, and whether it is soon removed."""
        status = path.stat()
        entry = {
            "size": status.st_size,
            "time": status.st_mtime_ns,
            "sha256": sha256,
            "fetched": fetched,
            "passing": passing,
        }
        self._update(self._ledger, {self._key(path): entry})

    def is_damaged(self, name: str) -> bool:
        """Tell whether verification found an artifact damaged and it has not been fetched since."""
        return self._read(self._ledger).get(_DAMAGED + name) is True

    def record_damage(self, name: str, *, damaged: bool) -> None:
        """Remember that an artifact is damaged, or no longer so."""
        if damaged != self.is_damaged(name):
            self._update(self._ledger, {_DAMAGED + name: damaged})

    def _entry(self, path: Path) -> dict[str, Any]:
        try:
            status = path.stat()
        except FileNotFoundError:
            return {}
        entry = self._read(self._ledger).get(self._key(path))
        if not isinstance(entry, dict):
            return {}
        same = entry.get("size") == status.st_size and entry.get("time") == status.st_mtime_ns
        return entry if same else {}

    def _key(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _read(self, path: Path) -> dict[str, Any]:
        """Read a record, unless it is the one that was read last."""
        try:
            status = path.stat()
        except FileNotFoundError:
            return {}
        version = (status.st_ino, status.st_size, status.st_mtime_ns)
        known = self._cache.get(path)
        if known is None or known[0] != version:
            known = self._cache[path] = (version, read_json(path))
        return known[1]

    def _update(self, path: Path, entries: dict[str, Any], *, keep_old: bool = False) -> None:
        with FileLock(self.root / HIDDEN_FOLDER / f"{path.name}.lock"):
            old = read_json(path)
            write_json(path, {**entries, **old} if keep_old else {**old, **entries})
