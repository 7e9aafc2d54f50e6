"""Python paths in a configuration: found in packages and in the working folder, and refused with key, path and reason."""

from __future__ import annotations

import pytest

from proxydet.errors import ConfigError, DataError
from proxydet.extensions import build_extension, load_extension, python_path, require_signature


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Write a module of one's own into the working folder; its name is new each time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])

    def write(text: str, name: str = f"own_{tmp_path.name}") -> str:
        (tmp_path / f"{name}.py").write_text(text)
        return name

    return write


def test_a_module_in_the_working_folder_is_found(own):
    module = own(
        "class Outer:\n    class Inner:\n        def __init__(self, a, b=1): self.sum = a + b\n"
    )
    path = f"{module}:Outer.Inner"
    assert build_extension(path, "losses.criterion", {"b": 4}, a=3).sum == 7
    assert python_path(load_extension(path, "losses.criterion"), "criterion") == path


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("no_such_package.losses:Mine", "no module no_such_package"),
        ("json:Mine", "no Mine"),
        ("json:load", "Did you mean 'loads'"),
        ("json", "must be a Python path"),
        ("os.path.join(1)", "must be a Python path"),
        ("../mine.py:Mine", "must be a Python path"),
    ],
)
def test_what_is_not_there_is_refused_with_key_and_path(path, reason):
    name = path.replace("json:load", "json:laods")
    with pytest.raises(ConfigError, match=r"some\.key") as caught:
        load_extension(name, "some.key")
    assert reason in caught.value.message
    assert name in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import no_such_dependency_of_mine", "no_such_dependency_of_mine, which is not installed"),
        ("def broken(:", "SyntaxError"),
        ("1 / 0", "line 1"),
    ],
)
def test_a_module_that_does_not_import(own, text, reason):
    with pytest.raises(ConfigError) as caught:
        load_extension(f"{own(text)}:Mine", "some.key")
    assert reason in caught.value.message


def test_parameters_are_checked_before_anything_is_called(own):
    module = own("def two(a, b): raise KeyError('x')\nVALUE = 3\n")
    with pytest.raises(ConfigError, match="two"):
        build_extension(f"{module}:two", "some.key", {"c": 1}, a=1)
    with pytest.raises(ConfigError, match=r"KeyError.*line 1"):
        build_extension(f"{module}:two", "some.key", {"b": 1}, a=1)
    with pytest.raises(ConfigError, match="int"):
        require_signature(load_extension(f"{module}:VALUE", "some.key"), "some.key", "VALUE")


def test_errors_of_ours_and_lack_of_memory_stay_what_they_are(own):
    module = own(
        "from proxydet.errors import DataError\n"
        "def ours(): raise DataError('x')\n"
        "def memory(): raise MemoryError\n"
    )
    with pytest.raises(DataError):
        build_extension(f"{module}:ours", "some.key", {})
    with pytest.raises(MemoryError):
        build_extension(f"{module}:memory", "some.key", {})


def test_what_has_no_path_cannot_be_an_argument():
    class Local:
        pass

    for thing in (Local, lambda: None, Local()):
        with pytest.raises(ConfigError, match="criterion"):
            python_path(thing, "criterion")
