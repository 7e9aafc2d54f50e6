"""Run code around the execution of chosen modules, so that an old library works without editing its files.

A repair is a context manager that gets the module: what it does before the ``yield`` happens before the
module's own code runs, what it does after happens once that code has run. Nothing outside the module needs to
change for longer than its import.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

Repair = Callable[[ModuleType], AbstractContextManager[None]]


class RepairFinder(MetaPathFinder):
    """Finds the modules that have a repair, as the other finders do, and wraps their execution.

    Args:
        repairs: The repair of each module, by full module name.
    """

    def __init__(self, repairs: dict[str, Repair]) -> None:
        self.repairs = dict(repairs)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find a module that has a repair; None for all others, which leaves them to the other finders."""
        repair = self.repairs.get(fullname)
        if repair is None:
            return None
        spec = self._find_elsewhere(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _RepairingLoader(spec.loader, repair)
        return spec

    def install(self) -> None:
        """Repair the modules that are loaded already, and wait for the others."""
        for name, repair in self.repairs.items():
            loaded = sys.modules.get(name)
            if loaded is not None:
                with repair(loaded):
                    pass
        sys.meta_path.insert(0, self)

    def _find_elsewhere(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None
    ) -> ModuleSpec | None:
        for finder in sys.meta_path:
            if finder is self:
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                return spec
        return None


class _RepairingLoader(Loader):
    """Stands for another loader until the module runs; that loader may serve other modules too."""

    def __init__(self, loader: Loader, repair: Repair) -> None:
        self._loader = loader
        self._repair = repair

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # From here on the module looks as if it had been found the ordinary way, to inspect and pickle too.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        with self._repair(module):
            self._loader.exec_module(module)


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
        # Not hasattr: numpy warns when it is asked for names that it used to have.
        self.__dict__.update({k: v for k, v in extra.items() if k not in vars(module)})
        self.__dict__["_module"] = module

    def __getattr__(self, name: str) -> object:
        return getattr(self.__dict__["_module"], name)
