"""Strict configuration: types, near misses, YAML, overrides, exact round trips."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxydet.config import (
    differences,
    dump_yaml,
    field_docs,
    from_mapping,
    key_paths,
    load_mapping,
    merge,
    parse_overrides,
    parse_toml,
    parse_yaml,
    to_mapping,
    type_name,
)
from proxydet.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Optimiser:
    learning_rate: float = 2e-4
    """Step size after warm-up."""

    momentum: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the moments:
    first, then second."""

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ConfigError("learning_rate must be positive.")


@dataclass(frozen=True, kw_only=True)
class Run:
    name: str
    mode: Literal["off", "published", "strict"] = "off"
    iterations: int = 10
    fast: bool = False
    folder: Path | None = None
    sizes: tuple[int, ...] = (640, 320)
    extra: dict[str, float] = field(default_factory=dict)
    optimiser: Optimiser = field(default_factory=Optimiser)
    second: Optimiser | None = None
    title: str | None = None
    tags: tuple[str, ...] = ()
    folders: tuple[Path, ...] = ()
    pairs: tuple[tuple[float, float], ...] = ()
    labels: dict[str, str] = field(default_factory=dict)
    low: int = 1
    high: int = 2

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ConfigError("low must not be above high")


def message(mapping: dict, cls: type = Run) -> str:
    with pytest.raises(ConfigError) as caught:
        from_mapping(cls, mapping)
    return f"{caught.value.message} / {caught.value.hint}"


def test_defaults_and_nested_values():
    run = from_mapping(Run, {"name": "a", "optimiser": {"learning_rate": 1}, "sizes": [1, 2, 3]})
    assert run == Run(name="a", optimiser=Optimiser(learning_rate=1.0), sizes=(1, 2, 3))
    assert isinstance(run.optimiser.learning_rate, float)


@pytest.mark.parametrize(
    ("mapping", "expected"),
    [
        ({"name": "a", "iteration": 3}, "Did you mean iterations?"),
        ({"name": "a", "optimiser": {"learn_rate": 1.0}}, "optimiser.learning_rate"),
        ({"name": "a", "learning_rate": 1.0}, "Did you mean optimiser.learning_rate"),
        ({"name": "a", "iterations": "many"}, "iterations must be an integer; it is 'many' (str)"),
        ({"name": "a", "iterations": True}, "iterations must be an integer"),
        ({"name": "a", "iterations": 1.0}, "iterations must be an integer"),
        ({"name": "a", "fast": 1}, "fast must be true or false"),
        ({"name": 3}, "name must be text"),
        ({"name": None}, "name must be text; it is null"),
        ({"name": "a", "mode": "publish"}, "Did you mean 'published'?"),
        ({"name": "a", "mode": False}, "mode must be one of"),
        ({"name": "a", "optimiser": 3}, "optimiser must be a mapping"),
        ({"name": "a", "optimiser": None}, "optimiser must be a mapping"),
        ({"name": "a", "optimiser": {"betas": [0.9]}}, "optimiser.betas must be a list of 2"),
        ({"name": "a", "sizes": [1, "b"]}, "sizes[1] must be an integer"),
        ({"name": "a", "sizes": "12"}, "sizes must be a list of integer"),
        ({"name": "a", "extra": {"k": "v"}}, "extra.k must be a number"),
        ({"name": "a", "optimiser": {"learning_rate": math.nan}}, "learning_rate must be a number"),
        ({"name": "a", "optimiser": {"learning_rate": -1}}, "optimiser: learning_rate must be"),
        ({}, "name is missing"),
    ],
)
def test_bad_mappings_name_the_key(mapping, expected):
    assert expected in message(mapping)


def test_merge_keeps_what_is_not_named():
    run = Run(name="a", optimiser=Optimiser(learning_rate=1.0, momentum=0.5))
    merged = merge(run, {"optimiser": {"momentum": None}, "second": {"learning_rate": 3.0}})
    assert merged.optimiser == Optimiser(learning_rate=1.0)
    assert merged.second == Optimiser(learning_rate=3.0)
    with pytest.raises(ConfigError, match="optimiser: learning_rate must be positive"):
        merge(run, {"optimiser": {"learning_rate": 0.0}})


def overridden(*assignments: str) -> Run:
    return merge(Run(name="a"), parse_overrides(Run, assignments))


