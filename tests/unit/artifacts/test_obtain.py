"""From a catalogue entry to a file that is ready: looked at, fetched once, checked, recorded, unpacked once."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import shutil
import threading
import zipfile
from functools import cache
from pathlib import Path

import pytest

import proxydet.artifacts.obtain as obtain_module
from proxydet.artifacts.artifact import Content, Login, Provided, Unpack
from proxydet.artifacts.catalogue import Catalogue, CatalogueFile
from proxydet.artifacts.download import download, locate
from proxydet.artifacts.downloader import Downloader, DownloadOptions
from proxydet.artifacts.look import State
from proxydet.errors import ArtifactError, ConfigError, DigestError, DiskFullError, TransferError
from proxydet.reporting import SilentProgress


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


@pytest.fixture
def run(root, quick):
    """Make artifacts ready; a second call of the same is what a second run of the command is."""

    def make(*artifacts, names=None, **options):
        catalogue = Catalogue([("test", CatalogueFile(artifacts=artifacts))])
        chosen = DownloadOptions(root=root, **{"settings": quick, **options})
        with Downloader(catalogue, chosen) as downloader:
            plan = downloader.plan(names or [artifact.name for artifact in artifacts])
            return plan, downloader.fetch(plan)

    return make


@pytest.fixture
def verify(root):
    def make(*artifacts):
        with Downloader(
            Catalogue([("t", CatalogueFile(artifacts=artifacts))]), DownloadOptions(root=root)
        ) as d:
            return {
                finding.name: finding
                for finding in d.verify([artifact.name for artifact in artifacts])
            }

    return make


def states(plan) -> list[State]:
    return [item.state for item in plan.items]


@cache  # a zip holds the time at which it was made
def photos(count: int = 30) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for number in range(count):
            archive.writestr(f"photos/{number}.jpg", bytes([number]) * 100)
    return stream.getvalue()


def packed(artifact, data: bytes, **fields: object):
    unpack = Unpack(folder="datasets/set", provides=(Provided(path="photos", files=30),))
    return artifact("set", data, target="datasets/set/photos.zip", unpack=unpack, **fields)


def test_fetched_once(run, server, artifact, body, root) -> None:
    served = server.add("/thing", body)
    thing = artifact(body=body)
    plan, report = run(thing)
    assert states(plan) == [State.ABSENT]
    assert plan.bytes_to_fetch == len(body)
    assert [outcome.status for outcome in report.outcomes] == ["fetched"]
    assert (root / "models/thing.bin").read_bytes() == body
    plan, report = run(thing)
    assert states(plan) == [State.READY]
    assert [outcome.status for outcome in report.outcomes] == ["ready"]
    assert len(served.requests) == 1
    assert not [
        path for path in (root / "models").iterdir() if "part" in path.name or "lock" in path.name
    ]


def test_what_was_put_there_by_hand_is_checked_and_used(run, server, artifact, body, root) -> None:
    (root / "models").mkdir(parents=True)
    (root / "models/thing.bin").write_bytes(body)
    plan, report = run(artifact(body=body))
    assert states(plan) == [State.UNCHECKED]
    assert report.outcomes[0].status == "checked"
    assert states(run(artifact(body=body))[0]) == [State.READY]


@pytest.mark.parametrize("wrong", [b"short", None], ids=["other size", "other bytes"])
def test_something_else_in_its_place_is_never_overwritten_unasked(
    run, server, artifact, body, root, wrong
) -> None:
    wrong = wrong or body[::-1]
    server.add("/thing", body)
    path = root / "models/thing.bin"
    path.parent.mkdir(parents=True)
    path.write_bytes(wrong)
    _, report = run(artifact(body=body))
    with pytest.raises(DigestError, match="is there, but is not") as caught:
        report.raise_for_failures()
    assert "--force" in (caught.value.hint or "")
    assert path.read_bytes() == wrong
    run(artifact(body=body), force=True)[1].raise_for_failures()
    assert path.read_bytes() == body


def test_a_file_changed_after_the_check_is_noticed(run, server, artifact, body, root) -> None:
    server.add("/thing", body)
    run(artifact(body=body))
    path = root / "models/thing.bin"
    path.write_bytes(body[::-1])
    _, report = run(artifact(body=body))
    with pytest.raises(DigestError):
        report.raise_for_failures()


class TestUnpinned:
    def test_its_digest_is_recorded_and_checked_ever_after(
        self, run, server, artifact, body, root
    ) -> None:
        server.add("/thing", body)
        run(artifact())[1].raise_for_failures()
        entry = json.loads((root / "models/artifacts.lock.json").read_text())["thing"]
        assert entry["sha256"] == hashlib.sha256(body).hexdigest()
        assert (entry["size"], entry["etag"]) == (len(body), '"v1"')
        assert entry["when"]
        (root / "models/thing.bin").unlink()
        server.add("/thing", body[::-1])
        _, report = run(artifact())
        with pytest.raises(DigestError, match="expected sha256"):
            report.raise_for_failures()
        assert not (root / "models/thing.bin").exists()

    def test_strict_refuses_it_until_it_is_recorded(
        self, run, server, artifact, body, root
    ) -> None:
        served = server.add("/thing", body)
        pinned = server.add("/pinned", body)
        with pytest.raises(ArtifactError, match=r"for 1 file \(thing\), .*--strict refuses it"):
            run(artifact("pinned", body), artifact(), strict=True)
        assert not served.requests
        assert not pinned.requests, (
            "what has a digest is not fetched first, to be refused afterwards"
        )
        run(artifact())[1].raise_for_failures()
        (root / "models/thing.bin").unlink()
        run(artifact(), strict=True)[1].raise_for_failures()

    def test_what_it_holds_is_checked_before_it_gets_its_name(
        self, run, server, artifact, body, root
    ) -> None:
        server.add("/thing", body)
        _, report = run(artifact(content=Content(kind="tensors")))
        with pytest.raises(DigestError, match="is not thing"):
            report.raise_for_failures()
        assert not (root / "models/thing.bin").exists()
        assert not (root / "models/artifacts.lock.json").exists()

    def test_a_file_put_there_by_hand_is_recorded(self, run, artifact, body, root) -> None:
        (root / "models").mkdir(parents=True)
        (root / "models/thing.bin").write_bytes(body)
        run(artifact())[1].raise_for_failures()
        assert "thing" in json.loads((root / "models/artifacts.lock.json").read_text())

    def test_a_damaged_record_is_told(self, run, server, artifact, body, root) -> None:
        server.add("/thing", body)
        (root / "models").mkdir(parents=True)
        lock = root / "models/artifacts.lock.json"
        for text in ("{", "[]", '{"thing": {"sha256": "zz", "size": 3}}', '{"thing": 3}'):
            lock.write_text(text)
            with pytest.raises(ArtifactError, match=r"artifacts\.lock\.json"):
                run(artifact())[1].raise_for_failures()


class TestUnpacking:
    def test_unpacked_once(self, run, server, artifact, root) -> None:
        served = server.add("/set", photos())
        thing = packed(artifact, photos())
        _, report = run(thing)
        report.raise_for_failures()
        assert report.outcomes[0].status == "unpacked"
        assert report.outcomes[0].path == root / "datasets/set/photos"
        assert len(list((root / "datasets/set/photos").iterdir())) == 30
        assert not (root / "datasets/set/photos.zip").exists()
        assert states(run(thing)[0]) == [State.READY]
        assert len(served.requests) == 1

    def test_archives_are_kept_if_asked(self, run, server, artifact, root) -> None:
        server.add("/set", photos())
        run(packed(artifact, photos()), keep_archives=True)[1].raise_for_failures()
        assert (root / "datasets/set/photos.zip").exists()
        assert states(run(packed(artifact, photos()))[0]) == [State.READY]

    def test_an_archive_that_is_there_is_not_fetched(self, run, server, artifact, root) -> None:
        served = server.add("/set", photos())
        (root / "datasets/set").mkdir(parents=True)
        (root / "datasets/set/photos.zip").write_bytes(photos())
        plan, report = run(packed(artifact, photos()))
        report.raise_for_failures()
        assert states(plan) == [State.PACKED]
        assert plan.bytes_to_fetch == 0
        assert not served.requests

    def test_photographs_unpacked_by_hand_are_recognised_by_their_number(
        self, run, artifact, root
    ) -> None:
        folder = root / "datasets/set/photos"
        folder.mkdir(parents=True)
        for number in range(29):
            (folder / f"{number}.jpg").write_bytes(b"x")
        plan, _ = run(packed(artifact, photos()))
        assert states(plan) == [State.ABSENT]
        assert "29 files instead of 30" in plan.items[0].why
        (folder / "29.jpg").write_bytes(b"x")
        assert states(run(packed(artifact, photos()))[0]) == [State.READY]

    def test_a_file_that_goes_missing_is_noticed(self, run, server, artifact, root) -> None:
        server.add("/set", photos())
        run(packed(artifact, photos()))
        (root / "datasets/set/photos/7.jpg").unlink()
        plan, report = run(packed(artifact, photos()))
        assert "photos/7.jpg is missing" in plan.items[0].why
        report.raise_for_failures()
        assert (root / "datasets/set/photos/7.jpg").exists()

    def test_a_published_digest_inside_an_archive(self, run, artifact, root) -> None:
        data = b"annotations"
        inside = Provided(path="a.json", size=len(data), sha256=hashlib.sha256(data).hexdigest())
        thing = artifact(
            "set",
            b"zip",
            target="datasets/a.zip",
            unpack=Unpack(folder="datasets/set", provides=(inside,)),
        )
        path = root / "datasets/set/a.json"
        path.parent.mkdir(parents=True)
        path.write_bytes(data[::-1])
        plan, report = run(thing)
        assert states(plan) == [State.UNCHECKED]
        with pytest.raises(DigestError, match="not the published file"):
            report.raise_for_failures()
        path.write_bytes(data)
        run(thing)[1].raise_for_failures()
        assert states(run(thing)[0]) == [State.READY]


class TestVerify:
    def test_every_kind_of_finding(self, run, verify, server, artifact, body, root) -> None:
        server.add("/thing", body)
        server.add("/set", photos())
        things = [
            artifact(body=body),
            packed(artifact, photos()),
            artifact("gone", body),
            artifact("loose"),
        ]
        run(*things[:2])
        (root / "models/loose.bin").write_bytes(b"x")
        found = verify(*things)
        assert [found[t.name].verdict for t in things] == ["sound", "sound", "absent", "unproven"]
        (root / "models/thing.bin").write_bytes(body[::-1])
        (root / "datasets/set/photos/3.jpg").write_bytes(b"\4" * 100)
        found = verify(*things)
        assert found["thing"].verdict == found["set"].verdict == "damaged"
        assert "photos/3.jpg" in found["set"].detail
        (root / "datasets/set/photos/3.jpg").unlink()
        assert verify(things[1])["set"].verdict == "damaged"

    def test_digest_of_first_use(self, run, verify, server, artifact, body, root) -> None:
        server.add("/thing", body)
        run(artifact())
        assert verify(artifact())["thing"].detail == "digest of first use"


class TestMany:
    def test_a_failure_does_not_stop_the_others(self, run, server, artifact, body) -> None:
        server.add("/b", body)
        _, report = run(artifact("a", body), artifact("b", body), artifact("c", body))
        assert [outcome.name for outcome in report.outcomes] == ["b"]
        with pytest.raises(ArtifactError, match="2 of 3 files"):
            report.raise_for_failures()

    def test_members_that_may_be_missing_are_reported(self, run, server, artifact, body) -> None:
        server.add("/b", body)
        _, report = run(artifact("a", body, may_be_missing=True), artifact("b", body))
        report.raise_for_failures()
        assert {outcome.name: outcome.status for outcome in report.outcomes} == {
            "a": "missing",
            "b": "fetched",
        }

    def test_a_host_that_refuses_is_left_alone(self, run, server, artifact, quick) -> None:
        things = [artifact(f"t{n}") for n in range(20)]
        for thing in things:
            server.add(f"/{thing.name}", answers=[(403, {})] * 5)
        _, report = run(*things, settings=dataclasses.replace(quick, jobs=1))
        assert len(report.failures) == 20
        assert sum(len(served.requests) for served in server.files.values()) == 3

    def test_an_account_is_asked_for(
        self, run, artifact, root, tmp_path, monkeypatch, server, body, quick
    ) -> None:
        login = Login(site="https://example.org", how="Register there.")
        thing = artifact(login=login)
        plan, report = run(thing)
        assert states(plan) == [State.NEEDS_ACCOUNT]
        assert report.outcomes[0].status == "needs account"
        catalogue = Catalogue([("t", CatalogueFile(artifacts=(thing,)))])
        with pytest.raises(ArtifactError, match="need an account"):
            download("thing", root=root, catalogue=catalogue)
        cookies = tmp_path / "cookies.txt"
        cookies.write_text(
            "# Netscape HTTP Cookie File\n127.0.0.1\tFALSE\t/\tFALSE\t4102444800\tsession\tsecret\n"
        )
        monkeypatch.setenv("PROXYDET_COOKIES", str(cookies))
        served = server.add("/thing", body, cookie="session=secret", page=b"<html>sign in</html>")
        run(thing)[1].raise_for_failures()
        assert "session=secret" in served.requests[0]["Cookie"]

    def test_a_cookie_file_that_is_none(self, run, artifact, tmp_path, monkeypatch) -> None:
        (tmp_path / "c").write_text("nonsense")
        monkeypatch.setenv("PROXYDET_COOKIES", str(tmp_path / "c"))
        with pytest.raises(ConfigError, match="cookie file"):
            run(artifact())

    def test_a_mirror_comes_first(self, run, server, artifact, body, quick) -> None:
        served = server.add("/mirror/models/thing.bin", body)
        mirrored = dataclasses.replace(quick, mirror=server.address("/mirror/"))
        run(artifact(body=body), settings=mirrored)[1].raise_for_failures()
        assert len(served.requests) == 1
        server.add("/other", body)
        run(artifact("other", body), settings=mirrored)[1].raise_for_failures()

    def test_too_little_room_is_told_before_anything_is_fetched(
        self, run, server, artifact
    ) -> None:
        served = server.add("/thing", b"")
        with pytest.raises(DiskFullError, match="are free"):
            run(artifact(size=1 << 49, sha256="0" * 64))
        assert not served.requests


def test_servers_are_asked_for_sizes_that_are_not_published(server, artifact, body, root) -> None:
    server.add("/a", body)
    server.add("/b", redirect="/a")
    server.add("/page", b"<html>", content_type="text/html")
    catalogue = Catalogue(
        [("t", CatalogueFile(artifacts=tuple(map(artifact, ("a", "b", "page", "absent")))))]
    )
    with Downloader(catalogue, DownloadOptions(root=root)) as downloader:
        plan = downloader.plan(["a", "b", "page", "absent"])
        assert (plan.bytes_to_fetch, plan.unknown_sizes) == (0, 4)
        plan = downloader.ask_sizes(plan)
    assert [item.to_fetch for item in plan.items] == [len(body), len(body), None, None]
    assert plan.needs[0].needed == 2 * len(body)


class TestPublicApi:
    def test_a_name_in_and_a_path_out(self, server, artifact, body, root, quick) -> None:
        server.add("/thing", body)
        server.add("/set", photos())
        catalogue = Catalogue(
            [("t", CatalogueFile(artifacts=(artifact(body=body), packed(artifact, photos()))))]
        )
        options = DownloadOptions(root=root, settings=quick)
        with pytest.raises(ArtifactError, match="not there") as caught:
            locate("thing", root=root, catalogue=catalogue)
        assert "proxydet download thing --root" in (caught.value.hint or "")
        assert download("thing", catalogue=catalogue, options=options) == root / "models/thing.bin"
        assert download("set", catalogue=catalogue, options=options) == root / "datasets/set/photos"
        assert locate("thing", root=root, catalogue=catalogue) == root / "models/thing.bin"

    def test_an_unknown_name(self) -> None:
        with pytest.raises(ConfigError, match="Did you mean clip-vit-b32"):
            download("clip-vit-32")

    def test_the_places_of_the_environment(
        self, server, artifact, body, tmp_path, monkeypatch, quick
    ) -> None:
        monkeypatch.setenv("PROXYDET_MODELS", str(tmp_path / "elsewhere"))
        server.add("/thing", body)
        catalogue = Catalogue([("t", CatalogueFile(artifacts=(artifact(body=body),)))])
        path = download("thing", catalogue=catalogue, options=DownloadOptions(settings=quick))
        assert path == tmp_path / "elsewhere/thing.bin"


def test_a_second_thread_waits_and_fetches_nothing(run, server, artifact, body) -> None:
    served = server.add("/thing", body, pause=0.01)
    results: list[str] = []

    def work() -> None:
        results.append(run(artifact(body=body))[1].outcomes[0].status)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["fetched", "ready", "ready"]
    assert len(served.requests) == 1


def test_nothing_secret_is_told(run, server, artifact, caplog) -> None:
    server.add("/thing?token=secret", answers=[(500, {})] * 99)
    thing = artifact(addresses=(server.address("/thing?token=secret"),))
    with caplog.at_level("DEBUG"):
        _, report = run(thing)
    with pytest.raises(TransferError) as caught:
        report.raise_for_failures()
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("proxydet")]
    assert "secret" not in str(caught.value) + " ".join(ours)


def test_damage_that_verification_found_is_mended_by_force(
    run, verify, server, artifact, body, root
) -> None:
    """Even where size and time stamp do not tell: a bit that flipped on the disk."""
    server.add("/thing", body)
    server.add("/set", photos())
    things = [artifact(body=body), packed(artifact, photos())]
    run(*things)
    for path in (root / "models/thing.bin", root / "datasets/set/photos/3.jpg"):
        status = path.stat()
        path.write_bytes(path.read_bytes()[:-1] + b"!")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert states(run(*things)[0]) == [State.READY, State.READY]
    assert {finding.verdict for finding in verify(*things).values()} == {"damaged"}
    plan, report = run(*things)
    assert states(plan) == [State.DIFFERENT, State.DIFFERENT]
    assert len(report.failures) == 2
    run(*things, force=True)[1].raise_for_failures()
    assert states(run(*things)[0]) == [State.READY, State.READY]
    assert {finding.verdict for finding in verify(*things).values()} == {"sound"}


def test_an_archive_that_somebody_put_there_stays(run, server, artifact, root, monkeypatch) -> None:
    server.add("/set", photos())
    path = root / "datasets/set/photos.zip"
    path.parent.mkdir(parents=True)
    path.write_bytes(photos())
    run(packed(artifact, photos()))[1].raise_for_failures()
    assert path.exists()
    shutil.rmtree(root)
    with monkeypatch.context() as patch:
        patch.setattr(obtain_module, "unpack", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(packed(artifact, photos()))
    assert path.exists()
    run(packed(artifact, photos()))[1].raise_for_failures()
    assert not path.exists()


@pytest.mark.parametrize("keep", [False, True])
def test_an_archive_that_a_killed_run_did_not_come_to_remove_goes_at_the_next(
    run, server, artifact, root, monkeypatch, keep
) -> None:
    """Unpacked and noted as such, but still there; one that was to be kept stays, whatever is asked later."""
    served = server.add("/set", photos())
    path, thing = root / "datasets/set/photos.zip", packed(artifact, photos())
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed_at(path, Path.unlink))
        if keep:
            run(thing, keep_archives=True)
        else:
            with pytest.raises(KeyboardInterrupt):
                run(thing)
    assert path.exists()
    run(thing, keep_archives=True)
    assert path.exists()
    _, report = run(thing)
    assert [outcome.status for outcome in report.outcomes] == ["ready"]
    assert path.exists() == keep
    assert len(list((root / "datasets/set/photos").iterdir())) == 30
    assert len(served.requests) == 1


def killed_at(path: Path, unlink):
    def at(self: Path, **options: bool) -> None:
        if self == path:
            raise KeyboardInterrupt
        unlink(self, **options)

    return at


def test_folders_that_a_failed_download_made_go_away(run, server, artifact, body, root) -> None:
    """Those that were there stay, and so does the folder of what can be gone on from."""
    for thing in (artifact(), packed(artifact, b"absent")):
        assert len(run(thing)[1].failures) == 1
        assert not root.exists()
    (root / "models").mkdir(parents=True)
    assert len(run(artifact())[1].failures) == 1
    assert (root / "models").is_dir()
    server.add("/thing", body, drop_after=100_000, answers=[], later={2: {"answers": [(403, {})]}})
    part = artifact(target="deep/er/thing.bin")
    assert len(run(part)[1].failures) == 1
    assert any(path.suffix == ".part" for path in (root / "deep/er").iterdir())


def test_so_does_the_empty_folder_of_an_archive_that_did_not_unpack(
    run, server, artifact, root
) -> None:
    server.add("/thing", b"no archive")
    unpack = Unpack(folder="models/w", provides=(Provided(path="w.bin"),))
    thing = artifact(target="datasets/w.zip", unpack=unpack)
    assert len(run(thing)[1].failures) == 1
    assert not (root / "models").exists()


def test_strict_has_nothing_against_what_is_ready(run, artifact, root) -> None:
    """Photographs unpacked by hand: no digest of their archive was ever recorded."""
    folder = root / "datasets/set/photos"
    folder.mkdir(parents=True)
    for number in range(30):
        (folder / f"{number}.jpg").write_bytes(b"x")
    thing = packed(artifact, b"", sha256=None, size=None)
    assert states(run(thing, strict=True)[0]) == [State.READY]


def test_files_unpacked_under_another_top_folder_are_remembered_there(run, artifact, root) -> None:
    data = b"weights"
    provides = (Provided(path="w.bin", sha256=hashlib.sha256(data).hexdigest()),)
    thing = artifact(
        target="datasets/w.zip", unpack=Unpack(folder="models/w", provides=provides), body=b"zip"
    )
    (root / "models/w").mkdir(parents=True)
    (root / "models/w/w.bin").write_bytes(data)
    plan, report = run(thing)
    assert states(plan) == [State.UNCHECKED]
    assert [outcome.status for outcome in report.outcomes] == ["checked"]
    assert states(run(thing)[0]) == [State.READY]


def test_a_wrong_archive_is_no_first_use(run, server, artifact, root) -> None:
    """An unpinned archive that does not unpack is not recorded, so that the next run fetches it again."""
    server.add("/set", b"no archive")
    thing = packed(artifact, photos(), sha256=None, size=None)
    (failure,) = run(thing)[1].failures
    assert "is not set: photos.zip is not a zip archive" in failure.error.message
    folder = root / "datasets"
    assert "set" not in json.loads((folder / "artifacts.lock.json").read_text())
    assert not (folder / "set").exists()
    server.add("/set", photos())
    run(thing)[1].raise_for_failures()
    assert len(list((folder / "set/photos").iterdir())) == 30


def test_a_pinned_archive_that_does_not_unpack_can_be_fetched_anew(
    run, server, artifact, root
) -> None:
    data = photos(29)  # the catalogue says 30
    served = server.add("/set", data)
    thing = packed(artifact, data)
    for _ in range(2):
        (failure,) = run(thing)[1].failures
        assert "photos.zip holds 29 files in photos, not 30" in failure.error.message
        assert "--force to fetch it again" in (failure.error.hint or "")
    assert len(served.requests) == 1
    assert [path.name for path in (root / "datasets/set").iterdir()] == ["photos.zip"]
    run(thing, force=True)
    assert len(served.requests) == 2


def test_an_empty_file_is_no_first_use(run, server, artifact, root) -> None:
    server.add("/thing", b"")
    (failure,) = run(artifact(body=b"x", sha256=None, size=None))[1].failures
    assert "served an empty file" in failure.error.message
    assert not (root / "models/thing.bin").exists()


def test_waiting_for_another_attempt_is_told_once(run, server, artifact, body, caplog) -> None:
    served = server.add("/thing", body)
    served.answers = [(500, {}), (503, {})]
    run(artifact(body=body))[1].raise_for_failures()
    told = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(told) == 1
    assert told[0].endswith("answered 500. Trying again.")


def test_a_size_that_was_only_announced_shows_how_far_it_is(server, artifact, body, root) -> None:
    totals: list[float | None] = []

    class Watching(SilentProgress):
        def task(self, description, *, total=None, **options):
            totals.append(total)
            return super().task(description, total=total, **options)

    server.add("/thing", body)
    thing = artifact(body=body, sha256=None, size=None)
    catalogue = Catalogue([("test", CatalogueFile(artifacts=(thing,)))])
    with Downloader(catalogue, DownloadOptions(root=root), Watching()) as downloader:
        downloader.fetch(downloader.ask_sizes(downloader.plan(["thing"]))).raise_for_failures()
    assert totals == [len(body)]


def test_another_file_than_at_first_use_says_where_that_is_recorded(
    run, server, artifact, body, root
) -> None:
    server.add("/thing", body)
    thing = artifact(body=body, sha256=None, size=None)
    run(thing)[1].raise_for_failures()
    (root / "models/thing.bin").unlink()
    server.add("/thing", body[::-1])
    (failure,) = run(thing)[1].failures
    assert str(root / "models/artifacts.lock.json") in (failure.error.hint or "")
    assert "remove the entry of thing" in (failure.error.hint or "")
