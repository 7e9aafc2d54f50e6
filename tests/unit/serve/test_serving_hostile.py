"""Whatever is sent, the answer is one of the documented ones, and nothing is held afterwards."""

from __future__ import annotations

import io
from typing import Any
from urllib.parse import urlencode

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image, features

KINDS = {
    "parameter",
    "words",
    "image",
    "image-type",
    "image-size",
    "upload-size",
    "malformed",
}
STATUSES = {400, 413, 415}
shared_client = settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

disposition = st.sampled_from(
    [
        b'form-data; name="picture"; filename="a.png"',
        b'form-data; name="words"',
        b"form-data; name=picture; filename*=utf-8''%ff",
        b"form-data",
        b'form-data; name="\xff"; filename=""',
        b"",
    ]
)
piece = st.one_of(
    st.binary(max_size=40),
    st.sampled_from(
        [b"--x", b"--x--", b"\r\n", b"\n", b"Content-Disposition: ", b"GIF89a", b"P6 1 1 255 "]
    ),
    disposition,
)
bodies = st.lists(piece, max_size=14).map(b"".join)


def check(response: Any) -> None:
    if response.status_code == 200:
        assert set(response.json()) == {"file", "width", "height", "detections"}
        return
    error = response.json()["error"]
    assert response.status_code in STATUSES, response.text
    assert error["kind"] in KINDS
    assert error["message"]


@shared_client
@given(bodies)
@example(b"--x\r\nContent-Disposition: form-data; name=picture; filename=a\r\n\r\nGIF89a\r\n--x--")
def test_broken_forms(client, body):
    headers = {"content-type": "multipart/form-data; boundary=x"}
    check(client.post("/api/predict", content=body, headers=headers))


@shared_client
@given(st.binary(max_size=30), st.sampled_from([b"x", b'"x"', b"", b"x" * 300, b"\xff;;=", b'"']))
def test_broken_content_types(client, kind, boundary):
    for value in (b"multipart/form-data; boundary=" + boundary, kind.translate(None, b"\r\n\0")):
        headers = [(b"content-type", value)]
        check(client.post("/api/predict", content=b"--x\r\n\r\n--x--", headers=headers))


# Pillow warns of damaged EXIF blocks; the server's process does not show that.
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@shared_client
@given(st.binary(max_size=60), st.integers(0, 2000), st.integers(0, 255))
def test_broken_pictures(client, png, tail, position, value):
    headers = {"content-type": "image/png"}
    changed = bytearray(png)
    changed[position] = value
    check(client.post("/api/predict", content=bytes(changed), headers=headers))
    for start in (b"\xff\xd8\xff\xe0", b"II*\0", b"MM\0*", b"BM", b"RIFF\0\0\0\0WEBPVP8 ", b"P5 "):
        check(client.post("/api/predict", content=start + tail, headers=headers))


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_an_avif_whose_items_are_damaged(client):
    stream = io.BytesIO()
    Image.new("RGB", (64, 48)).save(stream, "AVIF")
    body = stream.getvalue().replace(b"iloc", b"xxxx")
    response = client.post("/api/predict", content=body, headers={"content-type": "image/avif"})
    assert response.status_code == 415


@shared_client
@given(st.dictionaries(st.text(max_size=12), st.text(max_size=30), max_size=4))
@example({"words": "\ud800"})
@example({"words": "a\nb", "top": "\u0663"})
def test_any_parameters(client, png, parameters):
    encoded = {
        key.encode("utf-8", "surrogatepass"): value.encode("utf-8", "surrogatepass")
        for key, value in parameters.items()
    }
    headers = {"content-type": "image/png"}
    check(client.post(f"/api/predict?{urlencode(encoded)}", content=png, headers=headers))
