"""What a quick start must not load, told by the modules in memory and not by the clock."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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

REPORT = """
import atexit, json, os, sys
def report():
    with open(os.environ["MODULES_FILE"], "w") as file:
        json.dump(sorted(sys.modules), file)
atexit.register(report)
"""


def loaded_by(program: str, tmp_path: Path) -> set[str]:
    """Run Python code in a fresh process; the modules in memory when it ends."""
    target = tmp_path / "modules.json"
    subprocess.run(
        [sys.executable, "-c", REPORT + program],
        env={**os.environ, "MODULES_FILE": str(target)},
        check=True,
        capture_output=True,
    )
    return set(json.loads(target.read_text()))


def command_line(*words: str) -> str:
    return f"from proxydet_cli.main import main\nsys.exit(main({list(words)!r}))\n"


def tops(modules: set[str]) -> set[str]:
    return {name.split(".")[0] for name in modules}


def test_the_package_loads_nothing_heavy(tmp_path):
    assert not tops(loaded_by("import proxydet", tmp_path)) & HEAVY


def test_version_is_answered_before_typer_loads(tmp_path):
    for words in (["--version"], ["-V"]):
        modules = loaded_by(command_line(*words), tmp_path)
        assert not tops(modules) & (HEAVY | {"typer", "rich"})
        assert "proxydet_cli.app" not in modules


def test_help_loads_no_command_and_nothing_heavy(tmp_path):
    modules = loaded_by(command_line("--help"), tmp_path)
    assert not tops(modules) & (HEAVY | {"rich", "pydantic"})
    assert not {name for name in modules if name.startswith("proxydet_cli.commands.")}
    assert len(modules) < 400


@pytest.mark.parametrize("command", COMMANDS)
def test_a_commands_help_loads_only_that_command(command, tmp_path):
    modules = loaded_by(command_line(command, "--help"), tmp_path)
    assert not tops(modules) & (HEAVY | {"rich", "pydantic"})
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
        ["push", "run", "pets", "--dry-run"],
    ],
    ids=" ".join,
)
def test_misspelt_names_and_missing_weights_are_refused_before_torch_is_loaded(words, tmp_path):
    (tmp_path / "photo.jpg").write_text("no weights, and no image")
    (tmp_path / "data.toml").write_text('name = "d"\n')
    (tmp_path / "run").mkdir()
    for name in ("config.yaml", "vocabulary.npz"):
        (tmp_path / "run" / name).touch()
    program = f"import os; os.chdir({str(tmp_path)!r})\n" + (
        "try:\n    " + command_line(*words).replace("\n", "\n    ") + "pass\n"
        "except SystemExit as stop:\n    assert stop.code in (2, 3, 4)\n"
    )
    assert "torch" not in loaded_by(program, tmp_path)
