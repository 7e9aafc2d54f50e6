"""Import this first where a benchmark uses the parity checks' modules, which lie in ``tests/parity``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "parity"))
