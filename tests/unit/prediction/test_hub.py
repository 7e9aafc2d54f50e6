"""Detectors on the Hugging Face hub, against a server on this machine that imitates it and misbehaves as told."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import yaml
from huggingface_hub import constants

from proxydet.config import dump_yaml
from proxydet.detector import Detector, open_named
from proxydet.errors import ArtifactError, InputError, TransferError
from proxydet.hub import fetch
from proxydet.models import find_detector
from proxydet.publishing import prepared, upload
from proxydet.recipes import get_recipe, resolve_config
from proxydet.vocabulary.compositional import CompositionalEncoder
from proxydet.weight_files import write_safetensors
from proxydet_cli.main import main

# Of the hub's own library, which sends files in a way that its HTTP library will drop.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

NAME = "ann/shapes"
TOKEN = "hf_secret"


def cli(*words: str) -> int:
    """Run a command in this process; the exit code."""
    try:
        return main(list(words))
    except SystemExit as done:
        return int(done.code or 0)


@dataclass
class Hub:
    """What the server holds, and how it misbehaves."""

    address: str = ""
    commits: dict[str, list[dict[str, bytes]]] = field(default_factory=dict)
    """Files by path of each commit, by repository."""
    private: set[str] = field(default_factory=set)
    gated: set[str] = field(default_factory=set)
    forbidden_to_write: bool = False
    answer: tuple[int, bytes] | None = None
    """Given to everything but what `only` leaves out."""
    only: str = ""
    """Part of the path that `answer` is meant for."""
    cut: int = 0
    """Bytes left out at the end of every file, with the length of the whole announced."""
    created: list[dict] = field(default_factory=list)
    uploads: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def sha(self, name: str, index: int = -1) -> str:
        index = range(len(self.commits[name]))[index]
        return hashlib.sha1(f"{name} {index}".encode()).hexdigest()

    def files(self, name: str, revision: str) -> dict[str, bytes] | None:
        for index, files in enumerate(self.commits[name]):
            if revision in (self.sha(name, index), f"v{index}"):
                return files
        return self.commits[name][-1] if revision == "main" else None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def reply(self, status: int, value: object = b"", **headers: str) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path).strip("/")
        hub.requests.append(f"{self.command} {path}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        while self.headers.get("Transfer-Encoding") == "chunked":
            size = int(self.rfile.readline(), 16)
            self.body += self.rfile.read(size + 2)[:size]
            if not size:
                break
        if hub.answer is not None and hub.only in path:
            return self.reply(*hub.answer)
        logged_in = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if self.headers.get("Authorization") and not logged_in:
            said = "Invalid credentials in Authorization header"
            return self.reply(401, X_Error_Message=said)
        if self.command in ("POST", "PUT"):
            return self.written(path, logged_in)
        parts = path.removeprefix("api/models/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        if name not in hub.commits or (name in hub.private and not logged_in):
            return self.reply(404 if logged_in else 401, X_Error_Code="RepoNotFound")
        if name in hub.gated and (rest[:1] == ["resolve"] or not path.startswith("api")):
            return self.reply(403, X_Error_Code="GatedRepo")
        revision = rest[1] if len(rest) > 1 else "main"
        files = hub.files(name, revision)
        if files is None:
            return self.reply(404, X_Error_Code="RevisionNotFound")
        [sha] = [hub.sha(name, i) for i, made in enumerate(hub.commits[name]) if made is files]
        if path.startswith("api") and rest[:1] == ["tree"]:
            listed = [
                {
                    "type": "file",
                    "path": file,
                    "size": len(data),
                    "oid": hashlib.sha1(data).hexdigest(),
                }
                for file, data in files.items()
            ]
            return self.reply(200, listed)
        if path.startswith("api"):
            siblings = [{"rfilename": file, "size": len(data)} for file, data in files.items()]
            return self.reply(200, {"id": name, "sha": sha, "siblings": siblings, "tags": []})
        if rest[2] not in files:
            return self.reply(404, X_Error_Code="EntryNotFound")
        data = files[rest[2]]
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", sha)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[: len(data) - hub.cut])
            self.close_connection = bool(hub.cut)
        return None

    def written(self, path: str, logged_in: bool) -> None:
        hub, parts = self.hub, path.split("/")
        if self.command == "PUT":
            hub.uploads[parts[-1]] = self.body
            return self.reply(200)
        if not logged_in:
            return self.reply(401, X_Error_Message="Invalid username or password.")
        if hub.forbidden_to_write:
            said = 'You don\'t have the rights to create a model under the namespace "ann".'
            return self.reply(403, {"error": said}, X_Error_Message=said)
        if path == "api/validate-yaml":
            return self.reply(200, {"errors": [], "warnings": []})
        if path.endswith("objects/batch"):
            objects = json.loads(self.body)["objects"]
            for item in objects:
                item["actions"] = {"upload": {"href": f"{hub.address}/put/{item['oid']}"}}
            return self.reply(200, {"transfer": "basic", "objects": objects})
        if path == "api/repos/create":
            asked = json.loads(self.body)
            name = f"{asked.get('organization', 'ann')}/{asked['name']}"
            known = name in hub.commits
            hub.created.append(asked)
            hub.commits.setdefault(name, [{}])
            return self.reply(409 if known else 200, {"url": f"{hub.address}/{name}"})
        name = "/".join(parts[2:4])
        if parts[4] == "preupload":
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith("safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(self.body)["files"]
            ]
            return self.reply(200, {"files": files})
        files = dict(hub.commits[name][-1])
        for line in map(json.loads, self.body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                files[line["value"]["path"]] = hub.uploads[line["value"]["oid"]]
        hub.commits[name].append(files)
        url = f"{hub.address}/{name}/commit/{hub.sha(name)}"
        return self.reply(200, {"commitUrl": url, "commitOid": hub.sha(name)})

    do_HEAD = do_POST = do_PUT = do_GET


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("_Handler", (Handler,), {"hub": hub}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        hub.address + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    yield hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(tmp_path, network, encoder) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    recipe = get_recipe("tiny")
    data = dataclasses.replace(recipe.data, description=tmp_path / "private" / "pets.toml")
    (folder / "config.yaml").write_text(dump_yaml(dataclasses.replace(recipe, data=data)))
    network.vocabulary.save(folder / "vocabulary.npz")
    encoder.save(folder / "text_encoder.json")
    write_safetensors(folder / "model_final.safetensors", network.state_dict(), {"iteration": 30})
    record = {"iteration": 30, "metrics": {"segm/AP": 0.2345, "segm/AP novel": 0.1}}
    (folder / "evaluations.jsonl").write_text(json.dumps(record) + "\n")
    return folder


@pytest.fixture
def on_hub(hub, run) -> Hub:
    """The hub with the run's detector in two commits, of which the newer one has a README too."""
    files = {path.name: path.read_bytes() for path in run.iterdir()}
    hub.commits[NAME] = [files, {**files, "README.md": b"# Shapes\n", "more/huge.bin": b"0"}]
    return hub


