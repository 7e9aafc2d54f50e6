"""The search page and its endpoint, around an index of photos."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from region_indexes import made
from starlette.testclient import TestClient

from proxydet import RegionIndex
from proxydet.index.build import index_images
from proxydet.index.search import results_page
from proxydet.inference.sources import SourceImage
from proxydet.serve.app import Served, ServingSettings, build_app

WORDS = ["red star", "blue circle"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(4)
    for number, size in enumerate([(48, 64), (64, 48), (80, 80)]):
        pixels = draw.integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"photo {number}.png")
    return folder


@pytest.fixture(scope="module")
def index(photos, detector, tmp_path_factory) -> RegionIndex:
    return RegionIndex(made(tmp_path_factory.mktemp("index") / "photos.index", detector, photos))


@pytest.fixture(scope="module")
def searching(index):
    app = build_app(Served(index=index), ServingSettings(max_words=20))
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as made:
        yield made


def test_a_search_over_http_finds_what_the_index_finds(searching, index):
    info = searching.get("/api/info").json()
    assert info["index"] == {"images": 3, "regions": index.stored.regions, "mode": "exact"}
    assert info["words"]["default"] == list(index.vocabulary.names)
    query = {"words": ", ".join(WORDS), "score_threshold": "0.2", "limit": "2"}
    found = searching.get("/api/search", params=query).json()
    wanted = index.search(WORDS, score_threshold=0.2, top=2)
    assert found["images"] == [
        {"id": hit.number, **json.loads(json.dumps(hit.to_dict()))} for hit in wanted
    ]
    image = searching.get(f"/images/{wanted[0].number}.jpg", params={"size": "40"})
    assert max(Image.open(io.BytesIO(image.content)).size) == 40
    assert "app.js" not in searching.get("/").text


def test_more_like_a_region_over_http(searching, index):
    hit = index.search(WORDS, score_threshold=0.2)[0]
    box = hit.found.boxes_xyxy[0].tolist()
    query = {"like": str(hit.number), "box": json.dumps(box), "score_threshold": "0.05"}
    found = searching.get("/api/search", params=query).json()
    like = index.like(hit.number, box)
    assert (like.iou > 0.95, found["like"]) == (True, {"id": hit.number, **like.to_dict()})
    wanted = index.search(like.vocabulary, score_threshold=0.05)
    assert len(wanted) > 0
    assert found["images"] == [
        {"id": hit.number, **json.loads(json.dumps(hit.to_dict()))} for hit in wanted
    ]


def test_a_damaged_part_is_not_a_region_that_is_absent(index, tmp_path):
    copied = RegionIndex(shutil.copytree(index.stored.path, tmp_path / "photos.index"))
    app = build_app(Served(index=copied), ServingSettings())
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        for part in copied.stored.parts:
            part.__dict__.pop("arrays", None)
            part.path.unlink()
        response = client.get("/api/search?like=0&box=[0,0,9,9]")
    assert (response.status_code, response.json()["error"]["kind"]) == (500, "index")


def test_members_of_a_tar_are_shown_and_objects_of_a_store_are_not_fetched(
    photos, detector, tmp_path, monkeypatch
):
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(photos / "photo 0.png", "photo 0.png")
    index_images(detector, [tmp_path / "photos.tar"], tmp_path / "tar.index")
    index = RegionIndex(tmp_path / "tar.index")
    page = results_page(index.search(WORDS, score_threshold=0.0), title="", summary="")
    captions = [image.caption for image in page.sections[0].images]
    assert len(captions) == 1
    assert "not there any more" not in captions[0]
    app = build_app(Served(index=index), ServingSettings())
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        image = client.get("/images/0.jpg", params={"size": "40"})
        assert max(Image.open(io.BytesIO(image.content)).size) == 40
        elsewhere = SourceImage("memory://photos/0.png")
        monkeypatch.setattr(RegionIndex, "source_at", lambda *_: elsewhere)
        assert client.get("/images/0.jpg").status_code == 404


@pytest.mark.parametrize(
    ("path", "status", "kind"),
    [
        ("/api/search?words=purple", 400, "words"),
        ("/api/search?limit=5000", 400, "parameter"),
        ("/api/search?masks=true", 400, "parameter"),
        ("/api/search?nothing=1", 400, "parameter"),
        ("/api/search?like=0", 400, "parameter"),
        ("/api/search?like=x&box=[0,0,9,9]", 400, "parameter"),
        ("/api/search?like=0&box=[0,0,9,9]&words=red", 400, "parameter"),
        ("/api/search?like=0&box=[0,0,9]", 400, "parameter"),
        ("/api/search?like=7&box=[0,0,9,9]", 404, "region"),
        ("/api/search?like=0&box=[900,900,950,950]", 404, "region"),
        ("/images/3.jpg", 404, "not-found"),
        ("/images/99999999999999999999.jpg", 404, "not-found"),
        ("/images/0.jpg?size=-1", 400, "parameter"),
        ("/api/predict", 404, "not-found"),
    ],
)
def test_mistakes_are_named(searching, path, status, kind):
    response = searching.get(path)
    assert (response.status_code, response.json()["error"]["kind"]) == (status, kind)
    if path == "/api/predict":
        assert response.json()["error"]["hint"] == "routes: /api/health, /api/info, /, /api/search"


def test_a_file_that_is_gone_and_a_damaged_index_are_reported(photos, detector, tmp_path):
    own = Path(shutil.copytree(photos, tmp_path / "own"))
    place = made(tmp_path / "own.index", detector, own)
    app = build_app(Served(index=RegionIndex(place)))
    shutil.rmtree(own)
    for part in (place / "parts").glob("*"):
        part.write_bytes(b"")
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        assert client.get("/api/search").json()["error"]["kind"] == "index"


def test_an_image_above_the_limit_is_not_decoded(index):
    app = build_app(Served(index=index), ServingSettings(max_pixels=4000))
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        shown = [client.get(f"/images/{number}.jpg").status_code for number in range(3)]
    assert sorted(shown) == [200, 200, 413]
