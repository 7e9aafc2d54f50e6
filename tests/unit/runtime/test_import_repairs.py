from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import pytest

from proxydet.runtime.detectron2 import (
    RepairFinder,
)
from proxydet.runtime.stand_ins import temporary_attribute


@pytest.fixture
def old_library(tmp_path, monkeypatch) -> Iterator[str]:
    """A module that cannot be imported until `helper.GONE` exists."""
    name = "old_library_of_the_test"
    (tmp_path / f"{name}.py").write_text("import helper_of_the_test as h\nVALUE = h.GONE\n")
    (tmp_path / "helper_of_the_test.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    finders = list(sys.meta_path)
    yield name
    sys.meta_path[:] = finders
    for module in (name, "helper_of_the_test"):
        sys.modules.pop(module, None)


@contextmanager
def give_gone(module: ModuleType) -> Iterator[None]:
    helper = importlib.import_module("helper_of_the_test")
    with temporary_attribute(helper, "GONE", 7):
        yield
    module.__dict__["REPAIRED"] = True


def test_repair_runs_around_the_module(old_library):
    RepairFinder({old_library: give_gone}).install()
    module = importlib.import_module(old_library)
    assert module.VALUE == 7
    assert module.REPAIRED
    assert not hasattr(importlib.import_module("helper_of_the_test"), "GONE")


def test_module_loaded_before_is_repaired_too(old_library):
    loaded = sys.modules[old_library] = ModuleType(old_library)
    RepairFinder({old_library: give_gone}).install()
    assert loaded.__dict__["REPAIRED"]


def test_repaired_module_keeps_its_ordinary_loader_and_source(old_library):
    RepairFinder({old_library: give_gone}).install()
    module = importlib.import_module(old_library)
    assert module.__spec__ is not None
    assert module.__spec__.loader is module.__loader__
    assert "Repair" not in type(module.__loader__).__name__
    assert module.__file__ is not None
    assert module.__file__.endswith(f"{old_library}.py")


def test_finder_ignores_other_modules_and_ones_that_do_not_exist():
    finder = RepairFinder({"no_such_module_of_the_test": give_gone})
    assert finder.find_spec("json", None) is None
    assert finder.find_spec("no_such_module_of_the_test", None) is None


def test_temporary_attribute_goes_when_the_block_fails():
    owner = SimpleNamespace()
    with pytest.raises(ZeroDivisionError), temporary_attribute(owner, "extra", 2):
        _ = owner.extra / 0
    assert not hasattr(owner, "extra")
