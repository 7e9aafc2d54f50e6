"""`data check` says what the other commands do: random deviations, and the commands run as processes as the oracle.

Each command runs in a process of its own, forked from one that has imported everything, so that an example takes seconds.
"""

from __future__ import annotations

import copy
import gzip
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes")

MOST_SECONDS = 120
MOST_MEGABYTES = 900
"""Growth of a command's memory over the process that it is forked from; training a tiny model takes half of it."""

_FORKER = """
import json, os, resource, sys, time
import proxydet.training.train, proxydet.evaluation.evaluate, proxydet.recipes, proxydet.detector
import proxydet.data.check, proxydet.training_run, proxydet.evaluation.page, hotcoco, msgspec
import proxydet_cli.app, proxydet_cli.progress, matplotlib.figure
from proxydet_cli.main import main
# Drawing takes most of the time and decides nothing here.
matplotlib.figure.Figure.savefig = lambda figure, target, **_: target.write("<svg/>") if hasattr(target, "write") else None
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        os.chdir(job["cwd"])
        output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1), os.dup2(output, 2)
        sys.argv = ["proxydet", *job["words"]]
        code = 70
        try:
            code = main()
            code = 0 if code is None else code
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 1)
    late = time.monotonic() + job["seconds"]
    while True:
        ended, status, usage = os.wait4(child, os.WNOHANG)
        if ended or time.monotonic() > late:
            break
        time.sleep(0.02)
    if not ended:
        os.kill(child, 9)
        _, status, usage = os.wait4(child, 0)
        status = None
    code = None if status is None else os.waitstatus_to_exitcode(status)
    print(json.dumps({"code": code, "kilobytes": usage.ru_maxrss}), flush=True)
"""


