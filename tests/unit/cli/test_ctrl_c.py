"""Ctrl-C while the program is still being loaded ends it with exit code 130."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SENDS_ITSELF_CTRL_C = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1000):
        pass
except BaseException:
    os.abort()  # as C++ code does with an exception that it does not expect
"""


def run(folder: Path, module: str, text: str) -> subprocess.CompletedProcess[str]:
    """Run a command that imports torch, with a made-up module in front of the installed ones."""
    target = folder / module
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)
    (folder / "photo.jpg").touch()
    (folder / "weights.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    start = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from proxydet_cli.main import main; raise SystemExit(main())"
    )
    return subprocess.run(
        [sys.executable, "-c", start, "predict", "photo.jpg", "--weights", "weights.safetensors"],
        env={**os.environ, "PYTHONPATH": str(folder)},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_while_torch_is_imported(tmp_path):
    ended = run(tmp_path, "torch/__init__.py", SENDS_ITSELF_CTRL_C)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")


def test_before_the_commands_are_there(tmp_path):
    interrupted = (
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nfor _ in range(1000): pass\n"
    )
    ended = run(tmp_path, "typer/__init__.py", interrupted)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")
