"""Damages files that proxydet reads, and counts what happens: refused, or read with the same values.

Checkpoints, final weights, weights of others, vocabularies, annotation stores and run manifests are damaged at random places:
changed bits and bytes, ranges of zeros, cut, joined, doubled. Each is read in a child process of bounded memory, so that a
crash counts as one. Two outcomes are good: an error of proxydet, or the values that were written. Files without any check sum
(``.pkl``, torch's format before 1.6) may also be read with other values.

    python benchmarks/fuzz_files.py --cases 20000 --seed 0
"""

from __future__ import annotations

import argparse
import json
import pickle
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

CHUNK = 1000
MEMORY = 8 << 30
UNCHECKED = ("pickle", "weights in the old format")


def originals(folder: Path) -> dict[str, tuple[Path, Callable[[Path], str]]]:
    """Write one good file of each kind; return it with a function that gives a digest of what it is read as."""
    import torch

    from proxydet.data.store import AnnotationStore
    from proxydet.manifest import build_manifest, read_manifest
    from proxydet.training.checkpoint import load_checkpoint
    from proxydet.vocabulary.vocabulary import Vocabulary
    from proxydet.weight_files import (
        content_digest,
        read_state_dict,
        write_safetensors,
        write_state,
    )

    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.BatchNorm1d(5))
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.rand(4, 7)).sum().backward()
    optimizer.step()
    weights = network.state_dict()
    state = {"model": weights, "optimizer": optimizer.state_dict(), "iteration": 3, "run": "{}"}
    write_state(state, folder / "step_0000003.pth")
    write_safetensors(folder / "model_final.safetensors", weights, {"recipe": "tiny"})
    torch.save({"model": weights}, folder / "others.pth")
    torch.save({"model": weights}, folder / "old.pth", _use_new_zipfile_serialization=False)
    arrays = {name: value.numpy() for name, value in weights.items()}
    (folder / "arrays.pkl").write_bytes(pickle.dumps({"model": arrays}, protocol=2))
    Vocabulary.from_arrays(["red circle", "blue star"], np.eye(2, 6)).save(
        folder / "vocabulary.npz"
    )
    source = folder / "instances.json"
    images = [{"id": n, "file_name": f"{n}.jpg", "height": 60, "width": 80} for n in range(3)]
    objects = [
        {"id": n, "image_id": n % 3, "category_id": 1, "bbox": [n, 2, 9, 8], "area": 72, "iscrowd": 0,
         "segmentation": [[n, 2, n + 9, 2, n + 9, 10, n, 10]]}
        for n in range(9)
    ]  # fmt: skip
    classes = [{"id": 1, "name": "red circle"}]
    source.write_text(json.dumps({"images": images, "annotations": objects, "categories": classes}))
    store = AnnotationStore.open(source, cache=folder / "cache").path
    manifest = build_manifest("training", configuration={"seed": 1}, digests={"annotations": "0" * 64},
                              mode="off", seeds={"seed": 1})  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest.to_dict()))

    def of_weights(path: Path) -> str:
        return content_digest(dict(sorted(read_state_dict(path).items())))

    def of_store(path: Path) -> str:
        found = AnnotationStore(path)
        if damaged := found.damaged_columns():
            return "refused: " + damaged[0]
        rows = [repr([found.record(n), *found.polygons(n)]) for n in range(len(found))]
        return content_digest([rows, repr(found.categories)])

    return {
        "checkpoint": (
            folder / "step_0000003.pth",
            lambda path: content_digest(load_checkpoint(path)),
        ),
        "final weights": (folder / "model_final.safetensors", of_weights),
        "weights of others": (folder / "others.pth", of_weights),
        "weights in the old format": (folder / "old.pth", of_weights),
        "pickle": (folder / "arrays.pkl", of_weights),
        "vocabulary": (folder / "vocabulary.npz", lambda path: Vocabulary.load(path).digest),
        "store": (store, of_store),
        "manifest": (folder / "manifest.json", lambda path: repr(read_manifest(path.parent))),
    }


def damage(data: bytes, random: np.random.Generator) -> bytes:
    """Return a damaged copy."""
    out = bytearray(data)
    at, length = int(random.integers(len(out))), int(random.integers(1, 64))
    kind = random.integers(8)
    if kind == 0:
        del out[at:]
    elif kind == 1:
        out[at : at + length] = bytes(len(out[at : at + length]))
    elif kind == 2:
        out[at:at] = out[at : at + length]
    elif kind == 3:
        del out[at : at + length]
    elif kind == 4:
        for place in random.integers(0, len(out), length):
            out[place] = int(random.integers(256))
    else:  # one bit; half of them near the end, where a zip archive has its directory
        place = at if kind < 7 else len(out) - 1 - int(random.integers(min(len(out), 1500)))
        out[place] ^= 1 << int(random.integers(8))
    return bytes(out)


def work(seed: int, cases: int) -> None:
    """Read damaged files, and print counts by kind as JSON."""
    from proxydet.errors import ProxydetError

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    random = np.random.default_rng(seed)
    counts: Counter[str] = Counter()
    slowest = 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kinds = {
            kind: (path.read_bytes(), path.name, read, read(path))
            for kind, (path, read) in originals(folder).items()
        }
        place = folder / "damaged"
        place.mkdir()
        for number in range(cases):
            kind = list(kinds)[number % len(kinds)]
            data, file_name, read, expected = kinds[kind]
            damaged = damage(data, random)
            path = place / file_name
            path.write_bytes(damaged)
            began = time.process_time()
            try:
                found = read(path)
                outcome = (
                    "same"
                    if found == expected
                    else "refused"
                    if found.startswith("refused")
                    else "other values"
                )
                if kind in UNCHECKED and outcome == "other values":
                    outcome = "other values, no check sum"
            except ProxydetError as error:
                outcome = "refused" if error.hint else "refused without a hint"
            except Exception:  # noqa: BLE001 whatever it is, it is what we look for
                outcome = "bug"
                print(f"seed {seed} case {number}: {kind}", traceback.format_exc(), file=sys.stderr)
            slowest = max(slowest, time.process_time() - began)
            if outcome in ("other values", "bug"):
                path.rename(folder.parent / f"fuzz-{seed}-{number}-{file_name}")
            counts[f"{kind}: {outcome}"] += 1
    print(json.dumps({"counts": counts, "slowest": slowest}))


def main() -> int:
    """Run the cases in child processes, and print the counts; 1 where anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.seed, options.cases)
        return 0
    total: Counter[str] = Counter()
    slowest = 0.0
    for chunk, start in enumerate(range(0, options.cases, CHUNK)):
        words = [
            "--worker",
            "--seed",
            str(options.seed + chunk),
            "--cases",
            str(min(CHUNK, options.cases - start)),
        ]
        done = subprocess.run(
            [sys.executable, __file__, *words], capture_output=True, text=True, check=False
        )
        sys.stderr.write(done.stderr)
        if done.returncode:
            total[f"crashed: {done.returncode}"] += 1
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        total.update(found["counts"])
        slowest = max(slowest, found["slowest"])
    for name, count in sorted(total.items()):
        print(f"{count:7} {name}")
    print(f"slowest: {slowest:.2f} s of CPU")
    bad = [
        name
        for name in total
        if name.startswith("crashed") or name.endswith((": bug", ": other values", "a hint"))
    ]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
