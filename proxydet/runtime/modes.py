"""The reproducibility modes and their settings, without torch."""

from __future__ import annotations

from typing import Literal, get_args

Mode = Literal["off", "published", "strict"]
"""``off`` changes nothing; ``published`` is the published training's; ``strict`` repeats itself bit for bit."""

MODES: tuple[Mode, ...] = get_args(Mode)

CUBLAS_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
CUBLAS_WORKSPACE = ":4096:8"
"""Eight fixed workspaces of 4 MiB: cuBLAS then repeats itself (read when a process first uses CUDA)."""
