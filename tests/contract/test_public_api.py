"""The public names: what `__all__` promises is there, and nothing else."""

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest

import proxydet

ROOT = ast.parse(Path(str(proxydet.__file__)).read_text(encoding="utf-8"))
LAZY = sorted(proxydet._HOME)


@pytest.mark.parametrize("name", LAZY)
def test_each_name_is_defined_in_its_module(name):
    """Read from the source, so that no torch is loaded for it."""
    spec = find_spec(proxydet._HOME[name])
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    defined = {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)
    }
    assert name in defined


def test_all_is_the_lazy_names_and_what_is_always_there():
    assert set(proxydet.__all__) == {*LAZY, "__version__", "errors"}
    assert dir(proxydet) == sorted(proxydet.__all__)


def test_type_checkers_see_the_same_names_from_the_same_modules():
    [block] = [node for node in ROOT.body if isinstance(node, ast.If)]
    seen = {
        alias.asname or alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == {**proxydet._HOME, "errors": "proxydet"}


def test_no_submodule_hides_a_public_name():
    folder = Path(str(proxydet.__file__)).parent
    assert not {path.stem for path in folder.iterdir()} & set(LAZY)


def test_names_load_on_use():
    from proxydet.vocabulary.vocabulary import Vocabulary

    assert proxydet.Vocabulary is Vocabulary
    assert proxydet.errors.ProxydetError.exit_code == 1


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'Detektor'"):
        _ = proxydet.Detektor
