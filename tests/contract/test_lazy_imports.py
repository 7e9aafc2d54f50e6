"""What a quick start must not load, told by the modules in memory and not by the clock."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from proxydet.config import dump_yaml
from proxydet.recipes import get_recipe
from proxydet.vocabulary.compositional import CompositionalEncoder
from proxydet.vocabulary.vocabulary import Vocabulary
from proxydet_cli.app import COMMANDS

REPOSITORY = Path(__file__).resolve().parents[2]
HEAVY = {
    "torch",
    "torchvision",
    "detectron2",
    "numpy",
    "PIL",
    "requests",
    "matplotlib",
    "open_clip",
    "cv2",
}
MODULES = """
import json, os, sys
def report():
    with open(os.environ["MODULES_FILE"], "w") as file:
        json.dump(sorted(sys.modules), file)
"""
FORKER = """
from proxydet_cli.main import main
output = os.open(os.devnull, os.O_WRONLY)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os.dup2(output, 1), os.dup2(output, 2)
        code = 1
        try:
            code = main(json.loads(line)) or 0
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            report()
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
Run = Callable[..., tuple[int, set[str]]]


def loaded_by(program: str, tmp_path: Path) -> set[str]:
    """Run Python code in a fresh process; the modules in memory when it ends."""
    target = tmp_path / "modules.json"
    subprocess.run(
        [sys.executable, "-c", f"{MODULES}import atexit; atexit.register(report)\n{program}"],
        env={**os.environ, "MODULES_FILE": str(target)},
        check=True,
        capture_output=True,
    )
    return set(json.loads(target.read_text()))


def command_line(*words: str) -> str:
    return f"from proxydet_cli.main import main\nsys.exit(main({list(words)!r}))\n"


@contextmanager
def forked(folder: Path, imported: str) -> Iterator[Run]:
    """Run command lines, each in a process forked from one that has imported some modules: exit code, modules in memory."""
    target = folder / "modules.json"
    with subprocess.Popen(
        [sys.executable, "-c", f"{MODULES}import {imported}\n{FORKER}"],
        env={**os.environ, "MODULES_FILE": str(target)},
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:

        def run(*words: str) -> tuple[int, set[str]]:
            assert process.stdin is not None
            assert process.stdout is not None
            target.unlink(missing_ok=True)
            process.stdin.write(json.dumps(words) + "\n")
            process.stdin.flush()
            code = int(process.stdout.readline())
            return code, set(json.loads(target.read_text()))

        yield run


def tops(modules: set[str]) -> set[str]:
    return {name.split(".")[0] for name in modules}


def test_the_package_loads_nothing_heavy(tmp_path):
    assert not tops(loaded_by("import proxydet", tmp_path)) & HEAVY


def test_version_is_answered_before_typer_loads(tmp_path):
    with forked(tmp_path, "proxydet_cli.main") as run:
        for asked in ("-V", "--version"):
            code, modules = run(asked)
            assert code == 0
            assert not tops(modules) & (HEAVY | {"typer", "rich"})
            assert "proxydet_cli.app" not in modules


def test_help_loads_no_command_and_nothing_heavy(tmp_path):
    modules = loaded_by(command_line("--help"), tmp_path)
    assert not tops(modules) & (HEAVY | {"rich", "pydantic"})
    assert not {name for name in modules if name.startswith("proxydet_cli.commands.")}
    assert len(modules) < 400


def test_a_commands_help_loads_only_that_command(tmp_path):
    with forked(tmp_path, "proxydet_cli.app") as run:
        for command in COMMANDS:
            code, modules = run(command, "--help")
            assert code == 0, command
            assert not tops(modules) & (HEAVY | {"rich", "pydantic"}), command
            commands = {name for name in modules if name.startswith("proxydet_cli.commands.")}
            assert commands == {f"proxydet_cli.commands.{command.replace('-', '_')}"}


def test_configurations_load_no_torch(tmp_path):
    names = [
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
        for path in (REPOSITORY / "proxydet").rglob("config.py")
    ]
    assert names
    program = "".join(f"import {name}\n" for name in names)
    assert not tops(loaded_by(program, tmp_path)) & {"torch", "torchvision", "detectron2"}


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory) -> Iterator[Run]:
    """Run command lines next to files that are not what they are named as."""
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "photo.jpg").write_text("no weights, and no image")
    (folder / "data.toml").write_text('name = "d"\n')
    (folder / "run").mkdir()
    for name in ("config.yaml", "vocabulary.npz"):
        (folder / "run" / name).touch()
    with forked(folder, "numpy, PIL.Image, proxydet.models, proxydet_cli.app") as run:
        yield run


