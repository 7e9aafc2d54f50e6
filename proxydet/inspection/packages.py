"""Facts about installed packages, read from their metadata and files; nothing of them is imported."""

from __future__ import annotations

import ast
import re
import sys
from importlib import metadata
from pathlib import Path

import proxydet
from proxydet._version import __version__
from proxydet.compat.patch import package_folder, patch_status, roi_align_files
from proxydet.errors import EnvironmentProblem
from proxydet.inspection.facts import Fact, Facts, ask

_DISTRIBUTIONS = {
    "numpy": ("numpy", ("numpy",)),
    "Pillow": ("PIL", ("pillow",)),
    "fvcore": ("fvcore", ("fvcore",)),
    "iopath": ("iopath", ("iopath",)),
    "cv2": (
        "cv2",
        (
            "opencv-python-headless",
            "opencv-python",
            "opencv-contrib-python-headless",
            "opencv-contrib-python",
        ),
    ),
}
"""By fact: the name to import, and the packages that bring it."""


def package_facts() -> Facts:
    """Collect versions and places of the packages that matter, and the state of the installed RoIAlign.

    Returns:
        Facts by key.
    """
    facts: Facts = {"python": Fact(sys.version.replace("\n", "")), "proxydet": _proxydet()}
    for key, (module, names) in _DISTRIBUTIONS.items():
        facts[key] = _version(module, names)
    facts["torch"] = installed_version("torch")
    facts |= _torch_build()
    facts["torchvision"] = installed_version("torchvision")
    facts["detectron2"] = installed_version("detectron2")
    facts["detectron2._C"] = _compiled_part()
    facts["roi_align"] = _roi_align()
    facts["dependencies"] = _dependencies()
    return facts


def installed_version(name: str) -> Fact:
    """Return version and folder of a package from its files: ``"2.15.0+cu132 @/.../torch"``.

    Args:
        name: The name under which it is imported.

    Returns:
        The version that its ``version.py`` or ``__init__.py`` states, else that of its metadata.
    """
    folder = package_folder(name)
    if folder is None:
        return Fact(None, "not installed")
    for file in (folder / "version.py", folder / "__init__.py"):
        version = stated_version(file)
        if version is not None:
            return Fact(f"{version} @{folder}")
    for distribution in metadata.packages_distributions().get(name, []):
        return Fact(f"{metadata.version(distribution)} @{folder}")
    return Fact(f"unknown @{folder}", "its files do not say which version they are")


def stated_version(file: Path) -> str | None:
    """Read ``__version__ = "..."`` out of a Python file without running it.

    Args:
        file: The file; need not exist.

    Returns:
        The version, or None where the file does not state one.
    """
    version = _constants(file).get("__version__")
    return version if isinstance(version, str) else None


def _constants(file: Path) -> dict[str, object]:
    """The names that a Python file gives constants at its top level; empty where it cannot be read as one."""
    if not file.is_file():
        return {}
    try:
        module = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return {}
    found: dict[str, object] = {}
    for node in module.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Constant):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {t.id: node.value.value for t in targets if isinstance(t, ast.Name)}
    return found


def _torch_build() -> Facts:
    """What torch's version file says of its build: known even where torch does not load."""
    folder = package_folder("torch")
    stated = {} if folder is None else _constants(folder / "version.py")
    facts: Facts = {}
    if "debug" in stated:
        facts["torch.debug"] = Fact(str(bool(stated["debug"])))
    if "cuda" in stated:
        cuda = stated["cuda"]
        facts["torch.cuda"] = Fact(str(cuda)) if cuda else Fact(None, "built without CUDA")
    return facts


def _version(module: str, distributions: tuple[str, ...]) -> Fact:
    if package_folder(module) is None:
        return Fact(None, "not installed")
    found = {name: _metadata_version(name) for name in distributions}
    versions = {name: version for name, version in found.items() if version is not None}
    if not versions:
        return installed_version(module)
    problem = ""
    if len(versions) > 1:
        listed = ", ".join(f"{name} {version}" for name, version in versions.items())
        problem = f"several packages write the same files: {listed}"
    return Fact(next(iter(versions.values())), problem)


def _metadata_version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _proxydet() -> Fact:
    folder = Path(proxydet.__file__).parent
    revision = commit_of(folder)
    return Fact(f"{__version__} @{folder}" + (f", {revision}" if revision else ""))


def commit_of(folder: Path) -> str | None:
    """Return the commit of the source tree that holds a folder.

    Args:
        folder: A folder.

    Returns:
        ``commit 1a2b3c…``, with ``and uncommitted changes`` where there are some; None outside a source tree.
    """
    if "site-packages" in folder.parts or "dist-packages" in folder.parts:
        return None
    head = ask(["git", "-C", str(folder), "rev-parse", "HEAD"])
    if head.value is None:
        return None
    changes = ask(["git", "-C", str(folder), "status", "--porcelain", "--", "."])
    return f"commit {head.value}" + (" and uncommitted changes" if changes.value else "")


def _compiled_part() -> Fact:
    folder = package_folder("detectron2")
    if folder is None:
        return Fact(None, "detectron2 is not installed")
    built = sorted(path.name for path in folder.glob("_C*") if path.suffix in {".so", ".pyd"})
    return Fact(built[0] if built else "not built")


def _roi_align() -> Fact:
    files = roi_align_files()
    if not files:
        return Fact(None, "detectron2 is not installed")
    try:
        status = patch_status(files[0])
    except (EnvironmentProblem, OSError) as error:
        return Fact(None, str(error))
    problems = [] if status.state in {"original", "applied"} else [status.reason]
    if status.stale_bytecode:
        problems.append("Python runs a compiled file of another source")
    if len(files) > 1:
        problems.append(f"{len(files)} copies of detectron2 are on Python's path")
    return Fact(f"{status.state} @{status.file}", "; ".join(problems))


def _dependencies() -> Fact:
    """Which of proxydet's own requirements are not installed at all."""
    try:
        required = metadata.requires("proxydet") or []
    except metadata.PackageNotFoundError:
        return Fact(None, "proxydet itself is not installed, only on Python's path")
    names = [
        re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0]
        for line in required
        if "extra ==" not in line and "python_version" not in line
    ]
    missing = [name for name in names if _metadata_version(name) is None]
    problem = f"not installed: {', '.join(missing)}" if missing else ""
    return Fact(f"{len(names) - len(missing)} of {len(names)} installed", problem)
