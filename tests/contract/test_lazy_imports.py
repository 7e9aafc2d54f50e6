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
    modules = loaded_by(command_line("-V"), tmp_path)
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
