"""``set_up`` step by step, with uv and the checks replaced by what they say in each situation."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from proxydet import errors
from proxydet.runtime import setup as install
from proxydet.runtime import smoke

LIBRARIES = {"torch": "2.15.0", "torchvision": "0.30.0"}
FOUND = {"version": "0.6", "folder": "/env/detectron2", "operators": "absent"}


class Machine:
    """What the environment answers; tests change it."""

    def __init__(self) -> None:
        self.detectron2 = False
        self.torch_failure = ""
        self.detectron2_failure = ""
        self.installs: list[list[str]] = []

    def run_check(self, stage: str) -> tuple[dict[str, Any] | None, str]:
        failure = self.torch_failure if stage == smoke.TORCH else self.detectron2_failure
        answer = LIBRARIES if stage == smoke.TORCH else FOUND
        return (None, failure) if failure else (answer, "")

    def locate(self) -> Path:
        if not self.detectron2:
            raise errors.MissingDependencyError("absent")
        return Path("/env/detectron2")

    def pip_install(self, arguments: Sequence[str], *, folder: Path, destination: Path) -> None:
        self.requirements = Path(arguments[-1 if arguments[-2] == "--requirements" else -3])
        self.hashes = self.requirements.read_text()
        self.installs.append(list(arguments))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    machine = Machine()
    monkeypatch.setattr(install, "_run_check", machine.run_check)
    monkeypatch.setattr(install, "locate_detectron2", machine.locate)
    monkeypatch.setattr(install, "_recorded_version", lambda _name: None)
    monkeypatch.setattr(install, "pip_install", machine.pip_install)
    monkeypatch.setattr(install.sysconfig, "get_path", lambda _name, **_: str(tmp_path))
    return machine


def test_installs_where_there_is_none(machine: Machine) -> None:
    report = install.set_up()
    assert (report.action, report.detectron2, report.operators) == ("installed", "0.6", "absent")
    [arguments] = machine.installs
    assert "--require-hashes" in arguments
    assert "--no-deps" in arguments
    assert machine.hashes == f"pb1-detectron2==0.6 --hash=sha256:{install.SHA256}\n"
    assert not machine.requirements.exists()


def test_leaves_an_installation_that_is_there(machine: Machine) -> None:
    machine.detectron2 = True
    assert install.set_up().action == "found"
    assert machine.installs == []


def test_dry_run_installs_nothing(machine: Machine) -> None:
    report = install.set_up(dry_run=True)
    assert (report.action, report.folder) == ("would install", None)
    assert machine.installs == []


def test_never_replaces_an_installation_that_does_not_work(machine: Machine) -> None:
    machine.detectron2 = True
    machine.detectron2_failure = "ImportError: no boxes"
    with pytest.raises(errors.MissingDependencyError, match="no boxes") as caught:
        install.set_up()
    assert "pip uninstall detectron2" in (caught.value.hint or "")
    assert machine.installs == []


def test_half_removed_installation_is_installed_again(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install, "_recorded_version", lambda _name: "0.6")
    install.set_up()
    assert "--reinstall-package" in machine.installs[0]


def test_torch_and_torchvision_of_different_releases(machine: Machine) -> None:
    machine.torch_failure = "RuntimeError: operator torchvision::nms does not exist"
    with pytest.raises(errors.EnvironmentProblem, match="do not work together") as caught:
        install.set_up()
    assert "torchvision::nms" in caught.value.message
    assert "pip install" in (caught.value.hint or "")
    assert machine.installs == []


@pytest.mark.parametrize("absent", ["torch", "torchvision"])
def test_torch_absent(machine: Machine, monkeypatch: pytest.MonkeyPatch, absent: str) -> None:
    monkeypatch.setattr(install, "find_spec", lambda name: None if name == absent else object())
    with pytest.raises(errors.MissingDependencyError, match=f"{absent} is not installed"):
        install.set_up()


@pytest.mark.parametrize("absent", ["setuptools", "wheel"])
def test_build_tools_absent(machine: Machine, monkeypatch: pytest.MonkeyPatch, absent: str) -> None:
    monkeypatch.setattr(install, "find_spec", lambda name: None if name == absent else object())
    with pytest.raises(errors.MissingDependencyError, match=absent):
        install.set_up()


def test_read_only_environment(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install.os, "access", lambda _path, _mode: False)
    with pytest.raises(errors.EnvironmentProblem, match="cannot be written") as caught:
        install.set_up()
    assert "python -m venv" in (caught.value.hint or "")


def test_python_of_the_operating_system(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "EXTERNALLY-MANAGED").touch()
    monkeypatch.setattr(install.sys, "prefix", sys.base_prefix)
    with pytest.raises(errors.EnvironmentProblem, match="operating system"):
        install.set_up()


def test_uv_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "find_spec", lambda _name: None)
    monkeypatch.setattr(install.shutil, "which", lambda _name: None)
    with pytest.raises(errors.MissingDependencyError) as caught:
        install.find_uv()
    assert caught.value.hint == "run: pip install uv"


def test_uv_of_the_search_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "find_spec", lambda _name: None)
    monkeypatch.setattr(install.shutil, "which", lambda _name: "/bin/uv")
    assert install.find_uv() == Path("/bin/uv")


# What uv 0.13 wrote in each situation, shortened.
UV_SAYS = {
    "hash": (
        "error: Failed to download and build `pb1-detectron2==0.6`\n"
        "  cause: Hash mismatch for `pb1-detectron2==0.6`\n",
        errors.DigestError,
    ),
    "offline": (
        "error: No solution found when resolving dependencies\n"
        "hint: Packages were unavailable because the network was disabled.",
        errors.TransferError,
    ),
    "refused": (
        "error: Failed to fetch: https://index.example/pb1-detectron2/\n"
        "  cause: error sending request for url\n  cause: Connection refused (os error 111)\n",
        errors.TransferError,
    ),
    "not carried": (
        "error: No solution found when resolving dependencies\n"
        "  cause: Because pb1-detectron2 was not found in the package registry ...",
        errors.TransferError,
    ),
    "no room": ("error: failed to write\n  cause: No space left on device", errors.DiskFullError),
    "denied": (
        "error: failed to create directory\n  cause: Permission denied (os error 13)",
        errors.EnvironmentProblem,
    ),
    "cache": (
        "error: Failed to initialize cache at `/x`\n  cause: failed to create directory",
        errors.EnvironmentProblem,
    ),
    "build": (
        "error: Failed to build `pb1-detectron2==0.6`\n  cause: The build backend returned an error\n"
        "  [stderr]\n  Traceback\n  ModuleNotFoundError: No module named 'setuptools'\n",
        errors.MissingDependencyError,
    ),
}


@pytest.mark.parametrize("situation", UV_SAYS)
def test_what_uv_says_becomes_our_error(situation: str) -> None:
    said, kind = UV_SAYS[situation]
    error = install.explain_failure(said, Path("/env"))
    assert type(error) is kind
    assert error.hint
    assert said.splitlines()[0] in error.message


def test_build_failure_names_the_python_error() -> None:
    error = install.explain_failure(UV_SAYS["build"][0], Path("/env"))
    assert "No module named 'setuptools'" in error.message


def test_uv_runs_for_this_interpreter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[list[str]] = []

    def run(command: list[str], **_options: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        return subprocess.CompletedProcess(command, 2, "", UV_SAYS["hash"][0])

    monkeypatch.setattr(install, "find_uv", lambda: Path("/bin/uv"))
    monkeypatch.setattr(install, "uv_environment", dict)
    monkeypatch.setattr(install.subprocess, "run", run)
    with pytest.raises(errors.DigestError):
        install.pip_install(["x"], folder=tmp_path, destination=tmp_path)
    assert calls == [
        [
            "/bin/uv",
            "pip",
            "install",
            "--no-progress",
            "--compile-bytecode",
            "--python",
            sys.executable,
            "x",
        ]
    ]


def _answer(code: int, stdout: str, stderr: str) -> Callable[..., Any]:
    return lambda command, **_: subprocess.CompletedProcess(command, code, stdout, stderr)


def test_check_reads_the_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install.subprocess, "run", _answer(0, 'noise\n{"torch": "2"}\n', ""))
    assert install._run_check(smoke.TORCH) == ({"torch": "2"}, "")


@pytest.mark.parametrize(
    ("code", "stderr", "why"),
    [
        (1, "Traceback\nRuntimeError: bad\n\n", "RuntimeError: bad"),
        (-11, "", "Python ended with code -11"),
    ],
)
def test_failed_check_says_why(
    monkeypatch: pytest.MonkeyPatch, code: int, stderr: str, why: str
) -> None:
    monkeypatch.setattr(install.subprocess, "run", _answer(code, "", stderr))
    assert install._run_check(smoke.TORCH) == (None, why)


@pytest.mark.slow
def test_the_real_checks_pass_here() -> None:
    """Both checks, in this environment, through the real interpreter."""
    report = install.set_up()
    assert report.action == "found"


class TestIndexSettings:
    """pip's way to the index, told to uv."""

    @pytest.fixture(autouse=True)
    def _no_files(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(install, "_from_files", dict)

    def test_mirror_proxy_and_certificate(self) -> None:
        told = install.uv_environment(
            {
                "PIP_INDEX_URL": "https://mirror.example/simple",
                "PIP_PROXY": "http://proxy.example:1",
                "PIP_CERT": "/ca.pem",
            }
        )
        assert told["UV_DEFAULT_INDEX"] == "https://mirror.example/simple"
        assert told["ALL_PROXY"] == "http://proxy.example:1"
        assert told["SSL_CERT_FILE"] == "/ca.pem"

    def test_what_uv_knows_stays(self) -> None:
        told = install.uv_environment(
            {"PIP_INDEX_URL": "https://a.example", "UV_INDEX_URL": "https://b.example"}
        )
        assert "UV_DEFAULT_INDEX" not in told

    def test_offline_pip_brings_its_folders(self) -> None:
        told = install.uv_environment({"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/wheels /more"})
        assert (told["UV_NO_INDEX"], told["UV_FIND_LINKS"]) == ("1", "/wheels,/more")

    def test_nothing_to_tell(self) -> None:
        assert install.uv_environment({"HOME": "/h"}) == {"HOME": "/h"}


def test_pip_configuration_files_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    listing = (
        "global.index-url='https://a.example'\ninstall.cert='/ca'\n:env:.proxy='x'\nodd line\n"
    )
    monkeypatch.setattr(install.subprocess, "run", _answer(0, listing, ""))
    monkeypatch.setattr(install, "find_spec", lambda _name: object())
    settings = install.pip_settings({"PIP_INDEX_URL": "https://b.example"})
    assert settings == {"index-url": "https://b.example", "cert": "/ca"}
