"""What a run was made from: configuration, code, packages, digests of its inputs, mode and seeds.

::

    manifest = build_manifest(
        "training", configuration=to_mapping(config), digests={"vocabulary": vocabulary.digest},
        mode="published", seeds={"seed": 7}, world_size=8,
    )
    write_run_records(folder, manifest)      # manifest.json and environment.json
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import msgspec

import proxydet
from proxydet._version import __version__
from proxydet.config import differences
from proxydet.errors import InputError
from proxydet.files import read_json, write_json
from proxydet.paths import run_in
from proxydet.runtime.modes import Mode
from proxydet.runtime.processes import run_program
from proxydet.runtime.report import EnvironmentReport, environment
from proxydet.wording import json_text

MANIFEST_NAME = "manifest.json"
ENVIRONMENT_NAME = "environment.json"
FORMAT = 2
"""Version 0.1 wrote 1, without a digest."""

_HINT = "give the folder of a run that proxydet trained or evaluated; one that was killed before its first step has no records"
T = TypeVar("T")

FREE_KEYS = (
    "recipe",
    "training.device",
    "training.threads",
    "training.accumulation",
    "training.checkpoints",
    "training.evaluation",
    "training.log",
    "training.guards",
    "training.weights",
    "training.finetune",
    "data.workers",
    "data.prefetch",
    "data.worker_timeout_s",
    "data.cache",
    *(EVALUATION_KEYS := ("data.test_", "inference", "evaluation")),
)
"""Keys that may differ when a run is resumed: they do not change what is learnt, or by a stated rule."""


@dataclass(frozen=True, kw_only=True)
class RunManifest:
    """What a run was made from.

    Attributes:
        kind: What ran: ``training``, ``evaluation``.
        created: UTC time of its start, ISO 8601.
        proxydet: Version of proxydet.
        command: The command line of the process.
        git: Commit of proxydet's source tree and of the working folder's, digests of their uncommitted changes, and a
            digest of the Python files of the package itself (``proxydet.source``), which needs no git.
        packages: Version of every installed package.
        configuration: The resolved configuration.
        digests: Digests of what went in: annotation stores, vocabulary, starting checkpoint.
        mode: The reproducibility mode.
        seeds: The seeds from which every random number derives.
        world_size: Number of processes.
        environment: SHA-256 of what ``environment.json`` next to it holds; empty where none is there, and in what version
            0.1 wrote.
    """

    kind: str
    created: str
    proxydet: str
    command: tuple[str, ...]
    git: dict[str, str | None]
    packages: dict[str, str]
    configuration: dict[str, Any]
    digests: dict[str, str]
    mode: Mode
    seeds: dict[str, int]
    world_size: int
    environment: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the manifest as JSON values."""
        plain = {"format": FORMAT, **asdict(self), "command": list(self.command)}
        return {**plain, "sha256": _digest(plain)}

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> RunManifest:
        """Read a manifest that :meth:`to_dict` wrote.

        Raises:
            InputError: It is of another format, or not a whole one.
        """
        values = {key: value for key, value in mapping.items() if key not in ("format", "sha256")}
        _require_whole(mapping)
        try:
            if mapping.get("format") not in (1, FORMAT):
                raise ValueError(f"it has format {mapping.get('format')!r}, not {FORMAT}")
            unknown = values.keys() - {field.name for field in fields(cls)}
            if unknown:
                raise ValueError(f"it has unknown keys: {', '.join(sorted(unknown))}")
            return msgspec.convert(values, cls)
        except (msgspec.ValidationError, ValueError) as error:
            raise InputError(
                f"the manifest is not one that this version of proxydet writes: {error}", hint=_HINT
            ) from error


def _require_whole(mapping: Mapping[str, Any]) -> None:
    """Compare a manifest's values with the SHA-256 in it; version 0.1 wrote none.

    Raises:
        InputError: They changed since they were written.
    """
    content = {key: value for key, value in mapping.items() if key != "sha256"}
    sealed = "sha256" in mapping or mapping.get("format") == FORMAT  # damage to either key is seen
    if sealed and mapping.get("sha256") != _digest(content):
        raise InputError("SHA-256 mismatch: the manifest changed after it was written", hint=_HINT)


def _digest(content: Mapping[str, Any]) -> str:
    plain = json.loads(json_text(content))  # as a reader will see it
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def build_manifest(
    kind: str,
    *,
    configuration: Mapping[str, Any],
    digests: Mapping[str, str],
    mode: Mode,
    seeds: Mapping[str, int],
    world_size: int = 1,
) -> RunManifest:
    """Collect what a run is made from.

    Args:
        kind: What runs: ``"training"``, ``"evaluation"``.
        configuration: The resolved configuration as plain values.
        digests: By name, digests of what goes in; see `proxydet.files.sha256`.
        mode: The reproducibility mode.
        seeds: By name.
        world_size: Number of processes.

    Returns:
        The manifest, with packages and source trees as they are now.
    """
    return RunManifest(
        kind=kind,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        proxydet=__version__,
        command=tuple(sys.argv),
        git=_source_trees(),
        packages=installed_packages(),
        configuration=dict(configuration),
        digests=dict(digests),
        mode=mode,
        seeds=dict(seeds),
        world_size=world_size,
    )