class Commands:
    """Runs `proxydet` commands, each in a process of its own."""

    def __init__(self) -> None:
        environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
        self._forker = subprocess.Popen(
            [sys.executable, "-c", _FORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        with tempfile.TemporaryDirectory() as folder:
            self.idle_kilobytes = 0
            code, _, self.idle_kilobytes = self.run(Path(folder), "--version")
            assert code == 0

    def run(self, cwd: Path, *words: str) -> tuple[int | None, str, int]:
        """Return exit code (None: too late), what was printed, and kilobytes of memory."""
        output = cwd / "output.txt"
        job = {"words": words, "cwd": str(cwd), "output": str(output), "seconds": MOST_SECONDS}
        assert self._forker.stdin is not None
        assert self._forker.stdout is not None
        self._forker.stdin.write(json.dumps(job) + "\n")
        self._forker.stdin.flush()
        done = json.loads(self._forker.stdout.readline())
        return done["code"], output.read_text(errors="replace"), done["kilobytes"]

    def close(self) -> None:
        assert self._forker.stdin is not None
        assert self._forker.stdout is not None
        self._forker.stdin.close()
        self._forker.wait()
        self._forker.stdout.close()


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    runner = Commands()
    yield runner
    runner.close()


WIDTH, HEIGHT = 48, 32


def sound(masks: bool) -> dict[str, Any]:
    """Four images with an object each, of two classes; deviations leave the first image and its object alone."""
    images, annotations = [], []
    for index in range(4):
        x, y, w, h = 4 + 2 * index, 5 + index, 20, 15
        images.append(
            {"id": index + 1, "file_name": f"{index}.png", "width": WIDTH, "height": HEIGHT}
        )
        row = {"id": index + 1, "image_id": index + 1, "category_id": 1 + index % 2}
        row |= {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}
        if masks:
            row["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        annotations.append(row)
    categories = [{"id": 1, "name": "apple"}, {"id": 2, "name": "pear"}]
    return {"images": images, "annotations": annotations, "categories": categories}


odd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 5),
    st.sampled_from([1.0, 2.5, 2**40, 2**70, -1, 1e9, "1", "x", "", [], {}, [1, 2], "b'PPYo1'"]),
)
mask = st.one_of(
    odd,
    st.sampled_from(
        [
            [[10, 10, 30, 30]],
            [10, 10, 30, 10, 30, 20],
            [[1, 2]],
            [[]],
            [[2, 2, 20, 2, 20, 2.5e8]],
            [[2, 2, 20, 2, None, 9]],
            {"size": [HEIGHT, WIDTH], "counts": [100, 50, HEIGHT * WIDTH - 150]},
            {"size": [HEIGHT, WIDTH], "counts": [100, 50]},
            {"size": [WIDTH, HEIGHT], "counts": [HEIGHT * WIDTH]},
            {"size": [HEIGHT, WIDTH], "counts": "zzzz"},
            {"counts": [100, 50, HEIGHT * WIDTH - 150]},
            {"size": [HEIGHT, WIDTH], "counts": None},
        ]
    ),
)
box = st.one_of(
    odd,
    st.lists(st.one_of(st.integers(-20, 60), st.floats(-20, 60)), min_size=4, max_size=4),
    st.sampled_from([[100, 100, 5, 5], [1, 1, 0, 5], [0.1, 0.1, 0.5, 0.5], [1e308, 1, 1e308, 1]]),
)
Edit = Callable[[dict[str, Any]], None]


def at(kind: str, field: str, values: st.SearchStrategy[Any]) -> st.SearchStrategy[Edit]:
    """Give a field of one record, but the first, another value, or take it away."""

    def edit(row: int, value: Any, absent: bool) -> Edit:
        def apply(content: dict[str, Any]) -> None:
            rows = content[kind]
            if len(rows) > 1 and isinstance(rows[row % (len(rows) - 1) + 1], dict):
                record = rows[row % (len(rows) - 1) + 1]
                record.pop(field, None)
                if not absent:
                    record[field] = value

        return apply

    return st.builds(edit, st.integers(0, 2), values, st.booleans())


def everywhere(edit: Callable[[dict[str, Any]], Any]) -> st.SearchStrategy[Edit]:
    return st.just(lambda content: edit(content))


def text_ids(content: dict[str, Any]) -> None:
    for row in content["images"]:
        row["id"] = f"i{row['id']}"
    for row in content["annotations"]:
        row["image_id"] = f"i{row['image_id']}"


def crowds(content: dict[str, Any]) -> None:
    for row in content["annotations"]:
        row["iscrowd"] = 1


def federated(content: dict[str, Any]) -> None:
    for row in content["images"]:
        row["neg_category_ids"] = []
    for row in content["categories"]:
        row["frequency"] = "f"


edits = st.one_of(
    *(at("annotations", field, odd) for field in ("id", "image_id", "category_id", "area", "iscrowd")),
    at("annotations", "bbox", box),
    at("annotations", "segmentation", mask),
    *(at("images", field, odd) for field in ("id", "width", "height", "file_name", "neg_category_ids")),
    *(at("categories", field, odd) for field in ("id", "name", "frequency", "supercategory")),
    everywhere(text_ids),
    everywhere(crowds),
    everywhere(federated),
    everywhere(lambda content: content.update(annotations=[])),
    everywhere(lambda content: content["images"].append(dict(content["images"][1]))),
    everywhere(lambda content: content["images"].append(dict(content["images"][1], id=99))),
    everywhere(lambda content: content["annotations"].append("no object")),
    everywhere(lambda content: content["categories"].append({"id": 0, "name": "root"})),
)  # fmt: skip
wraps: st.SearchStrategy[Callable[[bytes], bytes]] = st.sampled_from(
    [
        lambda text: text,
        gzip.compress,
        lambda text: b"\xef\xbb\xbf" + text,
        lambda text: text.replace(b'"area": 300', b'"area": NaN'),
        lambda text: text[:-5],
    ]
)


def check_and_compare(
    commands: Commands,
    folder: Path,
    edited: list[Edit],
    wrap: Callable[[bytes], bytes],
    masks: bool,
) -> None:
    content = sound(masks)
    for index, row in enumerate(content["images"]):
        shade = Image.new("RGB", (WIDTH, HEIGHT), (60 * index, 90, 200))
        shade.save(folder / row["file_name"])
    for edit in edited:
        edit(content)
    first = content["annotations"][0] if content["annotations"] else sound(masks)["annotations"][0]
    found = {key: first[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9}
    found |= {"segmentation": first["segmentation"]} if masks else {}
    (folder / "results.json").write_text(json.dumps([found]))
    (folder / "data.json").write_bytes(wrap(json.dumps(copy.deepcopy(content)).encode()))
    np.save(folder / "table.npy", np.eye(3, 16, dtype=np.float32)[:2])
    split = 'annotations = "data.json"\nimages = "."\n'
    names = '["apple", "pear"]'
    (folder / "data.toml").write_text(
        f'name = "d"\n[vocabulary]\nembeddings = "table.npy"\nnames = {names}\n[train]\n{split}[val]\n{split}'
    )
    small = ["--recipe", "tiny", "--set", "training.iterations=2", "--set", "data.workers=0"]
    small += [
        "--set",
        "training.log.tensorboard=false",
        "--set",
        "data.image_labels=null",
        "--device",
        "cpu",
        "--gpus",
        "1",
    ]
    ran = {
        "check": commands.run(folder, "data", "check", "data.toml"),
        "train": commands.run(folder, "train", "--data", "data.toml", "-o", "run", *small),
        "eval": commands.run(
            folder, "eval", "--results", "results.json", "--data", "data.json", "-o", "ev", "--bootstrap", "20"
        ),
    }  # fmt: skip
    said = "\n".join(f"--- {name}: {code}\n{text}" for name, (code, text, _) in ran.items())
    for name, (code, text, kilobytes) in ran.items():
        assert code in (0, 3), f"{name} ended with {code}\n{said}"
        assert "Traceback" not in text, said
        assert "bug in proxydet" not in text, said
        assert kilobytes - commands.idle_kilobytes < MOST_MEGABYTES * 1024, f"{name}\n{said}"
    fails = any(ran[name][0] for name in ("train", "eval"))
    assert ran["check"][0] == (3 if fails else 0), said


def run_examples(
    commands: Commands, tmp_path_factory: pytest.TempPathFactory, examples: int
) -> None:
    @settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    @given(st.lists(edits, min_size=1, max_size=3), wraps, st.booleans())
    def compare(edited: list[Edit], wrap: Callable[[bytes], bytes], masks: bool) -> None:
        check_and_compare(commands, tmp_path_factory.mktemp("set"), edited, wrap, masks)

    compare()


@pytest.mark.parametrize("masks", [True, False], ids=["masks", "boxes"])
def test_a_sound_set_is_sound_trained_and_scored(
    commands: Commands, tmp_path: Path, masks: bool
) -> None:
    check_and_compare(commands, tmp_path, [], lambda text: text, masks)
    assert (tmp_path / "run" / "config.yaml").is_file()


def test_check_says_what_the_commands_do(
    commands: Commands, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run_examples(commands, tmp_path_factory, 6)


@pytest.mark.slow
def test_check_says_what_the_commands_do_at_length(
    commands: Commands, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run_examples(commands, tmp_path_factory, int(os.environ.get("PROXYDET_EXAMPLES", "300")))
