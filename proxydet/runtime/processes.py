"""Programs and fresh interpreters: what they print or return, or in one line why there is nothing."""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxydet.errors import RuntimeEnvironmentError


@dataclass(frozen=True)
class Fact:
    """A value, or the reason why there is none."""

    value: str | None
    """What was found; None where nothing was."""
    problem: str = ""
    """Why there is no value, or what is wrong with it; empty where all is well."""


def run_program(command: Sequence[str], *, seconds: float = 10) -> Fact:
    """Run a program (a name is searched on PATH) and return its stdout, stripped, or why there is none."""
    program = shutil.which(command[0])
    if program is None:
        return Fact(None, f"{command[0]} not found")
    try:
        done = subprocess.run(  # noqa: S603 - a list, no shell
            [program, *command[1:]],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Fact(None, f"{command[0]} did not finish within {seconds:g} s")
    except OSError as error:
        return Fact(None, f"{command[0]} does not run: {error.strerror or error}")
    if done.returncode != 0:
        output = (done.stderr.strip() or done.stdout.strip()).splitlines()
        return Fact(None, f"{command[0]} failed: {output[-1] if output else done.returncode}")
    return Fact(done.stdout.strip())


_HINT = "run: proxydet env --check"
_START = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from importlib import import_module
module, function, arguments, result = sys.argv[2:]
value = getattr(import_module(module), function)(**json.loads(arguments))
with open(result, "w", encoding="utf-8") as file:
    json.dump(value, file)
"""


# Of glibc's malloc.h: the parameters of mallopt(3).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Let this process keep the memory that tensors on the CPU free, for the next ones, until it ends.

    By default glibc returns large blocks to the system at once, which then clears every page of the next one: up to a fifth of the
    time of a small network, more where several processes do. Values do not change.

    Returns:
        Whether the C library is glibc, which can.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    settings = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1, _TOP_PAD: 2**28}
    taken = [mallopt(parameter, value) == 1 for parameter, value in settings.items()]
    return all(taken)


def call_in_new_process(
    module: str,
    function: str,
    *,
    search_path: Sequence[str] | None = None,
    seconds: float | None = None,
    **arguments: Any,
) -> Any:
    """Call a function in a fresh interpreter, where a crash does no harm and nothing is imported yet.

    Args:
        module: Its module.
        function: Its name.
        search_path: Python's search path there; None for this process's own without the working folder, so that
            nothing that lies there is imported by mistake.
        seconds: How long it may take; None for as long as it takes.
        arguments: Its keyword arguments, JSON values.

    Returns:
        What it returned, a JSON value. What it prints is dropped.

    Raises:
        RuntimeEnvironmentError: It raised an error, crashed or took too long; the message is the last line that it wrote.
    """
    path = [entry for entry in sys.path if entry] if search_path is None else search_path
    absolute = json.dumps([str(Path(entry).absolute()) for entry in path])
    with tempfile.TemporaryDirectory(prefix="proxydet-") as folder:
        result = Path(folder) / "result.json"
        # -B: a check leaves no bytecode in the installation that it checks.
        command = [sys.executable, "-B", "-c", _START, absolute]
        try:
            done = subprocess.run(  # noqa: S603 - a list, no shell, our own function
                [*command, module, function, json.dumps(arguments), str(result)],
                cwd=folder,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise RuntimeEnvironmentError(
                f"it did not finish within {seconds:g} s", hint=_HINT
            ) from error
        if done.returncode == 0 and result.is_file():
            return json.loads(result.read_text(encoding="utf-8"))
        lines = done.stderr.strip().splitlines()
        last = lines[-1].strip() if lines else f"exit code {done.returncode}"
        raise RuntimeEnvironmentError(last, hint=_HINT)
