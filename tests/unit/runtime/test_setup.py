"""``set_up`` step by step, with uv and the checks replaced by what they answer in each situation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from proxydet import errors
from proxydet.runtime import setup
from proxydet.runtime.processes import Fact, call_in_new_process

ANSWERS = {
    "check_torch": {"torch": "2.15.0", "torchvision": "0.30.0"},
    "check_detectron2": {"detectron2": "0.6", "folder": "/env/detectron2", "operators": "absent"},
}


class Machine:
    """What the environment answers; tests change it."""

    def __init__(self) -> None:
        self.detectron2: Path | None = None
        self.failures: dict[str, str] = {}
        self.recorded: str | None = None
        self.uv_error = ""
        self.installs: list[list[str]] = []

    def check(self, _module: str, name: str, **_: Any) -> Any:
        if name in self.failures:
            raise errors.RuntimeEnvironmentError(self.failures[name])
        return ANSWERS[name]

    def version(self, name: str) -> str | None:
        return self.recorded if name == setup.DISTRIBUTION else "1"

    def run(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.requirements = Path(command[command.index("--requirements") + 1])
        self.hashes = self.requirements.read_text()
        self.installs.append(command)
        return subprocess.CompletedProcess(command, 2 if self.uv_error else 0, "", self.uv_error)


@pytest.fixture
def machine(monkeypatch, tmp_path) -> Machine:
    machine = Machine()
    monkeypatch.setattr(setup, "call_in_new_process", machine.check)
    monkeypatch.setattr(setup, "package_folder", lambda _: machine.detectron2)
    monkeypatch.setattr(setup, "distribution_version", machine.version)
    monkeypatch.setattr(setup, "find_uv", lambda: Path("/bin/uv"))
    monkeypatch.setattr(setup, "uv_environment", dict)
    monkeypatch.setattr(setup.subprocess, "run", machine.run)
    monkeypatch.setattr(setup.sysconfig, "get_path", lambda _name, **_: str(tmp_path))
    return machine


def test_installs_where_there_is_none(machine):
    report = setup.set_up()
    assert (report.action, report.detectron2, report.operators) == ("installed", "0.6", "absent")
    [arguments] = machine.installs
    assert "--require-hashes" in arguments
    assert "--no-deps" in arguments
    assert machine.hashes == f"pb1-detectron2==0.6 --hash=sha256:{setup.SHA256}\n"
    assert not machine.requirements.exists()


def test_leaves_an_installation_that_is_there(machine):
    machine.detectron2 = Path("/env/detectron2")
    assert setup.set_up().action == "found"
    assert machine.installs == []


def test_dry_run_installs_nothing(machine):
    report = setup.set_up(dry_run=True)
    assert (report.action, report.folder) == ("would install", None)
    assert machine.installs == []


def test_never_replaces_an_installation_that_does_not_work(machine):
    machine.detectron2 = Path("/env/detectron2")
    machine.failures["check_detectron2"] = "ImportError: no boxes"
    with pytest.raises(errors.MissingDependencyError, match="no boxes") as caught:
        setup.set_up()
    assert "pip uninstall detectron2" in (caught.value.hint or "")
    assert machine.installs == []


def test_half_removed_installation_is_installed_again(machine):
    machine.recorded = "0.6"
    setup.set_up()
    assert "--reinstall-package" in machine.installs[0]


def test_torch_and_torchvision_of_different_releases(machine):
    machine.failures["check_torch"] = "RuntimeError: operator torchvision::nms does not exist"
    with pytest.raises(errors.RuntimeEnvironmentError, match="do not work together") as caught:
        setup.set_up()
    assert "torchvision::nms" in caught.value.message
    assert "pip install" in (caught.value.hint or "")
    assert machine.installs == []


@pytest.mark.parametrize("absent", ["torch", "torchvision", "setuptools", "wheel"])
def test_packages_that_it_needs_are_named(machine, monkeypatch, absent):
    monkeypatch.setattr(setup, "find_spec", lambda name: None if name == absent else object())
    with pytest.raises(errors.MissingDependencyError, match=absent):
        setup.set_up()


def test_read_only_environment(machine, monkeypatch):
    monkeypatch.setattr(setup.os, "access", lambda _path, _mode: False)
    with pytest.raises(errors.RuntimeEnvironmentError, match="cannot be written") as caught:
        setup.set_up()
    assert "python -m venv" in (caught.value.hint or "")


def test_python_of_the_operating_system(machine, monkeypatch, tmp_path):
    (tmp_path / "EXTERNALLY-MANAGED").touch()
    monkeypatch.setattr(setup.sys, "prefix", sys.base_prefix)
    with pytest.raises(errors.RuntimeEnvironmentError, match="operating system"):
        setup.set_up()


@pytest.mark.parametrize("place", [None, "/bin/uv"])
def test_uv_of_the_search_path(monkeypatch, place):
    monkeypatch.setattr(setup, "find_spec", lambda _name: None)
    monkeypatch.setattr(setup.shutil, "which", lambda _name: place)
    if place:
        assert setup.find_uv() == Path(place)
        return
    with pytest.raises(errors.MissingDependencyError) as caught:
        setup.find_uv()
    assert caught.value.hint == "run: pip install uv"


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
        errors.RuntimeEnvironmentError,
    ),
    "cache": (
        "error: Failed to initialize cache at `/x`\n  cause: failed to create directory",
        errors.RuntimeEnvironmentError,
    ),
    "build": (
        "error: Failed to build `pb1-detectron2==0.6`\n  cause: The build backend returned an error\n"
        "  [stderr]\n  Traceback\n  ModuleNotFoundError: No module named 'setuptools'\n",
        errors.MissingDependencyError,
    ),
}


@pytest.mark.parametrize("situation", UV_SAYS)
def test_what_uv_says_becomes_our_error(situation):
    said, kind = UV_SAYS[situation]
    error = setup.explain_failure(said, Path("/env"))
    assert type(error) is kind
    assert error.hint
    assert said.splitlines()[0] in error.message
    assert (situation == "build") == ("No module named 'setuptools'" in error.message)


def test_uv_runs_for_this_interpreter(machine):
    machine.uv_error = UV_SAYS["hash"][0]
    with pytest.raises(errors.DigestError):
        setup.set_up()
    [command] = machine.installs
    assert command[:3] == ["/bin/uv", "pip", "install"]
    assert command[command.index("--python") + 1] == sys.executable


@pytest.mark.slow
def test_the_real_checks_pass_here():
    """Both checks, in this environment, through the real interpreter."""
    report = setup.set_up()
    assert report.action == "found"


class TestIndexSettings:
    """pip's way to the index, passed to uv."""

    listing = ""

    @pytest.fixture(autouse=True)
    def _pip(self, monkeypatch) -> None:
        monkeypatch.setattr(setup, "run_program", lambda _command, **_: Fact(self.listing or None))

    def test_mirror_proxy_and_certificate(self):
        found = setup.uv_environment(
            {
                "PIP_INDEX_URL": "https://mirror.example/simple",
                "PIP_PROXY": "http://proxy.example:1",
                "PIP_CERT": "/ca.pem",
            }
        )
        assert found["UV_DEFAULT_INDEX"] == "https://mirror.example/simple"
        assert found["ALL_PROXY"] == "http://proxy.example:1"
        assert found["SSL_CERT_FILE"] == "/ca.pem"

    def test_settings_of_uv_stay(self):
        found = setup.uv_environment(
            {"PIP_INDEX_URL": "https://a.example", "UV_INDEX_URL": "https://b.example"}
        )
        assert "UV_DEFAULT_INDEX" not in found

    def test_offline_pip_brings_its_folders(self):
        found = setup.uv_environment({"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/wheels /more"})
        assert (found["UV_NO_INDEX"], found["UV_FIND_LINKS"]) == ("1", "/wheels,/more")

    def test_nothing_to_pass(self):
        assert setup.uv_environment({"HOME": "/h"}) == {"HOME": "/h"}

    def test_configuration_files_are_read_and_variables_win(self):
        self.listing = (
            "install.cert='/ca'\nglobal.cert='/other'\nglobal.index-url='https://a.example'\n"
            "global.proxy='http://p'\n:env:.proxy='x'\nodd line\n"
        )
        found = setup.uv_environment({"PIP_INDEX_URL": "https://b.example"})
        assert found["UV_DEFAULT_INDEX"] == "https://b.example"
        assert (found["SSL_CERT_FILE"], found["ALL_PROXY"]) == ("/ca", "http://p")


