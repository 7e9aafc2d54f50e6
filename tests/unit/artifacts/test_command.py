"""``proxydet download`` as it is typed."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import pty
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from proxydet.artifacts import Downloader
from proxydet.errors import VocabularyError
from proxydet.reporting import SILENT
from proxydet_cli import main
from proxydet_cli.commands.download import with_downloads

ENTRY = """
[[artifacts]]
name = "{name}"
title = "a thing"
licence = "CC0"
addresses = ["{address}"]
target = "models/{name}.bin"
{more}
"""
# A suite that is run in the background hands Ctrl-C down ignored.
SIGNALLED = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
TYPED = "import sys; from proxydet_cli.main import main; sys.exit(main())"
LOGIN = 'login = { site = "https://example.org/join", how = "Register there." }\n'


@pytest.fixture
def entry(server, tmp_path) -> Callable[..., None]:
    path = tmp_path / "catalogue.toml"
    path.write_text("")

    def add(name: str, body: bytes | None = None, more: str = "") -> None:
        if body is not None:
            server.add(f"/{name}", body)
            more += f'sha256 = "{hashlib.sha256(body).hexdigest()}"\nsize = {len(body)}\n'
        address = server.address(f"/{name}")
        path.write_text(path.read_text() + ENTRY.format(name=name, address=address, more=more))

    return add


@pytest.fixture
def run(tmp_path, monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PROXYDET_CATALOGUE", str(tmp_path / "catalogue.toml"))

    def call(*words: str) -> tuple[int, str, str]:
        try:
            code = main.main(["download", *words])
        except SystemExit as stop:
            code = int(stop.code or 0)
        return (code, *capsys.readouterr())

    return call


def test_fetches_and_says_so(run, entry, body, tmp_path):
    entry("thing", body)
    code, out, err = run("thing", "--yes")
    assert code == 0
    assert "fetched" in out
    assert "300.0 kB" in err
    assert (tmp_path / "models/thing.bin").read_bytes() == body
    code, out, err = run("thing")
    assert (code, out.strip()) == (0, "1 ready before")


def test_a_dry_run_fetches_nothing(run, entry, server, body, tmp_path):
    entry("thing", body)
    code, out, _ = run("thing", "--dry-run", "--root", "there")
    assert code == 0
    assert "absent" in out
    assert "CC0" in out
    assert "free" in out
    assert not server.files["/thing"].requests
    assert not (tmp_path / "there").exists()


def test_without_a_name_it_is_what_training_needs(run, entry, monkeypatch):
    def ask_sizes(self, plan):
        return dataclasses.replace(
            plan, items=tuple(dataclasses.replace(i, announced=170_000_000) for i in plan.items)
        )

    monkeypatch.setattr(Downloader, "ask_sizes", ask_sizes)
    code, out, err = run("--dry-run")
    assert code == 0
    for name in ("boxsup-r50", "coco-train2017", "lvis-train", "imagenet-21k-lvis"):
        assert name in out
    assert "170.0 MB" in out
    assert "997 of 997 files need an account at https://image-net.org" in err


def test_json_is_json(run, entry, body):
    entry("thing", body)
    entry("absent", b"x" * 10)
    plan = json.loads(run("thing", "--dry-run", "--json")[1])
    assert plan["files"][0]["to fetch"] == plan["bytes_to_fetch"] == len(body)
    report = json.loads(run("thing", "--yes", "--json")[1])
    assert report["files"][0]["status"] == "fetched"
    assert report["files"][0]["sha256"] == hashlib.sha256(body).hexdigest()
    rows = json.loads(run("--list", "--json")[1])
    assert {"name", "kind", "files", "bytes", "digest", "account", "licence", "title"} == set(
        rows[0]
    )
    assert json.loads(run("--verify", "--json")[1])[0]["verdict"] == "sound"


def test_all_files_of_a_resumed_job_are_counted_whole(
    run, entry, server, body, tmp_path, monkeypatch
):
    totals: dict[str, float | None] = {}

    class Recorder:
        def task(self, description, *, total=None, **_):
            totals[description] = total
            return SILENT.task(description)

    monkeypatch.setattr("proxydet_cli.progress.show_progress", Recorder)
    for name in ("one", "two"):
        entry(name, body)
    served = server.add("/one", body, drop_after=100_000, later={2: {"answers": [(403, {})]}})
    assert run("one", "--yes")[0] == 4
    plan = json.loads(run("one", "two", "--dry-run", "--json")[1])
    assert plan["bytes_to_fetch"] == 2 * len(body) - 100_000
    assert run("one", "two", "--yes")[0] == 0
    assert totals["all files"] == 2 * len(body)
    assert served.sent == len(body)


@pytest.mark.parametrize("how", ["--dry-run", "--yes"])
def test_strict_refuses_before_anything_is_asked_or_fetched(run, entry, server, body, how):
    entry("pinned", body)
    entry("loose")
    code, out, err = run("pinned", "loose", "--strict", how)
    assert (code, out) == (4, "")
    assert "loose" in err
    assert "--strict refuses it" in " ".join(err.split())
    assert not server.files["/pinned"].requests


def test_licences_are_told_once_each(run, entry, body):
    entry("one", body)
    entry("two", body)
    out = run("one", "two", "--dry-run")[1]
    assert out.count("CC0") == 1
    assert "one, two: CC0" in out


def test_nobody_there_to_agree(run, entry, server, body, monkeypatch):
    entry("thing", body)
    with Path(os.devnull).open() as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        code, _, err = run("thing")
    assert code == 3
    assert "--yes" in err
    assert not server.files["/thing"].requests


def test_a_failure_has_its_exit_code_and_leaves_the_rest(run, entry, body, tmp_path):
    entry("good", body)
    entry("absent", more=f'sha256 = "{"0" * 64}"\n')
    code, out, err = run("good", "absent", "--yes")
    assert code == 4
    assert "fetched" in out
    assert "404" in err
    assert "or put the file there yourself" in " ".join(err.split())
    assert (tmp_path / "models/good.bin").exists()


def test_an_account_by_its_own_name_is_an_error_in_a_group_a_warning(run, entry, body, tmp_path):
    entry("open", body)
    entry("closed", more=LOGIN)
    with (tmp_path / "catalogue.toml").open("a") as file:
        file.write('[groups.both]\ntitle = "both"\nholds = ["open", "closed"]\n')
    code, _, err = run("both", "--yes")
    assert code == 0
    assert "warning" in err
    assert "https://example.org/join" in err
    code, _, err = run("closed", "--yes")
    assert code == 4
    assert "1 of 1 file needs an account" in err
    assert "Register there." in err


def test_verification(run, entry, body, tmp_path):
    entry("thing", body)
    assert run("--verify")[1].strip() == f"nothing is there ({tmp_path})"
    code, _, err = run("thing", "--verify")
    assert code == 4
    assert "1 of 1 file damaged or absent: thing." in err
    assert "Run: proxydet download thing" in err
    run("thing", "--yes")
    code, out, _ = run("thing", "--verify")
    assert code == 0
    assert "sound" in out
    (tmp_path / "models/thing.bin").write_bytes(body[::-1])
    code, out, err = run("--verify")
    assert code == 4
    assert "damaged" in out
    assert "proxydet download --force thing" in err


def test_a_mirror_from_the_environment(run, entry, server, body, monkeypatch):
    entry("thing", body)
    served = server.add("/m/models/thing.bin", body)
    monkeypatch.setenv("PROXYDET_MIRROR", server.address("/m"))
    assert run("thing", "--yes")[0] == 0
    assert served.requests


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("lvsi", "--dry-run"), 3, "Did you mean 'lvis"),
        (("lvis", "--limit-rate", "fast"), 2, "not a rate"),
        (("lvis", "--jobs", "0"), 2, "jobs"),
        (("lvis", "--mirror", "ftp://x/", "--yes"), 3, "not an https or http address"),
        (("--catalogue", "absent.toml", "--list"), 3, "cannot be read"),
    ],
)
def test_mistakes(run, entry, words, code, message):
    got, _, err = run(*words)
    assert got == code
    assert message in err
    assert "Traceback" not in err
    assert "hint: " in err or code == 2


@pytest.mark.parametrize(
    ("keys", "code"), [(b"\n", 0), (b"n\n", 0), (b"\x03", 130), (b"\x04", 130)]
)
def test_asks_on_a_terminal(entry, server, body, tmp_path, keys, code):
    entry("thing", body)
    ended, shown = on_terminal(tmp_path, keys)
    agreed = keys == b"\n"  # yes, unless something else is said
    assert (ended, "Nothing was fetched." in shown) == (code, not agreed)
    assert bool(server.files["/thing"].requests) == agreed
    assert (tmp_path / "models/thing.bin").exists() == agreed


def on_terminal(folder: Path, keys: bytes) -> tuple[int, str]:
    """Type keys when asked, on a terminal that is the process's own, so that Ctrl-C is a signal."""
    controller, terminal = pty.openpty()
    # The first process of a session that opens a terminal is controlled by it.
    own = "import os; os.open(os.ttyname(0), os.O_RDWR); " + SIGNALLED + TYPED
    process = subprocess.Popen(
        [sys.executable, "-c", own, "download", "thing", "--catalogue", "catalogue.toml"],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        cwd=folder,
        start_new_session=True,
    )
    os.close(terminal)
    shown, again, end = b"", 0.0, time.monotonic() + 60
    while time.monotonic() < end:
        if select.select([controller], [], [], 0.5)[0]:
            try:
                shown += os.read(controller, 4096)
            except OSError:  # the process is gone
                break
        elif b"Continue?" in shown and time.monotonic() > again:
            # What is typed before the prompt has set up its terminal is thrown away with what was typed ahead: again,
            # but not to a process that is just ending.
            os.write(controller, keys)
            again = time.monotonic() + 10
    os.close(controller)  # hangs up on a process that still waits
    return process.wait(timeout=60), shown.decode()


