"""Google Drive's pages, certificates, proxies, cookies, redirects: what stands between an address and its bytes."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path

import pytest

from proxydet.artifacts import Login, TransferSettings, bytes_per_second
from proxydet.errors import ArtifactError, ConfigError, TransferError

SCAN_PAGE = b"""<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title></head><body>
<p>Google Drive can't scan this file for viruses. proxydet.pth (500M) is too large.</p>
<form id="download-form" action="%s" method="get"><input type="submit" value="Download anyway"/>
<input type="hidden" name="id" value="1H8c"><input type="hidden" name="export" value="download">
<input type="hidden" name="confirm" value="t"><input type="hidden" name="uuid" value="a-b&amp;c"></form></body></html>"""
QUOTA_PAGE = b"<html><head><title>Google Drive - Quota exceeded</title></head><body>Too many users</body></html>"
DRIVE = "http://drive.google.com"
BUTTON = f"{DRIVE}/download?id=1H8c&export=download&confirm=t&uuid=a-b%26c"


@pytest.fixture
def proxied(server, monkeypatch) -> None:
    """Make every host of the web, over plain HTTP, be our server: it is the proxy."""
    monkeypatch.setenv("HTTP_PROXY", server.address(""))
    monkeypatch.setenv("no_proxy", "")


@pytest.mark.usefixtures("proxied")
class TestGoogleDrive:
    @pytest.mark.parametrize("action", [b"/download", b"http://drive.usercontent.google.com/d"])
    def test_its_button_is_pressed_and_again_to_resume(self, fetch, server, body, action):
        fetch.set(connections=4, parallel_from=1000)
        page = server.add(
            f"{DRIVE}/uc?id=1H8c", SCAN_PAGE % action, content_type="text/html", ranges=False
        )
        goal = (
            BUTTON
            if action == b"/download"
            else BUTTON.replace(f"{DRIVE}/download", action.decode())
        )
        served = server.add(goal, body, drop_after=200_000)
        fetch(f"{DRIVE}/uc?id=1H8c", pinned=body)
        assert fetch.target.read_bytes() == body
        assert (len(page.requests), len(served.requests)) == (2, 2)
        assert served.sent == len(body)

    @pytest.mark.parametrize(
        ("page", "message"),
        [
            (QUOTA_PAGE, "quota"),
            (b"<html>You need access. Sign in</html>", "sign in"),
            (b"<html>404</html>", "page"),
            (SCAN_PAGE % b"https://evil.example.org/download", "page"),
        ],
    )  # fmt: skip
    def test_pages_without_a_way_on(self, fetch, server, body, page, message):
        server.add(f"{DRIVE}/uc", page, content_type="text/html")
        with pytest.raises(TransferError, match=message) as caught:
            fetch(f"{DRIVE}/uc", pinned=body, page="https://drive.google.com/file/d/1H8c/view")
        assert "https://drive.google.com/file/d/1H8c/view" in (caught.value.hint or "")
        assert not fetch.target.exists()

    def test_a_page_behind_the_page(self, fetch, server, body):
        server.add(f"{DRIVE}/uc", SCAN_PAGE % b"/download", content_type="text/html")
        server.add(BUTTON, QUOTA_PAGE, content_type="text/html")
        with pytest.raises(TransferError, match="quota"):
            fetch(f"{DRIVE}/uc", pinned=body)


class TestCertificates:
    @pytest.fixture
    def secure(self, server, tmp_path) -> Path:
        """Make the server speak TLS with a certificate that nobody knows; return that certificate's file."""
        certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
        command = f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1 -out {certificate} -keyout {key}"
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

    def test_an_unknown_one_is_refused_without_retries(self, fetch, server, body, secure):
        server.add("/f", body)
        with pytest.raises(TransferError, match="certificate") as caught:
            fetch(server.address("/f").replace("http:", "https:"), pinned=body)
        assert "REQUESTS_CA_BUNDLE" in (caught.value.hint or "")
        assert not fetch.target.exists()

    def test_requests_ca_bundle_is_honoured(self, fetch, server, body, secure, monkeypatch):
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(secure))
        server.add("/f", body, drop_after=100_000)
        fetch(server.address("/f").replace("http:", "https:"))
        assert fetch.target.read_bytes() == body

    @pytest.mark.usefixtures("secure")
    def test_a_redirect_to_plain_http_needs_a_digest(
        self, fetch, server, body, proxied, secure, monkeypatch
    ):
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(secure))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        server.add("/f", redirect="http://elsewhere.example/g")
        with pytest.raises(TransferError, match=r"http://elsewhere.example/g"):
            fetch(server.address("/f").replace("http:", "https:"))


