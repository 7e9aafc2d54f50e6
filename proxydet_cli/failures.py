"""The one place where an error becomes a message, a hint and an exit code.

==== =====================================================================
code meaning
==== =====================================================================
0    done
1    a bug in proxydet: please report it
2    the command line itself is wrong (unknown option, missing argument)
3    an input is not usable: configuration, vocabulary, data, checkpoint
4    a file could not be downloaded, verified or unpacked
5    the environment does not allow the job, or a value is not finite
6    training failed in one of its processes
130  stopped by Ctrl-C (128 + the signal's number for other signals)
141  the reader of the output went away (``proxydet ... | head``)
==== =====================================================================
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from pathlib import Path
from types import TracebackType

from proxydet.errors import DiskFullError, ProxydetError, RuntimeEnvironmentError
from proxydet_cli.output import Output, ReaderGone

EXPECTED = (ProxydetError, OSError, MemoryError, KeyboardInterrupt, ReaderGone)
"""What :func:`report` translates, besides a device's lack of memory; anything else is a bug."""

CTRL_C = 130
READER_GONE = 141
BUG = 1

_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})
_FILE_IN_THE_WAY = frozenset({errno.EEXIST, errno.ENOTDIR})


def report(error: BaseException) -> int:
    """Write an expected error to stderr.

    Args:
        error: One of :data:`EXPECTED`, or an error for which :func:`is_out_of_memory` is true.

    Returns:
        The exit code.
    """
    if isinstance(error, ReaderGone | BrokenPipeError):
        _detach_stdout()
        return READER_GONE
    if isinstance(error, KeyboardInterrupt):
        return CTRL_C
    if os.environ.get("PROXYDET_DEBUG"):
        traceback.print_exception(error)
    translated = translate(error)
    Output().error(translated.message, translated.hint)
    return translated.exit_code


def translate(error: BaseException) -> ProxydetError:
    """Say an operating system's error in this project's terms.

    Args:
        error: A ProxydetError (returned as it is), an OSError, or lack of memory.

    Returns:
        The error with message, hint and exit code.
    """
    if isinstance(error, ProxydetError):
        return error
    if isinstance(error, OSError):
        return _translate_os_error(error)
    detail = str(error).splitlines()[0] if str(error) else "the request was refused"
    return RuntimeEnvironmentError(
        f"There is not enough memory: {detail}",
        hint="use a smaller batch or smaller images, or a machine or device with more memory",
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is a GPU's lack of memory, found without importing torch."""
    kind = type(error)
    return kind.__name__ == "OutOfMemoryError" and kind.__module__.split(".")[0] == "torch"


def _translate_os_error(error: OSError) -> ProxydetError:
    path = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else None
    where = f" ({path})" if path else ""
    if error.errno in _NO_ROOM:
        return DiskFullError(
            f"There is no room left on the disk{where}.",
            hint="free some space, or choose another folder, and run the same command again",
            path=path,
        )
    if path is not None and error.errno in _FILE_IN_THE_WAY:
        return RuntimeEnvironmentError(
            f"A folder is needed where there is a file: {path}.",
            hint="name another folder, or move the file away",
            path=path,
        )
    return RuntimeEnvironmentError(
        f"{error.strerror or error}{where}.",
        hint="check that the path exists and that you may read and write it",
        path=path,
    )


def report_unexpected(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Report a bug in a few lines: the ``sys.excepthook`` of the command line (exit code 1).

    ``PROXYDET_DEBUG=1`` adds the whole traceback.
    """
    if os.environ.get("PROXYDET_DEBUG"):
        traceback.print_exception(kind, error, trace)
    frames = traceback.extract_tb(trace)
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    Output().error(
        f"this is a bug in proxydet: {kind.__name__}: {error}{where}",
        "run the command again with PROXYDET_DEBUG=1 in the environment, and report its output "
        "together with that of: proxydet env",
    )


def _detach_stdout() -> None:
    # Python flushes stdout once more on exit and would complain about the closed pipe.
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, sys.stdout.fileno())
    os.close(sink)
