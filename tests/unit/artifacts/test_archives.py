"""Archives: unpacked whole or not at all, never outside their folder, continued where they were interrupted."""

from __future__ import annotations

import contextlib
import gzip
import io
import random
import shutil
import stat
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxydet.artifacts import Artifact, Outcome, Provided, Unpack
from proxydet.errors import ArchiveError, ConfigError, DiskFullError, ProxydetError

FILES = {f"photos/{n:03}.jpg": random.Random(n).randbytes(n * 37) for n in range(200)}


def zipped(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """Make a zip whose names are not tidied up."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, data in files.items():
            info = zipfile.ZipInfo("placeholder")
            info.filename, info.compress_type = name, method
            archive.writestr(info, data)
    return stream.getvalue()


def tarred(files: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def one_header(
    kind: bytes = tarfile.REGTYPE, size: int = 0, form: int = tarfile.GNU_FORMAT
) -> bytes:
    info = tarfile.TarInfo("photos/x")
    info.type, info.size, info.linkname = kind, size, "/etc/passwd"
    return info.tobuf(form)


MAKERS = {".zip": zipped, ".tar": tarred, ".tar.gz": lambda files: gzip.compress(tarred(files))}


class Place:
    """A data root into which an archive is put by hand, and unpacked."""

    def __init__(self, downloads) -> None:
        self.downloads = downloads
        self.data = downloads.root / "datasets" / "set"
        self.photos = self.data / "photos"

    def artifact(self, suffix: str, data: bytes, *provides: Provided) -> Artifact:
        self.data.mkdir(parents=True, exist_ok=True)
        (self.data / f"archive{suffix}").write_bytes(data)
        return self.downloads.artifact(
            "set",
            data,
            target=f"datasets/set/archive{suffix}",
            unpack=Unpack(folder="datasets/set", provides=provides or (Provided(path="photos"),)),
        )

    def unpack(self, suffix: str, data: bytes, *provides: Provided) -> Outcome:
        report = self.downloads.fetch(self.artifact(suffix, data, *provides))
        report.raise_for_failures()
        return report.outcomes[0]

    def files(self) -> dict[str, bytes]:
        found = {}
        for path in self.data.rglob("*"):
            name = path.relative_to(self.data).as_posix()
            if path.is_file() and not name.startswith("archive"):
                found[name] = path.read_bytes()
        return found

    def interrupt(self, suffix: str, data: bytes, share: float) -> set[int]:
        """Unpack and press Ctrl-C after that share; return the inodes of the files that are complete."""
        artifact = self.artifact(suffix, data, Provided(path="photos", files=200))

        class Interrupting:
            @contextlib.contextmanager
            def task(self, description, *, total=None, unit="", done=0):
                self.left = total * share if description.startswith("unpacking") else 1e9
                yield self

            def advance(self, amount=1, **fields):
                self.left -= amount
                if self.left < 0:
                    raise KeyboardInterrupt

            def describe(self, description):
                pass

        with pytest.raises(KeyboardInterrupt):
            self.downloads.fetch(artifact, progress=Interrupting())
        assert not (self.data / "photos").exists()
        return {path.stat().st_ino for path in self.data.glob(".*.unpacking/photos/*")}


@pytest.fixture
def place(downloads) -> Place:
    return Place(downloads)


KINDS = {
    "stored zip": (".zip", zipped(FILES, zipfile.ZIP_STORED)),
    "zip": (".zip", zipped(FILES)),
    "tar": (".tar", tarred(FILES)),
    "gnu tar": (".tar", tarred(FILES, tarfile.GNU_FORMAT)),
    "old tar": (".tar", tarred(FILES, tarfile.USTAR_FORMAT)),
    "tar.gz": (".tar.gz", gzip.compress(tarred(FILES))),
}


@pytest.mark.parametrize("kind", KINDS)
def test_everything_comes_out(place, kind):
    outcome = place.unpack(*KINDS[kind], Provided(path="photos", files=200))
    assert (outcome.status, outcome.note, outcome.path) == (
        "unpacked",
        "200 files",
        place.data / "photos",
    )
    assert place.files() == FILES
    assert not list(place.data.glob(".*"))
    (finding,) = place.downloads.verify(place.artifact(*KINDS[kind])).values()
    assert finding.status == "sound"


@pytest.mark.parametrize("kind", ["stored zip", "zip", "tar", "tar.gz"])
def test_continues_where_it_was_interrupted(place, kind):
    complete = place.interrupt(*KINDS[kind], 0.7)
    assert len(complete) > 50
    place.unpack(*KINDS[kind])
    assert place.files() == FILES
    kept = {path.stat().st_ino for path in (place.data / "photos").iterdir()} & complete
    assert len(kept) >= len(complete) - 40
    assert not list(place.data.glob(".*"))


def test_what_another_version_left_is_thrown_away(place):
    other = {name: b"x" + data[1:] for name, data in FILES.items() if data}
    place.interrupt(".zip", zipped(other), 0.5)
    place.unpack(*KINDS["zip"])
    assert place.files() == FILES


def test_a_kill_while_they_are_moved(place, monkeypatch):
    """All are unpacked, and some have their final place: nothing is unpacked again, or lost."""
    place.photos.mkdir(parents=True)
    (place.photos / "mine.jpg").write_bytes(b"mine")
    replace, moved = Path.replace, list[Path]()

    def killed(self: Path, target: Path) -> Path:
        if target.parent == place.photos:
            moved.append(target)
            if len(moved) > 100:
                raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            place.unpack(*KINDS["zip"], Provided(path="photos", files=200))
    inodes = {path.stat().st_ino for path in place.data.rglob("*.jpg")}
    place.unpack(*KINDS["zip"], Provided(path="photos", files=200))
    assert place.files() == FILES | {"photos/mine.jpg": b"mine"}
    assert {path.stat().st_ino for path in place.photos.iterdir()} == inodes


@pytest.mark.parametrize("suffix", MAKERS)
def test_a_name_that_is_a_file_and_a_folder(place, suffix):
    for files in ({"photos/a": b"1", "photos/a/b": b"2"}, {"photos/a/b": b"2", "photos/a": b"1"}):
        with pytest.raises(ArchiveError, match="photos/a"):
            place.unpack(suffix, MAKERS[suffix](files))
    assert place.files() == {}


def test_files_of_others_in_the_folder_stay(place):
    (place.data / "photos").mkdir(parents=True)
    (place.data / "photos" / "mine.jpg").write_bytes(b"mine")
    (place.data / "photos" / "001.jpg").write_bytes(b"half")
    place.unpack(*KINDS["zip"], Provided(path="photos", files=200))
    assert place.files() == FILES | {"photos/mine.jpg": b"mine"}


@pytest.mark.parametrize(
    ("provides", "message"),
    [
        (Provided(path="photos", files=201), "200 files"),
        (Provided(path="photos/absent"), "photos/absent"),
        (Provided(path="photos/001.jpg", size=38), "photos/001.jpg"),
    ],
)
def test_what_it_holds_must_be_what_the_catalogue_says(place, provides, message):
    with pytest.raises(ArchiveError, match=message):
        place.unpack(*KINDS["zip"], provides)
    assert not (place.data / "photos").exists()


NAMES = ["/etc/evil", "../evil", "photos/../../../evil", "photos/..", "a\\..\\evil", "photos/a\\..\\..\\evil",
         "C:/evil", "photos/\x00x", "photos/" + "x" * 300, "photos//x", "photos/./x", "evil", "other/x",
         "photos/\x1b[2Jx", "photos/" + "p/" * 31 + "x", "photos/\u202egpj.exe"]  # fmt: skip


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
@pytest.mark.parametrize("name", NAMES)
def test_names_that_lead_elsewhere(place, tmp_path, name, suffix):
    data = MAKERS[suffix]({"photos/good.jpg": b"x", name: b"evil"})
    with pytest.raises(ArchiveError):
        place.unpack(suffix, data)
    assert place.files() == {}
    assert not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize("suffix", MAKERS)
def test_the_deepest_name_that_is_accepted(place, suffix):
    files = {"photos/" + "p/" * 30 + "x": b"1", "./photos/y": b"2"}
    place.unpack(suffix, MAKERS[suffix](files))
    assert set(place.files()) == {name.removeprefix("./") for name in files}


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE,
     tarfile.GNUTYPE_SPARSE, b"Z"],
)  # fmt: skip
def test_links_and_devices_in_tars(place, kind):
    with pytest.raises(ArchiveError, match="photos/x"):
        place.unpack(".tar", one_header(kind) + bytes(1024))
    assert place.files() == {}


def test_a_sparse_file_in_the_newer_style(place):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("photos/x")
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
        archive.addfile(info)
    with pytest.raises(ArchiveError):
        place.unpack(".tar", stream.getvalue())


def test_links_in_zips(place):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        info = zipfile.ZipInfo("photos/link")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(ArchiveError, match="photos/link"):
        place.unpack(".zip", stream.getvalue())


def test_an_encrypted_zip(place):
    data = bytearray(zipped({"photos/a": b"x"}))
    data[6] |= 1
    data[data.rindex(b"PK\1\2") + 8] |= 1
    with pytest.raises(ArchiveError, match="encrypted"):
        place.unpack(".zip", bytes(data))


class TestBombs:
    def test_a_tar_of_many_times_its_size(self, place, monkeypatch):
        monkeypatch.setattr("proxydet.files.SPARE_BYTES", 1 << 20)
        data = gzip.compress(tarred({"photos/zeros": bytes(4 << 20)}))
        with pytest.raises(ArchiveError, match="200"):
            place.unpack(".tar.gz", data)

    def test_a_zip_of_many_times_its_size(self, place):
        data = zipped({f"photos/{n}": bytes(20 << 20) for n in range(4)})
        assert len(data) < 100_000
        with pytest.raises(ArchiveError, match="200"):
            place.unpack(".zip", data)
        assert place.files() == {}

    def test_what_follows_the_end_of_a_tar_counts_too(self, place, monkeypatch):
        monkeypatch.setattr("proxydet.files.SPARE_BYTES", 1 << 20)
        data = gzip.compress(tarred({"photos/a": b"x"}) + bytes(4 << 20))
        with pytest.raises(ArchiveError, match="200"):
            place.unpack(".tar.gz", data)

    @pytest.mark.parametrize("suffix", MAKERS)
    def test_more_members_than_any_data_set_has(self, place, suffix, monkeypatch):
        monkeypatch.setattr("proxydet.files.MOST_MEMBERS", 3)
        files = {f"photos/{n}": b"x" for n in range(3)}
        place.unpack(suffix, MAKERS[suffix](files))
        shutil.rmtree(place.data)
        with pytest.raises(ArchiveError, match="3 files"):
            place.unpack(suffix, MAKERS[suffix](files | {"photos/3": b"x"}))
        assert place.files() == {}

    def test_headers_without_end(self, place):
        """A sparse file's map, compressed to nothing, that the library would hold in memory."""
        head = bytearray(one_header(tarfile.GNUTYPE_SPARSE))
        head[482] = 1  # more blocks of the map follow
        head[148:156] = b" " * 8
        head[148:156] = b"%06o\0 " % sum(head)
        more = bytearray(512)
        more[504] = 1
        with pytest.raises(ArchiveError, match="headers"):
            place.unpack(".tar.gz", gzip.compress(bytes(head) + bytes(more) * 100_000))

    def test_a_chain_of_extended_headers(self, place):
        head = one_header(tarfile.GNUTYPE_LONGNAME, 512) + b"photos/x".ljust(512, b"\0")
        with pytest.raises(ArchiveError):
            place.unpack(".tar", head * 900)

    def test_a_zips_table_of_contents_that_is_announced_too_long(self, place):
        data = bytearray(zipped({"photos/a": b"x"}))
        end = data.rindex(b"PK\5\6")
        data[end + 12 : end + 16] = struct.pack("<I", 0xF0000000)
        with pytest.raises(ArchiveError):
            place.unpack(".zip", bytes(data))

    def test_room_for_a_zip_is_checked_before_anything_is_written(self, place, monkeypatch):
        data = zipped({"photos/a": b"x" * 100_000, "photos/b": b"x" * 100_000})
        usage = shutil.disk_usage("/")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=199_999))
        with pytest.raises(DiskFullError):
            place.unpack(".zip", data)
        assert place.files() == {}
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=200_000))
        place.unpack(".zip", data)

    def test_members_that_overlap(self, place):
        """Two names for the same stored bytes, as zip bombs have millions of."""
        data = bytearray(zipped({"photos/a": b"x" * 99, "photos/b": b"x" * 99}, zipfile.ZIP_STORED))
        at = data.rindex(b"PK\1\2")
        data[at + 42 : at + 46] = struct.pack("<I", 0)
        with pytest.raises(ArchiveError):
            place.unpack(".zip", bytes(data))

    def test_a_member_that_is_longer_than_announced(self, place):
        data = bytearray(zipped({"photos/a": b"x" * 100_000}))
        at = data.rindex(b"PK\1\2")
        data[at + 24 : at + 28] = struct.pack("<I", 10)
        with pytest.raises(ArchiveError):
            place.unpack(".zip", bytes(data))
        assert place.files() == {}

    @pytest.mark.parametrize("size", [1 << 30, (1 << 33) - 1])
    @pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
    def test_an_extended_header_of_a_gigabyte(self, place, kind, size):
        with pytest.raises(ArchiveError):
            place.unpack(".tar", one_header(kind, size) + bytes(4096))

    def test_a_tar_member_of_a_quintillion_bytes(self, place):
        with pytest.raises(ArchiveError):
            place.unpack(".tar", one_header(size=1 << 60) + bytes(1024))