@pytest.fixture
def login(tmp_path) -> None:
    (tmp_path / "token").write_text(TOKEN)


def opened_as(detector: Detector, other: Detector) -> None:
    theirs = other.network.state_dict()
    for name, value in detector.network.state_dict().items():
        np.testing.assert_array_equal(value, theirs[name])
    assert detector.vocabulary == other.vocabulary
    assert detector.sides == other.sides
    assert isinstance(detector.encoder, CompositionalEncoder)


def test_what_is_pushed_is_opened_by_its_name(hub, run, login, tmp_path, pictures, capsys):
    assert cli("push", str(run), NAME, "--license", "mit", "--private", "--yes", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["commit"] == f"{hub.address}/{NAME}/commit/{hub.sha(NAME)}"
    [asked] = hub.created
    assert asked.get("private") or asked["visibility"] == "private"  # older and newer libraries
    [_, files] = hub.commits[NAME]  # one commit: all or nothing
    assert set(files) == {
        "README.md", "config.yaml", "vocabulary.npz", "text_encoder.json", "model_final.safetensors",
    }  # fmt: skip
    everything = b"".join(files.values())
    assert str(tmp_path).encode() not in everything
    assert b"private" not in files["config.yaml"]

    _, header, card = files["README.md"].decode().split("---\n", 2)
    assert yaml.safe_load(header)["license"] == "mit"
    for text in (
        f'from_pretrained("{NAME}")',
        f"--weights {NAME} -v 'red circle, ",
        "`tiny`",
        "| segm/AP | 23.4 |",
        "red circle",
    ):
        assert text in card
    opened_as(Detector.from_pretrained(NAME, device="cpu"), Detector.from_run(run, device="cpu"))
    found = find_detector(run=None, weights=NAME, config=None)
    assert (found.name, found.repository) == (NAME, NAME)
    assert open_named(found, device="cpu").predict(pictures[0], ["red star"]) is not None


def test_a_fine_tuned_run_is_pushed_with_the_scores_of_its_weights(run, network, tmp_path):
    sets = ["weights=start.pth", "interpolation=0.5", f"finetune.start={tmp_path}/start"]
    config = resolve_config("tiny", None, [f"training.{text}" for text in sets])
    (run / "config.yaml").write_text(dump_yaml(config))
    write_safetensors(run / "model_best.safetensors", network.state_dict(), {"iteration": 20})
    with (run / "evaluations.jsonl").open("a") as file:
        file.write(json.dumps({"iteration": 20, "metrics": {"segm/AP": 0.5678}}) + "\n")
    with prepared(run, NAME) as package:
        assert str(tmp_path) not in (package.folder / "config.yaml").read_text()
        assert "after 20 iterations" in package.card
        assert "| segm/AP | 56.8 |" in package.card
        assert Detector.from_run(package.folder, device="cpu")
    with prepared(run, NAME, weights=run / "model_final.safetensors") as package:
        assert "| segm/AP | 23.4 |" in package.card


def test_a_card_that_is_there_is_kept(on_hub, run, login):
    with prepared(run, NAME) as package:
        assert "not stated a licence" in package.card
        upload(package)
        assert on_hub.commits[NAME][-1]["README.md"] == b"# Shapes\n"
        upload(package, keep_card=False)
    assert on_hub.commits[NAME][-1]["README.md"].decode() == package.card


def test_a_dry_run_asks_nobody(hub, run, capsys):
    assert cli("push", str(run), NAME, "--dry-run") == 0
    assert "model_final.safetensors" in capsys.readouterr().out
    assert hub.requests == []


def test_a_revision_is_pinned_and_needs_no_hub_afterwards(on_hub, network):
    changed = dict(on_hub.commits[NAME][1])
    first = on_hub.sha(NAME, 0)
    on_hub.commits[NAME].append({**changed, "config.yaml": b"recipe: [no"})
    folder = fetch(f"{NAME}@v0")
    assert folder.name == first
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml", "vocabulary.npz", "text_encoder.json", "model_final.safetensors",
    }  # fmt: skip
    on_hub.requests.clear()
    assert (
        Detector.from_pretrained(f"{NAME}@{first}", device="cpu").vocabulary == network.vocabulary
    )
    assert on_hub.requests == []
    with pytest.raises(InputError, match=r"no revision v9 of ann/shapes"):
        fetch(f"{NAME}@v9")


