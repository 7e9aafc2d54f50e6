"""Strict, typed configuration: dataclasses, mappings and text, with errors that name the key and the near miss.

A configuration is a tree of frozen keyword-only dataclasses, each defined next to the code that reads it. This
module knows none of them: it reads their annotations. Keys of an earlier version are read where a class lists them
(``EARLIER``) and says what stands for them (``from_earlier``). Supported field types are ``bool``, ``int``, ``float``,
``str``, ``Path``, ``Literal``, ``tuple[...]``, ``dict[str, ...]``, other configuration dataclasses, and ``X | None``.

As text, a configuration is YAML with each field's documentation as a comment, or assignments ``a.b=c``. The YAML is
the 1.2 core schema: ``off``, ``no`` and ``1:30`` are text, ``2e-4`` is a number, and a key that appears twice in one
mapping is an error. TOML files are read here too.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import inspect
import itertools
import math
import re
import reprlib
import sys
import textwrap
import types
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import yaml

from proxydet.detectron2_keys import counterparts, is_theirs
from proxydet.errors import ConfigError
from proxydet.files import read_text
from proxydet.wording import near_misses, nearest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")

_type_hints: Callable[[Any], dict[str, Any]] = functools.cache(get_type_hints)

_LINE_WIDTH = 110
_LARGEST_FILE = 200_000
_MOST_ROWS = 200
_MALFORMED = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What PyYAML and tomllib raise, besides their own errors, for nesting, tags and numbers that they did not expect."""

_LONG_KEY = re.compile(r"""(?:(?:(?<![\w-])[\w-]+|"[^"\n]*"|'[^'\n]*')[ \t]*\.[ \t]*){32}""")
"""A dotted key of TOML with so many parts that the tables it stands for fill the memory."""

_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = 80
_shown.maxlong = 40


# --- Mappings ---------------------------------------------------------------------------------------------------------


def from_mapping(cls: type[T], mapping: Mapping[str, Any], where: str = "") -> T:
    """Build a configuration from a mapping, strictly.

    Args:
        cls: A configuration dataclass.
        mapping: Its values by field name; nested configurations as mappings. Absent fields keep their default.
        where: Dotted path of this mapping in the whole configuration, for messages; empty at the root.

    Returns:
        An instance of ``cls``.

    Raises:
        ConfigError: A key is unknown or missing, or a value has the wrong type or is out of range.
    """
    values = _checked_items(cls, mapping, where)
    unset = dataclasses.MISSING
    missing = [
        f.name
        for f in dataclasses.fields(cast("Any", cls))
        if f.init and f.name not in values and f.default is unset and f.default_factory is unset
    ]
    if missing:
        raise ConfigError(
            f"{_join(where, missing[0])} is missing and has no default.",
            hint=f"{where or 'the configuration'} needs {', '.join(missing)}",
        )
    return _construct(lambda: cls(**values), where)


def merge(config: T, mapping: Mapping[str, Any], where: str = "") -> T:
    """Return a copy of a configuration with the values of a partial mapping in place of its own.

    Nested configurations are merged key by key; tuples and dictionaries are replaced whole. Values are checked against
    each other when all are in place.

    Raises:
        ConfigError: As `from_mapping`.
    """
    nested: dict[str, Any] = {}
    plain: dict[str, Any] = {}
    for key, value in mapping.items():
        current = getattr(config, str(key), None)
        if _is_config(current) and isinstance(value, Mapping):
            nested[key] = merge(current, value, _join(where, str(key)))
        else:
            plain[key] = value
    changes = {**_checked_items(type(config), plain, where, config), **nested}
    return _construct(lambda: cast("T", dataclasses.replace(cast("Any", config), **changes)), where)


