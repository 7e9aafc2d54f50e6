"""Cuts the full parity fixtures down to what the tests carry: below 1 MB a file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

_PARTS = ("r50", "swinb")
_BASE_CLASSES = "lvis_base_classes.npy"


def trim(key: str, array: np.ndarray) -> np.ndarray:
    """Return the part of an array that the small fixtures hold."""
    name = key.partition(".")[2]
    if name in ("p3", "p4"):
        return array[::4, ::2, ::2]
    if name.startswith(("agn_hm0", "reg0")):
        return array[:, ::2, ::2]
    if name.endswith((".logits", ".embedding")):
        return array[::8, ::2]
    if name.endswith(".deltas"):
        return array[::4]
    return array


def write_trimmed(source: Path, target: Path) -> None:
    """Write the small fixtures.

    Args:
        source: Folder of the full ones.
        target: Where to put the small ones.
    """
    target.mkdir(parents=True, exist_ok=True)
    for part in _PARTS:
        with np.load(source / f"parity_{part}.npz", allow_pickle=False) as full:
            kept = {name: trim(name, full[name]) for name in full.files if _is_kept(name)}
        np.savez_compressed(target / f"parity_{part}.npz", **kept)
        names = json.loads((source / f"state_dict_{part}.json").read_text())
        short = {name: [entry["shape"], entry["dtype"]] for name, entry in names.items()}
        (target / f"state_dict_{part}.json").write_text(json.dumps(short, separators=(",", ":")))
    for name in ("parity_functions.npz", "parity_trajectory.npz"):
        with np.load(source / name, allow_pickle=False) as full:
            kept = {
                key: full[key]
                for key in full.files
                if not key.startswith(("resize", "sampler", "schedule"))
            }
        np.savez_compressed(target / name, **kept)


def base_classes(folder: Path) -> np.ndarray:
    """Return which LVIS classes are base (frequent and common): bool (1203,)."""
    return np.asarray(np.load(folder / _BASE_CLASSES, allow_pickle=False), dtype=np.bool_)


def _is_kept(name: str) -> bool:
    # The second image has its own shape; its detections stand for all that lies before them.
    return (
        not (
            name.startswith("eval1.")
            and not name.startswith(
                ("eval1.boxes", "eval1.scores", "eval1.classes", "eval1.mask_area")
            )
        )
        and "mask_first8" not in name
    )
