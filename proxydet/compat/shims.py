"""What detectron2 0.6 misses on current torch, numpy, Pillow and setuptools, and without its compiled part.

Each repair touches one detectron2 module in memory. No installed file changes, and neither numpy nor Pillow
keeps an attribute from here.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from proxydet.compat.import_repairs import (
    NamespaceOverlay,
    Repair,
    temporary_attribute,
    temporary_module,
)
from proxydet.errors import MissingDependencyError

COMPILED_MODULE = "detectron2._C"


class MissingOperators(ModuleType):
    """Stands in for ``detectron2._C`` where it is not compiled: importable, and an error when used.

    Args:
        load_failure: Why the compiled file does not load; None where there is no such file.
    """

    load_failure: str | None

    def __init__(self, load_failure: str | None = None) -> None:
        super().__init__(COMPILED_MODULE, "Stand-in for operators that are not compiled.")
        self.__spec__ = ModuleSpec(COMPILED_MODULE, None)
        self.load_failure = load_failure

    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

        def missing_operator(*_args: object, **_kwargs: object) -> NoReturn:
            why = self.load_failure or "this detectron2 is installed without them"
            raise MissingDependencyError(
                f"{name}, one of detectron2's compiled operators, was called, but {why}.",
                hint="ProxyDet never calls it; code that does needs detectron2 built from source with a compiler.",
            )

        return missing_operator


@contextmanager
def _bilinear_alias(_module: ModuleType) -> Iterator[None]:
    # Pillow 10 dropped Image.LINEAR; the module needs it once, as a default argument.
    from PIL import Image

    with temporary_attribute(Image, "LINEAR", Image.Resampling.BILINEAR):
        yield


@contextmanager
def _builtin_numpy_types(module: ModuleType) -> Iterator[None]:
    # numpy 1.24 dropped np.int, np.float and np.bool (2.0 brought the last one back); the module uses them when
    # called, so it keeps its own namespace.
    yield
    numpy = module.__dict__.get("np")
    if numpy is not None and not isinstance(numpy, NamespaceOverlay):
        module.__dict__["np"] = NamespaceOverlay(numpy, {"int": int, "float": float, "bool": bool})


@contextmanager
def _resource_filename(_module: ModuleType) -> Iterator[None]:
    # setuptools 82 dropped pkg_resources, and warned of it before; the model zoo uses one function of it.
    stand_in = ModuleType("pkg_resources")
    stand_in.__dict__["resource_filename"] = _path_in_package
    with temporary_module("pkg_resources", stand_in):
        yield


def _path_in_package(package: str, resource: str) -> str:
    from importlib.resources import files

    return str(Path(str(files(package))) / resource)


@contextmanager
def _clip_only_gradients(module: ModuleType) -> Iterator[None]:
    # torch raises on a parameter that has no gradient (a frozen layer, a head that this batch did not use).
    yield
    create = module.__dict__["_create_gradient_clipper"]
    if getattr(create, "clips_only_gradients", False):
        return

    def create_gradient_clipper(config: Any) -> Callable[[Any], None]:
        clip = create(config)

        def clip_those_with_gradient(parameters: Any) -> None:
            single = not isinstance(parameters, Iterable) or hasattr(parameters, "grad")
            candidates = [parameters] if single else list(parameters)
            present = [p for p in candidates if p.grad is not None]
            if present:
                clip(present)

        return clip_those_with_gradient

    create_gradient_clipper.__dict__["clips_only_gradients"] = True
    module.__dict__["_create_gradient_clipper"] = create_gradient_clipper


@contextmanager
def _python_coco_evaluation(module: ModuleType) -> Iterator[None]:
    # The fast evaluator is C++ all through; without it the class is pycocotools' own, which gives the same numbers.
    yield
    if isinstance(sys.modules.get(COMPILED_MODULE), MissingOperators):
        from pycocotools.cocoeval import COCOeval

        module.__dict__["COCOeval_opt"] = COCOeval


@contextmanager
def _quiet_torchscript(_module: ModuleType) -> Iterator[None]:
    # torch deprecated torch.jit.script, which these modules use at import; the user can do nothing about it.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch\\.jit\\.", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*torch\\.jit\\.", category=DeprecationWarning)
        yield


REPAIRS: dict[str, Repair] = {
    "fvcore.nn.focal_loss": _quiet_torchscript,
    "detectron2.modeling.box_regression": _quiet_torchscript,
    "detectron2.data.transforms.transform": _bilinear_alias,
    "detectron2.data.build": _builtin_numpy_types,
    "detectron2.structures.masks": _builtin_numpy_types,
    "detectron2.utils.visualizer": _builtin_numpy_types,
    "detectron2.evaluation.sem_seg_evaluation": _builtin_numpy_types,
    "detectron2.model_zoo.model_zoo": _resource_filename,
    "detectron2.solver.build": _clip_only_gradients,
    "detectron2.evaluation.fast_eval_api": _python_coco_evaluation,
}