def test_a_folder_of_that_name_comes_first_and_is_reported(on_hub, run, tmp_path, caplog):
    (tmp_path / "ann").mkdir()
    run.rename(tmp_path / "ann" / "shapes")
    assert find_detector(run=None, weights=NAME, config=None).run == Path(NAME)
    assert "is a folder here" in caplog.text
    assert on_hub.requests == []


def test_a_misspelt_folder_is_not_asked_of_the_hub(on_hub, run, tmp_path, capsys):
    (tmp_path / "ann").mkdir()
    run.rename(tmp_path / "ann" / "shapse")
    assert cli("predict", "photos", "--weights", NAME) == 3
    said = capsys.readouterr().err
    assert f"did you mean {Path('ann/shapse')}?" in said
    assert on_hub.requests == []
    assert find_detector(run=None, weights=f"{NAME}@main", config=None).repository == f"{NAME}@main"


@pytest.mark.parametrize("answer", [(503, b""), (429, b"{}"), (200, b"not JSON")])  # fmt: skip
def test_a_hub_that_is_down_is_reported_and_a_copy_used(on_hub, answer, caplog):
    on_hub.answer = answer
    with pytest.raises(
        TransferError, match=rf"^{NAME} could not be downloaded: .*{on_hub.address}"
    ) as caught:
        fetch(NAME)
    assert caught.value.hint
    on_hub.answer = None
    folder = fetch(NAME)
    on_hub.answer = answer
    assert fetch(NAME) == folder
    assert str(folder) in caplog.text


