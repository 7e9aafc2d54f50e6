"""Writes the configuration reference from the dataclasses: ``python -m proxydet_cli.config_reference FILE``."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from proxydet.config import (
    config_class,
    field_docs,
    field_types,
    parse_yaml,
    scalar_text,
    to_mapping,
    type_name,
)
from proxydet.recipes import RECIPES, RunConfig

_INTRODUCTION = """# Configuration

Written by `make docs` from the dataclasses that the program reads.

A configuration is put together from a recipe, a YAML file (`--config`, whole or partial) and single keys (`--set`), the later
ones winning; values are checked against each other when all are in place. Lists and mappings are written as in YAML, in
quotes for the shell: `--set 'evaluation.iou_types=[bbox]'`. `proxydet train --show-config` writes the result; a run keeps it as `config.yaml`. An unknown key or a wrong
type is an error that names the nearest key. In YAML, `off` and `no` are text, `2e-4` is a number.

Defaults below are those of the dataclasses, which are the published R50's; a recipe changes some."""


def configuration_page() -> str:
    """Describe every recipe and every key, as one Markdown page."""
    parts = [
        _INTRODUCTION,
        "## Recipes",
        _recipes(),
        "## Keys",
        *_sections(RunConfig, to_mapping(RunConfig()), ""),
    ]
    return "\n\n".join(parts) + "\n"


def _recipes() -> str:
    rows = ["| recipe | what it is |", "|---|---|"]
    for name, function in RECIPES.items():
        rows.append(f"| `{name}` | {_cell(' '.join((inspect.getdoc(function) or '').split()))} |")
    return "\n".join(rows)


def _sections(cls: type, values: Mapping[str, Any], where: str) -> list[str]:
    """Describe a class's own keys in a table, then each nested class under a heading of its own.

    Args:
        cls: A configuration class.
        values: Its defaults in the whole configuration.
        where: Dotted path of the class in it.
    """
    docs = field_docs(cls)
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    nested: list[str] = []
    for name, annotation in field_types(cls).items():
        path = f"{where}.{name}" if where else name
        inner = config_class(annotation)
        if inner is not None and values[name] is not None:
            summary = (inspect.getdoc(inner) or "").split("\n\n")[0]
            null = " May be null." if type(None) in get_args(annotation) else ""
            text = f"{docs[name]} {' '.join(summary.split())}{null}"
            nested += [f"### {path}", text, *_sections(inner, values[name], path)]
        else:
            cells = (type_name(annotation), f"`{_default(values[name])}`", docs[name])
            rows.append(f"| `{path}` | {' | '.join(map(_cell, cells))} |")
    table = ["\n".join(rows)] if len(rows) > 2 else []
    return [*table, *nested]


def _default(value: Any) -> str:
    text = scalar_text(value)
    assert parse_yaml(text) == value, text
    return text


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(configuration_page(), encoding="utf-8")