class TestRedirects:
    def test_they_keep_the_range(self, fetch, server, body):
        server.add("/f", redirect="/elsewhere?token=secret")
        served = server.add("/elsewhere?token=secret", body, drop_after=200_000)
        fetch("/f")
        assert fetch.target.read_bytes() == body
        assert served.headers("Range") == [None, "bytes=200000-"]

    def test_endless_ones(self, fetch, server):
        served = server.add("/f", redirect="/f")
        with pytest.raises(TransferError, match="redirects"):
            fetch("/f")
        assert len(served.requests) < 40

    @pytest.mark.parametrize(
        "goal",
        ["ftp://127.0.0.1/x", "file:///etc/passwd", "http://user:secret@127.0.0.1/x",
         "http://127.0.0.1:99999999/x", "http://" + "x" * 5000, "http://a b/"],
    )  # fmt: skip
    def test_to_what_is_not_a_plain_web_address(self, fetch, server, goal):
        server.add("/f", redirect=goal)
        with pytest.raises(TransferError, match="redirect") as caught:
            fetch("/f")
        assert "secret" not in str(caught.value)
        assert not fetch.target.exists()

    @pytest.mark.usefixtures("proxied")
    @pytest.mark.parametrize(
        "goal",
        ["http://127.0.0.1:8080/f", "http://localhost/f", "http://[::1]/f", "http://0.0.0.0/f",
         "http://LOCALHOST./f", "http://a.localhost/f", "http://127.8.9.1/f"],
    )  # fmt: skip
    def test_from_outside_to_this_machine(self, fetch, server, body, goal):
        served = server.add("http://elsewhere.example/f", redirect=goal)
        with pytest.raises(TransferError, match="this machine"):
            fetch("http://elsewhere.example/f", pinned=body)
        assert len(served.requests) == 1

    @pytest.mark.usefixtures("proxied")
    def test_from_outside_to_outside(self, fetch, server, body):
        server.add("http://elsewhere.example/f", redirect="http://localhost.example.org/g")
        served = server.add("http://localhost.example.org/g", body)
        fetch("http://elsewhere.example/f", pinned=body)
        assert fetch.target.read_bytes() == body
        assert served.headers("Host") == ["localhost.example.org"]


class TestAccounts:
    def test_netrc_credentials_stay_with_their_host(
        self, fetch, server, body, tmp_path, monkeypatch
    ):
        netrc = tmp_path / "netrc"
        netrc.write_text("machine localhost login me password secret\n")
        netrc.chmod(0o600)
        monkeypatch.setenv("NETRC", str(netrc))
        host = server.address("").replace("127.0.0.1", "localhost")
        first = server.add("/f", redirect=server.address("/g"))
        second = server.add("/g", body)
        fetch(f"{host}/f")
        assert (first.headers("Authorization")[0] or "").startswith("Basic ")
        assert second.headers("Authorization") == [None]

    def test_a_cookie_is_what_is_needed(self, downloads, server, body, tmp_path, monkeypatch):
        thing = downloads.artifact(login=Login(site="https://example.org", how="Register there."))
        served = server.add("/thing", body, cookie="session=secret", page=b"<html>sign in</html>")
        assert downloads.states(thing) == ["needs account"]
        assert downloads.fetch(thing).outcomes[0].status == "needs account"
        assert not served.requests
        cookies = tmp_path / "cookies.txt"
        line = "127.0.0.1\tFALSE\t/\tFALSE\t4102444800\tsession\tsecret\n"
        cookies.write_text(f"# Netscape HTTP Cookie File\n{line}")
        monkeypatch.setenv("PROXYDET_COOKIES", str(cookies))
        downloads.fetch(thing).raise_for_failures()
        assert served.headers("Cookie") == ["session=secret"]

    def test_a_cookie_file_that_is_not_one(self, downloads, tmp_path, monkeypatch):
        (tmp_path / "c").write_text("nonsense")
        monkeypatch.setenv("PROXYDET_COOKIES", str(tmp_path / "c"))
        with pytest.raises(ConfigError) as caught:
            downloads.open(downloads.artifact())
        assert caught.value.path == tmp_path / "c"

    def test_nothing_secret_is_shown(self, downloads, server, caplog):
        server.add("/thing?token=secret", answers=[(500, {})] * 99)
        thing = downloads.artifact(addresses=(server.address("/thing?token=secret"),))
        with caplog.at_level("DEBUG"), pytest.raises(ArtifactError) as caught:
            downloads.fetch(thing).raise_for_failures()
        ours = [r.getMessage() for r in caplog.records if r.name.startswith("proxydet")]
        assert ours
        assert "secret" not in str(caught.value) + str(caught.value.hint) + " ".join(ours)


def test_a_mirror_comes_first_with_quoted_paths(downloads, fetch, server, body):
    served = server.add("/mirror/models/a%2Bb%20c.bin", body)
    fetch.set(mirror=server.address("/mirror/"))
    server.add("/thing", body)
    downloads.fetch(downloads.artifact(body=body, target="models/a+b c.bin")).raise_for_failures()
    assert len(served.requests) == 1
    downloads.fetch(downloads.artifact(body=body, target="models/o.bin")).raise_for_failures()
    assert len(server.files["/thing"].requests) == 1


@pytest.mark.parametrize(
    ("text", "rate"), [("800k", 8e5), ("20M", 2e7), ("1.5G", 1.5e9), ("300", 300), ("2MB/s", 2e6)]
)
def test_rates(text, rate):
    assert bytes_per_second(text) == rate


@pytest.mark.parametrize("text", ["", "fast", "-3M", "0", "1e9", "3T", "nan", "٣M"])
def test_what_is_not_a_rate(text):
    with pytest.raises(ConfigError):
        bytes_per_second(text)


@pytest.mark.parametrize(
    "field", ["connections", "jobs", "attempts", "limit_rate", "read_timeout", "chunk_bytes"]
)
def test_settings_are_checked(field):
    with pytest.raises(ConfigError, match=field):
        TransferSettings(**{field: 0})
