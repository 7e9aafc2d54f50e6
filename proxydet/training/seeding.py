"""Random numbers that depend on (seed, iteration, rank) alone, so that a run can stop and go on at any step.

Each step seeds every generator anew. No random state has to be carried from step to step or stored, and what one
step draws does not depend on how many numbers another one drew.
"""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def derive_seed(*parts: int | str) -> int:
    """Mix integers and words into one seed of 63 bits, the same on every machine."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's global generators (the CPU's and every GPU's)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries draw from the global generator
    torch.manual_seed(seed)
