"""Runs ``proxydet data prepare`` on files of the published format and size, and counts the results again.

::

    python benchmarks/prepare.py lvis imagenet coco --folder /scratch
    python benchmarks/prepare.py objects365 --names Objects365_names_fix.csv

Files are made up (`published_inputs.py`); ``--scale 0.1`` makes them a tenth. For each data set it prints the seconds
and peak memory of preparing it the first time and again, and of ``proxydet data check``; every count that the command
reports, and what the files it wrote hold, is compared with what was counted while the input was made.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import published_inputs as inputs

_IDS = re.compile(rb'"image_id": ?(\d+), ?"bbox": ?\[[^]]*\], ?"category_id": ?(\d+)')


_COMMAND = """
import re, sys
from pathlib import Path
from proxydet_cli.main import main
try:
    code = main(sys.argv[2:])
except SystemExit as stop:
    code = stop.code
# Of this process alone; what the system counts for a child begins with its parent's.
Path(sys.argv[1]).write_text(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
sys.exit(code)
"""


def run(words: list[str], cache: Path) -> tuple[Any, dict[str, float]]:
    """Run a proxydet command; return what it says as JSON, and its cost."""
    peak = cache.parent / "peak"
    command = [sys.executable, "-c", _COMMAND, str(peak), *words, "--cache", str(cache), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    started = time.perf_counter()
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    cost = {
        "exit": process.returncode,
        "wall_s": round(time.perf_counter() - started, 2),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_MB": round(int(peak.read_text()) / 1024, 1),
    }
    return json.loads(said or "null"), cost


def expect(what: str, found: Any, expected: Any) -> None:
    """Compare; a difference ends the run."""
    if found != expected:
        raise SystemExit(f"WRONG: {what}: {found!r}, but {expected!r} were made")
    print(f"    {what}: {found if not isinstance(found, (list, dict)) else 'equal'}")


def detail(report: Any, name: str, number: int = 0) -> list[int]:
    """Return the numbers in what a step says of itself."""
    steps = [step for step in report["steps"] if step["name"] == name]
    return [int(digits) for digits in re.findall(r"\d+", steps[number]["detail"])]


def ids_in(path: Path) -> tuple[Any, Any]:
    """Read image and category ids of all annotations by a pattern: another way than the code under test."""
    pairs = np.array(_IDS.findall(path.read_bytes()), dtype="S12").astype(np.int64)
    return pairs[:, 0], pairs[:, 1]


def check_lvis(root: Path, made: Any, report: Any) -> None:
    """Compare stores, the file without rare classes and both tables of counts."""
    train, val = made["train"], made["val"]
    for number, part in enumerate((train, val)):
        expect(
            "images, annotations",
            detail(report, "annotation store", number),
            [part["images"], part["annotations"]],
        )
    expect("annotations left out", detail(report, "without rare classes"), [train["rare"]])
    _, kept = ids_in(root / "lvis/lvis_v1_train_norare.json")
    expect("annotations kept in norare", len(kept), train["annotations"] - train["rare"])
    for name, with_rare in (("train", True), ("train_norare", False)):
        rows = json.loads((root / f"lvis/lvis_v1_{name}_cat_info.json").read_text())
        shown = np.array([with_rare or row["frequency"] != "r" for row in rows])
        images = np.bincount(train["pairs"], minlength=1204)[1:] * shown
        expect(
            f"{name} instance counts",
            [row["instance_count"] for row in rows],
            (train["instances"] * shown).tolist(),
        )
        expect(f"{name} image counts", [row["image_count"] for row in rows], images.tolist())
    expect("nothing mended or dropped", report["problems"], [])


def check_coco(root: Path, made: Any, report: Any) -> None:
    """Compare stores and the zero-shot split."""
    for number, split in enumerate(("train2017", "val2017")):
        part, suffix = made[split], ("seen", "all")[number]
        stored = detail(report, "annotation store", number)
        expect(f"{split} images, annotations", stored, [part["images"], part["annotations"]])
        said = detail(report, "zero-shot split", number)[:2]
        expected = [part["zero-shot images"], part["zero-shot annotations"]]
        expect(f"{split} zero-shot images, annotations", said, expected)
        images, _ = ids_in(root / f"coco/zero-shot/instances_{split}_{suffix}_2_oriorder.json")
        expect(f"{split} in the file", [len(np.unique(images)), len(images)], expected)


def check_objects365(root: Path, made: Any, report: Any) -> None:
    """Compare the store, and the names and counts in the file written."""
    expect("names changed", detail(report, "names corrected"), [made["changed names"]])
    expect(
        "images, annotations",
        detail(report, "annotation store"),
        [made["images"], made["annotations"]],
    )
    path = root / "objects365/annotations/zhiyuan_objv2_val_fixname.json"
    content = json.loads(path.read_text())
    expect("names", [category["name"] for category in content["categories"]], made["names"])
    counts = Counter(annotation["category_id"] for annotation in content["annotations"])
    expect("boxes a class", [counts[i] for i in range(1, 366)], made["instances"].tolist())


def check_openimages(root: Path, made: Any, report: Any) -> None:
    """Expand boxes and labels again, one at a time by recursion, and compare with the file written."""
    parents, id_of = made["parents"], {label: i for i, label in enumerate(made["labels"], 1)}
    children: dict[str, set[str]] = {label: set() for label in parents}
    for label, above in parents.items():
        for parent in above:
            children[parent].add(label)

    def reach(label: str, step: Any) -> set[str]:
        return {label}.union(*(reach(other, step) for other in step[label]))

    boxes: Counter[tuple[Any, ...]] = Counter()
    for name, label, _, _, _, _, group in made["boxes"]:
        boxes.update((name, id_of[other], group) for other in reach(label, parents))
    labels: dict[tuple[str, int], set[int]] = {}
    for name, label, sure in made["verified"]:
        found = {id_of[other] for other in reach(label, parents if sure else children)}
        labels.setdefault((name, sure), set()).update(found)
    content = json.loads(
        (root / "oid/annotations/oid_challenge_2019_val_expanded.json").read_text()
    )
    names = {image["id"]: image["file_name"][:-4] for image in content["images"]}
    written = Counter(
        (names[a["image_id"]], a["category_id"], a["iscrowd"]) for a in content["annotations"]
    )
    expect("boxes in the tables, expanded", sum(written.values()), sum(boxes.values()))
    expect("each box", dict(written), dict(boxes))
    expect("images, boxes", detail(report, "hierarchy expanded"), [len(names), sum(boxes.values())])
    for field, sure in (("pos_category_ids", 1), ("neg_category_ids", 0)):
        found = {image["file_name"][:-4]: image[field] for image in content["images"]}
        again = {name: sorted(labels.get((name, sure), ())) for name in found}
        expect(field, found, again)
    kept = detail(report, "annotation store")
    expect("images, boxes in the store", kept, [len(names), sum(boxes.values())])


def check_imagenet(_root: Path, made: Any, report: Any) -> None:
    """Compare the numbers of tars, images and problems."""
    images, tars, gzipped = detail(report, "tar index")
    expect(
        "images, tars, gzipped",
        [images, tars, gzipped],
        [made["images"], made["tars"], made["gzipped"]],
    )
    problems = "\n".join(report["problems"])
    for pattern, expected in (
        (r"(\d+) unreadable members", made["broken"]),
        (r"(\d+) damaged tars", 1),
        (r"(\d+) tars without images", 1),
        (r"(\d+) tars are missing", 5),
        (r"(\d+) tars belong to no class", 1),
    ):
        match = re.search(pattern, problems)
        expect(pattern[6:], int(match[1]) if match else 0, expected)


def measure(name: str, folder: Path, scale: float, fixes: Path | None) -> dict[str, Any]:
    """Make the input, prepare it twice, check it, and compare."""
    root, cache = folder / "datasets", folder / "cache"
    root.mkdir(exist_ok=True)
    if name == "objects365":
        if fixes is None:
            raise SystemExit(
                "objects365 needs the table of names: --names Objects365_names_fix.csv"
            )
        made = inputs.objects365(root, scale, fixes)
    else:
        made = getattr(inputs, name)(root, scale)
    dataset = "imagenet-lvis" if name == "imagenet" else name
    print(f"{dataset}:")
    words = ["data", "prepare", dataset, "--root", str(root)]
    report, first = run(words, cache)
    globals()[f"check_{name}"](root, made, report)
    again, second = run(words, cache)
    actions = {step["action"] for step in again["steps"] if step["name"] != "dataset config"}
    expect("the second time", actions, {"up to date"})
    description = root / ("lvis.toml" if name == "imagenet" else f"{name}.toml")
    found, checked = run(["data", "check", str(description)], cache)
    for finding in found[0]["findings"]:
        print(f"    check: {finding['level']:7} {finding['part']}: {finding['text'][:110]}")
    result = {"first": first, "again": second, "check": checked}
    for what, cost in result.items():
        print(f"  {what:6} {cost}", flush=True)
    return result


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="+", choices=["lvis", "imagenet", "coco", "objects365", "openimages"]
    )
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    parser.add_argument("--names", dest="fixes", type=Path, help="Objects365_names_fix.csv")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = {}
    folder = Path(tempfile.mkdtemp(prefix="proxydet-prepare-", dir=options.folder))
    try:
        # Of one folder: ImageNet's classes are those of the LVIS file made before it.
        for name in options.names:
            results[name] = measure(name, folder, options.scale, options.fixes)
    finally:
        shutil.rmtree(folder)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
