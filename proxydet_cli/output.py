"""The only place that writes: data to stdout, everything else to stderr."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, TextIO

from proxydet.wording import json_text, printable

_RED = "31"
_YELLOW = "33"
_BOLD = "1"


class ReaderGone(Exception):
    """The program that read our output has closed it, as ``head`` does when it has enough."""


class Output:
    """Renders what a command gives back.

    Args:
        json: Write data as JSON instead of text.
        quiet: Leave out messages; warnings and errors stay.
    """

    def __init__(self, *, json: bool = False, quiet: bool = False) -> None:
        self.json = json
        self.quiet = quiet

    def data(self, value: object, text: str | None = None) -> None:
        """Write a command's result to stdout.

        Args:
            value: What ``--json`` shows: dataclasses, mappings, sequences, numbers, paths, text; a number that
                is not finite becomes null.
            text: What a person reads; None shows ``value`` as it is, a mapping as ``key: value`` lines.
        """
        if self.json:
            _write(json_text(_plain(value), indent=2))
        else:
            _write(_as_text(value) if text is None else text)

    def line(self, value: object) -> None:
        """Write a value to stdout as one line of JSON, for programs that read while a command runs."""
        _write(json_text(_plain(value)))

    def row(self, text: str) -> None:
        """Write one line of text about one file, frame or class to stdout; a line break in its name does not break it."""
        _write(printable(text))

    def table(
        self, rows: Sequence[Mapping[str, object]], columns: Sequence[str] | None = None
    ) -> None:
        """Write rows to stdout: aligned columns, numbers to the right; a list of objects with ``--json``.

        Args:
            rows: One mapping a row.
            columns: The keys to show and their order; None shows those of the first row.
        """
        if self.json:
            self.data(list(rows))
            return
        names = list(columns if columns is not None else rows[0] if rows else [])
        if names:
            _write(aligned(rows, names))

    def message(self, text: str) -> None:
        """Tell how the job goes: one line on stderr, left out under ``--quiet``."""
        if not self.quiet:
            _write_error(_harmless(text))

    def warning(self, text: str) -> None:
        """Warn the user on stderr; the job continues."""
        _write_error(f"{_coloured('warning:', _YELLOW)} {_harmless(text)}")

    def error(self, text: str, hint: str | None = None) -> None:
        """Tell why the job stopped and what to do next: stderr."""
        _write_error(f"{_coloured('error:', _RED)} {_harmless(text)}")
        if hint:
            _write_error(f"\n{_coloured('hint:', _BOLD)} {_harmless(hint)}")

    def agreed(self, what: str, *, nothing: str = "", before: str = "") -> bool:
        """Ask on the terminal whether to continue.

        Args:
            what: What is confirmed, such as ``"the download"``.
            nothing: What to report where it is not: ``"Nothing was fetched."``.
            before: What to know before answering.

        Raises:
            ConfigError: Nobody can be asked.
            JobInterruptedError: Ctrl-C, or Ctrl-D, in place of an answer.
        """
        import typer

        from proxydet.errors import ConfigError, JobInterruptedError

        if not sys.stdin.isatty():
            raise ConfigError(
                f"stdin is not a terminal, so {what} cannot be confirmed", hint="pass --yes"
            )
        try:
            agreed = typer.confirm(f"{before}\nContinue?".lstrip(), default=True, err=True)
        except typer.Abort:
            raise JobInterruptedError(f"Stopped. {nothing}".rstrip()) from None
        if nothing and not agreed:
            self.message(nothing)
        return agreed


class LogHandler(logging.Handler):
    """Shows the core's log records on stderr; warnings and errors say so."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        text = self.format(record)
        if record.levelno >= logging.WARNING:
            Output().warning(text)
        else:
            Output().message(text)


def show_logs(*, verbose: bool = False) -> None:
    """Show what the core logs.

    Args:
        verbose: Show information too, not only warnings.
    """
    logger = logging.getLogger("proxydet")
    level = logging.INFO if verbose else logging.WARNING
    logger.setLevel(level)
    if not any(isinstance(handler, LogHandler) for handler in logger.handlers):
        logger.addHandler(LogHandler())
        logger.propagate = False
    for handler in logger.handlers:
        if isinstance(handler, LogHandler):
            # A log file that wants more may lower the logger's own level.
            handler.setLevel(level)


def prepare_streams() -> None:
    """Make characters that the terminal's encoding lacks readable escapes instead of a crash."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def flush() -> None:
    """Write what is buffered, while a closed pipe can still be reported."""
    with _told_when_closed():
        sys.stdout.flush()


def is_terminal(stream: TextIO) -> bool:
    """Whether a person watches ``stream`` on a terminal that can move its cursor."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


@contextmanager
def _told_when_closed() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError as error:
        raise ReaderGone from error


def _harmless(text: str) -> str:
    """Escape what a terminal would obey, names and file contents being what others made them."""
    return printable(text, keep="\n\t")


def _write(text: str) -> None:
    with _told_when_closed():
        print(_harmless(text), flush=True)


def _write_error(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _coloured(text: str, code: str) -> str:
    if os.environ.get("NO_COLOR") or not is_terminal(sys.stderr):
        return text
    return f"\033[{code}m{text}\033[0m"


def _plain(value: Any) -> Any:
    """Reduce a value to what JSON can say."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Path):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):  # numpy's arrays and scalars, which are not imported for this
        return _plain(value.tolist())
    return [_plain(item) for item in value]


def _as_text(value: object) -> str:
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return "\n".join(f"{key}: {_cell(item)}" for key, item in value.items())
    return str(value)


def _cell(value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else printable(str(value))


def aligned(rows: Sequence[Mapping[str, object]], columns: Sequence[str] | None = None) -> str:
    """Lay out rows under the names of their columns, numbers to the right.

    Args:
        rows: One mapping a row.
        columns: The keys to show and their order; None shows those of the first row.
    """
    names = list(columns if columns is not None else rows[0] if rows else [])
    cells = [[_cell(row.get(name)) for name in names] for row in rows]
    widths = [max(len(line[i]) for line in [names, *cells]) for i in range(len(names))]
    numeric = [all(isinstance(row.get(name), int | float | None) for row in rows) for name in names]
    lines = (
        "  ".join(
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in [names, *cells]
    )
    return "\n".join(lines)
