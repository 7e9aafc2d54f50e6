"""`data check` says what the other commands do: random deviations, and the commands run as processes as the oracle.

Each command runs in a process of its own, forked from one that has imported everything, so that an example takes seconds.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
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
MOST_KILOBYTES, MOST_TIMES_ITS_SIZE = 300 * 1024, 10
"""How much more memory a command may take than on the sound data set, and how much more for each byte of its files."""

_FORKER = """
import gc, json, os, resource, sys, time
import hotcoco, jinja2, matplotlib.figure
import proxydet.data.check, proxydet.detector, proxydet.evaluation.evaluate, proxydet.evaluation.page, proxydet.recipes
import proxydet.inference.jobs, proxydet.training.train, proxydet.training_run, PIL.PngImagePlugin
import proxydet_cli.commands.data, proxydet_cli.commands.eval, proxydet_cli.commands.predict, proxydet_cli.commands.train
from proxydet_cli.main import main
# Drawing takes most of the time and decides nothing here.
matplotlib.figure.Figure.savefig = lambda figure, target, **_: target.write("<svg/>") if hasattr(target, "write") else None
gc.freeze()
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
        self.sound_kilobytes: dict[str, int] = {}
        """Memory of each command on the sound data set with masks."""

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
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    runner = Commands()
    folder = tmp_path_factory.mktemp("sound")
    ran = run_all(runner, folder, sound("masks"), lambda text: text)
    assert [code for code, _, _ in ran.values()] == [0, 0, 0, 0], ran
    runner.sound_kilobytes = {name: kilobytes for name, (_, _, kilobytes) in ran.items()}
    yield runner
    runner.close()


WIDTH, HEIGHT = 48, 32


