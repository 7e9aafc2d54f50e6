"""The entry point: answers ``--version`` at once, and turns every expected error into one message and exit code.

This module and what it imports at its top load neither Typer nor the core's packages.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

_CTRL_C = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: The words after the program's name; None takes them from ``sys.argv``.

    Returns:
        The exit code, where the command line does not exit itself (usage errors, ``--help``).
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words in (["--version"], ["-V"]):
        from proxydet._version import __version__

        sys.stdout.write(f"proxydet {__version__}\n")
        return 0
    try:
        if arguments is None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _interrupt)
        return _run(words)
    except KeyboardInterrupt:
        return _CTRL_C


def _interrupt(number: int, frame: FrameType | None) -> None:
    # torch's C++ code calls Python while it is imported, and an exception there can abort the process. Nothing has been
    # begun then that would have to be ended.
    if getattr(getattr(sys.modules.get("torch"), "__spec__", None), "_initializing", False):
        os._exit(_CTRL_C)
    signal.default_int_handler(number, frame)


def _run(words: list[str]) -> int:
    from proxydet_cli import failures, output

    output.prepare_streams()
    sys.excepthook = failures.report_unexpected
    try:
        from proxydet_cli.app import run

        run(words)
        output.flush()
    except failures.EXPECTED as error:
        return failures.report(error)
    except RuntimeError as error:
        if not failures.is_out_of_memory(error):
            raise
        return failures.report(error)
    return 0