class TestDamage:
    def test_a_header_in_a_tar(self, place):
        data = tarred({"photos/a": b"x", "photos/b": b"x"})
        for name in (b"photos/a", b"photos/b"):
            with pytest.raises(ArchiveError):
                place.unpack(".tar", data.replace(name, b"photos/e"))
        assert place.files() == {}

    @pytest.mark.parametrize("suffix", MAKERS)
    def test_the_same_name_twice(self, place, suffix):
        two = {"photos/a": b"1", "./photos/a": b"2"}
        with pytest.raises(ArchiveError, match="photos/a"):
            place.unpack(suffix, MAKERS[suffix](two))

    # A tar alone has no check sums.
    @pytest.mark.parametrize("kind", ["stored zip", "zip", "tar.gz"])
    def test_a_byte(self, place, kind):
        suffix, data = KINDS[kind]
        damaged = bytearray(data)
        damaged[len(data) // 2] ^= 0xFF
        with pytest.raises(ArchiveError):
            place.unpack(suffix, bytes(damaged))
        assert not (place.data / "photos").exists()

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_cut(self, place, kind):
        suffix, data = KINDS[kind]
        end = len(data) - (15_000 if suffix == ".tar" else 15)
        for length in (0, 1, 100, 600, len(data) // 2, end):
            with pytest.raises(ProxydetError):
                place.unpack(suffix, data[:length])
        assert not (place.data / "photos").exists()

    def test_a_signature_in_front_of_a_zips_member(self, place):
        data = bytearray(zipped({"photos/a": b"x" * 100}, zipfile.ZIP_STORED))
        data[0] ^= 8
        with pytest.raises(ArchiveError):
            place.unpack(".zip", bytes(data))

    @pytest.mark.parametrize("suffix", MAKERS)
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
    @given(
        flips=st.lists(
            st.tuples(st.integers(0, 4000), st.integers(1, 255)), min_size=1, max_size=20
        )
    )
    def test_fuzzed_archives_end_in_files_or_in_clear_errors(self, place, suffix, flips):
        damaged = bytearray(MAKERS[suffix]({f"photos/{n}": bytes([n]) * 90 for n in range(6)}))
        for at, change in flips:
            damaged[at % len(damaged)] ^= change
        with contextlib.suppress(ArchiveError, ConfigError, DiskFullError):
            place.unpack(suffix, bytes(damaged))
        inside = {path.name for path in place.data.iterdir()}
        assert inside <= {"photos", *(f"archive{suffix}" for suffix in MAKERS)}
        assert {path.name for path in place.data.parent.iterdir()} <= {"set", ".proxydet"}
        shutil.rmtree(place.data.parent)


def test_long_names(place):
    name = "photos/" + "/".join(["d" * 60] * 3) + "/x"
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        place.unpack(".tar", tarred({name: b"abc"}, form))
        assert place.files() == {name: b"abc"}
