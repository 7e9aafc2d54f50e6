"""Makes sure that going on in a run folder goes on with the same run: the same settings, and the same data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from proxydet.config import load_mapping
from proxydet.errors import ConfigError
from proxydet.training.fit import Resume
from proxydet.training.runfolder import RunFolder

# Keys that may differ when a run goes on: they do not change what is learnt.
_FREE_KEYS = (
    "recipe",
    "training.device",
    "training.threads",
    "training.checkpoints",
    "training.evaluation",
    "training.log",
    "training.guards",
    "training.weights",
    "data.workers",
    "data.prefetch",
    "data.worker_timeout_s",
    "data.cache",
    "data.test_",
    "inference",
    "evaluation",
)


def check_folder(
    folder: RunFolder,
    settings: Mapping[str, Any],
    *,
    digests: Mapping[str, str],
    resume: Resume,
) -> bool:
    """Compare a run folder with what is to be trained in it.

    Args:
        folder: The run folder; may be absent.
        settings: The whole configuration.
        digests: By name, digests of the vocabulary and the annotations.
        resume: What to do with checkpoints that are there; a path goes on from it whatever the folder holds.

    Returns:
        Whether training starts anew.

    Raises:
        ConfigError: The folder holds a run, and none was to be there; or one of other settings, or of other data.
    """
    if not isinstance(resume, str):
        return False
    if not any(folder.checkpoints.glob("step_*.pth")):
        return True
    if resume == "never":
        raise ConfigError(
            f"{folder.root} already holds a run.",
            hint="Give another folder with --output, or go on with the run: --resume auto.",
            path=folder.root,
        )
    if folder.config.exists():
        _check_settings(folder, settings)
    if folder.manifest.exists():
        _check_data(folder, json.loads(folder.manifest.read_text(encoding="utf-8")), digests)
    return False


def _check_settings(folder: RunFolder, settings: Mapping[str, Any]) -> None:
    before, now = _flat(load_mapping(folder.config)), _flat(settings)
    changed = [
        f"{key}: {before.get(key)!r} there, {now.get(key)!r} now"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key) and not key.startswith(_FREE_KEYS)
    ]
    if changed:
        raise ConfigError(
            f"{folder.root} holds a run with other settings ({'; '.join(changed[:5])}).",
            hint="Give another folder with --output; go on with the same settings "
            f"(--config {folder.config}); or start from its weights with --weights.",
            path=folder.config,
        )


def _check_data(folder: RunFolder, manifest: Mapping[str, Any], digests: Mapping[str, str]) -> None:
    before = manifest.get("digests", {})
    changed = [name for name, digest in digests.items() if before.get(name, digest) != digest]
    if changed:
        raise ConfigError(
            f"{folder.root} holds a run on other data: the {' and the '.join(changed)} changed since.",
            hint="Put the files back as they were; or train in another folder (--output), from this run's weights if "
            "you like (--weights).",
            path=folder.manifest,
        )


def _flat(mapping: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flat(value, f"{where}{key}."))
        else:
            flat[f"{where}{key}"] = value
    return flat
