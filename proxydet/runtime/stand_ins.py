"""Names and modules that code of others finds while it is imported, or in its own view of a module, and nobody else."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


@contextmanager
def temporary_attribute(owner: object, name: str, value: object) -> Iterator[None]:
    """Give ``owner`` an attribute that it lacks, for the length of the block; one it has is left alone."""
    if hasattr(owner, name):
        yield
        return
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name)


@contextmanager
def temporary_module(name: str, module: ModuleType) -> Iterator[None]:
    """Make ``module`` importable as ``name`` for the length of the block."""
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        yield
    finally:
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before


class NamespaceOverlay(ModuleType):
    """A module as one of its users sees it: its own names, and a few more that only this user gets.

    Args:
        module: The module behind it.
        extra: The names to add; one that the module has keeps the module's value.
    """

    def __init__(self, module: ModuleType, extra: dict[str, object]) -> None:
        super().__init__(module.__name__, module.__doc__)
        self.__dict__.update({**extra, **vars(module), "_module": module})

    def __getattr__(self, name: str) -> object:
        return getattr(self.__dict__["_module"], name)