@pytest.mark.parametrize(
    "words",
    [
        ["predict", "absent.jpg", "-v", "mug"],
        ["predict", "photo.jpg", "--run", "absent"],
        ["predict", "photo.jpg", "--weights", "proxydet-r5"],
        ["predict", "photo.jpg", "-v", "absent.txt"],
        ["predict", "photo.jpg"],
        ["serve", "--run", "absent"],
        ["export", "--weights", "absent.pth", "-o", "a.onnx"],
        ["eval", "--run", "absent", "--data", "absent.toml"],
        ["train", "--finetune", "proxydet-r5", "--data", "absent.toml"],
        ["train", "--recipe", "smal", "--data", "absent.toml"],
        ["train", "--recipe", "tiny", "--data", "absent.toml"],
        ["train", "--recipe", "tiny", "--data", "data.toml", "--weights", "absent.pth"],
        ["train", "--recipe", "tiny", "--data", "data.toml", "--weights", "photo.jpg"],
        ["train", "--recipe", "tiny", "--data", "data.toml", "--set", "losses.criterion=absent:A"],
        ["predict", "photo.jpg", "--weights", "photo.jpg"],
        ["predict", "photo.jpg", "--run", "run", "--vocabulary", "lviss"],
        ["predict", "photo.jpg", "--run", "run", "--device", "gpu"],
        ["push", "absent", "me/pets", "--dry-run"],
        ["index", "absent", "-o", "x.index", "--run", "run"],
        ["index", "photo.jpg", "-o", "run", "--run", "run"],
        ["index", "ad", "-o", "x.index"],
        ["index", "info", "run"],
        ["search", "run", "-v", "cup"],
        ["push", "run", "pets", "--dry-run"],
    ],
    ids=" ".join,
)
def test_misspelt_names_and_missing_weights_are_refused_before_torch_is_loaded(words, mistaken):
    code, modules = mistaken(*words)
    assert code in (2, 3, 4)
    assert "torch" not in modules


def test_wrong_inputs_of_a_run_are_refused_before_torch_is_loaded(tmp_path):
    """Those of exemplars, of calibration and of tiles; all in one process, which ends at the first that loads it."""
    run, encoder = tmp_path / "run", CompositionalEncoder.create(["red", "cup"], dim=4, noise=0.1, seed=0)  # fmt: skip
    run.mkdir()
    (run / "config.yaml").write_text(dump_yaml(get_recipe("tiny")))
    encoder.save(run / "text_encoder.json")
    Vocabulary.from_arrays(["red cup"], encoder.encode(["red cup"])).save(run / "vocabulary.npz")
    for folder in ("empty", "shots/cup", "shots/red cup"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("shots/cup/1.png", "shots/red cup/1.png", "plate.png"):
        Image.effect_noise((9, 9), 50).save(tmp_path / name)
    crowd = {
        "id": 1,
        "image_id": 1,
        "category_id": 1,
        "bbox": [1, 1, 5, 5],
        "area": 25,
        "iscrowd": 1,
    }
    plates = {
        "images": [{"id": 1, "file_name": "plate.png", "width": 9, "height": 9}],
        "categories": [{"id": 1, "name": "plate"}],
    }
    for name, crowded in {"plates": 0, "crowds": 1}.items():
        rows = [{**crowd, "iscrowd": crowded}]
        (tmp_path / f"{name}.json").write_text(json.dumps({**plates, "annotations": rows}))
    (tmp_path / "said.yaml").write_text("cup: [A thing to drink from.]\n")
    (tmp_path / "data.toml").write_text('name = "d"\n')
    build = ["vocab", "build", "-o", "a.vocab", "--run", "run", "--exemplars"]
    calibrate = ["vocab", "calibrate", "-o", "a.vocab", "--run", "run", "--data"]
    refused = {
        "absent": [*build, "absent"],
        "absent.json": [*build, "absent.json"],
        "neither annotations nor": [*build, "empty"],
        "every annotation is a crowd": [*build, "crowds.json"],
        "runs": ["vocab", "build", "-o", "a.vocab", "--run", "runs", "--exemplars", "shots"],
        "imgs": [*build, "shots", "--statistics", "imgs"],
        "holds no images": [*build, "shots", "--statistics", "empty"],
        "'cup' would be lost": [*build, "shots", "--descriptions", "said.yaml"],
        "has no image tower": [*build, "shots", "--image-tower", "--encoder", "run/text_encoder.json"],
        "a.vocab": ["vocab", "build", "said.yaml", "-o", "a.txt"],
        "no dataset config": [*calibrate, "plats.toml"],
        "plats.json": [*calibrate, "plats.json"],
        "none of the classes": [*calibrate, "plates.json"],
        "'spoon'": [*calibrate, "plates.json", "-v", "spoon"],
        "inference.tiles": ["predict", "plate.png", "--run", "run", "--tiles", "10"],
        "does not know 'spoon'": ["predict", "plate.png", "--run", "run", "-v", "red spoon"],
        "--tiles": ["predict", "plate.png", "--run", "run", "--tile-overlap", "0.3"],
        "inference.tiles is 9": ["serve", "--run", "run", "--tiles", "9"],
        "inference.tiles is 8": ["eval", "--run", "run", "--data", "data.toml", "--tiles", "8"],
    }  # fmt: skip
    program = (
        f"import contextlib, io, os, sys\nos.chdir({str(tmp_path)!r})\n"
        "from proxydet_cli.main import main\n"
        f"for said, words in {refused!r}.items():\n"
        "    err = io.StringIO()\n"
        "    with contextlib.redirect_stderr(err):\n"
        "        try:\n            code = main(words)\n"
        "        except SystemExit as stop:\n            code = stop.code\n"
        "    text = ' '.join(err.getvalue().split())\n"
        "    assert code in (2, 3) and said in text, (words, code, text)\n"
        "    assert 'torch' not in sys.modules, words\n"
    )
    assert "torch" not in loaded_by(program, tmp_path)
