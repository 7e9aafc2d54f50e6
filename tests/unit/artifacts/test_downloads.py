"""From a catalogue entry to a file that is ready: inspected, fetched once, checked, recorded, unpacked once."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import shutil
import zipfile
from functools import cache
from pathlib import Path

import pytest

from proxydet.artifacts import (
    Catalogue,
    CatalogueFile,
    Content,
    DownloadOptions,
    Login,
    Provided,
    Unpack,
    download,
    locate,
)
from proxydet.errors import ArtifactError, ConfigError, DigestError, DiskFullError


@cache  # a zip holds the time at which it was made
def photos(count: int = 30, folder: str = "photos") -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for number in range(count):
            archive.writestr(f"{folder}/{number}.jpg", bytes([number]) * 100)
    return stream.getvalue()


@pytest.fixture
def packed(downloads):
    def make(data: bytes | None = None, name: str = "set", **fields: object):
        provides = Provided(path="photos", files=30)
        fields.setdefault("unpack", Unpack(folder="datasets/set", provides=(provides,)))
        return downloads.artifact(name, data, **{"target": "datasets/set/photos.zip", **fields})

    return make


@pytest.fixture
def root(downloads) -> Path:
    return downloads.root


def put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def by_hand(root: Path, count: int) -> None:
    for number in range(count):
        put(root / f"datasets/set/photos/{number}.jpg", b"x")


class TestOneFile:
    def test_fetched_once(self, downloads, server, body, root):
        served = server.add("/thing", body)
        thing = downloads.artifact(body=body)
        plan = downloads.plan(thing)
        assert (downloads.states(thing), plan.bytes_to_fetch) == (["absent"], len(body))
        assert [outcome.status for outcome in downloads.fetch(thing).outcomes] == ["fetched"]
        assert (root / "models/thing.bin").read_bytes() == body
        assert downloads.states(thing) == ["ready"]
        assert [outcome.status for outcome in downloads.fetch(thing).outcomes] == ["ready"]
        assert len(served.requests) == 1
        names = {path.name for path in (root / "models").iterdir()}
        assert names == {"thing.bin", ".proxydet"}

    def test_what_was_put_there_by_hand_is_checked_and_used(self, downloads, body, root):
        put(root / "models/thing.bin", body)
        thing = downloads.artifact(body=body)
        assert downloads.states(thing) == ["unchecked"]
        assert downloads.fetch(thing).outcomes[0].status == "checked"
        assert downloads.states(thing) == ["ready"]

    @pytest.mark.parametrize("other", [b"short", None], ids=["size", "bytes"])
    def test_something_else_in_its_place_is_only_replaced_by_force(
        self, downloads, server, body, root, other
    ):
        server.add("/thing", body)
        path = put(root / "models/thing.bin", other or body[::-1])
        thing = downloads.artifact(body=body)
        with pytest.raises(DigestError) as caught:
            downloads.fetch(thing).raise_for_failures()
        assert caught.value.path == path
        assert "--force" in (caught.value.hint or "")
        assert path.read_bytes() == (other or body[::-1])
        downloads.fetch(thing, force=True).raise_for_failures()
        assert path.read_bytes() == body

    def test_a_folder_in_its_place(self, downloads, body, root):
        (root / "models/thing.bin").mkdir(parents=True)
        assert downloads.states(downloads.artifact(body=body)) == ["different"]

    def test_a_file_changed_after_the_check_is_noticed(self, downloads, server, body, root):
        server.add("/thing", body)
        downloads.fetch(downloads.artifact(body=body))
        put(root / "models/thing.bin", body[::-1])
        with pytest.raises(DigestError):
            downloads.fetch(downloads.artifact(body=body)).raise_for_failures()

    def test_sizes_that_are_not_published_are_asked_for(self, downloads, server, body):
        server.add("/a", body)
        server.add("/b", redirect="/a")
        server.add("/page", b"<html>", content_type="text/html")
        things = [downloads.artifact(name) for name in ("a", "b", "page", "absent")]
        with downloads.open(*things) as downloader:
            plan = downloader.plan([thing.name for thing in things])
            assert (plan.bytes_to_fetch, plan.unknown_sizes) == (0, 4)
            plan = downloader.ask_sizes(plan)
            assert [item.to_fetch for item in plan.items] == [len(body), len(body), None, None]
            assert plan.needs[0].needed == 2 * len(body)
            downloader.fetch(plan)
        assert downloads.progress.totals["a.bin"] == len(body)

    def test_too_little_room_is_reported_before_anything_is_fetched(self, downloads, server):
        served = server.add("/thing", b"")
        with pytest.raises(DiskFullError):
            downloads.fetch(downloads.artifact(size=1 << 49, sha256="0" * 64))
        assert not served.requests

    def test_another_attempt_is_announced_once(self, downloads, server, body, caplog):
        server.add("/thing", body, answers=[(500, {}), (503, {})])
        downloads.fetch(downloads.artifact(body=body)).raise_for_failures()
        (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
        assert "500" in record.getMessage()

    def test_folders_that_a_failed_download_made_go_away(
        self, downloads, server, body, root, packed
    ):
        """Those that were there stay, and so does the folder of what can be continued."""
        for thing in (downloads.artifact(), packed(b"absent")):
            assert len(downloads.fetch(thing).failures) == 1
            assert not root.exists()
        (root / "models").mkdir(parents=True)
        assert len(downloads.fetch(downloads.artifact()).failures) == 1
        assert (root / "models").is_dir()
        server.add("/thing", body, drop_after=100_000, later={2: {"answers": [(403, {})]}})
        part = downloads.artifact(target="deep/er/thing.bin")
        assert len(downloads.fetch(part).failures) == 1
        assert any(path.suffix == ".part" for path in (root / "deep/er").iterdir())


class TestUnpinned:
    def test_its_digest_is_recorded_and_checked_ever_after(self, downloads, server, body, root):
        server.add("/thing", body)
        downloads.fetch(downloads.artifact()).raise_for_failures()
        record = root / "models/artifacts.lock.json"
        entry = json.loads(record.read_text())["thing"]
        assert entry["sha256"] == hashlib.sha256(body).hexdigest()
        assert (entry["size"], entry["etag"]) == (len(body), '"v1"')
        assert entry["when"]
        for other in (body[::-1], body + b"more"):
            (root / "models/thing.bin").unlink(missing_ok=True)
            served = server.add("/thing", other)
            with pytest.raises(DigestError) as caught:
                downloads.fetch(downloads.artifact()).raise_for_failures()
            assert str(record) in (caught.value.hint or "")
            assert not (root / "models/thing.bin").exists()
            assert json.loads(record.read_text())["thing"] == entry
        assert len(served.requests) == 1

    def test_one_put_there_by_hand_is_recorded(self, downloads, body, root):
        put(root / "models/thing.bin", body)
        downloads.fetch(downloads.artifact()).raise_for_failures()
        assert "thing" in json.loads((root / "models/artifacts.lock.json").read_text())

    def test_strict_refuses_it_until_it_is_recorded(self, downloads, server, body, root):
        served = [server.add(f"/{name}", body) for name in ("pinned", "thing")]
        things = [downloads.artifact("pinned", body), downloads.artifact()]
        with pytest.raises(ArtifactError, match="thing"):
            downloads.fetch(*things, strict=True)
        assert not any(s.requests for s in served), "what has a digest is not fetched first"
        downloads.fetch(*things).raise_for_failures()
        (root / "models/thing.bin").unlink()
        downloads.fetch(*things, strict=True).raise_for_failures()

    def test_strict_accepts_what_is_ready(self, downloads, root, packed):
        """Photographs unpacked by hand: no digest of their archive was ever recorded."""
        by_hand(root, 30)
        assert downloads.states(packed(), strict=True) == ["ready"]

    @pytest.mark.parametrize(
        "text", ["{", "[]", '{"thing": {"sha256": "zz", "size": 3}}', '{"thing": 3}', "[" * 100_000]
    )
    def test_a_damaged_record_is_named(self, downloads, server, body, root, text):
        server.add("/thing", body)
        put(root / "models/artifacts.lock.json", text.encode())
        with pytest.raises(ArtifactError) as caught:
            downloads.fetch(downloads.artifact()).raise_for_failures()
        assert caught.value.path == root / "models/artifacts.lock.json"

    def test_a_wrong_archive_is_not_a_first_use(self, downloads, server, root, packed):
        """One that does not unpack is not recorded, so that the next run fetches it again."""
        server.add("/set", b"not an archive")
        (error,) = downloads.fetch(packed()).failures.values()
        assert isinstance(error, DigestError)
        assert "set" not in json.loads((root / "datasets/artifacts.lock.json").read_text())
        assert not (root / "datasets/set").exists()
        server.add("/set", photos())
        downloads.fetch(packed()).raise_for_failures()
        assert len(list((root / "datasets/set/photos").iterdir())) == 30


class TestUnpacking:
    def test_unpacked_once(self, downloads, server, root, packed):
        served = server.add("/set", photos())
        report = downloads.fetch(packed(photos()))
        report.raise_for_failures()
        assert report.outcomes[0].status == "unpacked"
        assert report.outcomes[0].path == root / "datasets/set/photos"
        assert len(list((root / "datasets/set/photos").iterdir())) == 30
        assert not (root / "datasets/set/photos.zip").exists()
        assert downloads.states(packed(photos())) == ["ready"]
        assert len(served.requests) == 1

    def test_archives_are_kept_if_asked(self, downloads, server, root, packed):
        server.add("/set", photos())
        downloads.fetch(packed(photos()), keep_archives=True).raise_for_failures()
        downloads.fetch(packed(photos())).raise_for_failures()
        assert (root / "datasets/set/photos.zip").exists()

    def test_one_that_somebody_put_there_is_used_and_stays(self, downloads, server, root, packed):
        served = server.add("/set", photos())
        path = put(root / "datasets/set/photos.zip", photos())
        assert downloads.states(packed(photos())) == ["packed"]
        downloads.fetch(packed(photos())).raise_for_failures()
        assert not served.requests
        assert path.exists()

    @pytest.mark.parametrize("keep", [False, True])
    def test_one_that_a_killed_run_did_not_remove_goes_at_the_next(
        self, downloads, server, root, packed, monkeypatch, keep
    ):
        """Unpacked and noted as such, but still there; one that was to be kept stays, whatever is asked later."""
        served = server.add("/set", photos())
        path, unlink = root / "datasets/set/photos.zip", Path.unlink

        def killed(self: Path, **options: bool) -> None:
            if self == path:
                raise KeyboardInterrupt
            unlink(self, **options)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", killed)
            if keep:
                downloads.fetch(packed(photos()), keep_archives=True)
            else:
                with pytest.raises(KeyboardInterrupt):
                    downloads.fetch(packed(photos()))
        downloads.fetch(packed(photos()), keep_archives=True)
        assert path.exists()
        assert downloads.fetch(packed(photos())).outcomes[0].status == "ready"
        assert path.exists() == keep
        assert len(list((root / "datasets/set/photos").iterdir())) == 30
        assert len(served.requests) == 1

    def test_a_file_that_goes_missing_is_fetched_again(self, downloads, server, root, packed):
        server.add("/set", photos())
        downloads.fetch(packed(photos()))
        (root / "datasets/set/photos/7.jpg").unlink()
        assert "photos/7.jpg" in downloads.plan(packed(photos())).items[0].why
        downloads.fetch(packed(photos())).raise_for_failures()
        assert (root / "datasets/set/photos/7.jpg").exists()

    @pytest.mark.parametrize("folder", ["datasets/set", "models/w"])
    def test_a_published_digest_inside_an_archive(self, downloads, root, packed, folder):
        data = b"annotations"
        inside = Provided(path="a.json", size=len(data), sha256=hashlib.sha256(data).hexdigest())
        thing = packed(b"zip", unpack=Unpack(folder=folder, provides=(inside,)))
        path = put(root / folder / "a.json", data[::-1])
        assert downloads.states(thing) == ["unchecked"]
        with pytest.raises(DigestError) as caught:
            downloads.fetch(thing).raise_for_failures()
        assert caught.value.path == path
        path.write_bytes(data)
        assert downloads.fetch(thing).outcomes[0].status == "checked"
        assert downloads.states(thing) == ["ready"]

    def test_a_pinned_one_that_does_not_unpack_can_be_fetched_again(
        self, downloads, server, root, packed
    ):
        data = photos(29)  # the catalogue says 30
        served = server.add("/set", data)
        for _ in range(2):
            (error,) = downloads.fetch(packed(data)).failures.values()
            assert "29 files" in error.message
            assert "--force" in (error.hint or "")
        assert len(served.requests) == 1
        assert [path.name for path in (root / "datasets/set").iterdir()] == ["photos.zip"]
        downloads.fetch(packed(data), force=True)
        assert len(served.requests) == 2

    @pytest.mark.parametrize(("keep", "at_once"), [(True, 3), (False, 1)])
    def test_the_room_for_archives_counts_those_that_lie_there_together(
        self, downloads, server, packed, keep, at_once
    ):
        things = []
        for name in ("a", "b", "c"):
            server.add(f"/{name}", photos(folder=name))
            rule = Unpack(folder="datasets/set", provides=(Provided(path=name),))
            target = f"datasets/set/{name}.zip"
            things.append(packed(photos(folder=name), name, target=target, unpack=rule))
        size = len(photos(folder="a"))
        one = dataclasses.replace(downloads.settings, jobs=1)
        plan = downloads.plan(*things, keep_archives=keep, settings=one)
        assert plan.needs[0].needed == 3 * size + at_once * size
        downloads.fetch(*things, settings=dataclasses.replace(one, jobs=3)).raise_for_failures()
        assert downloads.states(*things) == ["ready"] * 3


class TestVerify:
    def test_every_kind_of_finding(self, downloads, server, body, root, packed):
        server.add("/thing", body)
        server.add("/set", photos())
        things = [
            downloads.artifact(body=body),
            packed(photos()),
            downloads.artifact("gone", body),
            downloads.artifact("loose"),
        ]
        downloads.fetch(*things[:2])
        put(root / "models/loose.bin", b"x")
        found = downloads.verify(*things)
        assert [found[t.name].status for t in things] == ["sound", "sound", "absent", "unproven"]
        put(root / "models/thing.bin", body[::-1])
        put(root / "datasets/set/photos/3.jpg", b"\4" * 100)
        found = downloads.verify(*things)
        assert found["thing"].status == found["set"].status == "damaged"
        assert "photos/3.jpg" in found["set"].note
        (root / "datasets/set/photos/3.jpg").unlink()
        assert downloads.verify(things[1])["set"].status == "damaged"

    def test_damage_is_forgotten_with_the_file(self, downloads, root):
        tar = downloads.artifact("tar", content=Content(kind="image-tar"))
        put(root / "models/tar.bin", b"no tar" * 2000)
        assert downloads.verify(tar)["tar"].status == "damaged"
        assert downloads.states(tar) == ["different"]
        (root / "models/tar.bin").unlink()
        put(root / "models/tar.bin", photos())
        assert downloads.states(tar) == ["unchecked"]

    def test_the_digest_of_first_use(self, downloads, server, body, root):
        server.add("/thing", body)
        downloads.fetch(downloads.artifact())
        assert downloads.verify(downloads.artifact())["thing"].status == "sound"
        put(root / "models/thing.bin", body[::-1])
        assert downloads.verify(downloads.artifact())["thing"].status == "damaged"

    def test_files_placed_by_hand(self, downloads, root, packed):
        """Verification and a plan give the same answer where they are not all there."""
        by_hand(root, 29)
        found = downloads.verify(packed(photos()))["set"]
        plan = downloads.plan(packed(photos()))
        assert (found.status, plan.items[0].state.value) == ("absent", "absent")
        assert "29 files" in found.note
        assert "29 files" in plan.items[0].why
        by_hand(root, 30)
        assert downloads.states(packed(photos())) == ["ready"]
        assert downloads.verify(packed(photos()))["set"].status == "unproven"

    def test_one_placed_by_hand_that_is_right_is_not_read_again(self, downloads, root, packed):
        digest = hashlib.sha256(b"x").hexdigest()
        inside = Provided(path="a.json", size=1, sha256=digest)
        thing = packed(photos(), unpack=Unpack(folder="datasets/set", provides=(inside,)))
        put(root / "datasets/set/a.json", b"x")
        assert downloads.states(thing) == ["unchecked"]
        assert downloads.verify(thing)["set"].status == "sound"
        assert downloads.states(thing) == ["ready"]

    def test_damage_that_it_found_is_mended_by_force(self, downloads, server, body, root, packed):
        """Even where size and time stamp do not show it: a bit that flipped on the disk."""
        server.add("/thing", body)
        server.add("/set", photos())
        things = [downloads.artifact(body=body), packed(photos())]
        downloads.fetch(*things)
        for path in (root / "models/thing.bin", root / "datasets/set/photos/3.jpg"):
            status = path.stat()
            path.write_bytes(path.read_bytes()[:-1] + b"!")
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert downloads.states(*things) == ["ready", "ready"]
        assert {f.status for f in downloads.verify(*things).values()} == {"damaged"}
        assert downloads.states(*things) == ["different", "different"]
        assert len(downloads.fetch(*things).failures) == 2
        downloads.fetch(*things, force=True).raise_for_failures()
        assert downloads.states(*things) == ["ready", "ready"]
        assert {f.status for f in downloads.verify(*things).values()} == {"sound"}


class TestMany:
    def test_a_failure_does_not_stop_the_others(self, downloads, server, body):
        server.add("/b", body)
        report = downloads.fetch(*(downloads.artifact(name, body) for name in "abc"))
        assert [outcome.name for outcome in report.outcomes] == ["b"]
        with pytest.raises(ArtifactError, match="2 of 3 files"):
            report.raise_for_failures()

    def test_members_that_may_be_missing_are_reported(self, downloads, server, body):
        server.add("/b", body)
        things = [downloads.artifact("a", body, may_be_missing=True), downloads.artifact("b", body)]
        report = downloads.fetch(*things)
        report.raise_for_failures()
        assert {o.name: o.status for o in report.outcomes} == {"a": "missing", "b": "fetched"}

    @pytest.mark.parametrize(
        ("statuses", "asked"),
        [([403] * 20, 3), ([403, 403, 200, 403, 403, 200], 6)],
        ids=["three failures", "a success between"],
    )
    def test_a_host_that_fails_three_times_is_left_alone(
        self, downloads, server, body, statuses, asked
    ):
        things = [downloads.artifact(f"t{n}") for n in range(len(statuses))]
        for thing, status in zip(things, statuses, strict=True):
            answers = [(status, {})] * 5 if status != 200 else []
            server.add(f"/{thing.name}", body, answers=answers)
        one = dataclasses.replace(downloads.settings, jobs=1)
        report = downloads.fetch(*things, settings=one)
        assert len(report.failures) == statuses.count(403)
        assert sum(len(served.requests) for served in server.files.values()) == asked

    def test_wrong_bytes_are_not_the_hosts_failure(self, downloads, server, body):
        things = [downloads.artifact(f"t{n}", body) for n in range(5)]
        for thing in things:
            server.add(f"/{thing.name}", body[::-1])
        one = dataclasses.replace(downloads.settings, jobs=1)
        assert len(downloads.fetch(*things, settings=one).failures) == 5
        assert sum(len(served.requests) for served in server.files.values()) == 5

    def test_a_full_disk_stops_them_all(self, downloads, server, body):
        server.add("/a", body, announced=1 << 49)
        server.add("/b", body)
        one = dataclasses.replace(downloads.settings, jobs=1)
        report = downloads.fetch(*map(downloads.artifact, "ab"), settings=one)
        assert list(report.failures) == ["a"]
        assert not server.files["/b"].requests
        with pytest.raises(DiskFullError):
            report.raise_for_failures()


class TestPublicApi:
    def test_a_name_in_and_a_path_out(self, downloads, server, body, root, packed):
        server.add("/thing", body)
        server.add("/set", photos())
        things = (downloads.artifact(body=body), packed(photos()))
        catalogue = Catalogue([("t", CatalogueFile(artifacts=things))])
        with pytest.raises(ArtifactError) as caught:
            locate("thing", root=root, catalogue=catalogue)
        assert "proxydet download thing --root" in (caught.value.hint or "")
        assert caught.value.path == root / "models/thing.bin"
        for name, path in (("thing", "models/thing.bin"), ("set", "datasets/set/photos")):
            assert download(name, root=root, catalogue=catalogue) == root / path
            assert locate(name, root=root, catalogue=catalogue) == root / path

    def test_an_unknown_name(self):
        with pytest.raises(ConfigError, match="clip-vit-b32"):
            download("clip-vit-32")

    def test_what_needs_an_account(self, downloads, root):
        thing = downloads.artifact(login=Login(site="https://example.org", how="Register there."))
        catalogue = Catalogue([("t", CatalogueFile(artifacts=(thing,)))])
        with pytest.raises(ArtifactError, match="account"):
            download("thing", root=root, catalogue=catalogue)

    def test_the_places_of_the_environment(self, downloads, server, body, tmp_path, monkeypatch):
        monkeypatch.setenv("PROXYDET_MODELS", str(tmp_path / "elsewhere"))
        server.add("/thing", body)
        thing = downloads.artifact(body=body)
        catalogue = Catalogue([("t", CatalogueFile(artifacts=(thing,)))])
        options = DownloadOptions(settings=downloads.settings)
        path = download("thing", catalogue=catalogue, options=options)
        assert path == tmp_path / "elsewhere/thing.bin"
        shutil.rmtree(tmp_path / "elsewhere")