@pytest.mark.parametrize(
    ("assignment", "field", "value"),
    [
        ("name=007", "name", "007"),
        ("name='null'", "name", "null"),
        ("name=null", "name", "null"),
        ("name=", "name", ""),
        ("name=@{x}: [y", "name", "@{x}: [y"),
        ("mode=off", "mode", "off"),
        ("fast=true", "fast", True),
        ("folder=1", "folder", Path("1")),
        ("folder=null", "folder", None),
        ("folder=C:\\x #1", "folder", Path("C:\\x #1")),
        ("title=~", "title", None),
        ("title='~'", "title", "~"),
        ("sizes=[5]", "sizes", (5,)),
        ("sizes=[]", "sizes", ()),
        ("tags=[off, 007, 'a, b', \"c\"]", "tags", ("off", "007", "a, b", "c")),
        ("folders=[a b, 1]", "folders", (Path("a b"), Path("1"))),
        ("pairs=[[1, 2], [3, .inf]]", "pairs", ((1.0, 2.0), (3.0, math.inf))),
        ("extra={k: 1}", "extra", {"k": 1.0}),
        ("labels={k: 1}", "labels", {"k": "1"}),
        ("optimiser.learning_rate=1e-5", "optimiser", Optimiser(learning_rate=1e-5)),
        ("optimiser={momentum: 2}", "optimiser", Optimiser(momentum=2.0)),
        ("second={momentum: 2}", "second", Optimiser(momentum=2.0)),
        ("second.momentum=2", "second", Optimiser(momentum=2.0)),
        ("second=null", "second", None),
    ],
)
def test_an_override_of_every_type(assignment, field, value):
    assert overridden(assignment) == dataclasses.replace(Run(name="a"), **{field: value})


def test_overrides_are_checked_together():
    both = ["low=8", "high=9"]
    assert overridden(*both) == overridden(*reversed(both)) == Run(name="a", low=8, high=9)
    with pytest.raises(ConfigError, match="low must not be above high"):
        overridden("low=8")
    assert overridden("sizes=[1]", "sizes=[2]").sizes == (2,)
    assert overridden("optimiser={momentum: 1}", "optimiser.momentum=2").optimiser.momentum == 2
    assert overridden("second=null", "second.momentum=2").second == Optimiser(momentum=2.0)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("iterations", "not of the form key=value"),
        ("optimizer.learning_rate=1", "Did you mean optimiser"),
        ("learning_rate=1", "Did you mean optimiser.learning_rate"),
        ("iterations.x=1", "iterations has no x in it"),
        ("sizes=[1", "not valid YAML"),
        ("iterations=ten", "iterations must be an integer"),
        ("iterations={{ N }}", "The value of iterations, line 1"),
        ("iterations=" + "[" * 3000, "nested too deeply"),
        ("iterations=" + "9" * 5000, "too large"),
        ("iterations=" + "9" * 30, "does not fit into 64 bits"),
        ("optimiser.learning_rate=1e999", "too large"),
        ("tags=bbox", "tags must be a list of text"),
        ("tags=[[a]]", "tags[0] must be text"),
        ("iterations=[&a [1], *a]", "aliases"),
    ],
)
def test_bad_overrides(override, expected):
    with pytest.raises(ConfigError) as caught:
        overridden(override)
    assert expected in caught.value.message


def test_yaml_is_the_core_schema():
    text = "a: off\nb: 2e-4\nc: 1:30\nd: 010\ne: 2020-01-01\nf: ~\ng: .inf\nh: yes\ni: '1'\nj: 1."
    assert parse_yaml(text) == {
        "a": "off",
        "b": 2e-4,
        "c": "1:30",
        "d": 10,
        "e": "2020-01-01",
        "f": None,
        "g": math.inf,
        "h": "yes",
        "i": "1",
        "j": 1.0,
    }
    with pytest.raises(ConfigError, match="duplicate key"):
        parse_yaml("a: 1\na: 2")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("!!python/object:os.system {}", 1),
        ("a: 1\nb: {{ SEED }}\n", 2),
        ("a:\n\tb: 1", 2),
        ("a: 1\n\nb: \x07", 3),
        ("a: 1\n---\nb: 2", 2),
        ("a: 1\nb: !!bool maybe", 2),
        ("a: 1\nb: !!timestamp soon", 2),
        ("a: " + "[" * 5000, None),
        ("a: 1\nb: 1" + "0" * 5000, 2),
        ("a: 1e400", 1),
        ("[a]: 1", 1),
        ("a: &x [1]\nb: [*x, *x]", 2),
        ("a: &x [*x]", 1),
    ],
)
def test_malformed_yaml_is_refused_with_its_line(text, line, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match="not valid YAML") as caught:
        load_mapping(file)
    assert caught.value.path == file
    assert str(file) in caught.value.message
    assert line is None or f"line {line}" in caught.value.message
    assert len(caught.value.message) < 500


