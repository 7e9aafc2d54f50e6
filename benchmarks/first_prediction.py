"""Splits the time from the start of Python to the first prediction, each time in a fresh process.

::

    python benchmarks/first_prediction.py --run RUN --picture FILE [--words 'cup, plate'] [--rounds 5]
    python benchmarks/first_prediction.py --r50 --picture FILE

``--r50`` opens a full-size model with random weights and 1,203 random embeddings. Prints the median of the rounds after one that
warms the file cache: wall seconds, and the process's CPU seconds over all threads, which a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

Parts = dict[str, tuple[float, float]]


@contextmanager
def part(parts: Parts, name: str) -> Iterator[None]:
    """Note the wall and CPU seconds of what runs inside."""
    wall, used = time.perf_counter(), time.process_time()
    yield
    parts[name] = (time.perf_counter() - wall, time.process_time() - used)


def measure(place: Path, picture: str, words: list[str] | None) -> Parts:
    """Open a detector and look at a picture twice; return seconds by part."""
    parts: Parts = {"start of Python": (0.0, time.process_time())}
    with part(parts, "import proxydet"):
        import proxydet
    with part(parts, "import torch"):
        import torch  # noqa: F401
    with part(parts, "import Detector (detectron2)"):
        from proxydet import Detector
    weights = place / "r50.pth"
    if weights.is_file():
        with part(parts, "open the vocabulary"):
            vocabulary = proxydet.Vocabulary.load(place / "vocabulary.npz")
        with part(parts, "build the model, read the weights"):
            detector = Detector.from_checkpoint(weights, vocabulary=vocabulary, device="cpu")
    else:
        with part(parts, "build the model, read weights and vocabulary"):
            detector = Detector.from_run(place, device="cpu")
    with part(parts, "embed the words"):
        classes = detector.resolve(words)
    for name in ("first prediction", "second prediction"):
        with part(parts, name):
            detector.predict(picture, classes)
    return parts


def make_r50(place: Path) -> None:
    """Write a full-size checkpoint with the parity fixtures' weights, and its vocabulary."""
    import parity_path  # noqa: F401
    import torch
    from parity_model import TRIMMED, network_of
    from parity_trim import base_classes

    from proxydet import Vocabulary

    network = network_of("r50", base_classes(TRIMMED))
    torch.save({"model": network.state_dict()}, place / "r50.pth")
    # The fixtures' weights hold embeddings of their own.
    text_CD = network.class_table().text_DC1[:, :-1].T.numpy()
    names = network.vocabulary.names
    Vocabulary.from_arrays(names, text_CD, network.vocabulary.base).save(place / "vocabulary.npz")


def main() -> None:
    """Measure and print; with ``--alone``, once in this process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path)
    parser.add_argument("--r50", action="store_true")
    parser.add_argument("--picture", required=True)
    parser.add_argument("--words")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--alone", type=Path)
    arguments = parser.parse_args()
    words = None if arguments.words is None else arguments.words.split(", ")
    if arguments.alone is not None:
        print(json.dumps(measure(arguments.alone, arguments.picture, words)))
        return
    with tempfile.TemporaryDirectory() as folder:
        if arguments.r50:
            make_r50(Path(folder))
        place = Path(folder) if arguments.r50 else arguments.run
        command = [sys.executable, __file__, "--alone", str(place), "--picture", arguments.picture]
        command += [] if arguments.words is None else ["--words", arguments.words]
        rounds, whole = [], []
        for _ in range(arguments.rounds + 1):
            start = time.perf_counter()
            told = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
            whole.append(time.perf_counter() - start)
            rounds.append(json.loads(told))
    print("    wall      CPU")
    for name in rounds[0]:
        wall, used = (statistics.median(r[name][i] for r in rounds[1:]) for i in (0, 1))
        print(f"{wall:8.2f} {used:8.2f}  {name}")
    print(f"{statistics.median(whole[1:]):8.2f}           the whole process, from outside")


if __name__ == "__main__":
    main()