def test_nobody_listens(on_hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(TransferError, match=r"127\.0\.0\.1:9"):
        Detector.from_pretrained(NAME)


def test_offline_uses_what_is_there(on_hub, monkeypatch, capsys):
    folder = fetch(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    on_hub.requests.clear()
    assert fetch(NAME) == folder
    with pytest.raises(TransferError, match="HF_HUB_OFFLINE"):
        fetch("ann/others")
    assert cli("push", "run", NAME) == 4
    assert "HF_HUB_OFFLINE" in capsys.readouterr().err
    assert on_hub.requests == []


def test_private_gated_and_absent_repositories(on_hub, tmp_path):
    on_hub.private.add(NAME)
    for name in (NAME, "ann/shapse"):
        with pytest.raises(InputError, match=name) as caught:
            fetch(name)
        assert "hf auth login" in str(caught.value.hint)
    (tmp_path / "token").write_text("hf_wrong")
    with pytest.raises(ArtifactError, match="refused the token") as caught:
        fetch(NAME)
    assert "hf auth login" in str(caught.value.hint)
    (tmp_path / "token").write_text(TOKEN)
    on_hub.gated.add(NAME)
    with pytest.raises(ArtifactError, match="owner has granted") as caught:
        fetch(NAME)
    assert TOKEN not in f"{caught.value} {caught.value.hint}"
    on_hub.gated.clear()
    assert fetch(NAME).is_dir()


def test_a_repository_of_something_else(on_hub):
    files = on_hub.commits[NAME][0]
    on_hub.commits[NAME] = [{"config.json": b"{}", "vocabulary.npz": files["vocabulary.npz"]}]
    with pytest.raises(InputError, match=r"lacks config\.yaml, model_final\.safetensors"):
        fetch(NAME)
    assert not [request for request in on_hub.requests if "resolve" in request]


@pytest.mark.parametrize(
    "file", ["config.yaml", "vocabulary.npz", "text_encoder.json", "model_final.safetensors"]
)
def test_wrong_files_are_named(on_hub, file, tmp_path, capsys):
    data = bytearray(on_hub.commits[NAME][-1][file])
    data[-40:] = b"\xff" * 40
    on_hub.commits[NAME][-1][file] = bytes(data)
    with pytest.raises(InputError, match=file.replace(".", r"\.")) as caught:
        Detector.from_pretrained(NAME, device="cpu").resolve(["blue star"])
    assert "\n" not in str(caught.value)
    if file != "text_encoder.json":  # which is read later
        assert NAME in f"{caught.value} {caught.value.hint}"


def test_a_configuration_that_names_code_is_refused(on_hub):
    text = on_hub.commits[NAME][-1]["config.yaml"].decode()
    assert "    kind: resnet\n" in text
    evil = text.replace("    kind: resnet\n", "    kind: os:system\n")
    on_hub.commits[NAME][-1]["config.yaml"] = evil.encode()
    with pytest.raises(InputError, match="os:system"):
        Detector.from_pretrained(NAME)
    # What only training reads is not imported.
    on_hub.commits[NAME].append(
        {**on_hub.commits[NAME][-1], "config.yaml": f"{text}\ncriterion: os:system\n".encode()}
    )
    assert Detector.from_pretrained(NAME, device="cpu")


def test_a_download_that_breaks_off_leaves_nothing_that_would_be_taken_for_whole(
    on_hub, monkeypatch
):
    on_hub.cut = 5
    with pytest.raises(TransferError, match=NAME):
        fetch(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(TransferError, match=NAME):
        fetch(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    on_hub.cut = 0
    assert Detector.from_pretrained(NAME, device="cpu")


def test_pushes_that_are_refused(hub, run, tmp_path, capsys):
    def refused(*words: str) -> str:
        assert cli("push", *words, "--yes") in (3, 4)
        said = capsys.readouterr().err
        assert "hint: " in said
        assert "bug" not in said
        return said

    assert "no token" in refused(str(run), NAME)
    (tmp_path / "token").write_text(TOKEN)
    for name in ("shapes", "ann/shapes/x", "ann/shapes@v1", "ann/sha--pes"):
        assert name in refused(str(run), name)
    assert "absent" in refused("absent", NAME)
    with prepared(run, NAME) as package:
        hub.forbidden_to_write = True
        with pytest.raises(ArtifactError, match="don't have the rights"):
            upload(package)
        hub.forbidden_to_write = False
        hub.answer, hub.only = (503, b""), "/commit/"
        with pytest.raises(TransferError, match=f"{NAME} could not be uploaded.*503"):
            upload(package)
    assert hub.commits[NAME] == [{}]  # nothing by halves
    assert cli("push", str(run), NAME) == 3  # stdin is not a terminal
    assert "--yes" in capsys.readouterr().err


def test_the_predict_command_takes_a_repository(on_hub, folder, capsys):
    assert (
        cli(
            "predict",
            str(folder / "a0.png"),
            "--weights",
            NAME,
            "--save",
            "none",
            "--device",
            "cpu",
        )
        == 0
    )
    assert "a0.png" in capsys.readouterr().out
    assert cli("predict", str(folder / "a0.png"), "--weights", NAME, "--config", "r50") == 3
    assert "own configuration" in capsys.readouterr().err