def sound(kind: str) -> dict[str, Any]:
    """Four images with an object each, of two classes.

    Args:
        kind: ``masks``, ``boxes`` or ``openimages``, as COCO JSON has them; ``voc``: by file name, what its elements hold.
    """
    content: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 1, "name": "apple"}, {"id": 2, "name": "pear"}],
    }
    for index in range(4):
        x, y, w, h = 4 + 2 * index, 5 + index, 20, 15
        image = {"id": index + 1, "file_name": f"{index}.png", "width": WIDTH, "height": HEIGHT}
        row = {"id": index + 1, "image_id": index + 1, "category_id": 1 + index % 2}
        row |= {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}
        if kind == "masks":
            row["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        if kind == "openimages":
            image |= {"pos_category_ids": [1, 2], "neg_category_ids": []}
        content["images"].append(image)
        content["annotations"].append(row)
    if kind != "voc":
        return content
    files = {}
    for image, row in zip(content["images"], content["annotations"], strict=True):
        x, y, w, h = row["bbox"]
        item = {"name": ["apple", "pear"][row["category_id"] - 1], "difficult": 0}
        item |= {"xmin": x + 1, "ymin": y + 1, "xmax": x + w, "ymax": y + h}
        size = {"width": image["width"], "height": image["height"]}
        files[str(image["id"])] = {"filename": image["file_name"], "size": size, "objects": [item]}
    return {"files": files}


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
    """Give a field of one record another value, or take it away."""

    def edit(row: int, value: Any, absent: bool) -> Edit:
        def apply(content: dict[str, Any]) -> None:
            rows = content[kind]
            if rows and isinstance(rows[row % len(rows)], dict):
                record = rows[row % len(rows)]
                record.pop(field, None)
                if not absent:
                    record[field] = value

        return apply

    return st.builds(edit, st.integers(0, 3), values, st.booleans())


def everywhere(edit: Callable[[dict[str, Any]], Any]) -> st.SearchStrategy[Edit]:
    return st.just(lambda content: edit(content))


def records(content: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [row for row in content[kind] if isinstance(row, dict)]


def text_ids(content: dict[str, Any]) -> None:
    for kind, field in (("images", "id"), ("annotations", "image_id")):
        for row in records(content, kind):
            row[field] = f"i{row.get(field)}"


def crowds(content: dict[str, Any]) -> None:
    for row in records(content, "annotations"):
        row["iscrowd"] = 1


def federated(content: dict[str, Any]) -> None:
    for row in records(content, "images"):
        row["neg_category_ids"] = []
    for row in records(content, "categories"):
        row["frequency"] = "f"


edits = st.one_of(
    *(at("annotations", field, odd) for field in ("id", "image_id", "category_id", "area", "iscrowd")),
    at("annotations", "bbox", box),
    at("annotations", "segmentation", mask),
    *(at("images", field, odd) for field in ("id", "width", "height", "file_name", "neg_category_ids", "pos_category_ids")),
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
text = st.sampled_from(
    ["", " ", "x", "apple", "0", "1", "-3", "2.5", "60", "nan", "1e400", "9" * 30, "<b/>", "1.png", "C:\\a\\2.png", "3"]
)  # fmt: skip


def in_xml(part: str, field: str) -> st.SearchStrategy[Edit]:
    """Give an element of one XML file another text, or take it away."""

    def edit(number: int, value: str, absent: bool) -> Edit:
        def apply(content: dict[str, Any]) -> None:
            file = content["files"].get(str(number))
            if isinstance(file, dict):
                record = {"": file, "size": file["size"], "object": file["objects"][-1]}[part]
                record[field] = None if absent else value

        return apply

    return st.builds(edit, st.integers(1, 4), text, st.booleans())


def no_xml(number: int, raw: bytes) -> Edit:
    return lambda content: content["files"].update({str(number): raw})


def from_zero(content: dict[str, Any]) -> None:
    for file in content["files"].values():
        for item in file["objects"] if isinstance(file, dict) else ():
            item |= {
                side: 0 if side[1:] == "min" else 9 for side in ("xmin", "ymin", "xmax", "ymax")
            }


xml_edits = st.one_of(
    in_xml("", "filename"),
    *(in_xml("size", side) for side in ("width", "height")),
    *(in_xml("object", f) for f in ("name", "difficult", "xmin", "ymin", "xmax", "ymax")),
    everywhere(from_zero),
    everywhere(lambda content: content["files"].update({"5": content["files"]["1"]})),
    everywhere(lambda content: content["files"].pop("2", None)),
    st.builds(
        no_xml,
        st.integers(1, 4),
        st.sampled_from(
            [
                b"",
                b"text",
                b"<html></html>",
                b"<annotation>",
                b"<annotation/>",
                b"\0" * 99,
                b"<a>" * 20_000,
                "<annotation><object/></annotation>".encode("utf-16"),
                b'<!DOCTYPE a [<!ENTITY a "aa">]><annotation>&a;</annotation>',
            ]
        ),
    ),
)


def xml_of(file: dict[str, Any] | bytes) -> bytes:
    if isinstance(file, bytes):
        return file

    def written(fields: dict[str, Any]) -> str:
        return "".join(f"<{k}>{v}</{k}>" for k, v in fields.items() if v is not None)

    objects = ""
    for item in file["objects"]:
        corners = {side: item[side] for side in ("xmin", "ymin", "xmax", "ymax")}
        named = {key: item[key] for key in ("name", "difficult")}
        objects += written({"object": written({**named, "bndbox": written(corners)})})
    size = written(file["size"])
    inner = written({"filename": file["filename"], "size": size})
    return written({"annotation": inner + objects}).encode()


wraps: st.SearchStrategy[Callable[[bytes], bytes]] = st.sampled_from(
    [
        lambda text: text,
        gzip.compress,
        lambda text: b"\xef\xbb\xbf" + text,
        lambda text: text.replace(b'"area": 300', b'"area": NaN'),
        lambda text: text[:-5],
    ]
)


def detection(content: dict[str, Any]) -> dict[str, Any]:
    """A detection of an image and a class that the edits left alone, if any."""
    if "files" in content:
        names = [
            n for n, f in content["files"].items() if n != "5" and f == sound("voc")["files"].get(n)
        ]
        return {
            "image_id": (names or ["1"])[0],
            "category_id": 1,
            "bbox": [1, 1, 5, 5],
            "score": 0.9,
        }

    def sound_id(kind: str, **fields: Any) -> Any:
        for record in records(content, kind):
            found = record.get("id")
            whole = isinstance(found, (int, str)) and not isinstance(found, bool) and found != ""
            if whole and all(record.get(key) == value for key, value in fields.items()):
                return found
        return 1

    image = sound_id("images", width=WIDTH, height=HEIGHT)
    found = {"image_id": image, "category_id": sound_id("categories")}
    found |= {"bbox": [1, 1, 5, 5], "score": 0.9}
    if any("segmentation" in row for row in records(content, "annotations")):
        found["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": [40, 9, HEIGHT * WIDTH - 49]}
    return found


def run_all(
    commands: Commands, folder: Path, content: dict[str, Any], wrap: Callable[[bytes], bytes]
) -> dict[str, tuple[int | None, str, int]]:
    """Write a data set and run check, train, eval and predict on it; predict only where there is a run."""
    for index in range(4):
        Image.new("RGB", (WIDTH, HEIGHT), (60 * index, 90, 200)).save(folder / f"{index}.png")
    if "files" in content:
        data = "xml"
        (folder / data).mkdir()
        for name, file in content["files"].items():
            (folder / data / f"{name}.xml").write_bytes(wrap(xml_of(file)))
    else:
        data = "data.json"
        (folder / data).write_bytes(wrap(json.dumps(content).encode()))
    (folder / "results.json").write_text(json.dumps([detection(content)]))
    np.save(folder / "table.npy", np.eye(3, 16, dtype=np.float32)[:2])
    split = f'annotations = "{data}"\nimages = "."\n'
    names = '["apple", "pear"]'
    (folder / "data.toml").write_text(
        f'name = "d"\n[vocabulary]\nembeddings = "table.npy"\nnames = {names}\n[train]\n{split}[val]\n{split}'
    )
    small = ["--recipe", "tiny", "--set", "training.iterations=2", "--set", "data.workers=0"]
    small += ["--set", "data.image_labels=null", "--set", "evaluation.bootstrap=0"]
    small += ["--set", "training.log.tensorboard=false"]
    tasks = {
        "check": ["data", "check", "data.toml"],
        "train": ["train", "--data", "data.toml", "-o", "run", *small, "--device", "cpu", "--gpus", "1"],
        "eval": ["eval", "--results", "results.json", "--data", data, "-o", "ev", "--bootstrap", "20"],
        "predict": ["predict", "0.png", "--run", "run", "-o", "found", "--save", "coco", "--device", "cpu"],
    }  # fmt: skip
    ran = {}
    for name, words in tasks.items():
        if name != "predict" or ran["train"][0] == 0:
            ran[name] = commands.run(folder, *words)
    return ran


def check_and_compare(
    commands: Commands, folder: Path, content: dict[str, Any], wrap: Callable[[bytes], bytes]
) -> None:
    ran = run_all(commands, folder, content, wrap)
    said = "\n".join(f"--- {name}: {code}\n{text}" for name, (code, text, _) in ran.items())
    size = len(json.dumps(content, default=repr)) >> 10
    for name, (code, text, kilobytes) in ran.items():
        assert code in (0, 3), f"{name} ended with {code}\n{said}"
        assert "Traceback" not in text, said
        assert "bug in proxydet" not in text, said
        more = kilobytes - commands.sound_kilobytes[name]
        assert more < MOST_KILOBYTES + MOST_TIMES_ITS_SIZE * size, f"{name}: {more} KB\n{said}"
    fails = any(code for name, (code, _, _) in ran.items() if name != "check")
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
    @given(st.sampled_from(["masks", "boxes", "openimages", "voc"]), st.data(), wraps)
    def compare(kind: str, data: st.DataObject, wrap: Callable[[bytes], bytes]) -> None:
        content = sound(kind)
        chosen = xml_edits if kind == "voc" else edits
        for edit in data.draw(st.lists(chosen, min_size=1, max_size=3)):
            edit(content)
        check_and_compare(commands, tmp_path_factory.mktemp("set"), content, wrap)

    compare()


@pytest.mark.parametrize("kind", ["boxes", "openimages", "voc"])
def test_a_sound_set_is_sound_trained_and_scored(commands, tmp_path, kind):
    check_and_compare(commands, tmp_path, sound(kind), lambda text: text)
    assert (tmp_path / "found" / "coco.json").is_file()


def test_check_says_what_the_commands_do(commands, tmp_path_factory):
    run_examples(commands, tmp_path_factory, 2)


@pytest.mark.slow
def test_check_says_what_the_commands_do_at_length(commands, tmp_path_factory):
    run_examples(commands, tmp_path_factory, int(os.environ.get("PROXYDET_EXAMPLES", "300")))
