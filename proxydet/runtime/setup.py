"""Finds a working detectron2, or installs one without a compiler.

The package index carries no ``detectron2``, but the sources of its v0.6 tag, file by file, as
``pb1-detectron2`` 0.6. Its C++ part is not needed on ProxyDet's path, so uv builds a pure-Python wheel from it,
checked by hash. An installation that is already there is used as it is and never replaced.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from proxydet.errors import (
    DigestError,
    DiskFullError,
    EnvironmentProblem,
    MissingDependencyError,
    ProxydetError,
    TransferError,
)
from proxydet.reporting import SILENT, Progress
from proxydet.runtime import smoke
from proxydet.runtime.detectron2 import locate_detectron2

_UV_VARIABLES = {
    "index-url": ("UV_DEFAULT_INDEX", "UV_INDEX_URL"),
    "proxy": ("ALL_PROXY", "HTTPS_PROXY", "https_proxy", "all_proxy"),
    "cert": ("SSL_CERT_FILE",),
    "trusted-host": ("UV_INSECURE_HOST",),
}
"""pip's setting -> the variable that says it to uv, and the ones that say it already if they are set."""


def uv_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Make the environment in which uv reaches the index as pip does.

    Args:
        environment: The environment to start from; what it already tells uv stays.

    Returns:
        A copy with variables added for pip's index, proxy, certificate and trusted hosts; for an offline pip
        (``no-index``), its folders of files.
    """
    settings = pip_settings(environment)
    result = dict(environment)
    for setting, variables in _UV_VARIABLES.items():
        value = settings.get(setting)
        if value and not any(environment.get(variable) for variable in variables):
            result[variables[0]] = value
    if settings.get("no-index", "").lower() in {"1", "true", "yes", "on"}:
        result.setdefault("UV_NO_INDEX", "1")
        result.setdefault("UV_FIND_LINKS", ",".join(settings.get("find-links", "").split()))
    return result


def pip_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Read pip's settings: its configuration files, and over them its environment variables.

    Args:
        environment: Where the ``PIP_...`` variables are looked up.

    Returns:
        Setting (``"index-url"``) to value.
    """
    settings = _from_files()
    for name, value in environment.items():
        if name.startswith("PIP_") and value:
            settings[name.removeprefix("PIP_").lower().replace("_", "-")] = value
    return settings


def _from_files() -> dict[str, str]:
    if find_spec("pip") is None:
        return {}
    # Our own interpreter and constant arguments.
    answer = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )
    found: dict[str, dict[str, str]] = {"global": {}, "install": {}}
    for line in answer.stdout.splitlines():
        key, separator, value = line.partition("=")
        section, _, setting = key.partition(".")
        if separator and section in found:
            found[section][setting] = str(ast.literal_eval(value))
    return {**found["global"], **found["install"]}


_NO_NETWORK = (
    "error sending request",
    "failed to fetch",
    "dns error",
    "could not connect",
    "network connectivity is disabled",
    "network was disabled",
    "operation timed out",
)
_NOT_WRITABLE = (
    "permission denied",
    "read-only file system",
    "externally managed",
    "failed to initialize cache",
)


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


def pip_install(arguments: Sequence[str], *, folder: Path, destination: Path) -> None:
    """Run ``uv pip install`` for this interpreter's environment.

    Args:
        arguments: What follows ``uv pip install --python ...``.
        folder: An empty folder to run in, so that no project's settings are picked up.
        destination: Where packages go, for error messages.

    Raises:
        MissingDependencyError: uv is absent, or the build failed.
        TransferError: The package index cannot be reached, or lacks what is asked for.
        DigestError: What came is not what was expected.
        EnvironmentProblem: The environment cannot be written.
        DiskFullError: The disk is full.
    """
    # Compiled at once: the first import is quick also where Python may not write byte code later.
    options = ["--no-progress", "--compile-bytecode", "--python", sys.executable]
    command = [str(find_uv()), "pip", "install", *options]
    run = subprocess.run(  # noqa: S603 - uv's path and our own arguments, no shell
        [*command, *arguments],
        cwd=folder,
        env=uv_environment(os.environ),
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        raise explain_failure(run.stderr, destination)


def explain_failure(stderr: str, destination: Path) -> ProxydetError:
    """Turn what uv says into one of our errors.

    Args:
        stderr: All that uv wrote.
        destination: Where packages go.

    Returns:
        The error to raise, with uv's own words in its message.
    """
    said = stderr.lower()
    words = _gist(stderr)
    if "hash mismatch" in said:
        return DigestError(
            f"The package index sent other detectron2 sources than the expected ones: {words}",
            hint="check the index or mirror that is configured; nothing was installed",
        )
    if "no space left" in said:
        return DiskFullError(
            f"There is no room left on the disk: {words}",
            hint="free some space, or set UV_CACHE_DIR and TMPDIR to folders with room, and run it again",
            path=destination,
        )
    if any(sign in said for sign in _NOT_WRITABLE):
        return EnvironmentProblem(
            f"The environment cannot be written: {words}",
            hint="work in a virtual environment of your own; UV_CACHE_DIR moves uv's cache",
            path=destination,
        )
    if any(sign in said for sign in _NO_NETWORK):
        return TransferError(
            f"The package index cannot be reached: {words}",
            hint="connect to the network and run: proxydet setup. Behind a mirror or proxy, set "
            "UV_DEFAULT_INDEX or HTTPS_PROXY",
        )
    if "no solution found" in said or "not found in the package registry" in said:
        return TransferError(
            f"The package index does not carry the detectron2 sources: {words}",
            hint="use an index that carries pb1-detectron2 0.6, or install detectron2 from its repository",
        )
    return MissingDependencyError(
        f"detectron2 could not be built: {words}",
        hint="report it with this message and the output of: proxydet env",
    )


def _gist(stderr: str) -> str:
    """The lines in which uv names the error and its causes; all it wrote where there are none."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith(("error:", "cause:"))]
    raised = [line for line in lines if re.match(r"[A-Za-z.]*(Error|Exception): ", line)]
    return "; ".join([*telling, *raised] or lines)


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
        find_uv()
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
        pip_install(arguments, folder=Path(folder), destination=site_packages)


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
