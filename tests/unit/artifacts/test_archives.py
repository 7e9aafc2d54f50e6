"""Archives: unpacked whole or not at all, never outside their folder, going on where they were interrupted."""

from __future__ import annotations

import contextlib
import gzip
import io
import random
import stat
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxydet.artifacts.artifact import Artifact, Provided, Unpack
from proxydet.artifacts.root import Root
from proxydet.artifacts.staging import Staging, read_listing
from proxydet.artifacts.tar_reader import TarReader
from proxydet.artifacts.unpacking import unpack
from proxydet.errors import ArchiveError, ProxydetError
from proxydet.reporting import SILENT

FILES = {f"photos/{n:03}.jpg": random.Random(n).randbytes(n * 37) for n in range(200)}


def zipped(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return stream.getvalue()


def tarred(files: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


class Place:
    def __init__(self, folder: Path) -> None:
        self.root = Root(folder)
        self.data = folder / "datasets" / "set"

    def artifact(self, suffix: str, data: bytes, *provides: Provided) -> Artifact:
        artifact = Artifact(
            name="set",
            title="t",
            addresses=("https://example.org/f",),
            target=f"datasets/set/archive{suffix}",
            licence="l",
            unpack=Unpack(folder="datasets/set", provides=provides or (Provided(path="photos"),)),
        )
        self.data.mkdir(parents=True, exist_ok=True)
        self.root.path(artifact.target).write_bytes(data)
        return artifact

    def unpack(self, suffix: str, data: bytes, *provides: Provided, digest: str = "d" * 64) -> int:
        return unpack(self.artifact(suffix, data, *provides), digest, self.root, SILENT)

    def files(self) -> dict[str, bytes]:
        found = {}
        for path in self.data.rglob("*"):
            name = path.relative_to(self.data).as_posix()
            if path.is_file() and not name.startswith("archive"):
                found[name] = path.read_bytes()
        return found


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "inner" / "root")


KINDS = {
    "stored zip": (".zip", zipped(FILES, zipfile.ZIP_STORED)),
    "zip": (".zip", zipped(FILES)),
    "tar": (".tar", tarred(FILES)),
    "gnu tar": (".tar", tarred(FILES, tarfile.GNU_FORMAT)),
    "old tar": (".tar", tarred(FILES, tarfile.USTAR_FORMAT)),
    "tar.gz": (".tar.gz", gzip.compress(tarred(FILES))),
}


@pytest.mark.parametrize("kind", KINDS)
def test_everything_comes_out(place, kind) -> None:
    assert place.unpack(*KINDS[kind], Provided(path="photos", files=200)) == 200
    assert place.files() == FILES
    digest, listed = read_listing(place.root.listing(place.artifact(".x", b"")))
    assert digest == "d" * 64
    assert {name: entry.size for name, entry in listed.items()} == {
        n: len(d) for n, d in FILES.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_goes_on_where_it_was_interrupted(place, kind, monkeypatch) -> None:
    suffix, data = KINDS[kind]
    write = Staging.write
    written: list[str] = []

    def failing(self, name, size, chunks):
        if len(written) == 120:
            raise KeyboardInterrupt
        written.append(name)
        return write(self, name, size, chunks)

    with monkeypatch.context() as patch:
        patch.setattr(Staging, "write", failing)
        with pytest.raises(KeyboardInterrupt):
            place.unpack(suffix, data)
    assert not (place.data / "photos").exists()
    first = set(written)
    written.clear()
    monkeypatch.setattr(Staging, "write", lambda *a: (written.append(a[1]), write(*a))[1])
    place.unpack(suffix, data)
    assert place.files() == FILES
    assert len(written) <= 200 - len(first) + 4
    assert not list(place.data.glob(".*"))


def test_what_another_version_left_is_thrown_away(place) -> None:
    staging = Staging(place.data, "archive.zip", "a" * 64)
    staging.note("photos/stale.jpg", staging.write("photos/stale.jpg", 1, [b"x"]))
    staging.close()
    place.unpack(*KINDS["zip"])
    assert place.files() == FILES


def test_a_cut_journal_is_read_up_to_the_cut(place) -> None:
    staging = Staging(place.data, "archive.zip", "d" * 64)
    staging.note("photos/001.jpg", staging.write("photos/001.jpg", 37, [FILES["photos/001.jpg"]]))
    staging.close()
    journal = place.data / ".archive.zip.unpacking" / ".journal"
    journal.write_text(journal.read_text() + "12\t0123abcd\tphotos/00")
    again = Staging(place.data, "archive.zip", "d" * 64)
    again.close()
    assert set(again.done) == {"photos/001.jpg"}
    place.unpack(*KINDS["zip"])
    assert place.files() == FILES


def test_files_of_others_in_the_folder_stay(place) -> None:
    (place.data / "photos").mkdir(parents=True)
    (place.data / "photos" / "mine.jpg").write_bytes(b"mine")
    (place.data / "photos" / "001.jpg").write_bytes(b"half")
    place.unpack(*KINDS["zip"])
    assert place.files() == FILES | {"photos/mine.jpg": b"mine"}


@pytest.mark.parametrize(
    ("provides", "message"),
    [
        (Provided(path="photos", files=201), "200 files"),
        (Provided(path="photos/absent"), "does not hold"),
        (Provided(path="photos/001.jpg", size=38), "published size"),
    ],
)
def test_what_it_holds_must_be_what_the_catalogue_says(place, provides, message) -> None:
    with pytest.raises(ArchiveError, match=message):
        place.unpack(*KINDS["zip"], provides)
    assert not (place.data / "photos").exists()


NAMES = ["/etc/evil", "../evil", "photos/../../../evil", "photos/..", "a\\..\\evil", "C:/evil", "photos/\x00x",
         "photos/" + "x" * 300, "photos//x", "photos/./x", "evil", "other/x", "photos/\x1b[2Jx", "p/" * 40 + "x",
         "photos/\u202egpj.exe"]  # fmt: skip


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz"])
@pytest.mark.parametrize("name", NAMES)
def test_names_that_lead_elsewhere(place, tmp_path, name, suffix) -> None:
    files = {"photos/good.jpg": b"x", name: b"evil"}
    data = {".zip": raw_zip, ".tar": tarred, ".tar.gz": lambda f: gzip.compress(tarred(f))}[suffix](
        files
    )
    with pytest.raises(ArchiveError):
        place.unpack(suffix, data)
    assert place.files().keys() <= {
        ".archive.tar.unpacking/photos/good.jpg",
        ".archive.tar.gz.unpacking/photos/good.jpg",
        ".archive.tar.unpacking/.journal",
        ".archive.tar.gz.unpacking/.journal",
        ".archive.zip.unpacking/.journal",
    }
    assert not list(tmp_path.rglob("*evil*"))


def raw_zip(files: dict[str, bytes]) -> bytes:
    """Write a zip whose names are not tidied up."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in files.items():
            info = zipfile.ZipInfo("placeholder")
            info.filename = name
            archive.writestr(info, data)
    return stream.getvalue()


@pytest.mark.parametrize(
    "kind",
    [
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.CHRTYPE,
        tarfile.BLKTYPE,
        tarfile.FIFOTYPE,
        b"S",
        b"Z",
    ],
)
def test_links_and_devices_in_tars(place, kind) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as archive:
        info = tarfile.TarInfo("photos/x")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(ArchiveError):
        place.unpack(".tar", stream.getvalue())
    assert not (place.data / "photos").exists()


def test_links_in_zips(place) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        info = zipfile.ZipInfo("photos/link")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(ArchiveError, match="link"):
        place.unpack(".zip", stream.getvalue())


def test_a_bomb_in_a_tar(place) -> None:
    data = gzip.compress(tarred({"photos/zeros": bytes(80 << 20)}))
    with pytest.raises(ArchiveError, match="times its size"):
        place.unpack(".tar.gz", data)


def test_a_zip_that_is_larger_than_the_disk(place) -> None:
    data = bytearray(zipped({"photos/x": b"x"}))
    at = data.rindex(b"PK\1\2")
    data[at + 24 : at + 28] = struct.pack("<I", 0xFFFFFFF0)
    many = bytes(data)
    with pytest.raises(ProxydetError):
        place.unpack(".zip", many)


def test_members_that_overlap(place) -> None:
    """Two names for the same stored bytes, as zip bombs have millions of."""
    data = bytearray(zipped({"photos/a": b"x" * 100, "photos/b": b"x" * 100}, zipfile.ZIP_STORED))
    at = data.rindex(b"PK\1\2")
    data[at + 42 : at + 46] = struct.pack("<I", 0)
    with pytest.raises(ArchiveError, match="overlap"):
        place.unpack(".zip", bytes(data))


@pytest.mark.parametrize("at", [0, 8])
def test_a_zip_that_contradicts_its_table_of_contents(place, at) -> None:
    """Signature or method in front of a member's bytes are other than in the table."""
    data = bytearray(zipped({"photos/a": b"x" * 100}, zipfile.ZIP_STORED))
    data[at] ^= 8
    with pytest.raises(ArchiveError, match="contradicts"):
        place.unpack(".zip", bytes(data))


def test_a_damaged_header_in_a_tar(place) -> None:
    data = tarred({"photos/a": b"x"}).replace(b"photos/a", b"photos/e")
    with pytest.raises(ArchiveError, match="damaged"):
        place.unpack(".tar", data)


def test_a_sparse_file_in_the_newer_style() -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("photos/x")
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
        archive.addfile(info)
    stream.seek(0)
    with pytest.raises(ArchiveError, match="sparse"):
        list(TarReader(stream, "it"))


def test_the_same_name_twice(place) -> None:
    two = zipped({"photos/a": b"1", "photos/b": b"2"}).replace(b"photos/b", b"photos/a")
    with pytest.raises(ArchiveError, match="twice"):
        place.unpack(".zip", two)
    twice = tarred({"photos/a": b"1"})[:1024] + tarred({"photos/a": b"2"})
    with pytest.raises(ArchiveError, match="twice"):
        place.unpack(".tar", twice)


@pytest.mark.parametrize(
    "kind", ["stored zip", "zip", "tar.gz"]
)  # tar alone has no check sums of its files
def test_a_damaged_byte_is_noticed_where_the_format_can(place, kind) -> None:
    suffix, data = KINDS[kind]
    damaged = bytearray(data)
    damaged[len(data) // 2] ^= 0xFF
    with pytest.raises(ArchiveError):
        place.unpack(suffix, bytes(damaged))
    assert not (place.data / "photos").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_archive(place, kind) -> None:
    suffix, data = KINDS[kind]
    for length in (
        0,
        1,
        100,
        600,
        len(data) // 2,
        len(data) - (15_000 if suffix == ".tar" else 15),
    ):
        with pytest.raises(ArchiveError):
            place.unpack(suffix, data[:length])
    assert not (place.data / "photos").exists()


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    flips=st.lists(st.tuples(st.integers(0, 4000), st.integers(1, 255)), min_size=1, max_size=20)
)
def test_fuzzed_archives_end_in_files_or_in_clear_errors(place, suffix, flips) -> None:
    files = {f"photos/{n}": bytes([n]) * 90 for n in range(6)}
    data = {".zip": zipped, ".tar": tarred, ".tar.gz": lambda f: gzip.compress(tarred(f))}[suffix](
        files
    )
    damaged = bytearray(data)
    for at, change in flips:
        damaged[at % len(damaged)] ^= change
    with contextlib.suppress(ProxydetError):
        place.unpack(suffix, bytes(damaged))
    inside = {
        path.relative_to(place.data).parts[0]
        for path in place.data.rglob("*")
        if path != place.data
    }
    assert inside <= {"photos", f"archive{suffix}", f".archive{suffix}.unpacking"}
    assert {path.name for path in place.data.parent.iterdir()} <= {"set", ".proxydet"}


@given(st.binary(max_size=3000))
def test_any_bytes_are_a_tar_or_a_clear_error(data) -> None:
    with contextlib.suppress(ArchiveError):
        list(TarReader(io.BytesIO(data), "it"))


def test_an_extended_header_of_a_gigabyte_is_refused() -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 1 << 30
    with pytest.raises(ArchiveError, match="extended header"):
        list(TarReader(io.BytesIO(info.tobuf() + bytes(4096)), "it"))


def test_long_names_and_large_numbers(tmp_path) -> None:
    name = "photos/" + "/".join(["d" * 60] * 3) + "/x"
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        members = list(TarReader(io.BytesIO(tarred({name: b"abc"}, form)), "it"))
        assert [(member.name, member.size) for member in members] == [(name, 3)]
    info = tarfile.TarInfo("big")
    info.size = 1 << 40
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        reader = iter(TarReader(io.BytesIO(info.tobuf(form)), "it"))
        assert next(reader).size == 1 << 40
