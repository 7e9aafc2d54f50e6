"""Every error class becomes its exit code, a message and a hint, without a traceback."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import types

import pytest

from proxydet import errors
from proxydet_cli import app, failures, main, output

EXIT_CODES: dict[type[errors.ProxydetError], int] = {
    errors.ProxydetError: 1,
    errors.InputError: 3,
    errors.ConfigError: 3,
    errors.VocabularyError: 3,
    errors.DataError: 3,
    errors.UnreachableError: 3,
    errors.CheckpointError: 3,
    errors.ArtifactError: 4,
    errors.TransferError: 4,
    errors.DigestError: 4,
    errors.ArchiveError: 4,
    errors.RuntimeEnvironmentError: 5,
    errors.MissingDependencyError: 5,
    errors.DiskFullError: 5,
    errors.LockedError: 5,
    errors.NumericsError: 5,
    errors.TrainingError: 6,
    errors.JobInterruptedError: 130,
}


def all_errors() -> set[type[errors.ProxydetError]]:
    found = {errors.ProxydetError}
    pending = [errors.ProxydetError]
    while pending:
        children = [c for c in pending.pop().__subclasses__() if c.__module__ == errors.__name__]
        found.update(children)
        pending.extend(children)
    return found


def test_every_error_class_has_its_exit_code():
    assert {kind: kind("m").exit_code for kind in all_errors()} == EXIT_CODES


def test_a_signal_has_the_shells_exit_code():
    assert errors.JobInterruptedError("stopped", signal_number=15).exit_code == 143


@pytest.fixture
def failing(monkeypatch) -> types.SimpleNamespace:
    """A command line whose one command raises what the test puts in `failing.error`."""
    from proxydet_cli.options import command_app

    state = types.SimpleNamespace(error=None)
    module = types.ModuleType("proxydet_cli.commands.failing")
    command = command_app()

    @command.command()
    def fail() -> None:
        raise state.error

    module.__dict__["app"] = command
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(app, "COMMANDS", {"failing": "Fail."})
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    return state


def run(capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    try:
        code = main.main(["failing"])
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    assert captured.out == ""
    return code, captured.err


@pytest.mark.parametrize("kind", EXIT_CODES, ids=lambda kind: kind.__name__)
def test_message_hint_and_code(kind, failing, capsys):
    failing.error = kind("it broke because of this", hint="do that")
    code, text = run(capsys)
    assert code == EXIT_CODES[kind]
    assert text == "error: it broke because of this\n\nhint: do that\n"


def test_no_hint_no_hint_line(failing, capsys):
    failing.error = errors.DataError("it broke")
    assert run(capsys) == (3, "error: it broke\n")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk(number, failing, capsys):
    failing.error = OSError(number, os.strerror(number), "/data/model.pth")
    code, text = run(capsys)
    assert code == errors.DiskFullError.exit_code
    assert "no room left" in text
    assert "/data/model.pth" in text


def test_other_trouble_of_the_operating_system(failing, capsys):
    failing.error = PermissionError(errno.EACCES, "Permission denied", "/data/run")
    code, text = run(capsys)
    assert code == 5
    assert text.startswith("error: Permission denied (/data/run).\n")
    assert "Traceback" not in text


def test_ctrl_c(failing, capsys):
    failing.error = KeyboardInterrupt()
    assert run(capsys) == (130, "")


def test_lack_of_memory(failing, capsys):
    failing.error = MemoryError()
    code, text = run(capsys)
    assert code == 5
    assert "not enough memory" in text


def test_lack_of_gpu_memory_is_told_without_importing_torch(failing, capsys):
    kind = type("OutOfMemoryError", (RuntimeError,), {"__module__": "torch"})
    failing.error = kind("CUDA out of memory. Tried to allocate 2 GiB\nmore")
    code, text = run(capsys)
    assert code == 5
    assert "Tried to allocate 2 GiB" in text


def test_reader_that_went_away(failing, capsys, monkeypatch):
    monkeypatch.setattr(failures, "_detach_stdout", lambda: None)
    failing.error = output.ReaderGone()
    assert run(capsys) == (141, "")


@pytest.mark.parametrize("kind", [ValueError, RuntimeError])
def test_unexpected_error_is_left_to_the_hook(kind, failing):
    failing.error = kind("a bug")
    with pytest.raises(kind, match="a bug"):
        main.main(["failing"])
    assert sys.excepthook is failures.report_unexpected


BUG = """
import sys, types
from proxydet_cli import app, main
module = types.ModuleType("proxydet_cli.commands.buggy")
module.app = __import__("proxydet_cli.options").options.command_app()
@module.app.command()
def buggy() -> None:
    raise {error}
sys.modules[module.__name__] = module
app.COMMANDS = {{"buggy": "Have a bug."}}
sys.exit(main.main(["buggy"]))
"""


def run_process(error: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BUG.format(error=error)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_bug_is_reported_in_three_lines_with_code_1():
    done = run_process("ValueError('oops')")
    assert done.returncode == 1
    assert done.stderr.startswith(
        "error: this is a bug in proxydet: ValueError: oops (<string>, line"
    )
    assert "hint: run the command again with PROXYDET_DEBUG=1" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("error", ["ValueError('oops')", "FileNotFoundError(2, 'gone', 'x')"])
def test_debug_shows_the_traceback(error):
    done = run_process(error, PROXYDET_DEBUG="1")
    assert "Traceback (most recent call last)" in done.stderr
    assert "error: " in done.stderr


def test_closed_pipe_ends_quietly():
    program = (
        "import sys\nfrom proxydet_cli.main import main\n"
        "from proxydet_cli import app\n"
        "from proxydet_cli.output import Output\n"
        "app.run = lambda words: [Output().data('x' * 1000) for _ in range(1000)]\n"
        "sys.exit(main(['anything']))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(timeout=60) == 141


@pytest.mark.parametrize("number", [errno.EEXIST, errno.ENOTDIR])
def test_a_file_where_a_folder_goes(number, failing, capsys):
    failing.error = OSError(number, os.strerror(number), "/data/run")
    code, text = run(capsys)
    assert code == 5
    assert text.startswith("error: A folder is needed where there is a file: /data/run.\n")
    assert "hint: name another folder" in text
