"""What is known about one thing: its value, or why there is none; and how to ask a program for it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Fact:
    """A value, or the reason why there is none."""

    value: str | None
    """What was found; None where nothing was."""

    problem: str = ""
    """Why there is no value, or what is wrong with it; empty where all is well."""


Facts = dict[str, Fact]

NOT_ASKED = "torch does not load, so it cannot be asked"
"""Why a fact that only torch knows is missing."""


def ask(command: Sequence[str], *, seconds: float = 10) -> Fact:
    """Run a program and take what it writes to stdout.

    Args:
        command: The program (a name is searched on PATH) and its arguments.
        seconds: How long it may take.

    Returns:
        Its output, stripped, or why there is none.
    """
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
        return Fact(None, f"{command[0]} did not answer within {seconds:g} s")
    except OSError as error:
        return Fact(None, f"{command[0]} does not run: {error.strerror or error}")
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        return Fact(None, f"{command[0]} failed: {said[-1] if said else done.returncode}")
    return Fact(done.stdout.strip())


def numbers(version: str) -> tuple[int, ...]:
    """Leading numbers of a version: ``"2.15.0+cu132"`` gives ``(2, 15, 0)``."""
    parts: list[int] = []
    for part in version.split("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        parts.append(int(digits))
    return tuple(parts)
