"""Reads the losses of another training, to plot a run next to it: detectron2's ``log.txt`` and ``metrics.json``.

Published trainings of this method and of its relatives were made with detectron2; ``proxydet download proxydet-r50-inl-log`` fetches one.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import msgspec

from proxydet.errors import DataError

Curves = dict[str, list[tuple[float, float]]]

_LARGEST_FILE = 256 * 1024 * 1024
_LONGEST_LINE = 64 * 1024
_MOST_LOSSES = 200
_MOST_VALUES = 5_000_000


def read_reference(path: Path) -> Curves:
    """Read the losses of a detectron2 log.

    Args:
        path: A text log (``log.txt``: lines with ``iter: 19  total_loss: 12.3``) or JSON lines (``metrics.json``).

    Returns:
        For each loss its (iteration, value) points, in order; detectron2's ``total_loss`` is called ``total``, as in our runs. Of an
        iteration that is there twice, as after a resumption, the later record counts.

    Raises:
        DataError: There is no such file, it is too large, or it holds no losses.
    """
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise DataError(
                f"{path} is larger than {_LARGEST_FILE // 2**20} MiB",
                hint="give detectron2's log.txt or metrics.json, or a part of it",
                path=path,
            )
        found: dict[str, dict[int, float]] = {}
        count = 0
        with path.open("rb") as stream:
            while line := stream.readline(_LONGEST_LINE):
                iteration, losses = _record(line)
                if iteration is None:
                    continue
                for name, value in losses.items():
                    if name not in found and len(found) == _MOST_LOSSES:
                        continue
                    found.setdefault(name, {})[iteration] = value
                    count += 1
                if count > _MOST_VALUES:
                    raise DataError(
                        f"{path} holds more than {_MOST_VALUES:,} values",
                        hint="give a part of it",
                        path=path,
                    )
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror or error}",
            hint="name the log.txt or metrics.json that detectron2 wrote",
            path=path,
        ) from error
    if not found:
        raise DataError(
            f"{path} contains no losses of detectron2",
            hint="its text log has lines with 'iter: 19  total_loss: 12.3', its metrics.json has objects with iteration and total_loss",
            path=path,
        )
    return {name: sorted(values.items()) for name, values in found.items()}


def _record(line: bytes) -> tuple[int | None, dict[str, float]]:
    """Return the iteration of a line, None where it has none, and its losses."""
    entries: dict[Any, Any] = {}
    iteration: Any
    if line.lstrip().startswith(b"{"):
        try:
            decoded = msgspec.json.decode(line)
        except (msgspec.DecodeError, ValueError, RecursionError):
            return None, {}
        entries = decoded if isinstance(decoded, dict) else {}
        iteration = entries.get("iteration")
    else:
        words = line.decode("utf-8", "replace").split()
        for word, value in itertools.pairwise(words):
            if word.endswith(":"):
                entries.setdefault(word[:-1], value)
        iteration = entries.get("iter")
    try:
        number = int(iteration)
    except (TypeError, ValueError, OverflowError):
        return None, {}
    if not 0 <= number < 2**53:
        return None, {}
    losses = {}
    for name, value in entries.items():
        if "loss" not in name or len(name) > 100:
            continue
        try:
            loss = float(value)
        except (TypeError, ValueError, OverflowError):
            continue
        if math.isfinite(loss):
            losses["total" if name == "total_loss" else name] = loss
    return number, losses
