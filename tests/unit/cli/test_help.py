"""Help texts: grouped by purpose, coloured on a terminal, plain elsewhere."""

from __future__ import annotations

import re
import sys

import pytest
import typer

from proxydet_cli.app import COMMANDS, build, load_command


def help_of(name: str) -> str:
    command = build() if name == "proxydet" else load_command(name)
    return str(command.get_help(typer.Context(command, info_name=name)))


def test_commands_stand_in_groups_in_the_order_of_the_work():
    text = help_of("proxydet")
    listed = re.findall(r"^  ([a-z]+)  ", text, re.MULTILINE)
    assert [name for name in listed if name in COMMANDS] == list(COMMANDS)
    titles = re.findall(r"^(\S.*):$", text, re.MULTILINE)
    assert titles == ["Start", "Environment", "Data and class names", "Detectors", "Options"]


@pytest.mark.parametrize("name", ["proxydet", *COMMANDS])
def test_help_is_coloured_on_a_terminal_only(name, monkeypatch):
    plain = help_of(name)
    assert "\x1b" not in plain
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    coloured = help_of(name)
    assert "\x1b[" in coloured
    assert re.sub(r"\x1b\[\d+m", "", coloured) == plain
    monkeypatch.setenv("NO_COLOR", "1")
    assert help_of(name) == plain
