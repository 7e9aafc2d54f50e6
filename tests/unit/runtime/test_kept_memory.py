"""Memory that tensors free stays with the process that asks for it."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

CODE = """
import resource, sys
import numpy as np
from proxydet.runtime.processes import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
for round in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = np.empty(200 * 2**20, np.uint8)
    block[::4096] = 1
    del block
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_a_freed_block_is_used_again_without_asking_the_system():
    def faults(how: str) -> int:
        return int(subprocess.check_output([sys.executable, "-c", CODE, how], text=True))

    assert faults("kept") < 100
    assert faults("returned") >= 100  # by default each page is fetched again, large pages or small
