"""Imports go one way: vocabulary -> data -> modeling -> losses -> training -> evaluation."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

SHARED = 0
RANK = {
    # What everyone may use, and what uses nothing but that.
    **dict.fromkeys(
        [
            "errors",
            "files",
            "weight_files",
            "reporting",
            "wording",
            "paths",
            "_version",
            "config",
            "detectron2_keys",
            "extensions",
            "runtime",
            "artifacts",
            "hub",
        ],
        SHARED,
    ),
    "manifest": SHARED,
    "visualization": SHARED,  # draws what it is given
    "vocabulary": 1,
    "data": 2,
    "modeling": 3,
    "losses": 4,
    "models": 5,
    "detections": 5,
    "detector": 5,
    **dict.fromkeys(["inference", "index"], 5),
    "serve": 6,
    "export": 6,
    "training": 7,
    "evaluation": 8,
    # What puts everything together.
    **dict.fromkeys(
        [
            "",
            "recipes",
            "quickstart",
            "training_run",
            "finetune",
            "publishing",
            "runtime.run_comparison",
            "runtime.determinism",
        ],
        10,
    ),
}


def module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Names of our modules that a file imports when it runs, at any depth, and the line."""
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test).endswith("TYPE_CHECKING")
        for statement in block.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] in {"proxydet", "proxydet_cli"}:
                yield name, node.lineno


def part(name: str) -> str:
    """The module or package below `proxydet` that a name belongs to; a module with a rank of its own is its own part."""
    parts = name.split(".")[1:]
    own = ".".join(parts[:2])
    return own if own in RANK else ".".join(parts[:1])


def test_imports_go_one_way(trees):
    core = {path: tree for path, tree in trees.items() if path.parts[0] == "proxydet"}
    assert {part(module_name(path)) for path in core} <= set(RANK), "give the new module a rank"
    for path, tree in core.items():
        own = part(module_name(path))
        for name, line in imported(tree):
            where = f"{path}:{line} imports {name}"
            assert name.split(".")[0] == "proxydet", (
                f"{where}: the core is complete without the CLI"
            )
            other = part(name)
            if other == own or name == "proxydet":
                continue
            assert RANK[other] <= RANK[own], f"{where}: it comes later on the way"
            equals = RANK[other] == RANK[own]
            assert not equals or RANK[own] in (SHARED, RANK["detector"], RANK[""]), where


def test_package_files_import_nothing_of_ours(trees):
    """They hold a docstring, or offer names that are imported when they are first used."""
    for path, tree in trees.items():
        if path.name == "__init__.py":
            assert isinstance(tree.body[0], ast.Expr), path
            assert {name for name, _ in imported(tree)} <= {"proxydet._version.__version__"}, path


def test_imports_have_no_circle_and_at_most_ten_floors(trees):
    """Imports inside functions included: a chain of them is as long a way to read."""
    named = {module_name(path): tree for path, tree in trees.items()}
    below = {
        name: {other if other in named else other.rpartition(".")[0] for other, _ in imported(tree)}
        & (named.keys() - {name})
        for name, tree in named.items()
    }
    chains: dict[str, list[str]] = {}
    for name in TopologicalSorter(below).static_order():  # raises CycleError for a circle
        chains[name] = [name, *max((chains[other] for other in below[name]), key=len, default=[])]
    longest = max(chains.values(), key=len)
    assert len(longest) <= 10, " > ".join(longest)
