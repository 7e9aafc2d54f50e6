"""Finds a working detectron2, or installs one without a compiler.

The package index carries no ``detectron2``, but the sources of its v0.6 tag, file by file, as
``pb1-detectron2`` 0.6. Its C++ part is not needed on ProxyDet's path, so uv builds a pure-Python wheel from it,
checked by hash. An installation that is already there is used as it is and never replaced.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import requires
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from proxydet.errors import (
    DigestError,
    DiskFullError,
    MissingDependencyError,
    ProxydetError,
    RuntimeEnvironmentError,
    TransferError,
)
from proxydet.reporting import SILENT, Progress
from proxydet.runtime.detectron2 import SETUP_HINT, distribution_version, package_folder
from proxydet.runtime.processes import call_in_new_process, run_program

DISTRIBUTION = "pb1-detectron2"
RELEASE = "0.6"
SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"

_CHECK_SECONDS = 900
"""A broken binary may end the process, so checks run in one of their own; torch's first import may take minutes."""


@dataclass(frozen=True, kw_only=True)
class SetupReport:
    """What :func:`set_up` found and did."""

    action: Literal["found", "installed", "would install"]
    """Whether detectron2 was there, was installed now, or would be without ``dry_run``."""
    python: str
    """The interpreter whose environment this is about."""
    torch: str
    """Version of torch."""
    torchvision: str
    """Version of torchvision, found to fit that torch by running one of its operators."""
    detectron2: str
    """Version of detectron2."""
    folder: str | None
    """Its package folder; None where it is not installed yet."""
    operators: str | None
    """Its compiled part: ``compiled``, ``absent`` (not needed) or ``broken`` (not needed); None as above."""


def set_up(*, dry_run: bool = False, progress: Progress = SILENT) -> SetupReport:
    """Install detectron2 if it is missing, and check that it works here with torch and torchvision.

    Args:
        dry_run: Change nothing; report what would be done.
        progress: Where the steps are shown.

    Returns:
        What was found or done.

    Raises:
        MissingDependencyError: torch, torchvision or uv is absent, or detectron2 does not work.
        RuntimeEnvironmentError: torch and torchvision do not fit each other, or the environment cannot be changed.
        TransferError: The package index cannot be reached, or lacks the sources.
        DigestError: The sources are not the expected ones.
        DiskFullError: The disk is full.
    """
    action: Literal["found", "installed", "would install"] = "found"
    if package_folder("detectron2") is None:
        action = "would install" if dry_run else "installed"
        site_packages = _writable_site_packages()
        uv = find_uv()
    with progress.task("checking torch and torchvision"):
        libraries = _checked_torch()
    if action == "installed":
        with progress.task(f"installing detectron2 {RELEASE}, pure Python"):
            _install(uv, site_packages)
    found: dict[str, Any] = {"detectron2": RELEASE, "folder": None, "operators": None}
    if action != "would install":
        with progress.task("checking detectron2"):
            found = _checked_detectron2(action)
    return SetupReport(action=action, python=sys.executable, **libraries, **found)


# ---- checks ----------------------------------------------------------------------------------------------------------


def _checked_torch() -> dict[str, str]:
    for package in ("torch", "torchvision"):
        if find_spec(package) is None:
            raise MissingDependencyError(
                f"{package} is not installed.",
                hint="install torch and torchvision together: pip install torch torchvision",
            )
    try:
        found: dict[str, str] = call_in_new_process(__name__, "check_torch", seconds=_CHECK_SECONDS)
    except RuntimeEnvironmentError as error:
        pair = " and ".join(f"{p} {distribution_version(p)}" for p in ("torch", "torchvision"))
        required = [r for r in requires("torchvision") or [] if r.split(";")[0].startswith("torch")]
        needs = f"; this torchvision requires {required[0]}" if required else ""
        raise RuntimeEnvironmentError(
            f"{pair} do not work together: {error.message}{needs}",
            hint="install a pair of one release and one build (CPU or CUDA): "
            "pip install --force-reinstall torch torchvision",
        ) from error
    return found


def _checked_detectron2(action: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = call_in_new_process(
            __name__, "check_detectron2", seconds=_CHECK_SECONDS
        )
    except RuntimeEnvironmentError as error:
        which = "installed" if action == "found" else "new"
        owner = DISTRIBUTION if distribution_version(DISTRIBUTION) else "detectron2"
        raise MissingDependencyError(
            f"The {which} detectron2 does not work: {error.message}",
            hint=f"remove it (pip uninstall {owner}), then {SETUP_HINT}",
        ) from error
    return found


def check_torch() -> dict[str, str]:
    """Run an operator of torchvision, which fails where torch and torchvision do not fit each other.

    Returns:
        The versions of both.
    """
    import torch
    import torchvision
    from torchvision.ops import nms

    boxes_N4 = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30]])
    kept = nms(boxes_N4, torch.tensor([0.5, 0.9, 0.7]), 0.5).tolist()
    _expect("nms", kept, [1, 2])
    return {"torch": str(torch.__version__), "torchvision": str(torchvision.__version__)}