@pytest.mark.parametrize(
    ("module", "why"),
    [
        ("raise RuntimeError('bad')", "RuntimeError: bad"),
        ("import os; os._exit(7)", "exit code 7"),
        ("import os; os.abort()", "exit code -6"),
        ("import time; time.sleep(60)", "within 2 s"),
    ],
)
def test_a_function_that_fails_in_a_new_process_is_an_error(tmp_path, module, why):
    (tmp_path / "asked_in_the_test.py").write_text(f"def ask(x):\n    {module}\n")
    with pytest.raises(errors.RuntimeEnvironmentError, match=why):
        call_in_new_process(
            "asked_in_the_test", "ask", search_path=[str(tmp_path), *sys.path], seconds=2, x=1
        )


def test_what_a_function_prints_in_a_new_process_is_not_its_result(tmp_path, monkeypatch):
    (tmp_path / "asked_in_the_test.py").write_text("def ask(x):\n    print('{}')\n    return [x]\n")
    path = [str(tmp_path), *sys.path]
    assert call_in_new_process("asked_in_the_test", "ask", search_path=path, x=1) == [1]
    # Nothing of the working folder is imported by mistake.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    with pytest.raises(errors.RuntimeEnvironmentError, match="asked_in_the_test"):
        call_in_new_process("asked_in_the_test", "ask", x=1)
