"""detectron2: where it is, what it misses on current torch, numpy, Pillow and setuptools, and how it becomes importable.

Each repair touches one detectron2 module in memory. No installed file changes, and neither numpy nor Pillow
keeps an attribute from here. Import :mod:`proxydet.runtime.d2` to have them installed.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib import metadata
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NoReturn

from proxydet.errors import MissingDependencyError, RuntimeEnvironmentError
from proxydet.runtime.stand_ins import NamespaceOverlay, temporary_attribute, temporary_module

_logger = logging.getLogger(__name__)

OLDEST_VERSION = (0, 6)
SETUP_HINT = "run: proxydet setup"


def package_folder(name: str) -> Path | None:
    """Return the folder of the package that Python would import, without importing it; None where there is none."""
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):
        # Something refuses its import, or put a module without a spec in its place.
        return None
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def distribution_version(name: str) -> str | None:
    """Return the version of an installed distribution, by its name on the package index; None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def locate_detectron2() -> Path:
    """Find detectron2's package folder.

    Returns:
        The folder that holds its ``__init__.py``.

    Raises:
        MissingDependencyError: It is not installed, or another folder of that name hides it.
    """
    folder = package_folder("detectron2")
    if folder is not None:
        return folder
    message = "detectron2 is not installed."
    # Python takes any folder of that name for a package: the root of a source checkout, most often.
    folders = [Path(entry or ".") / "detectron2" for entry in sys.path]
    if shown := ", ".join(str(folder) for folder in folders if folder.is_dir()):
        message = f"detectron2 is not installed; this folder of that name is not a package: {shown}"
    raise MissingDependencyError(message, hint=SETUP_HINT)


@dataclass(frozen=True, kw_only=True)
class Detectron2:
    """The detectron2 in use."""

    version: str
    """Its own version number; that of its main branch is 0.6, too."""
    folder: Path
    """The folder of its package."""
    operators: Literal["compiled", "absent", "broken"]
    """Its compiled part: working, not built (nothing here needs it), or built but not loadable."""


def activate() -> Detectron2:
    """Import detectron2 with the repairs installed; later calls change nothing.

    Returns:
        What was found.

    Raises:
        MissingDependencyError: It is missing, older than 0.6, or needs a package that is missing.
        RuntimeEnvironmentError: Python runs without docstrings.
    """
    folder = locate_detectron2()
    if sys.flags.optimize > 1:
        raise RuntimeEnvironmentError(
            "Python runs with -OO (PYTHONOPTIMIZE=2), which removes docstrings; detectron2 reads its own.",
            hint="run it without -OO, or with -O",
        )
    if not any(isinstance(finder, RepairFinder) for finder in sys.meta_path):
        RepairFinder(REPAIRS).install()
    try:
        operators = _provide_compiled_module(folder)
        with _without_broken_opencv():
            package = importlib.import_module("detectron2")
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"detectron2 needs the package {error.name}, which is not installed.",
            hint="reinstall proxydet in this environment; its dependencies include that package",
        ) from error
    version = str(getattr(package, "__version__", "unknown"))
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers and (int(numbers[1]), int(numbers[2])) < OLDEST_VERSION:
        raise MissingDependencyError(
            f"detectron2 {version} is too old; 0.6 or its main branch is needed.",
            hint=f"uninstall it, then {SETUP_HINT}",
            path=folder,
        )
    return Detectron2(version=version, folder=folder, operators=operators)


def _provide_compiled_module(folder: Path) -> Literal["compiled", "absent", "broken"]:
    """Import ``detectron2._C``, or put a stand-in there whose operators raise when they are called."""
    loaded = sys.modules.get(COMPILED_MODULE)
    if loaded is None:
        failure = None
        if PathFinder.find_spec(COMPILED_MODULE, [str(folder)]) is not None:
            importlib.import_module("torch")  # whose libraries the compiled file is linked against
            try:
                with _without_broken_opencv():
                    importlib.import_module(COMPILED_MODULE)
                return "compiled"
            except ModuleNotFoundError:
                raise
            except ImportError as error:
                _logger.warning(
                    "detectron2's compiled operators do not load, and nothing here needs them: %s",
                    error,
                )
                failure = f"the compiled file does not load ({error})"
        loaded = sys.modules[COMPILED_MODULE] = MissingOperators(failure)
    if not isinstance(loaded, MissingOperators):
        return "compiled"
    return "absent" if loaded.load_failure is None else "broken"


@contextmanager
def _without_broken_opencv() -> Iterator[None]:
    """Keep an OpenCV that cannot load (no libGL on a server) from breaking detectron2's import."""
    if "cv2" in sys.modules or find_spec("cv2") is None:
        yield
        return
    try:
        importlib.import_module("cv2")
    except ImportError as error:
        _logger.info("OpenCV does not load (%s); detectron2 works without it", error)
    else:
        yield
        return
    before = os.environ.get("DETECTRON2_DISABLE_CV2")
    os.environ["DETECTRON2_DISABLE_CV2"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DETECTRON2_DISABLE_CV2"]
        else:
            os.environ["DETECTRON2_DISABLE_CV2"] = before


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
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _RepairingLoader(spec.loader, repair)
                return spec
        return None

    def install(self) -> None:
        """Repair the modules that are loaded already, and the others when they are imported."""
        for name, repair in self.repairs.items():
            loaded = sys.modules.get(name)
            if loaded is not None:
                with repair(loaded):
                    pass
        sys.meta_path.insert(0, self)


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
                f"{name} is one of detectron2's compiled operators, but {why}.",
                hint="ProxyDet never calls it; code that does needs detectron2 built from source with a compiler",
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
    def resource_filename(package: str, resource: str) -> str:
        return str(Path(str(files(package))) / resource)

    stand_in = ModuleType("pkg_resources")
    stand_in.__dict__["resource_filename"] = resource_filename
    with temporary_module("pkg_resources", stand_in):
        yield


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
            present = [p for p in ([parameters] if single else parameters) if p.grad is not None]
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
    # torch deprecated torch.jit.script, which these modules use at import; users can do nothing about it.
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
