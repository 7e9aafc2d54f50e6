"""Google Drive's pages, certificates, proxies, cookies, addresses: what stands between an address and its bytes."""

from __future__ import annotations

import dataclasses
import ssl
import subprocess
import threading
from pathlib import Path

import pytest

from proxydet.artifacts import addresses
from proxydet.artifacts.addresses import check_address, is_this_machine, mirror_address, shown
from proxydet.artifacts.google_drive import address_behind_page
from proxydet.artifacts.patience import retry_after
from proxydet.artifacts.settings import TransferSettings, bytes_per_second
from proxydet.errors import ConfigError, TransferError

SCAN_PAGE = b"""<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title></head><body>
<p>Google Drive can't scan this file for viruses. proxydet.pth (500M) is too large.</p>
<form id="download-form" action="%s" method="get"><input type="submit" value="Download anyway"/>
<input type="hidden" name="id" value="1H8c"><input type="hidden" name="export" value="download">
<input type="hidden" name="confirm" value="t"><input type="hidden" name="uuid" value="a-b&amp;c"></form></body></html>"""
QUOTA_PAGE = b"<html><head><title>Google Drive - Quota exceeded</title></head><body>Too many users</body></html>"


class TestGoogleDrive:
    def test_its_button_is_pressed(self, fetch, server, body) -> None:
        page = server.add(
            "/uc?id=1H8c", SCAN_PAGE % b"/download", content_type="text/html; charset=utf-8"
        )
        served = server.add("/download?id=1H8c&export=download&confirm=t&uuid=a-b%26c", body)
        host = server.address("").replace("127.0.0.1", "localhost")
        fetch(f"{host}/uc?id=1H8c")
        assert fetch.target.read_bytes() == body
        assert (len(page.requests), len(served.requests)) == (1, 1)

    def test_it_is_pressed_again_to_resume(self, fetch, server, body) -> None:
        server.add("/uc?id=1H8c", SCAN_PAGE % b"/download", content_type="text/html", ranges=False)
        served = server.add(
            "/download?id=1H8c&export=download&confirm=t&uuid=a-b%26c", body, drop_after=200_000
        )
        host = server.address("").replace("127.0.0.1", "localhost")
        fetch.settings = dataclasses.replace(fetch.settings, connections=4, parallel_from=1000)
        fetch(f"{host}/uc?id=1H8c")
        assert fetch.target.read_bytes() == body
        assert served.sent == len(body)

    @pytest.mark.parametrize(
        ("page", "message"),
        [
            (QUOTA_PAGE, "daily quota"),
            (b"<html>You need access. Sign in</html>", "sign in"),
            (b"<html>404</html>", "page in place"),
            (SCAN_PAGE % b"https://evil.example.org/download", "page in place"),
        ],
    )
    def test_pages_without_a_way_on(self, fetch, server, page, message) -> None:
        server.add("/uc", page, content_type="text/html")
        host = server.address("").replace("127.0.0.1", "localhost")
        with pytest.raises(TransferError, match=message) as caught:
            fetch(f"{host}/uc", page="https://drive.google.com/file/d/1H8c/view")
        assert "https://drive.google.com/file/d/1H8c/view" in (caught.value.hint or "")
        assert not fetch.target.exists()

    def test_a_page_behind_the_page(self, fetch, server) -> None:
        server.add("/uc", SCAN_PAGE % b"/download", content_type="text/html")
        server.add(
            "/download?id=1H8c&export=download&confirm=t&uuid=a-b%26c",
            QUOTA_PAGE,
            content_type="text/html",
        )
        host = server.address("").replace("127.0.0.1", "localhost")
        with pytest.raises(TransferError, match="daily quota"):
            fetch(f"{host}/uc")

    def test_the_real_hosts(self) -> None:
        page = (SCAN_PAGE % b"https://drive.usercontent.google.com/download").decode()
        goal = address_behind_page(page, "https://drive.google.com/uc?id=1H8c&export=download")
        assert goal.startswith(
            "https://drive.usercontent.google.com/download?id=1H8c&export=download&confirm=t&uuid="
        )


