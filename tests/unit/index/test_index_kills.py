"""A writer that is killed at any moment loses nothing that it had committed, and the next one continues."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
import warnings

import pytest
from region_indexes import made, paths

from proxydet import RegionIndex
from proxydet.index.build import finish_addition, index_images
from proxydet.index.store import StoredIndex


@pytest.mark.slow
def test_killed_at_fifty_random_moments(photos, detector, tmp_path, monkeypatch):
    monkeypatch.setattr("proxydet.index.build.LARGEST_PART", 3)
    own = tmp_path / "own"
    own.mkdir()
    for copy in range(20):
        for file in photos.glob("*.png"):
            shutil.copy(file, own / f"{file.stem}-{copy}.png")
            with (own / f"{file.stem}-{copy}.png").open("ab") as stream:
                stream.write(bytes([copy]))  # no two files have the same digest
    wanted = made(tmp_path / "whole.index", detector, own)
    began = time.perf_counter()
    made(tmp_path / "timed.index", detector, own)
    whole_s = time.perf_counter() - began
    draw = random.Random(3)
    index, killed, most, before = tmp_path / "photos.index", 0, 0, set()
    while killed < 50:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # fork next to threads
            child = os.fork()
        if child == 0:
            index_images(detector, [own], index, batch_size=2)
            os._exit(0)
        time.sleep(draw.uniform(0, whole_s / 5))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        killed += 1
        if (index / "index.json").exists():
            finish_addition(index)
            now = set(paths(index))
            assert before <= now
            before = now
            most = max(most, len(now))
            if len(now) == 80:  # all there before fifty moments: begin again
                shutil.rmtree(index)
                before = set()
    assert most > 20
    made(index, detector, own)
    assert paths(index) == paths(wanted)
    assert StoredIndex(index).verify() == []
    found, whole = (
        {hit.path: hit.found.scores.tolist() for hit in RegionIndex(p).search(score_threshold=0.1)}
        for p in (index, wanted)
    )
    assert found.keys() == whole.keys()
    assert all(found[path] == pytest.approx(whole[path], abs=1e-4) for path in whole)
