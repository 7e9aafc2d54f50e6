"""Calls uv, the installer that can build detectron2 as pure Python."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from proxydet.compat.index_settings import uv_environment
from proxydet.errors import (
    DigestError,
    DiskFullError,
    EnvironmentProblem,
    MissingDependencyError,
    ProxydetError,
    TransferError,
)

_NO_NETWORK = (
    "error sending request",
    "failed to fetch",
    "dns error",
    "could not connect",
    "network connectivity is disabled",
    "network was disabled",
    "operation timed out",
)
_NOT_WRITABLE = (
    "permission denied",
    "read-only file system",
    "externally managed",
    "failed to initialize cache",
)


def find() -> Path:
    """Find uv's executable: the one of the ``uv`` package, else one on the search path.

    Raises:
        MissingDependencyError: There is none.
    """
    if find_spec("uv") is not None:
        from uv import find_uv_bin

        try:
            return Path(find_uv_bin())
        except FileNotFoundError:
            pass
    on_path = shutil.which("uv")
    if on_path is None:
        raise MissingDependencyError(
            "uv, which builds detectron2 without a compiler, is not installed.",
            hint="run: pip install uv",
        )
    return Path(on_path)


def pip_install(arguments: Sequence[str], *, folder: Path, destination: Path) -> None:
    """Run ``uv pip install`` for this interpreter's environment.

    Args:
        arguments: What follows ``uv pip install --python ...``.
        folder: An empty folder to run in, so that no project's settings are picked up.
        destination: Where packages go, for error messages.

    Raises:
        MissingDependencyError: uv is absent, or the build failed.
        TransferError: The package index cannot be reached, or lacks what is asked for.
        DigestError: What came is not what was expected.
        EnvironmentProblem: The environment cannot be written.
        DiskFullError: The disk is full.
    """
    # Compiled at once: the first import is quick also where Python may not write byte code later.
    options = ["--no-progress", "--compile-bytecode", "--python", sys.executable]
    command = [str(find()), "pip", "install", *options]
    run = subprocess.run(  # noqa: S603 - uv's path and our own arguments, no shell
        [*command, *arguments],
        cwd=folder,
        env=uv_environment(os.environ),
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        raise explain_failure(run.stderr, destination)


def explain_failure(stderr: str, destination: Path) -> ProxydetError:
    """Turn what uv says into one of our errors.

    Args:
        stderr: All that uv wrote.
        destination: Where packages go.

    Returns:
        The error to raise, with uv's own words in its message.
    """
    said = stderr.lower()
    words = _gist(stderr)
    if "hash mismatch" in said:
        return DigestError(
            f"The package index sent other detectron2 sources than the expected ones: {words}",
            hint="check the index or mirror that is configured; nothing was installed",
        )
    if "no space left" in said:
        return DiskFullError(
            f"There is no room left on the disk: {words}",
            hint="free some space, or set UV_CACHE_DIR and TMPDIR to folders with room, and run it again",
            path=destination,
        )
    if any(sign in said for sign in _NOT_WRITABLE):
        return EnvironmentProblem(
            f"The environment cannot be written: {words}",
            hint="work in a virtual environment of your own; UV_CACHE_DIR moves uv's cache",
            path=destination,
        )
    if any(sign in said for sign in _NO_NETWORK):
        return TransferError(
            f"The package index cannot be reached: {words}",
            hint="connect to the network and run: proxydet setup. Behind a mirror or proxy, set "
            "UV_DEFAULT_INDEX or HTTPS_PROXY",
        )
    if "no solution found" in said or "not found in the package registry" in said:
        return TransferError(
            f"The package index does not carry the detectron2 sources: {words}",
            hint="use an index that carries pb1-detectron2 0.6, or install detectron2 from its repository",
        )
    return MissingDependencyError(
        f"detectron2 could not be built: {words}",
        hint="report it with this message and the output of: proxydet env",
    )


def _gist(stderr: str) -> str:
    """The lines in which uv names the error and its causes; all it wrote where there are none."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith(("error:", "cause:"))]
    raised = [line for line in lines if re.match(r"[A-Za-z.]*(Error|Exception): ", line)]
    return "; ".join([*telling, *raised] or lines)