def write_run_records(
    folder: Path, manifest: RunManifest, report: EnvironmentReport | None = None
) -> EnvironmentReport:
    """Write ``manifest.json`` and ``environment.json`` into a run folder.

    Args:
        folder: The run folder; it must exist.
        manifest: What the run is made from.
        report: The environment; None looks now.

    Returns:
        The environment report that was written.
    """
    report = environment() if report is None else report
    sealed = replace(manifest, environment=_digest(report.to_dict()))
    write_json(folder / MANIFEST_NAME, sealed.to_dict())
    write_json(folder / ENVIRONMENT_NAME, report.to_dict())
    return report


def read_run_records(run: Path) -> tuple[RunManifest, EnvironmentReport]:
    """Read both records of a run.

    Args:
        run: The run folder, or one of the two files in it.

    Returns:
        The manifest and the environment report.

    Raises:
        InputError: A file is missing, not one of ours, or changed since it was written.
    """
    folder = folder_of(run)
    manifest = read_manifest(folder)

    def report(content: Mapping[str, Any]) -> EnvironmentReport:
        if manifest.environment not in ("", _digest(content)):
            raise InputError(
                f"SHA-256 mismatch: it changed after {MANIFEST_NAME} was written", hint=_HINT
            )
        return EnvironmentReport.from_dict(content)

    return manifest, _read(folder / ENVIRONMENT_NAME, report)


def folder_of(run: Path) -> Path:
    """Return the folder of a run that is given as such, as that of a quickstart, or as a file in it.

    Raises:
        InputError: There is no such folder or file.
    """
    if not run.exists():
        raise InputError(
            f"There is no run folder {run}.",
            hint="give the folder of a run that proxydet trained or evaluated",
            path=run,
        )
    return run.parent if run.is_file() else run_in(run)


def read_values(path: Path) -> dict[str, Any]:
    """Return what a ``manifest.json`` holds, of whatever version.

    Raises:
        InputError: It is absent or damaged.
    """
    content = read_json(path, what="manifest", hint=_HINT)
    _require_whole(content)
    return content


def read_manifest(folder: Path) -> RunManifest:
    """Read the manifest of a training or an evaluation; errors as of `read_run_records`."""
    return _read(folder / MANIFEST_NAME, RunManifest.from_dict)


def differing(before: T, now: T, free: tuple[str, ...]) -> dict[str, str]:
    """Return how two configurations differ, by key, for people to read; keys that begin with one of ``free`` are left out."""

    def shown(value: object) -> str:
        return json.dumps(value, default=str, ensure_ascii=False)

    return {
        key: f"{shown(left)} there, {shown(right)} now"
        for key, (left, right) in differences(before, now).items()
        if not key.startswith(free)
    }


def listed(changed: Mapping[str, str]) -> str:
    """Return what `differing` found as one line, the first five keys of it."""
    more = f"; and {len(changed) - 5} more" if len(changed) > 5 else ""
    return "; ".join(f"{key}: {text}" for key, text in list(changed.items())[:5]) + more


_NAME_AND_VERSION = re.compile(r"^(Name|Version): *(.*\S)", re.MULTILINE)


def installed_packages() -> dict[str, str]:
    """Return the version of every installed package, by its normalised name."""
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        # Parsing a description takes ten times as long as finding two fields of its head.
        # What has no folder is read by no name: an *.egg-info that is a file.
        texts = map(distribution.read_text, ("METADATA", "PKG-INFO", ""))
        text = next(filter(None, texts), "")
        fields = dict(_NAME_AND_VERSION.findall(text.partition("\n\n")[0]))
        if fields.keys() == {"Name", "Version"}:
            # The first on Python's path is the one that is imported.
            found.setdefault(fields["Name"].lower().replace("_", "-"), fields["Version"])
    return dict(sorted(found.items()))


def source_digest(package: Path) -> str:
    """SHA-256 of a package's Python files and their names, in hexadecimal: the same wherever it is installed."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(package).as_posix()} {content}\n".encode())
    return digest.hexdigest()


def _source_trees() -> dict[str, str | None]:
    trees = {"proxydet": Path(proxydet.__file__).parent, "working_folder": Path.cwd()}
    state: dict[str, str | None] = {"proxydet.source": source_digest(trees["proxydet"])}
    for name, folder in trees.items():
        state[f"{name}.commit"] = run_program(["git", "-C", str(folder), "rev-parse", "HEAD"]).value
        changes = run_program(["git", "-C", str(folder), "diff", "HEAD", "--", "."]).value
        digest = hashlib.sha256(changes.encode()).hexdigest() if changes else None
        state[f"{name}.uncommitted"] = digest
    return state


def _read(path: Path, from_dict: Callable[[Mapping[str, Any]], T]) -> T:
    content = read_json(path, what="record of a run", hint=_HINT)
    try:
        return from_dict(content)
    except InputError as error:
        raise InputError(f"{path}: {error.message}", hint=error.hint, path=path) from error
