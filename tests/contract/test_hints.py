"""Every error about what a user gave says what to do next.

Left out are errors of configuration values, whose message names the allowed values, and those inside ``artifacts``, which are
collected and get their hint where the download as a whole is reported.
"""

from __future__ import annotations

import ast

WITH_HINTS = {
    "CheckpointError",
    "DataError",
    "DiskFullError",
    "RuntimeEnvironmentError",
    "InputError",
    "MissingDependencyError",
    "NumericsError",
    "TrainingError",
    "VocabularyError",
}


def raised_without_hint(tree: ast.Module) -> list[int]:
    """Return the lines that make such an error without a hint."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in WITH_HINTS
        and not any(keyword.arg in ("hint", None) for keyword in node.keywords)
    ]


def test_errors_have_hints(trees):
    assert len(trees) > 100
    found = [
        f"{path}:{line}"
        for path, tree in trees.items()
        if path.parent.name != "artifacts"
        for line in raised_without_hint(tree)
    ]
    assert found == []


def test_the_check_sees_what_it_looks_for():
    source = 'raise DataError("no")\nraise DataError("no", hint="yes")\nraise ValueError("no")\n'
    assert raised_without_hint(ast.parse(source)) == [1]


def named_pages(tree: ast.Module) -> list[str]:
    """Return the texts, but docstrings, that name a page of docs/, which an installed package does not have."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    } | {
        id(after.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for after in node.body
        if isinstance(after, ast.Expr)
    }
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and id(node) not in docstrings
        and "docs/" in node.value
        and ".md" in node.value
    ]


def test_messages_name_no_page_that_is_not_installed(trees):
    found = {str(path): named_pages(tree) for path, tree in trees.items()}
    assert {path: texts for path, texts in found.items() if texts} == {}
    assert named_pages(ast.parse('"""See docs/a.md."""\nraise DataError("see docs/b.md")')) == [
        "see docs/b.md"
    ]
