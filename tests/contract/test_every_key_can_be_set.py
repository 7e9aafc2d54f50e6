"""``--set`` reaches every key: set to its own value, alone and all together, a configuration stays what it is."""

from __future__ import annotations

import functools
import operator
from typing import Any

import pytest

from proxydet.config import (
    config_class,
    field_types,
    key_paths,
    merge,
    parse_overrides,
    scalar_text,
    to_mapping,
)
from proxydet.recipes import RECIPES, RunConfig, get_recipe, resolve_config


def paths(cls: type, where: str = "") -> list[str]:
    """Dotted paths of all keys, those of nested configurations with them."""
    found = []
    for name, annotation in field_types(cls).items():
        found.append(f"{where}{name}")
        nested = config_class(annotation)
        found += paths(nested, f"{where}{name}.") if nested else []
    return found


def assignments(recipe: str) -> list[str]:
    """Each key with its own value, as ``--set`` takes it; keys in a configuration that is null have none."""
    config = get_recipe(recipe)
    found = []
    for path in paths(RunConfig):
        value: Any = to_mapping(config)
        try:
            value = functools.reduce(operator.getitem, path.split("."), value)
        except TypeError:
            continue
        found.append(f"{path}={scalar_text(value)}")
    return found


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_key_of_every_recipe(recipe):
    config = get_recipe(recipe)
    each = assignments(recipe)
    assert len(each) > 150
    for assignment in each:
        assert merge(config, parse_overrides(RunConfig, [assignment])) == config, assignment
    assert resolve_config(recipe, None, each) == config
    assert resolve_config(None, None, reversed(each)) == config


def test_every_key_takes_another_value_from_any_recipe():
    """The leaf keys' values of one recipe, set one by one on another, give the first."""
    leaves = {path for path, _ in key_paths(RunConfig)}
    wanted = [text for text in assignments("swinb") if text.partition("=")[0] in leaves]
    assert resolve_config(None, None, wanted) == get_recipe("swinb")
    assert resolve_config(None, None, sorted(wanted)) == get_recipe("swinb")


def test_on_the_command_line(cli):
    wanted = [text for text in assignments("tiny") if not text.startswith("recipe=")]
    words = [word for text in wanted for word in ("--set", text)]
    shown = cli("train", "--recipe", "tiny", *words, "--show-config", "--json").data
    assert shown["data"] == to_mapping(get_recipe("tiny"))["data"]
