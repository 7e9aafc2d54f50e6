"""Configurations as text: YAML files with each field's documentation as a comment, and ``a.b=c`` overrides.

The YAML read and written here is the 1.2 core subset: ``off``, ``no`` and ``1:30`` are text, ``2e-4`` is a number,
and a key that appears twice in one mapping is an error.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import re
import textwrap
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

import yaml

from proxydet.config import config_class, field_types, merge, to_mapping, unknown_key_error
from proxydet.errors import ConfigError

T = TypeVar("T")

_LINE_WIDTH = 110


class _Loader(yaml.SafeLoader):
    """Safe loading with YAML 1.2's idea of what a number and a truth value look like."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Refuse a key that is given twice."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Safe dumping that quotes exactly what `_Loader` would not read back as text."""


def _use_core_schema(cls: Any) -> None:
    cls.yaml_implicit_resolvers = {}
    patterns = (
        ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
        ("tag:yaml.org,2002:null", r"null|Null|NULL|~|", ["n", "N", "~", ""]),
        ("tag:yaml.org,2002:int", r"[-+]?[0-9]+", "-+0123456789"),
        (
            "tag:yaml.org,2002:float",
            r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
            "-+.0123456789",
        ),
    )
    for tag, pattern, first in patterns:
        cls.add_implicit_resolver(tag, re.compile(f"^(?:{pattern})$"), list(first))


_use_core_schema(_Loader)
_use_core_schema(_Dumper)
# The 1.1 constructor would read 010 as octal; every integer here is decimal.
_Loader.add_constructor(
    "tag:yaml.org,2002:int",
    lambda loader, node: int(str(loader.construct_scalar(cast("yaml.ScalarNode", node)))),
)


def _represent_text(dumper: _Dumper, value: str) -> yaml.ScalarNode:
    """Quote text with Unicode's own line breaks so that they are escaped: a plain key would lose them."""
    style = '"' if any(break_ in value for break_ in "\x85\u2028\u2029\ufeff") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _represent_text)


def parse_yaml(text: str, where: str = "the text", path: Path | None = None) -> Any:
    """Parse YAML text.

    Args:
        text: One YAML document.
        where: What the text is, for messages.
        path: The file it came from.

    Raises:
        ConfigError: The text is not valid YAML; the message has the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a subclass of SafeLoader
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(
            f"{where} is not valid YAML: {error}",
            hint="correct that line; proxydet train --recipe small --show-config shows a complete file",
            path=path,
        ) from error


def load_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds one mapping.

    Raises:
        ConfigError: The file is absent, unreadable, not UTF-8, not YAML, or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"The configuration file {path} cannot be read: {error}",
            hint="Give an existing YAML file; proxydet train --show-config prints one to start from.",
            path=path,
        ) from error
    value = parse_yaml(text, str(path), path)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(
            f"{path} holds {type(value).__name__}, not a mapping of keys.",
            hint="a configuration file holds keys and values, such as seed: 7",
            path=path,
        )
    return value


def dump_yaml(config: Any, *, comments: bool = True) -> str:
    """Write a configuration as YAML, in field order.

    Args:
        config: A configuration dataclass.
        comments: Whether each field's documentation stands above it.

    Returns:
        Text from which `load_mapping` and `proxydet.config.from_mapping` give an equal configuration.
    """
    return "\n".join(_lines(type(config), to_mapping(config), 0, comments)) + "\n"


def apply_overrides(config: T, assignments: Iterable[str]) -> T:
    """Return a copy of a configuration with assignments ``a.b=c`` applied in order.

    The value is YAML (``null``, ``[1, 2]``, ``{a: 1}``); where the key takes text, it is taken as it stands.

    Raises:
        ConfigError: An assignment has no ``=``, names no key, or gives a value of the wrong type.
    """
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        key = key.strip()
        if not separator or not key:
            raise ConfigError(
                f"The override {assignment!r} is not of the form key=value.",
                hint="Write for example --set training.iterations=1000.",
            )
        config = merge(config, _nested(type(config), key, text.strip()))
    return config


def scalar_text(value: Any) -> str:
    """Write a plain value as YAML on one line."""
    text = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, width=2**31, allow_unicode=True
    )
    return text.removesuffix("\n").removesuffix("\n...")


@functools.cache
def field_docs(cls: type) -> Mapping[str, str]:
    """Return the documentation of each field of a dataclass: the string that follows it in the source.

    Returns:
        Field name to one line of text; a field without a string is absent.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    docs = {}
    for statement, following in itertools.pairwise(body):
        named = isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
        text = following.value if isinstance(following, ast.Expr) else None
        if named and isinstance(text, ast.Constant) and isinstance(text.value, str):
            docs[statement.target.id] = " ".join(text.value.split())  # type: ignore[attr-defined]
    return docs


def _nested(cls: type, key: str, text: str) -> dict[str, Any]:
    """Build the nested mapping that sets one dotted key, finding the type that the key takes."""
    root, where, parts = cls, "", key.split(".")
    for part in parts[:-1]:
        field_type = _field_type(cls, part, where, root)
        nested = config_class(field_type)
        where = f"{where}.{part}" if where else part
        if nested is None:
            leaf = parts[-1]
            raise ConfigError(
                f"{key} is not a configuration key: {where} has no {leaf} in it.",
                hint="proxydet train --recipe small --show-config lists every key",
            )
        cls = nested
    annotation = _field_type(cls, parts[-1], where, root)
    value: Any = _value(annotation, key, text)
    for part in reversed(parts):
        value = {part: value}
    return value  # type: ignore[no-any-return]


def _field_type(cls: type, name: str, where: str, root: type) -> Any:
    if name not in field_types(cls):
        raise unknown_key_error(cls, name, where, root)
    return field_types(cls)[name]


def _value(annotation: Any, key: str, text: str) -> Any:
    value = parse_yaml(text, f"The value of {key}")
    takes_text = bool({str, Path} & {annotation, *get_args(annotation)})
    if takes_text and value is not None and not isinstance(value, str):
        return text
    return value


def _lines(cls: type, mapping: Mapping[str, Any], depth: int, comments: bool) -> list[str]:
    indent = "  " * depth
    docs = field_docs(cls) if comments else {}
    lines: list[str] = []
    for name, annotation in field_types(cls).items():
        value = mapping[name]
        nested = config_class(annotation)
        if depth == 0 and lines:
            lines.append("")
        if name in docs:
            width = _LINE_WIDTH - len(indent) - 2
            lines += [f"{indent}# {line}" for line in textwrap.wrap(docs[name], width)]
        if nested is not None and value:
            lines += [f"{indent}{name}:", *_lines(nested, value, depth + 1, comments)]
        else:
            lines.append(f"{indent}{name}: {scalar_text(value)}")
    return lines
