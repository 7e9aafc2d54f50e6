"""Limits and refusals around archives and checkpoints, each by itself: behind one, another often says no as well."""

from __future__ import annotations

import io
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from proxydet.artifacts import files, unzip
from proxydet.artifacts.artifact import Artifact, Provided, Unpack
from proxydet.artifacts.checkpoint_index import read_tensor_index
from proxydet.artifacts.member_names import checked_name
from proxydet.artifacts.root import Root
from proxydet.artifacts.staging import Staging
from proxydet.artifacts.tar_reader import TarReader
from proxydet.artifacts.unpacking import unpack
from proxydet.errors import ArchiveError, ArtifactError, CheckpointError, DiskFullError
from proxydet.reporting import SILENT


@pytest.mark.parametrize(
    "name", ["C:/evil", "c:evil", "photos/a\\..\\..\\evil", "photos/" + "p/" * 31 + "x"]
)
def test_names_below_the_right_top_that_still_lead_elsewhere(name) -> None:
    with pytest.raises(ArchiveError, match="outside its folder"):
        checked_name(name, {"photos", "C:", "c:evil"}, "a.zip")


def test_the_deepest_name_that_is_accepted() -> None:
    name = "photos/" + "p/" * 30 + "x"
    assert checked_name(name, {"photos"}, "a.zip") == name


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (tarfile.LNKTYPE, "a hard link"),
        (tarfile.SYMTYPE, "a symbolic link"),
        (tarfile.CHRTYPE, "a device"),
        (tarfile.BLKTYPE, "a device"),
        (tarfile.FIFOTYPE, "a pipe"),
        (tarfile.GNUTYPE_SPARSE, "a sparse file"),
    ],
)
def test_a_tar_says_what_is_refused_in_it(kind, what) -> None:
    info = tarfile.TarInfo("photos/x")
    info.type, info.linkname = kind, "y"
    with pytest.raises(ArchiveError, match=f"holds {what}, .*refused"):
        list(TarReader(io.BytesIO(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024)), "it"))


def test_a_tar_member_of_a_quintillion_bytes() -> None:
    info = tarfile.TarInfo("photos/x")
    info.size = 1 << 60
    with pytest.raises(ArchiveError, match="announces a file of 1152921504606846976 bytes"):
        list(TarReader(io.BytesIO(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024)), "it"))


def zipped(path: Path, count: int) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(count):
            archive.writestr(f"photos/{number}", b"x" * 1000)
    return path


def test_a_zip_of_more_members_than_any_data_set_has(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(unzip, "_MOST_MEMBERS", 3)
    assert len(unzip.zip_members(zipped(tmp_path / "a.zip", 3), {"photos"})) == 3
    with pytest.raises(ArchiveError, match="holds 4 files; that is refused"):
        unzip.zip_members(zipped(tmp_path / "b.zip", 4), {"photos"})


def test_room_for_a_zip_is_asked_for_before_anything_is_written(tmp_path, monkeypatch) -> None:
    rule = Unpack(folder="datasets/s", provides=(Provided(path="photos"),))
    artifact = Artifact(
        name="s",
        title="t",
        licence="l",
        addresses=("https://example.org/a",),
        target="datasets/s/a.zip",
        unpack=rule,
    )
    folder = tmp_path / "datasets/s"
    folder.mkdir(parents=True)
    zipped(folder / "a.zip", 4)
    written: list[str] = []
    write = Staging.write
    monkeypatch.setattr(Staging, "write", lambda *a: (written.append(a[1]), write(*a))[1])
    monkeypatch.setattr(files, "free_bytes", lambda _: 3999)
    with pytest.raises(DiskFullError):
        unpack(artifact, "0" * 64, Root(tmp_path), SILENT)
    assert not written
    monkeypatch.setattr(files, "free_bytes", lambda _: 4000)
    assert unpack(artifact, "0" * 64, Root(tmp_path), SILENT) == 4


def test_a_member_that_does_not_end_is_left_at_its_announced_size(tmp_path) -> None:
    asked: list[int] = []

    def endless() -> Iterator[bytes]:
        for number in range(100):
            asked.append(number)
            yield b"x" * 10

    staging = Staging(tmp_path, "a.zip", "0" * 64)
    with pytest.raises(ArchiveError, match="not the 25 announced"):
        staging.write("x", 25, endless())
    staging.close()
    assert len(asked) == 3


def test_nothing_is_written_through_a_link_in_the_hidden_folder(tmp_path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    staging = Staging(tmp_path / "s", "a.zip", "0" * 64)
    (staging.path / "x").symlink_to(victim)
    with pytest.raises(ArtifactError):
        staging.write("x", 4, [b"evil"])
    staging.close()
    assert victim.read_bytes() == b"mine"


def test_files_that_were_moved_before_an_interruption_are_not_unpacked_again(tmp_path) -> None:
    staging = Staging(tmp_path, "a.zip", "0" * 64)
    staging.note("photos/1", staging.write("photos/1", 1, [b"x"]))
    staging.close()
    (tmp_path / "photos").mkdir()
    (staging.path / "photos/1").rename(tmp_path / "photos/1")
    again = Staging(tmp_path, "a.zip", "0" * 64)
    assert again.has("photos/1", 1)
    (tmp_path / "photos/1").unlink()
    assert not again.has("photos/1", 1)
    again.close()
    shutil.rmtree(again.path)


def test_a_checkpoint_whose_numbers_are_fewer_than_its_index_says(tmp_path) -> None:
    torch.save({"w": torch.ones(8)}, tmp_path / "c.pth")
    with (
        zipfile.ZipFile(tmp_path / "c.pth") as whole,
        zipfile.ZipFile(tmp_path / "cut.pth", "w") as cut,
    ):
        for name in whole.namelist():
            data = whole.read(name)
            cut.writestr(name, data[:-4] if "/data/" in name else data)
    with pytest.raises(CheckpointError, match=r"tensor data .* is missing"):
        read_tensor_index(tmp_path / "cut.pth")