@pytest.mark.parametrize(
    "text",
    [
        "a = {{ SEED }}",
        "a = " + "[" * 5000,
        "a = 1" + "0" * 5000,
        "a = 1\na = 2",
        "a = [1,,]",
        "a." * 100_000 + "b = 1",
        "a = [{b = 0x" + "f" * 50_000 + "}]",
    ],
)
def test_malformed_toml_is_refused(text):
    started = time.process_time()
    with pytest.raises(ConfigError, match=r"my\.toml.*not valid TOML"):
        parse_toml(text, "my.toml")
    assert time.process_time() - started < 2


@given(st.text(alphabet="ab:-[]{}&*!|>'\"%@`#,?~01.e\n \t\x00", max_size=40))
def test_any_text_is_a_value_or_refused(text):
    for parse in (parse_yaml, parse_toml):
        try:
            value = parse(text)
        except ConfigError:
            continue
        with contextlib.suppress(ConfigError):
            from_mapping(Run, value)


def test_file_errors(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_mapping(tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="not a mapping"):
        load_mapping(tmp_path / "list.yaml")
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_mapping(tmp_path / "empty.yaml") == {}
    (tmp_path / "windows.yaml").write_bytes("a: é\r\nb: 1\r\n".encode("utf-16"))
    assert load_mapping(tmp_path / "windows.yaml") == {"a": "é", "b": 1}
    (tmp_path / "latin.yaml").write_bytes(b"a: 1\nb: \xe9\n")
    with pytest.raises(ConfigError, match="line 2"):
        load_mapping(tmp_path / "latin.yaml")
    (tmp_path / "large.yaml").write_bytes(b"#" * 2_000_000)
    with pytest.raises(ConfigError, match="larger"):
        load_mapping(tmp_path / "large.yaml")


texts = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=12)
numbers = st.floats(allow_nan=False)
wide = st.integers(-(2**63), 2**63 - 1)


@given(
    name=texts | st.sampled_from(["off", "1e-4", "null", "~", "", "a: b", "# x", "true", "1:30"]),
    iterations=wide,
    momentum=st.none() | numbers,
    sizes=st.lists(wide, max_size=3),
    extra=st.dictionaries(texts, numbers, max_size=3),
    rate=st.floats(min_value=1e-300, allow_infinity=True, exclude_min=True),
)
@example(name="a\x85b\u2028", iterations=0, momentum=None, sizes=[], extra={"\x85": 0.0}, rate=1.0)
def test_text_round_trip_is_exact(name, iterations, momentum, sizes, extra, rate):
    run = Run(
        name=name,
        iterations=iterations,
        sizes=tuple(sizes),
        extra=extra,
        optimiser=Optimiser(momentum=momentum, learning_rate=rate),
    )
    assert from_mapping(Run, to_mapping(run)) == run
    for comments in (True, False):
        assert from_mapping(Run, parse_yaml(dump_yaml(run, comments=comments))) == run


def test_documentation_stands_above_each_key():
    assert field_docs(Optimiser) == {
        "learning_rate": "Step size after warm-up.",
        "betas": "Decay of the moments: first, then second.",
    }
    text = dump_yaml(Run(name="a"))
    assert "  # Step size after warm-up.\n  learning_rate: 0.0002\n" in text
    assert "#" not in dump_yaml(Run(name="a"), comments=False)


def test_paths_types_and_differences():
    assert dict(key_paths(Run))["optimiser.betas"] == tuple[float, float]
    assert type_name(dict(key_paths(Run))["folder"]) == "path or null"
    first = Run(name="a")
    second = dataclasses.replace(first, iterations=3, optimiser=Optimiser(learning_rate=1.0))
    assert differences(first, second) == {
        "iterations": (10, 3),
        "optimiser.learning_rate": (2e-4, 1.0),
    }