def check_detectron2() -> dict[str, Any]:
    """Run what the detector is built from: RoIAlign, boxes, and a feature pyramid with its gradient.

    Returns:
        Version, folder and state of the compiled operators of the installation that is in use.
    """
    import proxydet.runtime.d2 as d2

    import torch
    from detectron2.layers import ROIAlign
    from detectron2.modeling.backbone import FPN, BasicStem, ResNet
    from detectron2.modeling.backbone.resnet import BasicBlock
    from detectron2.structures import Boxes, pairwise_iou

    ramp_1CHW = torch.arange(16.0).expand(1, 1, 16, 16)
    box_15 = torch.tensor([[0, 4.0, 4.0, 8.0, 8.0]])
    pooled = ROIAlign((1, 2), 1.0, 0, aligned=True)(ramp_1CHW, box_15)
    _expect("roi_align", [round(v, 4) for v in pooled.flatten().tolist()], [4.5, 6.5])
    square = Boxes(torch.tensor([[0.0, 0.0, 2.0, 2.0]]))
    half = Boxes(torch.tensor([[0.0, 0.0, 2.0, 1.0]]))
    _expect("pairwise_iou", pairwise_iou(square, half).item(), 0.5)

    common = {"in_channels": 4, "norm": ""}
    stages = [
        ResNet.make_stage(BasicBlock, 1, stride_per_block=[stride], out_channels=width, **common)
        for stride, width in ((1, 4), (2, 8))
    ]
    bottom = ResNet(BasicStem(3, 4, norm=""), stages, out_features=["res2", "res3"])
    levels = FPN(bottom, ["res2", "res3"], out_channels=4)(torch.ones(1, 3, 32, 32))
    shapes = {name: list(level.shape) for name, level in levels.items()}
    _expect("pyramid", shapes, {"p2": [1, 4, 8, 8], "p3": [1, 4, 4, 4]})
    sum(level.sum() for level in levels.values()).backward()
    gradients = [p.grad for p in bottom.parameters() if p.requires_grad]
    _expect("gradients", all(g is not None and bool(g.isfinite().all()) for g in gradients), True)
    found = d2.INSTALLED
    return {"detectron2": found.version, "folder": str(found.folder), "operators": found.operators}


def _expect(what: str, actual: object, expected: object) -> None:
    if actual != expected:
        raise RuntimeError(f"{what} gives {actual}, not {expected}")


# ---- installation ----------------------------------------------------------------------------------------------------


def _writable_site_packages() -> Path:
    """The environment's package folder; an error where it may not be changed."""
    site_packages = Path(sysconfig.get_path("purelib"))
    hint = (
        "make an environment of your own (python -m venv env), install proxydet there, "
        "and run: env/bin/proxydet setup"
    )
    if not os.access(site_packages, os.W_OK):
        raise RuntimeEnvironmentError(
            f"This Python's package folder cannot be written: {site_packages}",
            hint=hint,
            path=site_packages,
        )
    marker = Path(sysconfig.get_path("stdlib")) / "EXTERNALLY-MANAGED"
    if sys.prefix == sys.base_prefix and marker.is_file():
        raise RuntimeEnvironmentError(
            "This Python belongs to the operating system, which manages its packages itself.",
            hint=hint,
            path=site_packages,
        )
    return site_packages


def find_uv() -> Path:
    """Find uv's executable: the one of the ``uv`` package, else one on the search path.

    Raises:
        MissingDependencyError: There is none.
    """
    if find_spec("uv") is not None:
        from uv import find_uv_bin

        try:
            return Path(find_uv_bin())
        except FileNotFoundError:
            pass
    on_path = shutil.which("uv")
    if on_path is None:
        raise MissingDependencyError(
            "uv, which builds detectron2 without a compiler, is not installed.",
            hint="run: pip install uv",
        )
    return Path(on_path)


