"""What an evaluation was made from, written next to its numbers: ``manifest.json`` and ``environment.json``.

The same records as a training's, so that ``proxydet env --diff`` explains why two evaluations differ.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from proxydet.config import to_mapping
from proxydet.errors import InputError
from proxydet.evaluation.config import EvaluationConfig
from proxydet.evaluation.ground_truth import GroundTruth
from proxydet.files import sha256
from proxydet.manifest import (
    MANIFEST_NAME,
    build_manifest,
    read_manifest,
    write_run_records,
)
from proxydet.runtime.modes import Mode
from proxydet.runtime.report import environment

RESULTS = "results"
"""What the results file that was scored is called in the configuration and among the digests."""


def record_results(
    folder: Path, results: Path, truth: GroundTruth, config: EvaluationConfig
) -> None:
    """Write down what scoring a results file is made from.

    Args:
        folder: The evaluation's folder; made when it is not there.
        results: The results file.
        truth: The annotations, read from a file.
        config: How it is scored.
    """
    digests = {RESULTS: sha256(results)}
    digests["annotations"] = truth.store.digest()
    chosen = {"dataset": truth.name, RESULTS: str(results.resolve())}
    write_records(folder, config, digests, chosen)


def recorded_results(folder: Path) -> Path | None:
    """Return the results file that an evaluation in this folder scored; None where it made its own or nothing says.

    Raises:
        InputError: The file is not there any more, or holds something else by now.
    """
    if not (folder / MANIFEST_NAME).is_file():
        return None
    manifest = read_manifest(folder)
    place = manifest.configuration.get(RESULTS)
    if place is None:
        return None
    path = Path(place)
    if not path.is_file():
        changed = "is not there any more"
    elif sha256(path) != manifest.digests[RESULTS]:
        changed = "has changed since"
    else:
        return path
    raise InputError(
        f"{folder} is an evaluation of {path}, which {changed}.",
        hint="give the results file itself, or evaluate again",
        path=path,
    )


def write_records(
    folder: Path,
    config: EvaluationConfig,
    digests: Mapping[str, str],
    configuration: Mapping[str, Any],
    *,
    processes: int = 1,
) -> None:
    """Write an evaluation's manifest and environment.

    Args:
        folder: The evaluation's folder; made when it is not there.
        config: How it is scored.
        digests: By name, digests of what goes in.
        configuration: What else was chosen, as plain values.
        processes: How many work on it.
    """
    manifest = build_manifest(
        "evaluation",
        configuration={"scoring": to_mapping(config), **configuration},
        digests=digests,
        mode=_mode(),
        seeds={"resamples": config.seed},
        world_size=processes,
    )
    folder.mkdir(parents=True, exist_ok=True)
    # Scoring a file needs no torch: then it is not imported to be asked about GPUs either.
    write_run_records(folder, manifest, environment(quick=not _torch_at_work()))


def _torch_at_work() -> bool:
    return "torch" in sys.modules


def _mode() -> Mode:
    if not _torch_at_work():
        return "off"
    from proxydet.runtime.modes import current_mode

    return current_mode()
