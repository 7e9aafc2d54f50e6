"""What the endpoints respond, requested through a test client."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import io
import json
import warnings
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient
from starlette.types import Message, Receive, Scope, Send

from proxydet._version import __version__
from proxydet.detector import Detector
from proxydet.errors import VocabularyError
from proxydet.modeling.network import ProxyDetNetwork
from proxydet.serve.app import (
    SecurityMiddleware,
    Served,
    ServingSettings,
    build_app,
    is_own_host,
    read_params,
)
from proxydet.vocabulary.vocabulary import Vocabulary

RAW = {"content-type": "image/png"}
SETTINGS = ServingSettings(max_upload_bytes=200_000, max_pixels=100_000, max_words=20)


def grey_png() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (60, 40), "gray").save(stream, "PNG")
    return stream.getvalue()


def ask(client: TestClient, picture: bytes, **fields: str) -> dict[str, Any]:
    response = client.post(
        "/api/predict", files={"picture": ("photo.png", picture, "image/png")}, data=fields
    )
    assert response.status_code == 200, response.text
    return dict(response.json())


def problem(response: Any, status: int, kind: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"kind", "message", "hint"}
    assert error["kind"] == kind, error
    return dict(error)


@pytest.mark.parametrize("words", [None, "red star, blue circle"])
def test_the_answer_is_that_of_the_detector_bit_for_bit(client, detector, png, pixels, words):
    names = None if words is None else ["red star", "blue circle"]
    fields = {} if words is None else {"words": words}
    wanted = detector.predict(pixels, names, score_threshold=0.02, one_label=False)
    assert len(wanted) > 1
    expected = {"file": "photo.png", **wanted.to_dict()}
    fields["one_label"] = "false"
    assert ask(client, png, score_threshold="0.02", **fields) == json.loads(json.dumps(expected))


def test_the_body_itself_can_be_the_image(client, png):
    asked = {"words": "red star, blue circle", "score_threshold": "0.02", "top": "1"}
    raw = client.post("/api/predict", params=asked, content=png, headers=RAW).json()
    assert {**raw, "file": "photo.png"} == ask(client, png, **asked)
    assert raw["file"] == "picture"
    assert len(raw["detections"]) == 1


def test_masks_and_second_labels_can_be_left_out(client, png):
    found = ask(client, png, score_threshold="0.02", masks="false", one_label="true")["detections"]
    assert all("mask" not in item for item in found)
    boxes = [tuple(item["box_xyxy"]) for item in found]
    assert len(set(boxes)) == len(boxes) >= 1
    everything = ask(client, png, score_threshold="0.02", one_label="false")["detections"]
    assert len(everything) > len(boxes)


def test_a_detector_of_boxes_serves_boxes_and_refuses_masks(detector, png):
    config = dataclasses.replace(detector.network.config, masks=None)
    network = ProxyDetNetwork(config, detector.vocabulary)
    network.load_state_dict(detector.network.state_dict(), strict=False)
    boxes = Detector(network, shortest=64, longest=100, encoder=detector.encoder)
    with TestClient(build_app(boxes), base_url="http://localhost") as client:
        assert client.get("/api/info").json()["model"]["masks"] is False
        for fields in ({}, {"masks": "false"}):
            found = ask(client, png, score_threshold="0.02", **fields)["detections"]
            assert len(found) > 0
            assert not any("mask" in item for item in found)
        files = {"picture": ("photo.png", png, "image/png")}
        for asked in ({"data": {"masks": "true"}}, {"params": {"masks": "true"}}):
            response = client.post("/api/predict", files=files, **asked)
            assert "mask head" in problem(response, 400, "parameter")["message"]


@pytest.mark.parametrize("kind", ["JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_common_formats_are_read(client, pixels, tmp_path, kind):
    Image.fromarray(pixels).save(tmp_path / "picture", kind)
    assert ask(client, (tmp_path / "picture").read_bytes())["width"] == 64


def test_info_has_model_words_and_limits(client, detector):
    info = client.get("/api/info").json()
    assert info["version"] == __version__
    assert info["model"] == {"name": "tiny", "device": "cpu", "training_classes": 4, "masks": True}
    assert info["words"]["default"] == list(detector.vocabulary.names)
    assert info["words"]["free"] is True
    assert info["words"]["known"] == ["red", "blue", "green", "circle", "square", "star"]
    assert info["limits"]["max_upload_bytes"] == 200_000
    assert client.get("/api/health").json() == {"status": "ok", "waiting": 0, "busy": False}


def test_without_a_text_encoder_the_default_words_still_serve(detector, png, monkeypatch, tmp_path):
    monkeypatch.setenv("PROXYDET_MODELS", str(tmp_path))
    without = Detector(detector.network, shortest=64, longest=100)
    words = detector.vocabulary_of(["red star"])
    with TestClient(build_app(without, vocabulary=words), base_url="http://localhost") as client:
        given = client.get("/api/info").json()["words"]
        assert given["free"] is False
        assert "proxydet download clip-vit-b32" in given["why_not"]
        assert given["default"] == ["red star"]
        assert ask(client, png, score_threshold="0.02")["detections"][0]["label"] == "red star"
        response = client.post("/api/predict?words=giraffe", content=png, headers=RAW)
        assert problem(response, 400, "words")["hint"].startswith("run: proxydet download")


def test_the_command_lines_wording_is_kept(client, detector, png):
    with pytest.raises(VocabularyError) as raised:
        detector.resolve(["a giraffe"])
    response = client.post("/api/predict?words=a+giraffe", content=png, headers=RAW)
    given = problem(response, 400, "words")
    assert (given["message"], given["hint"]) == (raised.value.message, raised.value.hint)


@pytest.mark.parametrize(
    ("query", "kind", "what"),
    [
        ("score_threshold=2", "parameter", "from 0 to 1"),
        ("score_threshold=nan", "parameter", "from 0 to 1"),
        ("score_threshold=much", "parameter", "'much'"),
        ("top=0", "parameter", "positive"),
        ("top=1001", "parameter", "1000"),
        ("top=1e3", "parameter", "positive"),
        ("top=" + "9" * 5000, "parameter", "positive"),
        ("masks=perhaps", "parameter", "true or false"),
        ("treshold=0.1", "parameter", "'treshold'"),
        ("top=3&top=4", "parameter", "'top'"),
        ("words=red+star,,", "words", "empty"),
        ("words=red+star,red+star", "words", "red star"),
        ("words=red+star&words=red+star", "words", "red star"),
        ('words="red', "words", "cannot split"),
        ("words=" + ",".join(f"red{i}" for i in range(21)), "words", "21 class names"),
        ("words=" + "a" * 201, "words", "201 characters"),
    ],
)
def test_wrong_parameters_are_named(client, png, query, kind, what):
    response = client.post(f"/api/predict?{query}", content=png, headers=RAW)
    error = problem(response, 400, kind)
    assert what in error["message"]
    assert len(error["message"]) < 2000


def test_a_near_miss_is_suggested(client, png):
    response = client.post("/api/predict?score_treshold=1", content=png, headers=RAW)
    assert problem(response, 400, "parameter")["hint"] == "Did you mean 'score_threshold'?"


def test_what_is_not_an_image_is_refused(client, png):
    post = client.post
    text = {"content-type": "text/plain"}
    problem(post("/api/predict", content=b"no picture", headers=RAW), 415, "image-type")
    problem(post("/api/predict", content=png, headers=text), 415, "image-type")
    problem(post("/api/predict", content=png), 415, "image-type")
    for kind in ("application/image", "text/image/png"):
        problem(
            post("/api/predict", content=png, headers={"content-type": kind}), 415, "image-type"
        )
    problem(post("/api/predict", content=b"", headers=RAW), 400, "malformed")
    problem(post("/api/predict", content=png[:-200], headers=RAW), 400, "image")
    # Pillow would hand PostScript to another program.
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"
    problem(post("/api/predict", content=eps, headers=RAW), 415, "image-type")


def test_wrong_forms_are_refused(client, png):
    post = client.post
    problem(post("/api/predict", files={"file": ("a.png", png)}), 400, "malformed")
    problem(post("/api/predict", files={"picture": ("a.png", b"")}), 400, "malformed")
    twice = [("picture", ("a.png", png)), ("picture", ("b.png", png))]
    problem(post("/api/predict", files=twice), 400, "malformed")
    many = {f"field{i}": "x" for i in range(20)}
    problem(post("/api/predict", files={"picture": ("a", png)}, data=many), 400, "malformed")
    form = {"content-type": "multipart/form-data; boundary=x"}
    problem(post("/api/predict", content=b"--y\r\n", headers=form), 400, "malformed")
    form = {"content-type": "multipart/form-data"}
    problem(post("/api/predict", content=b"--y\r\n", headers=form), 400, "malformed")


def test_large_uploads_are_refused_with_any_stated_length(client):
    def pieces(count: int) -> Iterator[bytes]:
        for _ in range(count):
            yield bytes(50_000)

    large = bytes(600_000)
    problem(client.post("/api/predict", content=large, headers=RAW), 413, "upload-size")
    problem(client.post("/api/predict", content=pieces(5), headers=RAW), 413, "upload-size")
    # Within the room for fields, but the picture alone is too large.
    form = {"picture": ("a.png", bytes(250_000))}
    problem(client.post("/api/predict", files=form), 413, "upload-size")
    lying = {**RAW, "content-length": "10"}
    problem(client.post("/api/predict", content=large, headers=lying), 413, "upload-size")
    for nonsense in ("-5", "many", "9" * 5000):
        headers = {**RAW, "content-length": nonsense}
        response = client.post("/api/predict", content=large, headers=headers)
        problem(response, 413, "upload-size")


def test_bombs_are_refused_from_their_header(client, png):
    """Files that say they are large and hold nothing: decoding would fail otherwise than by size."""
    for side in (400, 20_000, 60_000):
        header = bytearray(png)
        header[16:24] = side.to_bytes(4, "big") * 2
        header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
        with warnings.catch_warnings():
            warnings.simplefilter("default" if side == 20_000 else "error")
            response = client.post("/api/predict", content=bytes(header), headers=RAW)
        assert "pixels" in problem(response, 413, "image-size")["message"]


def test_only_the_fixed_routes_exist(client):
    assert client.get("/").headers["content-type"] == "text/html; charset=utf-8"
    for path in ("/style.css", "/app.js", "/drawing.js", "/colours.js"):
        assert client.get(path).status_code == 200
    traversals = ["/../app.py", "/%2e%2e/app.py", "/..%2fapp.py", "/assets/app.js", "/index.html"]
    for path in (*traversals, "/api", "/api/predict/", "/%00", "/style.css/"):
        problem(client.get(path), 404, "not-found")
    problem(client.get("/api/predict"), 405, "method")
    problem(client.post("/"), 405, "method")


def test_the_page_needs_nothing_from_elsewhere(client):
    response = client.get("/")
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
    assert "unsafe" not in policy
    assert response.headers["x-content-type-options"] == "nosniff"
    assert "access-control-allow-origin" not in response.headers
    for path in ("/", "/style.css", "/app.js", "/drawing.js", "/colours.js"):
        content = client.get(path).text.replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in content
        assert "https://" not in content
        assert " style=" not in content
        assert "innerHTML" not in content


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "evil-localhost",
        "a.localhost",
        "10.1.2.3",
        "[::2]",
        "",
        "a@",
    ],
)
def test_other_hosts_are_refused(client, host):
    problem(client.get("/api/info", headers={"host": host}), 403, "host")


def test_hosts_of_this_machine_are_accepted():
    for host in ("localhost", "LOCALHOST:80", "127.0.0.1:8000", "127.1.2.3", "[::1]:80", "box:80"):
        assert is_own_host(host, ("box",), loopback=True), host
    assert is_own_host("10.1.2.3:80", (), loopback=False)
    assert not is_own_host("evil.example", (), loopback=False)
    assert not is_own_host("[::1", (), loopback=False)


def test_pages_from_elsewhere_cannot_ask(client, png):
    for origin in ("http://evil.example", "null", "http://localhost:81", "http://[", "localhost"):
        headers = {**RAW, "origin": origin}
        problem(client.post("/api/predict", content=png, headers=headers), 403, "origin")
    own = {**RAW, "origin": "http://localhost"}
    assert client.post("/api/predict", content=png, headers=own).status_code == 200


def test_names_of_files_are_shown_and_never_used(client, png):
    hostile = "../../etc/passwd"
    response = client.post("/api/predict", files={"picture": (hostile, png)})
    assert response.json()["file"] == hostile


def test_a_bug_is_reported_as_one(held, png):
    held.failure = KeyError("lost")
    held.release.set()
    app = build_app(held)
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        response = client.post("/api/predict", content=png, headers=RAW)
    assert "KeyError" in problem(response, 500, "bug")["message"]
    assert response.headers["x-content-type-options"] == "nosniff"
    assert app.budget.held == 0


def test_lack_of_memory_is_no_bug(held, png):
    held.failure = MemoryError()
    held.release.set()
    with TestClient(build_app(held), base_url="http://localhost") as client:
        response = client.post("/api/predict", content=png, headers=RAW)
    assert "memory" in problem(response, 500, "environment")["message"]


def test_all_uploads_together_have_a_bound(detector, png):
    settings = dataclasses.replace(ServingSettings(), held_bytes=len(png) - 1)
    app = build_app(detector, settings)
    with TestClient(app, base_url="http://localhost") as client:
        response = client.post("/api/predict", content=png, headers=RAW)
    problem(response, 503, "busy")
    assert response.headers["retry-after"] == "1"
    assert app.budget.held == 0


def test_nothing_is_written_to_the_disk(detector, png, monkeypatch):
    def spooled(*_: object) -> None:
        pytest.fail("the upload went to a file")

    monkeypatch.setattr("tempfile.SpooledTemporaryFile.rollover", spooled)
    # More than what the form parser keeps in memory by itself.
    form = {"picture": ("a.png", png + bytes(3_000_000))}
    with TestClient(build_app(detector), base_url="http://localhost") as client:
        assert client.post("/api/predict", files=form).status_code == 200


def test_settings_are_checked():
    from proxydet.errors import ConfigError

    for name in ("max_pixels", "wait_seconds", "queue_places"):
        with pytest.raises(ConfigError, match=name):
            ServingSettings(**{name: 0})
    with pytest.raises(ConfigError):
        ServingSettings(wait_seconds=float("nan"))


def test_what_cannot_be_read_is_not_queued(detector, png, monkeypatch):
    def queued(*_: object, **__: object) -> None:
        pytest.fail("it would have waited in the queue")

    app = build_app(detector, dataclasses.replace(ServingSettings(), max_pixels=100))
    monkeypatch.setattr(app.queue, "run", queued)
    with TestClient(app, base_url="http://localhost") as client:
        post = client.post
        problem(post("/api/predict", content=png, headers=RAW), 413, "image-size")
        problem(post("/api/predict", content=b"text", headers=RAW), 415, "image-type")


def test_who_takes_no_answer_is_given_up():
    async def send_head(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def never(_message: Message) -> None:
        await asyncio.Event().wait()

    async def wait_for_it() -> asyncio.Task[None]:
        scope = {
            "type": "http",
            "method": "GET",
            "path": "/",
            "headers": [(b"host", b"localhost")],
        }
        middleware = SecurityMiddleware(
            send_head, dataclasses.replace(ServingSettings(), upload_seconds=0.05)
        )
        task = asyncio.create_task(middleware(scope, request, never))
        await asyncio.wait([task], timeout=5)
        return task

    async def request() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(wait_for_it()).result()


def test_background_and_scorers_of_classes_are_those_of_the_detector(client, detector, png, pixels):
    low = {"score_threshold": "0.02", "one_label": "false"}
    words = detector.resolve(["red star", "blue circle"], background=["green star"])

    def expected(classes):
        found = detector.predict(pixels, classes, score_threshold=0.02, one_label=False)
        return json.loads(json.dumps(found.to_dict()["detections"]))

    found = ask(client, png, words="red star, blue circle", background="green star", **low)
    assert found["detections"] == expected(words)
    plain = ask(client, png, words="red star, blue circle", **low)["detections"]
    scores = sorted(item["score"] for item in plain if item["label"] == "red star")
    classes = [
        {"name": "red star", "threshold": scores[0], "bias": 1.5},
        {"name": "blue circle"},
        {"name": "green star", "background": True, "bias": 0.1},
    ]
    words = words.with_scorers(bias=[1.5, 0, 0.1], threshold=[scores[0], np.nan, np.nan])
    found = ask(client, png, classes=json.dumps(classes), **low)["detections"]
    assert found == expected(words)
    assert {item["label"] for item in found} <= {"red star", "blue circle"}
    assert found != plain
    training = ask(client, png, words="red star", background="training", **low)["detections"]
    assert {item["label"] for item in training} <= {"red star"}


def test_words_of_the_served_vocabulary_are_what_they_are_there(detector, png):
    """With their thresholds, next to its background; background of others by the margin."""
    mine = detector.resolve(["red star", "blue star"], background=["green star"])
    mine = mine.joined(Vocabulary.from_arrays(["my mug"], mine.embeddings[:1] + 0.1))
    mine = mine.with_scorers(threshold=[0.01, 0.9, np.nan, np.nan], bias=[0, 0, 0.5, -1])
    assert mine.names == ("red star", "blue star", "my mug", "green star")
    served = Served(detector=detector, vocabulary=mine, background=detector.vocabulary)
    app = build_app(served, SETTINGS)

    def made(words=None, **fields) -> Vocabulary:
        given = fields if words is None else {**fields, "words": words}
        return app.vocabulary_of(read_params(given.items(), SETTINGS))

    assert made() is app.vocabulary
    found = made("blue circle, my mug, red star")
    assert found.reported == ("blue circle", "my mug", "red star")
    np.testing.assert_array_equal(found.threshold[:3], np.float32([np.nan, np.nan, 0.01]))
    assert found.bias[:3].tolist() == [0, 0.5, 0]
    assert "green star" in found.names[3:]
    assert len(found) > 4
    assert set(found.bias[3:].tolist()) == {-1}
    # As the server's, a request's background has the margin, unless it says otherwise.
    assert made("red star", background="blue star").bias.tolist() == [0, -1]
    for bias, wanted in ({}, -1), ({"bias": 0}, 0):
        classes = [{"name": "red star"}, {"name": "blue star", "background": True, **bias}]
        assert made(classes=json.dumps(classes)).bias.tolist() == [0, wanted]
    # Only the parameter `background` has the keyword for all classes of the training.
    assert len(made("red star", background="training")) > 2
    classes = [{"name": "red star"}, {"name": "training", "background": True}]
    assert read_params([("classes", json.dumps(classes))], SETTINGS).background == ("training",)
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        answer = ask(client, png, words="red star, my mug", score_threshold="0.9")
        assert answer["thresholds"] == {"red star": pytest.approx(0.01)}


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"classes": "[{"}, "parameter"),
        ({"classes": '[{"name": "red star", "threshold": 1.5}]'}, "parameter"),
        ({"classes": '[{"name": "red star", "bias": 1e9}]'}, "parameter"),
        ({"classes": '[{"name": "red star", "bias": NaN}]'}, "parameter"),
        ({"classes": '[{"name": "red star", "weight": 1}]'}, "parameter"),
        ({"classes": "[" * 100_000}, "parameter"),
        ({"classes": '[{"name": "red star"}]', "words": "red star"}, "parameter"),
        ({"classes": '[{"name": "red star", "background": true}]'}, "words"),
        ({"classes": '[{"name": "red star"}, {"name": "red star "}]'}, "words"),
        ({"classes": json.dumps([{"name": f"red star{i}"} for i in range(21)])}, "words"),
        ({"words": "red star", "background": "red star"}, "words"),
        ({"exemplars": json.dumps([{"name": "x" * 201, "regions": ["AAAA"]}])}, "words"),
        (
            {"exemplars": json.dumps([{"name": f"x{i}", "regions": ["AAAA"]} for i in range(21)])},
            "words",
        ),
        ({"words": "red star", "background": ", ".join(["red star"] * 21)}, "words"),
    ],
)
def test_scorers_out_of_bounds_are_refused(client, png, fields, kind):
    response = client.post(
        "/api/predict", files={"picture": ("photo.png", png, "image/png")}, data=fields
    )
    problem(response, 400, kind)


def test_regions_of_one_image_are_looked_for_in_another(
    client, png, pixels, detector, tmp_path, monkeypatch
):
    monkeypatch.setenv("PROXYDET_CACHE", str(tmp_path))
    files = {"picture": ("a.png", png, "image/png")}
    told = client.post(
        "/api/embed", files=files, data={"boxes": "[[5, 5, 40, 40], [10, 8, 60, 44]]"}
    )
    assert told.status_code == 200, told.text
    regions = told.json()["regions"]
    (wanted,) = detector.embed_boxes([pixels], [[[5, 5, 40, 40], [10, 8, 60, 44]]])
    found = np.stack([np.frombuffer(base64.b64decode(region), "<f4") for region in regions])
    np.testing.assert_allclose(found, wanted.mean(axis=1), atol=1e-5)

    exemplars = json.dumps([{"name": "my thing", "regions": regions}])
    data = {"exemplars": exemplars, "score_threshold": "0.0"}
    alone = client.post("/api/predict", files=files, data=data).json()["detections"]
    assert {item["label"] for item in alone} == {"my thing"}
    mixed = client.post("/api/predict", files=files, data={**data, "words": "red star", "one_label": "false"})  # fmt: skip
    assert {item["label"] for item in mixed.json()["detections"]} == {"red star", "my thing"}
    # Where nothing is measured, images of others change nothing: a new server gives the same.
    client.post("/api/embed", files={"picture": ("b.png", grey_png(), "image/png")}, data={"boxes": "[[0, 0, 9, 9]]"})  # fmt: skip
    with TestClient(build_app(detector, SETTINGS), base_url="http://localhost") as other:
        assert other.post("/api/predict", files=files, data=data).json()["detections"] == alone
    assert client.post("/api/predict", files=files, data=data).json()["detections"] == alone
    twice = client.post("/api/predict", files=files, data={**data, "words": "my thing"})
    assert (twice.status_code, twice.json()["error"]["kind"]) == (400, "words")


@pytest.mark.parametrize(
    ("path", "data"),
    [
        ("embed", {}),
        ("embed", {"boxes": "[[1, 2]]"}),
        ("embed", {"boxes": "[]"}),
        ("embed", {"boxes": "[[NaN, 0, 5, 5]]"}),
        ("embed", {"boxes": "[[500, 500, 600, 600]]"}),
        ("embed", {"boxes": "[[9, 9, 1, 1]]"}),
        ("embed", {"boxes": "[" * 50_000}),
        ("embed", {"boxes": str([[0, 0, 9, 9]] * 101)}),
        ("embed", {"boxes": "[[0, 0, 9, 9]]", "words": "cup"}),
        ("predict", {"exemplars": "cup"}),
        ("predict", {"exemplars": "[1]"}),
        ("predict", {"exemplars": '[{"name": "", "regions": ["AAAA"]}]'}),
        ("predict", {"exemplars": '[{"name": "a", "regions": []}]'}),
        ("predict", {"exemplars": '[{"name": "a", "regions": ["AAAA"]}]'}),
        ("predict", {"exemplars": '[{"name": "a", "regions": ["no!"]}]'}),
        ("predict", {"exemplars": '[{"name": ["a"], "regions": ["AAAA"]}]'}),
        ("predict", {"exemplars": json.dumps([{"name": "a", "regions": [base64.b64encode(np.full(64, np.nan, "<f4").tobytes()).decode()]}])}),
    ],
)  # fmt: skip
def test_wrong_exemplars_are_the_clients_mistake(client, png, path, data):
    files = {"picture": ("a.png", png, "image/png")}
    reply = client.post(f"/api/{path}", files=files, data=data)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["hint"]