class TestCertificates:
    @pytest.fixture
    def secure(self, server, tmp_path: Path) -> Path:
        """Make the server speak TLS with a certificate that nobody knows; return that certificate's file."""
        certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
        command = f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1 -out {certificate} -keyout {key}"
        try:
            subprocess.run(command.split(), check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("openssl is not there to make a certificate")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        server.socket = context.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
        return certificate

    def test_an_unknown_one_is_refused_without_retries(self, fetch, server, body, secure) -> None:
        server.add("/f", body)
        with pytest.raises(TransferError, match="certificate") as caught:
            fetch(server.address("/f").replace("http:", "https:"), pinned=body)
        assert "REQUESTS_CA_BUNDLE" in (caught.value.hint or "")
        assert not fetch.target.exists()

    def test_requests_ca_bundle_is_honoured(self, fetch, server, body, secure, monkeypatch) -> None:
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(secure))
        server.add("/f", body, drop_after=100_000)
        fetch(server.address("/f").replace("http:", "https:"))
        assert fetch.target.read_bytes() == body

    def test_a_redirect_from_https_to_http_needs_a_digest(
        self, fetch, server, body, secure, monkeypatch
    ) -> None:
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(secure))
        monkeypatch.setattr(addresses, "is_this_machine", lambda _: False)
        server.add("/f", redirect=server.address("/g"))
        with pytest.raises(TransferError, match=r"redirect from .* is not encrypted"):
            fetch(server.address("/f").replace("http:", "https:"))


def test_proxies_are_honoured(fetch, server, body, monkeypatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", server.address(""))
    monkeypatch.setenv("no_proxy", "")
    served = server.add("http://elsewhere.example/f", body)
    fetch("http://elsewhere.example/f", pinned=body)
    assert fetch.target.read_bytes() == body
    assert served.requests[0]["Host"] == "elsewhere.example"


def test_netrc_credentials_stay_with_their_host(fetch, server, body, tmp_path, monkeypatch) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine localhost login me password secret\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    host = server.address("").replace("127.0.0.1", "localhost")
    first = server.add("/f", redirect=server.address("/g"))
    second = server.add("/g", body)
    fetch(f"{host}/f")
    assert first.requests[0]["Authorization"].startswith("Basic ")
    assert "Authorization" not in second.requests[0]


@pytest.mark.parametrize(
    ("goal", "origin", "pinned", "accepted"),
    [
        ("https://b.org/f", "https://a.org/f", False, True),
        ("http://b.org/f", "https://a.org/f", False, False),
        ("http://b.org/f", "https://a.org/f", True, True),
        ("http://127.0.0.1:8080/f", "https://a.org/f", True, False),
        ("https://localhost/f", "https://a.org/f", True, False),
        ("http://[::1]/f", "https://a.org/f", True, False),
        ("http://0.0.0.0/f", "https://a.org/f", True, False),
        ("http://127.0.0.1/f", "http://localhost/f", False, True),
    ],
)
def test_where_redirects_may_lead(goal, origin, pinned, accepted) -> None:
    if accepted:
        check_address(goal, pinned=pinned, came_from=origin)
    else:
        with pytest.raises(TransferError, match="redirect"):
            check_address(goal, pinned=pinned, came_from=origin)


def test_what_is_shown_of_an_address() -> None:
    assert shown("https://me:secret@a.org:8443/x/y?token=secret#part") == "https://a.org:8443/x/y"
    assert shown("https://[bad") == "(unreadable address)"


def test_this_machine() -> None:
    assert all(
        map(
            is_this_machine,
            ("localhost", "LOCALHOST.", "a.localhost", "127.8.9.1", "::1", "0.0.0.0"),
        )
    )
    assert not any(map(is_this_machine, ("example.org", "10.0.0.1", "localhost.example.org", "")))


def test_mirror_addresses_are_quoted() -> None:
    assert (
        mirror_address("https://m.org/x/", "datasets/metadata/a+b c.npy")
        == "https://m.org/x/datasets/metadata/a%2Bb%20c.npy"
    )


@pytest.mark.parametrize(
    ("text", "rate"), [("800k", 8e5), ("20M", 2e7), ("1.5G", 1.5e9), ("300", 300), ("2MB/s", 2e6)]
)
def test_rates(text, rate) -> None:
    assert bytes_per_second(text) == rate


@pytest.mark.parametrize("text", ["", "fast", "-3M", "0", "1e9", "3T", "nan", "٣M"])
def test_what_is_no_rate(text) -> None:
    with pytest.raises(ConfigError):
        bytes_per_second(text)


@pytest.mark.parametrize(
    "field", ["connections", "jobs", "retries", "limit_rate", "read_timeout", "chunk_bytes"]
)
def test_settings_are_checked(field) -> None:
    with pytest.raises(ConfigError, match=field):
        TransferSettings(**{field: 0})


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("7", 7),
        ("", None),
        ("soon", None),
        ("-3", None),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0),
        ("9" * 50, 999999999),
        ("²", None),
    ],
)
def test_retry_after(text, seconds) -> None:
    assert retry_after({"Retry-After": text}) == seconds


def test_threads_do_not_share_a_session(fetch, server) -> None:
    from proxydet.artifacts.http import Client

    sessions: list[object] = []
    with Client(fetch.settings) as client:
        threads = [
            threading.Thread(target=lambda: sessions.append(client._session())) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(set(map(id, sessions))) == 3