def overlay(mapping: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping with the values of another in place of its own, mappings in it key by key."""
    merged = dict(mapping)
    for key, value in changes.items():
        inner = merged.get(key)
        if isinstance(inner, Mapping) and isinstance(value, Mapping):
            merged[key] = overlay(inner, value)
        else:
            merged[key] = value
    return merged


def to_mapping(config: Any) -> dict[str, Any]:
    """Turn a configuration into plain dictionaries, lists and scalars; `from_mapping` is its exact inverse."""
    return {name: _plain(getattr(config, name)) for name in field_types(type(config))}


def key_paths(cls: type, where: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted path and the type of every leaf key of a configuration class, in field order."""
    for name, annotation in field_types(cls).items():
        path = _join(where, name)
        nested = config_class(annotation)
        if nested is None:
            yield path, annotation
        else:
            yield from key_paths(nested, path)


def differences(first: Any, second: Any, where: str = "") -> dict[str, tuple[Any, Any]]:
    """Return the leaf keys in which two configurations of one class differ, with both values.

    Args:
        first: A configuration.
        second: Another one of the same class.
        where: Dotted path of both in the whole configuration.
    """
    found: dict[str, tuple[Any, Any]] = {}
    for name in field_types(type(first)):
        path = _join(where, name)
        left, right = getattr(first, name), getattr(second, name)
        if _is_config(left) and type(left) is type(right):
            found.update(differences(left, right, path))
        elif left != right:
            found[path] = (left, right)
    return found


def field_types(cls: type) -> Mapping[str, Any]:
    """Return the resolved annotation of each key of a configuration class, in field order."""
    hints = _type_hints(cls)
    names = [f.name for f in dataclasses.fields(cast("Any", cls)) if f.init]
    return types.MappingProxyType({name: hints[name] for name in names})


def config_class(annotation: Any) -> type | None:
    """Return the configuration dataclass that an annotation (``X`` or ``X | None``) holds, if any."""
    for member in _members(annotation):
        if isinstance(member, type) and dataclasses.is_dataclass(member):
            return member
    return None


def type_name(annotation: Any) -> str:
    """Say in words what an annotation accepts, as messages and the reference page print it."""
    if annotation is type(None):
        return "null"
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(member) for member in get_args(annotation))
    if origin is Literal:
        choices = ", ".join(repr(choice) for choice in get_args(annotation))
        return f"one of {choices}" if len(get_args(annotation)) > 1 else choices
    if origin is tuple:
        members = get_args(annotation)
        if members[-1] is Ellipsis:
            return f"list of {type_name(members[0])}"
        return f"list of {len(members)}: {', '.join(type_name(member) for member in members)}"
    if origin is dict:
        return f"mapping of names to {type_name(get_args(annotation)[1])}"
    words = {bool: "true or false", int: "integer", float: "number", str: "text", Path: "path"}
    return words.get(annotation) or ("mapping" if config_class(annotation) else str(annotation))


def _unknown_key_error(cls: type, key: str, where: str, root: type | None = None) -> ConfigError:
    """Build the error for a key that does not exist, naming the nearest ones that do.

    Args:
        cls: The class in which the key was looked for.
        key: The key.
        where: Dotted path of ``cls`` in the whole configuration.
        root: The whole configuration's class: its leaf keys are searched too.
    """
    known = list(field_types(cls))
    close = [_join(where, name) for name in near_misses(key, known, 2)]
    if root is not None and not close:
        leaves = [path for path, _ in key_paths(root)]
        close = [path for path in leaves if path.rsplit(".", 1)[-1] == key][:3]
        close = close or near_misses(_join(where, key), leaves, 2)
    meant = f" Did you mean {' or '.join(close)}?" if close else ""
    return ConfigError(
        f"{_join(where, key[:80])} is not a configuration key.{meant}",
        hint=f"keys of {where or 'the configuration'}: {', '.join(known)}",
    )


def _checked_items(
    cls: type, mapping: Mapping[str, Any], where: str, base: Any = None
) -> dict[str, Any]:
    if not isinstance(mapping, Mapping):
        raise _type_error(where, "mapping", mapping)
    known = field_types(cls)
    earlier = getattr(cls, "EARLIER", ())
    if any(key in mapping for key in earlier):
        mapping = cls.from_earlier(mapping, base)  # type: ignore[attr-defined]
    values = {}
    for key, value in mapping.items():
        if key not in known:
            raise _unknown_key_error(cls, str(key), where, None if where else cls)
        values[key] = _coerce(known[key], value, _join(where, key))
    return values