def test_the_list_of_what_is_named(run, entry, body):
    entry("thing", body)
    code, out, _ = run("--list", "thing", "metadata")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["name", "metadata", "thing"]
    code, _, err = run("--list", "thnig")
    assert code == 3
    assert "Did you mean 'thing" in err


def test_what_does_not_fit_is_marked_before(run, entry, body, monkeypatch):
    entry("thing", body)
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    code, out, _ = run("thing", "--dry-run")
    assert code == 0
    assert "300.0 kB needed, 1.0 kB free: not enough" in out
    code, _, err = run("thing", "--yes")
    assert code == 5
    assert "This needs 300.0 kB in" in err


def test_a_file_of_unknown_size_is_counted(run, entry, monkeypatch):
    entry("loose")
    assert "to fetch: 1 file of unknown size\n" in run("loose", "--dry-run")[1]


def test_a_place_that_cannot_be_written_is_the_environments_fault(run, entry, body, tmp_path):
    entry("thing", body)
    (tmp_path / "file").touch()
    code, _, err = run("thing", "--yes", "--root", "file")
    assert code == 5
    assert "cannot be written" in err


def test_missing_downloads_are_fetched_in_one_go(run, entry, tmp_path, monkeypatch):
    monkeypatch.setenv("PROXYDET_CATALOGUE", str(tmp_path / "catalogue.toml"))
    monkeypatch.chdir(tmp_path)
    for name in ("weights", "table", "encoder"):
        entry(name, name.encode())
    tried = []

    def action() -> str:
        tried.append(sorted(path.stem for path in tmp_path.glob("models/*.bin")))
        if len(tried) == 1:
            raise VocabularyError("no weights", needs=("weights", "table"))
        return "done"

    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(VocabularyError) as caught:
        with_downloads(action, also=("encoder",), yes=False)
    assert caught.value.hint is not None
    assert "proxydet download weights table encoder" in caught.value.hint
    assert not list(tmp_path.glob("models/*.bin"))
    tried.clear()
    assert with_downloads(action, also=("encoder",), yes=True) == "done"
    assert tried == [[], ["encoder", "table", "weights"]]


