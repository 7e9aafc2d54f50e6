"""No configuration key that no code reads; told by the attribute's name, so one name that two classes share counts for both."""

from __future__ import annotations

import ast
import dataclasses
import re
import typing
from collections.abc import Iterable

from proxydet.recipes import RunConfig


def keys(owner: type, prefix: str = "") -> dict[str, tuple[str, str]]:
    """Return every key below a configuration class, with the class that defines it and the field's name."""
    found = {}
    hints = typing.get_type_hints(owner)
    for field in dataclasses.fields(owner):
        inner = (hints[field.name], *typing.get_args(hints[field.name]))
        classes = [part for part in inner if dataclasses.is_dataclass(part)]
        for part in classes:
            found |= keys(part, f"{prefix}{field.name}.")
        if not classes:
            found[f"{prefix}{field.name}"] = (owner.__name__, field.name)
    return found


class _Reads(ast.NodeVisitor):
    """Collects the attributes that code reads, with the class around each."""

    def __init__(self) -> None:
        self.found: set[tuple[str, str]] = set()
        self._class = ""

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        around, self._class = self._class, node.name
        self.generic_visit(node)
        self._class = around

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Load):
            self.found.add((self._class, node.attr))
        self.generic_visit(node)


def unread(wanted: dict[str, tuple[str, str]], trees: Iterable[ast.Module]) -> list[str]:
    """Return the keys whose field no code reads outside of the class that defines it."""
    reads = _Reads()
    for tree in trees:
        reads.visit(tree)
    return sorted(
        key
        for key, (owner, name) in wanted.items()
        if not any(read == name and around != owner for around, read in reads.found)
    )


def test_every_key_is_read(trees):
    wanted = keys(RunConfig)
    assert len(wanted) > 100
    core = [tree for path, tree in trees.items() if path.parts[0] == "proxydet"]
    assert unread(wanted, core) == []


def test_the_check_sees_an_unread_key():
    source = """
class Config:
    def __post_init__(self):
        self.checked_only
        self.read
def work(config):
    config.written = config.read
"""
    wanted = {f"c.{name}": ("Config", name) for name in ("checked_only", "written", "read")}
    assert unread(wanted, [ast.parse(source)]) == ["c.checked_only", "c.written"]


def test_keys_named_in_pages_exist(repository):
    known = keys(RunConfig)
    groups = {key.rsplit(".", count)[0] for key in known for count in range(1, 5)}
    tops = "|".join(sorted({key.split(".")[0] for key in known if "." in key}))
    pages = [*repository.glob("*.md"), *(repository / "docs").rglob("*.md")]
    named = {
        (page.name, match[1])
        for page in pages
        for match in re.finditer(
            rf"[`\s]((?:{tops})\.[a-z_0-9]+(?:\.[a-z_0-9]+)*)[`=]", page.read_text("utf-8")
        )
        if match[1].rpartition(".")[2] not in {"md", "toml", "yaml"}
    }
    assert len(named) > 100
    assert sorted((page, key) for page, key in named if key not in known.keys() | groups) == []