def _install(uv: Path, site_packages: Path) -> None:
    for package in ("setuptools", "wheel"):
        if find_spec(package) is None:
            raise MissingDependencyError(
                f"{package}, which builds detectron2's wheel, is not installed.",
                hint="reinstall proxydet in this environment; its dependencies include it",
            )
    # Compiled at once: the first import is quick also where Python may not write bytecode later.
    options = ["--no-progress", "--compile-bytecode", "--python", sys.executable]
    options += ["--no-build-isolation", "--no-deps", "--require-hashes"]
    for setting in ("--global-option=build_py", "--build-option=--skip-build"):
        options += ["--config-settings-package", f"{DISTRIBUTION}:{setting}"]
    if distribution_version(DISTRIBUTION):
        # Its record is there and its files are not: without this, uv would take it as installed.
        options += ["--reinstall-package", DISTRIBUTION]
    # In an empty folder, so that no project's settings are picked up.
    with tempfile.TemporaryDirectory(prefix="proxydet-setup-") as folder:
        requirements = Path(folder) / "detectron2.txt"
        requirements.write_text(f"{DISTRIBUTION}=={RELEASE} --hash=sha256:{SHA256}\n", "utf-8")
        done = subprocess.run(  # noqa: S603 - uv's path and our own arguments, no shell
            [str(uv), "pip", "install", *options, "--requirements", str(requirements)],
            cwd=folder,
            env=uv_environment(os.environ),
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise explain_failure(done.stderr, site_packages)


_UV_VARIABLES = {
    "index-url": ("UV_DEFAULT_INDEX", "UV_INDEX_URL"),
    "proxy": ("ALL_PROXY", "HTTPS_PROXY", "https_proxy", "all_proxy"),
    "cert": ("SSL_CERT_FILE",),
    "trusted-host": ("UV_INSECURE_HOST",),
}
"""By pip's setting, uv's variable for it, and the ones that take precedence where they are set."""


def uv_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return a copy of an environment in which uv reaches the index as pip does; uv's own variables in it stay.

    Variables are added for pip's index, proxy, certificate and trusted hosts, and for an offline pip (``no-index``) its
    folders of files. pip's settings are those of its configuration files and, over them, of its ``PIP_...`` variables.
    """
    settings: dict[str, str] = {}
    listed = None
    if find_spec("pip") is not None:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
        listed = run_program([*pip, "config", "list"], seconds=60).value
    lines = [line.partition("=") for line in (listed or "").splitlines()]
    for section in ("global.", "install."):
        for key, equals, value in lines:
            if equals and key.startswith(section):
                settings[key.removeprefix(section)] = str(ast.literal_eval(value))
    for name, value in environment.items():
        if name.startswith("PIP_") and value:
            settings[name.removeprefix("PIP_").lower().replace("_", "-")] = value

    result = dict(environment)
    for setting, variables in _UV_VARIABLES.items():
        if settings.get(setting) and not any(environment.get(variable) for variable in variables):
            result[variables[0]] = settings[setting]
    if settings.get("no-index", "").lower() in {"1", "true", "yes", "on"}:
        result.setdefault("UV_NO_INDEX", "1")
        result.setdefault("UV_FIND_LINKS", ",".join(settings.get("find-links", "").split()))
    return result


_FAILURES: tuple[tuple[str, type[ProxydetError], str, str], ...] = (
    (
        "hash mismatch",
        DigestError,
        "The package index sent other detectron2 sources than the expected ones",
        "check the index or mirror that is configured; nothing was installed",
    ),
    (
        "no space left",
        DiskFullError,
        "There is no room left on the disk",
        "free some space, or set UV_CACHE_DIR and TMPDIR to folders with room, and run it again",
    ),
    (
        "permission denied|read-only file system|externally managed|failed to initialize cache",
        RuntimeEnvironmentError,
        "The environment cannot be written",
        "work in a virtual environment of your own; UV_CACHE_DIR moves uv's cache",
    ),
    (
        "error sending request|failed to fetch|dns error|could not connect|operation timed out|"
        "network connectivity is disabled|network was disabled",
        TransferError,
        "The package index cannot be reached",
        "connect to the network and run: proxydet setup. Behind a mirror or proxy, set UV_DEFAULT_INDEX or "
        "HTTPS_PROXY",
    ),
    (
        "no solution found|not found in the package registry",
        TransferError,
        "The package index does not carry the detectron2 sources",
        "use an index that carries pb1-detectron2 0.6, or install detectron2 from its repository",
    ),
    (
        "",
        MissingDependencyError,
        "detectron2 could not be built",
        "report it with this message and the output of: proxydet env",
    ),
)
"""What uv writes in each situation, as a pattern; the error, its message and hint. The first that matches counts."""


def explain_failure(stderr: str, destination: Path) -> ProxydetError:
    """Turn all that uv wrote into the error to raise; ``destination`` is where packages go.

    Its message holds the lines in which uv names the error and its causes, or all where there are none.
    """
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    named = [line for line in lines if line.startswith(("error:", "cause:"))]
    raised = [line for line in lines if re.match(r"[A-Za-z.]*(Error|Exception): ", line)]
    gist = "; ".join([*named, *raised] or lines)
    rows = (row for row in _FAILURES if re.search(row[0], stderr, re.IGNORECASE))
    _, kind, message, hint = next(rows)
    return kind(f"{message}: {gist}", hint=hint, path=destination)
