"""Finds a working detectron2, or installs one without a compiler.

The package index carries no ``detectron2``, but the sources of its v0.6 tag, file by file, as
``pb1-detectron2`` 0.6. Its C++ part is not needed on ProxyDet's path, so uv builds a pure-Python wheel from it,
checked by hash. An installation that is already there is used as it is and never replaced.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from proxydet.compat import smoke, uv_installer
from proxydet.compat.location import locate_detectron2
from proxydet.errors import EnvironmentProblem, MissingDependencyError
from proxydet.reporting import SILENT, Progress

DISTRIBUTION = "pb1-detectron2"
RELEASE = "0.6"
SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"

_CHECK_SECONDS = 900  # the first import of torch from a network file system takes minutes


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
    """Make sure that detectron2 works here, installing it where it is absent.

    Args:
        dry_run: Change nothing; say what would be done.
        progress: Where the steps are shown.

    Returns:
        What was found or done.

    Raises:
        MissingDependencyError: torch, torchvision or uv is absent, or detectron2 does not work.
        EnvironmentProblem: torch and torchvision do not fit each other, or the environment cannot be changed.
        TransferError: The package index cannot be reached, or lacks the sources.
        DigestError: The sources are not the expected ones.
    """
    present = _is_present()
    if not present:
        _require_writable()
        uv_installer.find()
    with progress.task("checking torch and torchvision"):
        libraries = _check_torch()
    if not present:
        if dry_run:
            return _report("would install", libraries, None)
        with progress.task(f"installing detectron2 {RELEASE}, pure Python"):
            _install()
    action: Literal["found", "installed"] = "found" if present else "installed"
    with progress.task("checking detectron2"):
        return _report(action, libraries, _check_detectron2(action))


def _is_present() -> bool:
    try:
        locate_detectron2()
    except MissingDependencyError:
        return False
    return True


def _report(
    action: Literal["found", "installed", "would install"],
    libraries: dict[str, Any],
    found: dict[str, Any] | None,
) -> SetupReport:
    return SetupReport(
        action=action,
        python=sys.executable,
        torch=libraries["torch"],
        torchvision=libraries["torchvision"],
        detectron2=found["version"] if found else RELEASE,
        folder=found["folder"] if found else None,
        operators=found["operators"] if found else None,
    )


def _install() -> None:
    site_packages = _require_writable()
    for package in ("setuptools", "wheel"):
        if find_spec(package) is None:
            raise MissingDependencyError(
                f"{package}, which builds detectron2's wheel, is not installed.",
                hint="reinstall proxydet in this environment; its dependencies include it",
            )
    with tempfile.TemporaryDirectory(prefix="proxydet-setup-") as folder:
        requirements = Path(folder) / "detectron2.txt"
        requirements.write_text(f"{DISTRIBUTION}=={RELEASE} --hash=sha256:{SHA256}\n", "utf-8")
        arguments = [
            "--no-build-isolation",
            "--no-deps",
            "--config-settings-package",
            f"{DISTRIBUTION}:--global-option=build_py",
            "--config-settings-package",
            f"{DISTRIBUTION}:--build-option=--skip-build",
            "--require-hashes",
            "--requirements",
            str(requirements),
        ]
        if _recorded_version(DISTRIBUTION):
            # Its record is there and its files are not: without this, uv would call it installed.
            arguments += ["--reinstall-package", DISTRIBUTION]
        uv_installer.pip_install(arguments, folder=Path(folder), destination=site_packages)


def _require_writable() -> Path:
    """The environment's package folder; an error where it may not be changed."""
    site_packages = Path(sysconfig.get_path("purelib"))
    hint = (
        "make an environment of your own (python -m venv env), install proxydet there, "
        "and run: env/bin/proxydet setup"
    )
    if not os.access(site_packages, os.W_OK):
        raise EnvironmentProblem(
            f"This Python's package folder cannot be written: {site_packages}",
            hint=hint,
            path=site_packages,
        )
    marker = Path(sysconfig.get_path("stdlib")) / "EXTERNALLY-MANAGED"
    if sys.prefix == sys.base_prefix and marker.is_file():
        raise EnvironmentProblem(
            "This Python belongs to the operating system, which manages its packages itself.",
            hint=hint,
            path=site_packages,
        )
    return site_packages


def _check_torch() -> dict[str, Any]:
    for package in ("torch", "torchvision"):
        if find_spec(package) is None:
            raise MissingDependencyError(
                f"{package} is not installed.",
                hint="install torch and torchvision together: pip install torch torchvision",
            )
    answer, failure = _run_check(smoke.TORCH)
    if answer is not None:
        return answer
    pair = f"torch {_recorded_version('torch')} and torchvision {_recorded_version('torchvision')}"
    wanted = [r for r in requires("torchvision") or [] if r.split(";")[0].startswith("torch")]
    asks = f"; this torchvision asks for {wanted[0]}" if wanted else ""
    raise EnvironmentProblem(
        f"{pair} do not work together here: {failure}{asks}",
        hint="install a pair of one release and one build (CPU or CUDA): "
        "pip install --force-reinstall torch torchvision",
    )


def _check_detectron2(action: Literal["found", "installed"]) -> dict[str, Any]:
    answer, failure = _run_check(smoke.DETECTRON2)
    if answer is not None:
        return answer
    origin = "The detectron2 that is installed here" if action == "found" else "The new detectron2"
    owner = DISTRIBUTION if _recorded_version(DISTRIBUTION) else "detectron2"
    raise MissingDependencyError(
        f"{origin} does not work: {failure}",
        hint=f"remove it (pip uninstall {owner}), then run: proxydet setup",
    )


def _run_check(stage: str) -> tuple[dict[str, Any] | None, str]:
    """Run one check in a fresh interpreter: its answer, or None and why it failed."""
    with tempfile.TemporaryDirectory(prefix="proxydet-check-") as folder:
        # From an empty folder, so that nothing lying in the working folder is imported by mistake.
        try:
            run = subprocess.run(  # noqa: S603 - our own interpreter and module
                [sys.executable, "-m", smoke.__name__, stage],
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=_CHECK_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return None, f"the check did not end within {_CHECK_SECONDS} seconds"
    if run.returncode == 0:
        answer: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
        return answer, ""
    lines = [line for line in run.stderr.splitlines() if line.strip()]
    return None, lines[-1].strip() if lines else f"Python ended with code {run.returncode}"


def _recorded_version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
