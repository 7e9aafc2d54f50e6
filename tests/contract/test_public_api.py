"""The public names: what `__all__` promises is there, and nothing else."""

import ast
import re
from importlib import import_module
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


FENCE = re.compile(r"^ *```python\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def wrong_names(code: str) -> list[str]:
    """Imports from the package that fail, and attributes of ``detector`` that no detector has."""
    detector = proxydet.Detector
    wrong = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "proxydet":
            module = import_module(str(node.module))
            names = [alias.name for alias in node.names]
            wrong += [f"{node.module}.{name}" for name in names if not hasattr(module, name)]
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) == "detector":
            known = hasattr(detector, node.attr) or node.attr in detector.__init__.__code__.co_names
            wrong += [] if known else [f"detector.{node.attr}"]
    return wrong


def test_the_python_of_the_documentation_names_what_exists(repository):
    code = "detector.exemplars([])\nfrom proxydet.detector import Exemplars"
    assert len(wrong_names(code)) == 2
    pages = [repository / "README.md", *(repository / "docs").rglob("*.md")]
    blocks = [
        (page.name, block) for page in pages for block in FENCE.findall(page.read_text("utf-8"))
    ]
    assert len(blocks) > 20
    assert [(page, wrong) for page, block in blocks for wrong in wrong_names(block)] == []
