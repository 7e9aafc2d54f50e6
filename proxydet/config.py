"""Strict, typed configuration: dataclass to mapping and back, with errors that name the key and the near miss.

A configuration is a tree of frozen keyword-only dataclasses, each defined next to the code that reads it. This
module knows none of them: it reads their annotations. Supported field types are ``bool``, ``int``, ``float``,
``str``, ``Path``, ``Literal``, ``tuple[...]``, ``dict[str, ...]``, other configuration dataclasses, and ``X | None``.

Text form (YAML), comments and overrides from the command line are in `proxydet.config_text`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from proxydet.errors import ConfigError

T = TypeVar("T")

_ARTICLES = {"integer": "an ", "number": "a ", "path": "a ", "list": "a ", "mapping": "a "}


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
    missing = [f.name for f in _init_fields(cls) if f.name not in values and not _has_default(f)]
    if missing:
        raise ConfigError(
            f"{_join(where, missing[0])} is missing and has no default.",
            hint=f"Keys that {_name(where)} needs: {', '.join(missing)}.",
        )
    return _construct(lambda: cls(**values), where)


def merge(config: T, mapping: Mapping[str, Any], where: str = "") -> T:
    """Return a copy of a configuration with the values of a partial mapping in place of its own.

    Nested configurations are merged key by key; tuples and dictionaries are replaced whole.

    Raises:
        ConfigError: As `from_mapping`.
    """
    cls = type(config)
    nested: dict[str, Any] = {}
    plain: dict[str, Any] = {}
    for key, value in mapping.items():
        current = getattr(config, str(key), None)
        if _is_config(current) and isinstance(value, Mapping):
            nested[key] = merge(current, value, _join(where, str(key)))
        else:
            plain[key] = value
    changes = {**_checked_items(cls, plain, where), **nested}
    return _construct(lambda: cast("T", dataclasses.replace(cast("Any", config), **changes)), where)


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
    hints = get_type_hints(cls)
    return types.MappingProxyType({f.name: hints[f.name] for f in _init_fields(cls)})


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
        return "one of " + ", ".join(repr(choice) for choice in get_args(annotation))
    if origin is tuple:
        members = get_args(annotation)
        if members[-1] is Ellipsis:
            return f"list of {type_name(members[0])}"
        return f"list of {len(members)}: {', '.join(type_name(member) for member in members)}"
    if origin is dict:
        return f"mapping of names to {type_name(get_args(annotation)[1])}"
    words = {bool: "true or false", int: "integer", float: "number", str: "text", Path: "path"}
    return words.get(annotation) or ("mapping" if config_class(annotation) else str(annotation))


def unknown_key_error(cls: type, key: str, where: str, root: type | None = None) -> ConfigError:
    """Build the error for a key that does not exist, naming the nearest ones that do.

    Args:
        cls: The class in which the key was looked for.
        key: The key.
        where: Dotted path of ``cls`` in the whole configuration.
        root: The whole configuration's class: its leaf keys are searched too.
    """
    known = list(field_types(cls))
    close = [_join(where, name) for name in difflib.get_close_matches(key, known, n=2)]
    if root is not None and not close:
        leaves = [path for path, _ in key_paths(root)]
        close = [path for path in leaves if path.rsplit(".", 1)[-1] == key][:3]
        close = close or difflib.get_close_matches(_join(where, key), leaves, n=2)
    nearest = f" Did you mean {' or '.join(close)}?" if close else ""
    return ConfigError(
        f"{_join(where, key)} is not a configuration key.{nearest}",
        hint=f"Keys of {_name(where)}: {', '.join(known)}.",
    )


def _checked_items(cls: type, mapping: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(mapping, Mapping):
        raise _type_error(where, "mapping", mapping)
    known = field_types(cls)
    values = {}
    for key, value in mapping.items():
        if key not in known:
            raise unknown_key_error(cls, str(key), where, None if where else cls)
        values[key] = _coerce(known[key], value, _join(where, key))
    return values


def _coerce(annotation: Any, value: Any, where: str) -> Any:
    """Check a plain value against an annotation and return it in the annotated type."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return _coerce_union(annotation, value, where)
    if origin is Literal:
        return _coerce_literal(annotation, value, where)
    if origin is tuple:
        return _coerce_tuple(annotation, value, where)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _type_error(where, type_name(annotation), value)
        inner = get_args(annotation)[1]
        return {str(k): _coerce(inner, v, _join(where, str(k))) for k, v in value.items()}
    nested = config_class(annotation)
    if nested is not None:
        return value if isinstance(value, nested) else from_mapping(nested, value, where)
    return _coerce_scalar(annotation, value, where)


def _coerce_scalar(annotation: Any, value: Any, where: str) -> Any:
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if annotation is Path and isinstance(value, str) and value:
        return Path(value)
    wrong = not isinstance(value, annotation) or (annotation is int and isinstance(value, bool))
    if wrong or (isinstance(value, float) and math.isnan(value)):
        raise _type_error(where, type_name(annotation), value)
    return value


def _coerce_union(annotation: Any, value: Any, where: str) -> Any:
    members = get_args(annotation)
    if value is None and type(None) in members:
        return None
    wanted = [member for member in members if member is not type(None)]
    if len(wanted) == 1:
        return _coerce(wanted[0], value, where)
    for member in wanted:
        try:
            return _coerce(member, value, where)
        except ConfigError:
            continue
    raise _type_error(where, type_name(annotation), value)


def _coerce_literal(annotation: Any, value: Any, where: str) -> Any:
    choices = get_args(annotation)
    if any(value == choice and type(value) is type(choice) for choice in choices):
        return value
    close = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1)
    nearest = f" Did you mean {close[0]!r}?" if close else ""
    raise ConfigError(f"{where} must be {type_name(annotation)}; it is {value!r}.{nearest}")


def _coerce_tuple(annotation: Any, value: Any, where: str) -> tuple[Any, ...]:
    members = get_args(annotation)
    if not isinstance(value, (list, tuple)):
        raise _type_error(where, type_name(annotation), value)
    if members[-1] is Ellipsis:
        members = (members[0],) * len(value)
    if len(members) != len(value):
        raise _type_error(where, type_name(annotation), value)
    return tuple(
        _coerce(member, item, f"{where}[{index}]")
        for index, (member, item) in enumerate(zip(members, value, strict=True))
    )


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
    given = "null" if value is None else f"{value!r} ({type(value).__name__})"
    article = _ARTICLES.get(wanted.split()[0], "")
    return ConfigError(f"{_name(where)} must be {article}{wanted}; it is {given}.")


def _init_fields(cls: Any) -> list[dataclasses.Field[Any]]:
    return [f for f in dataclasses.fields(cls) if f.init]


def _has_default(field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.default is not missing or field.default_factory is not missing


def _members(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) in (Union, types.UnionType):
        return get_args(annotation)
    return (annotation,)


def _is_config(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _name(where: str) -> str:
    return where or "the configuration"