def test_a_download_that_does_not_help_is_not_repeated(entry, tmp_path, monkeypatch):
    monkeypatch.setenv("PROXYDET_CATALOGUE", str(tmp_path / "catalogue.toml"))
    monkeypatch.chdir(tmp_path)
    entry("table", b"table")
    calls = []

    def action() -> None:
        calls.append(1)
        raise VocabularyError("still missing", needs=("table",))

    with pytest.raises(VocabularyError, match="still missing"):
        with_downloads(action, yes=True)
    assert len(calls) == 2


def test_train_fetches_what_it_starts_from(entry, cli, tmp_path, monkeypatch):
    monkeypatch.setenv("PROXYDET_CATALOGUE", str(tmp_path / "catalogue.toml"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    entry("start", b"not weights, so that nothing is trained here")
    (tmp_path / "d.toml").write_text(
        'name = "d"\n[vocabulary]\nembeddings = "e.npy"\n[train]\nannotations = "a.json"\nimages = "."\n'
    )
    words = ("train", "--recipe", "tiny", "--data", "d.toml", "--weights", "models/start.bin")
    asked = cli(*words)
    assert (asked.code, (tmp_path / "models").exists()) == (3, False)
    assert "proxydet download start; --yes does so first" in asked.err
    fetched = cli(*words, "--yes")
    assert fetched.code == 3
    assert "models/start.bin is damaged, or not a weight file" in fetched.err
    # A published model to fine-tune is asked for too, but not before the data are found.
    published = cli("train", "--finetune", "proxydet-r50-inl", "--data", "d.toml")
    assert published.code == 4
    assert "proxydet download proxydet-r50-inl lvis-metadata; --yes does so first" in published.err
    misspelt = cli("train", "--finetune", "proxydet-r50-inl", "--data", "e.toml", "--yes")
    assert misspelt.code == 3
    assert "there is no dataset config e.toml" in misspelt.err
