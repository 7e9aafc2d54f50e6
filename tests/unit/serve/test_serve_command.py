"""``proxydet serve`` from the command line: its options, its mistakes, and how it ends."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from starlette.testclient import TestClient

from proxydet.config import dump_yaml
from proxydet.errors import JobInterruptedError
from proxydet.recipes import get_recipe
from proxydet.serve import server
from proxydet.serve.app import PredictParams
from proxydet.serve.examples import Example
from proxydet.vocabulary.compositional import CompositionalEncoder

PROGRAM = "import sys; from proxydet_cli.main import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture
def call(detector, monkeypatch, cli) -> Callable[..., tuple[int, str, str, Any]]:
    """Run the command up to where it would accept requests."""
    served: list[Any] = []

    def serve(app: Any, listening: Any, *, on_started: Callable[[], None]) -> None:
        listening.listen()
        app.load()  # in the background of a real server
        served.append(app)
        on_started()

    monkeypatch.setattr("proxydet.models.locate_published", Path)
    monkeypatch.setattr("proxydet.detector.open_named", lambda *_, **__: detector)
    monkeypatch.setattr(server, "serve", serve)

    return lambda *words: (*cli("serve", "--port", "0", *words), served[-1] if served else None)


def test_the_address_goes_to_stderr(call):
    code, out, err, _ = call()
    assert (code, out) == (0, "")
    assert err.startswith("http://127.0.0.1:")


def test_an_index_that_is_not_there_is_refused_before_an_address_is_printed(call, tmp_path):
    code, out, err, app = call("--index", str(tmp_path / "photos.indx"))
    assert (code, out, app) == (3, "", None)
    assert "photos.indx" in err
    assert "http://" not in err


def test_a_second_ctrl_c_ends_the_process_without_the_interpreter(call, monkeypatch):
    def interrupted(*_: Any, **__: Any) -> None:
        raise JobInterruptedError("the server was stopped", signal_number=2)

    ended: list[int] = []
    monkeypatch.setattr(server, "serve", interrupted)
    monkeypatch.setattr(os, "_exit", ended.append)
    assert "the server was stopped" in call()[2]
    assert ended == [130]


def test_the_address_is_one_line_of_json(call):
    code, out, err, _ = call("--json")
    assert code == 0
    assert out.count("\n") == 1
    printed = json.loads(out)
    assert printed == {
        "address": f"http://127.0.0.1:{printed['port']}/",
        "host": "127.0.0.1",
        "port": printed["port"],
    }
    assert "http" not in err


def test_options_reach_the_application(call):
    limits = ("--max-upload", "2", "--max-megapixels", "3", "--queue", "4", "--timeout", "5")
    _, _, err, app = call("-v", "red star, blue star", *limits, "--allow-host", "Box.local")
    settings = app.settings
    assert settings.max_upload_bytes == 2 * 2**20
    assert settings.max_pixels == 3_000_000
    assert (settings.queue_places, settings.wait_seconds) == (4, 5.0)
    assert "box.local" in settings.allowed_hosts
    assert settings.loopback_only
    assert app.vocabulary.names == ("red star", "blue star")
    assert "warning" not in err


def test_settings_of_the_detector_are_those_of_predict(call, png):
    _, _, _, app = call("--tta", "--base-above", "-1", "-v", "red star")
    assert app.detector.inference.flip
    assert app.detector.inference.scales == (0.75, 1.0, 1.25)
    assert app.vocabulary.base.all()
    params = PredictParams(words=("red star", "green square"))
    assert app.vocabulary_of(params).base.all()
    _, _, _, plain = call("-v", "red star")
    assert not plain.detector.inference.augmented
    assert not plain.vocabulary_of(params).base.any()


def test_listening_on_the_network_warns(call):
    code, _, err, app = call("--host", "0.0.0.0")
    assert code == 0
    assert "warning: everyone who reaches this machine" in err
    assert not app.settings.loopback_only


@pytest.mark.parametrize("opens", [True, False])
def test_the_page_is_opened_when_asked(call, monkeypatch, opens):
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) or opens)
    _, _, err, _ = call("--open")
    assert len(opened) == 1
    assert opened[0] in err
    assert ("no browser could be opened" in err) is not opens


@pytest.mark.parametrize(
    ("words", "code", "what"),
    [
        (["-v", "a", "--vocabulary", "lvis"], 2, "either"),
        (["--names", "a.txt"], 2, "--names"),
        (["--port", "70000"], 2, "--port"),
        (["--queue", "0"], 2, "--queue"),
        (["--host", "no-such-host.invalid"], 3, "no-such-host.invalid"),
        (["-v", "a giraffe"], 3, "giraffe"),
        (["--precision", "fp16"], 3, "needs a GPU"),
        (["--host", "203.0.113.1"], 5, "203.0.113.1"),
    ],
)
def test_mistakes_are_named_without_a_traceback(call, words, code, what):
    found, out, err, _ = call(*words)
    assert found == code
    assert what in err
    assert "Traceback" not in err
    assert out == ""


def test_a_taken_port_is_reported_before_the_model_is_opened(call, monkeypatch):
    monkeypatch.setattr("proxydet.detector.open_named", lambda *_, **__: pytest.fail("opened"))
    with server.bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err, _ = call("--port", str(port))
    assert code == 5
    assert f"port {port} of 127.0.0.1 is in use" in err


def test_missing_packages_are_named_with_the_command(call, monkeypatch):
    from importlib import util

    find = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda n: None if n == "uvicorn" else find(n))
    code, _, err, _ = call()
    assert code == 5
    assert "not installed: uvicorn" in err
    assert "pip install 'proxydet[serve]'" in err


def test_packages_that_are_broken_are_no_bug_of_this_program(call, monkeypatch):
    import importlib

    def broken(name: str) -> Any:
        if name == "uvicorn":
            raise ImportError("cannot import name 'Server'")
        return load(name)

    load = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", broken)
    code, _, err, _ = call()
    assert code == 5
    assert "uvicorn, which cannot be imported: cannot import name 'Server'" in err
    assert "pip install --force-reinstall 'proxydet[serve]'" in err


@pytest.fixture(scope="module")
def run_folder(detector, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "run"
    folder.mkdir()
    recipe = get_recipe("tiny")
    data = dataclasses.replace(recipe.data, test_shortest_side=64, test_longest_side=100)
    (folder / "config.yaml").write_text(dump_yaml(dataclasses.replace(recipe, data=data)))
    detector.vocabulary.save(folder / "vocabulary.npz")
    assert isinstance(detector.encoder, CompositionalEncoder)
    detector.encoder.save(folder / "text_encoder.json")
    torch.save({"model": detector.network.state_dict()}, folder / "model_final.pth")
    return folder


def test_images_of_a_runs_own_data_are_shown_to_this_machine_only(call, run_folder, monkeypatch):
    own = Example(name="own.jpg", data=b"", words="")
    monkeypatch.setattr("proxydet.serve.examples.run_examples", lambda _: (own,))

    def offered(*words: str) -> list[str]:
        *_, app = call(*words)
        with TestClient(app, base_url="http://localhost") as client:
            return [example["name"] for example in client.get("/api/info").json()["examples"]]

    assert offered("--run", str(run_folder)) == ["own.jpg"]
    assert offered("--run", str(run_folder), "--allow-host", "box.local") == []
    assert offered("--run", str(run_folder), "--host", "0.0.0.0") == []
    assert offered() == ["coffee", "cat", "rocket"]


@contextmanager
def process(folder: Path, *words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start the command as a program; its address too."""
    arguments = ["serve", "--run", str(folder), "--port", "0", "--json", "--device", "cpu"]
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as started:
        try:
            assert started.stdout is not None
            line = started.stdout.readline()
            assert line, started.stderr and started.stderr.read()
            yield started, json.loads(line)["address"]
        finally:
            started.kill()


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_ends_the_server(run_folder, tmp_path):
    copy = shutil.copytree(run_folder, tmp_path / "run")
    (copy / "model_final.pth").write_bytes(b"PK\x03\x04 damaged")
    with process(copy) as (started, _):
        assert started.wait(300) == 3
        _, err = started.communicate()
    assert "model_final.pth" in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_the_program_answers_as_predict_does_and_stops_when_told(run_folder, png, tmp_path, cli):
    picture = tmp_path / "a.png"
    picture.write_bytes(png)
    with process(run_folder) as (started, address):
        answer = httpx.post(
            address + "api/predict",
            files={"picture": ("a.png", png)},
            data={"words": "red star, blue circle", "score_threshold": "0.02"},
            timeout=60,
        )
        assert answer.status_code == 200, answer.text
        assert httpx.get(address + "api/predict", timeout=60).status_code == 405
        started.send_signal(signal.SIGTERM)
        assert started.wait(60) == 0
        _, err = started.communicate()
    lines = err.splitlines()
    assert lines[0].startswith("127.0.0.1 POST /api/predict 200 ")
    assert lines[1].startswith("127.0.0.1 GET /api/predict 405 ")
    assert lines[2:] == ["stopped"]
    words = ("-v", "red star, blue circle", "--score-threshold", "0.02", "--device", "cpu")
    (wanted,) = cli("predict", picture, "--run", run_folder, "--json", *words).data["images"]
    assert wanted["detections"]
    assert {**answer.json(), "file": None} == {**wanted, "file": None}
