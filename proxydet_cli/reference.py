"""Writes the command reference from the commands themselves: ``python -m proxydet_cli.reference FILE``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from proxydet_cli.app import COMMANDS, build, load_command

_WIDTH = 100


def reference() -> str:
    """The help of every command and subcommand, as one Markdown page."""
    parts = ["# Commands", "Written by `make docs` from the commands' own help."]
    for name, text in _help_texts("proxydet", build()):
        parts.append(f"## {name}\n\n```\n{text.rstrip()}\n```")
    for command in COMMANDS:
        for name, text in _help_texts(f"proxydet {command}", load_command(command)):
            parts.append(f"{'#' * len(name.split())} {name}\n\n```\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def _help_texts(name: str, command: Any) -> Iterator[tuple[str, str]]:
    context = typer.Context(
        command, info_name=name, max_content_width=_WIDTH, terminal_width=_WIDTH
    )
    yield name, command.get_help(context)
    if name != "proxydet":
        for subname, subcommand in getattr(command, "commands", {}).items():
            yield from _help_texts(f"{name} {subname}", subcommand)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(reference(), encoding="utf-8")