def _coerce(annotation: Any, value: Any, where: str) -> Any:
    """Check a plain value against an annotation and return it in the annotated type."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in get_args(annotation):
            return None
        others = [member for member in get_args(annotation) if member is not type(None)]
        if len(others) == 1:
            return _coerce(others[0], value, where)
        for member in others:
            with contextlib.suppress(ConfigError):
                return _coerce(member, value, where)
        raise _type_error(where, type_name(annotation), value)
    if origin is Literal:
        choices = get_args(annotation)
        if any(value == choice and type(value) is type(choice) for choice in choices):
            return value
        meant = nearest(str(value)[:80], [str(choice) for choice in choices])
        raise ConfigError(
            f"{where} must be {type_name(annotation)}; it is {_shown.repr(value)}.{meant}"
        )
    if origin is tuple:
        members = get_args(annotation)
        if isinstance(value, (list, tuple)):
            if members[-1] is Ellipsis:
                members = (members[0],) * len(value)
            if len(members) == len(value):
                pairs = enumerate(zip(members, value, strict=True))
                return tuple(_coerce(m, item, f"{where}[{i}]") for i, (m, item) in pairs)
        raise _type_error(where, type_name(annotation), value)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _type_error(where, type_name(annotation), value)
        inner = get_args(annotation)[1]
        return {str(k): _coerce(inner, v, _join(where, str(k))) for k, v in value.items()}
    nested = config_class(annotation)
    if nested is not None:
        return value if isinstance(value, nested) else from_mapping(nested, value, where)
    if annotation is Path and isinstance(value, str) and value:
        return Path(value)
    integer = isinstance(value, int) and not isinstance(value, bool)
    if integer and not -(2**63) <= value < 2**63:
        raise ConfigError(f"{where} is {_shown.repr(value)}, which does not fit into 64 bits.")
    if annotation is float and integer:
        return float(value)
    wrong = not isinstance(value, annotation) or (annotation is int and not integer)
    if wrong or (isinstance(value, float) and math.isnan(value)):
        raise _type_error(where, type_name(annotation), value)
    return value


def _plain(value: Any) -> Any:
    if _is_config(value):
        return to_mapping(value)
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value


def _construct(build: Callable[[], T], where: str) -> T:
    """Run a constructor whose ``__post_init__`` may refuse; put the place in front of its message."""
    try:
        return build()
    except ConfigError as error:
        if not where:
            raise
        raise ConfigError(f"{where}: {error.message}", hint=error.hint, path=error.path) from error


def _type_error(where: str, wanted: str, value: Any) -> ConfigError:
    given = "null" if value is None else f"{_shown.repr(value)} ({type(value).__name__})"
    articles = {"integer": "an ", "number": "a ", "path": "a ", "list": "a ", "mapping": "a "}
    article = articles.get(wanted.split()[0], "")
    listed = wanted.startswith("list") and isinstance(value, str)
    hint = (
        f"write a list in brackets, and in quotes for the shell: '{where}=[{value[:40]}]'"
        if listed
        else None
    )
    message = f"{where or 'the configuration'} must be {article}{wanted}; it is {given}."
    return ConfigError(message, hint=hint)


def _members(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) in (Union, types.UnionType):
        return get_args(annotation)
    return (annotation,)


def _is_config(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


# --- Text -------------------------------------------------------------------------------------------------------------


def _refused(message: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, message, mark)


class _Loader(yaml.SafeLoader):
    """Safe loading with YAML 1.2's idea of what a number and a truth value look like."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuse to repeat a list or mapping by its alias: a few lines of them stand for more than memory holds."""
        alias = self.check_event(yaml.AliasEvent)
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        node = super().compose_node(parent, index)
        if alias and not isinstance(node, yaml.ScalarNode):
            raise _refused("aliases (*name) of lists and mappings are not supported", mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Refuse keys that are lists or mappings, or given twice."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _refused("a list or mapping cannot be a key", key_node.start_mark)
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise _refused(f"duplicate key {_shown.repr(key)}", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Give the line of a value that does not fit its tag."""
        try:
            return super().construct_object(node, deep)
        except _MALFORMED as error:
            reason = f"{_reason(error)}: not a value of {node.tag}"
            raise _refused(reason, node.start_mark) from error

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """Read a decimal number (YAML 1.1 would read 010 as octal), or refuse one that no 64 bits hold."""
        text = str(self.construct_scalar(node))
        if node.tag.endswith("int"):
            if len(text) > 40:
                raise _refused("the number is too large", node.start_mark)
            return int(text)
        value = float(text.replace(".inf", "inf").replace(".nan", "nan").lower())
        if math.isinf(value) and "inf" not in text.lower():
            raise _refused("the number is too large", node.start_mark)
        return value


class _Dumper(yaml.SafeDumper):
    """Safe dumping that quotes exactly what `_Loader` would not read back as text."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        """Write values that are the same object as often as they occur."""
        return True


for _cls in (_Loader, _Dumper):
    _cls.yaml_implicit_resolvers = {}
    for _tag, _pattern, _first in (
        ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
        ("null", r"null|Null|NULL|~|", ["n", "N", "~", ""]),
        ("int", r"[-+]?[0-9]+", "-+0123456789"),
        (
            "float",
            r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
            "-+.0123456789",
        ),
    ):
        _cls.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first)
        )
_Loader.yaml_constructors = {
    tag: constructor
    for tag, constructor in _Loader.yaml_constructors.items()
    if tag is None or tag.rsplit(":", 1)[-1] in ("bool", "map", "null", "seq", "str")
}
for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.construct_number)


class _TextLoader(_Loader):
    """Takes every scalar as text: for lists of names, where ``007`` and ``off`` are what they look like."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 PyYAML's own


def _represent_text(dumper: _Dumper, value: str) -> yaml.ScalarNode:
    """Quote text with Unicode's own line breaks so that they are escaped: a plain key would lose them."""
    style = '"' if any(break_ in value for break_ in "\x85\u2028\u2029\ufeff") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _represent_text)


def parse_yaml(
    text: str, where: str = "the text", path: Path | None = None, *, only_text: bool = False
) -> Any:
    """Parse YAML text.

    Args:
        text: One YAML document.
        where: What the text is, for messages.
        path: The file it came from.
        only_text: Take every scalar as text, ``007``, ``off`` and nothing at all too.

    Raises:
        ConfigError: The text is not valid YAML; the message has the line.
    """
    try:
        return yaml.load(text, Loader=_TextLoader if only_text else _Loader)  # noqa: S506 - a subclass of SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        number = mark.line if mark is not None else 0
        reason = ": ".join(part for part in (error.context, error.problem) if part)
        template = "{{" in "".join(text.splitlines()[number : number + 1])
        raise _not_valid(where, "YAML", reason, path, line=number + 1, template=template) from error
    except yaml.reader.ReaderError as error:
        line, reason = (
            text.count("\n", 0, error.position) + 1,
            "a character that YAML does not allow",
        )
        raise _not_valid(where, "YAML", reason, path, line=line) from error
    except _MALFORMED as error:
        raise _not_valid(where, "YAML", _reason(error), path) from error


def load_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds one mapping; of an empty file that is empty.

    Raises:
        ConfigError: The file is absent, unreadable, not UTF-8, not YAML, not a mapping, or a configuration of detectron2: the
            message names the key here for each of its keys.
    """
    try:
        text = read_text(path, limit=_LARGEST_FILE, pipe=True)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"The configuration file {path} cannot be read: {error}",
            hint="give an existing YAML file; proxydet train --show-config prints one to start from",
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
    if is_theirs(value):
        rows = list(counterparts(value))
        shown = [f"  {key[:60]}: {ours.replace('`', '')}" for key, ours in rows[:_MOST_ROWS]]
        more = [f"  and {len(rows) - _MOST_ROWS} more"] if len(rows) > _MOST_ROWS else []
        lines = "\n".join([*shown, *more])
        raise ConfigError(
            f"{path} is a configuration of detectron2. Its keys, and what stands for them here:\n{lines}",
            hint="start from a recipe and set what differs: proxydet train --recipe r50 --set KEY=VALUE, or a YAML file with "
            "these keys",
            path=path,
        )
    return value


def parse_toml(text: str, where: str = "the text", path: Path | None = None) -> dict[str, Any]:
    """Parse TOML text; arguments as for `parse_yaml`.

    Raises:
        ConfigError: The text is not valid TOML; the message has the line.
    """
    try:
        if key := _LONG_KEY.search(text):
            raise ValueError(f"{key[0][:20]}... has too many parts")
        content: dict[str, Any] = tomllib.loads(text)
        waiting: list[Any] = [content]
        while waiting:
            value = waiting.pop()
            if isinstance(value, dict | list):
                waiting.extend(value.values() if isinstance(value, dict) else value)
            elif (
                isinstance(value, int) and value.bit_length() > 64
            ):  # Python cannot print the longest
                raise ValueError("an integer does not fit into 64 bits")
    except tomllib.TOMLDecodeError as error:
        raise _not_valid(where, "TOML", str(error), path) from error
    except _MALFORMED as error:
        raise _not_valid(where, "TOML", _reason(error), path) from error
    return content


def dump_yaml(config: Any, *, comments: bool = True) -> str:
    """Write a configuration as YAML, in field order.

    Args:
        config: A configuration dataclass.
        comments: Whether each field's documentation stands above it.

    Returns:
        Text from which `load_mapping` and `from_mapping` give an equal configuration.
    """
    return "\n".join(_lines(type(config), to_mapping(config), 0, comments)) + "\n"


def scalar_text(value: Any) -> str:
    """Write a plain value as YAML on one line."""
    text = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, width=2**31, allow_unicode=True
    )
    return text.removesuffix("\n").removesuffix("\n...")


def parse_overrides(cls: type, assignments: Iterable[str]) -> dict[str, Any]:
    """Turn assignments ``a.b=c`` into a mapping that `merge` takes; the later of two for one key wins.

    The value is YAML (``null``, ``[1, 2]``, ``{a: 1}``). Where the key takes text it is taken as it stands, unless it is
    in quotes; in lists of text, so is every item.

    Args:
        cls: The configuration's class.
        assignments: Such as ``training.iterations=1000``.

    Raises:
        ConfigError: An assignment has no ``=``, names no key, or its value is not YAML.
    """
    changes: dict[str, Any] = {}
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        key = key.strip()
        if not separator or not key:
            raise ConfigError(
                f"The override {assignment!r} is not of the form key=value.",
                hint="write for example --set training.iterations=1000",
            )
        members, text = _members(_key_type(cls, key)), text.strip()
        value: Any = text
        if not {str, Path}.intersection(members) or text.startswith(('"', "'")):
            only_text = any(_holds_text(member) for member in members)
            value = parse_yaml(text, f"The value of {key}", only_text=only_text)
        elif type(None) in members and text in ("null", "Null", "NULL", "~", ""):
            value = None
        for part in reversed(key.split(".")):
            value = {part: value}
        changes = overlay(changes, cast("dict[str, Any]", value))
    return changes


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


def _not_valid(
    where: str,
    kind: str,
    reason: str,
    path: Path | None,
    *,
    line: int | None = None,
    template: bool = False,
) -> ConfigError:
    place = where if line is None else f"{where}, line {line}"
    hint = "correct that line"
    if template:
        hint = "this looks like a template: put a value in place of {{ ... }}"
    elif path is None:
        hint = "correct the value, and put it in quotes for the shell"
    return ConfigError(f"{place} is not valid {kind}: {reason}", hint=hint, path=path)


def _reason(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "lists or mappings are nested too deeply"
    return str(error).split(";")[0] or type(error).__name__


def _key_type(root: type, key: str) -> Any:
    """Return the annotation of a dotted key.

    Raises:
        ConfigError: There is no such key.
    """
    cls, where = root, ""
    *parents, leaf = key.split(".")
    for part in parents:
        if part not in field_types(cls):
            raise _unknown_key_error(cls, part, where, root)
        nested = config_class(field_types(cls)[part])
        where = _join(where, part)
        if nested is None:
            raise ConfigError(
                f"{key} is not a configuration key: {where} has no {leaf} in it.",
                hint="proxydet train --recipe small --show-config lists every key",
            )
        cls = nested
    if leaf in getattr(cls, "EARLIER", ()):
        return Any  # it is what YAML says
    if leaf not in field_types(cls):
        raise _unknown_key_error(cls, leaf, where, root)
    return field_types(cls)[leaf]


def _holds_text(annotation: Any) -> bool:
    """Whether an annotation is a list or mapping of texts or paths."""
    inner = [member for member in get_args(annotation) if member is not Ellipsis]
    if get_origin(annotation) is dict:
        inner = inner[1:]
    return get_origin(annotation) in (tuple, dict) and all(
        member in (str, Path) or _holds_text(member) for member in inner
    )


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
