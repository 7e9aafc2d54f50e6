import gzip
import io
import os
import pickle
import tarfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from proxydet.data.image_labels import TarClasses, TarImages
from proxydet.data.images import read_image
from proxydet.errors import DataError

Make = Callable[..., Path]
Jpeg = Callable[..., bytes]


def link(name: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return info


def folder_of(name: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = tarfile.DIRTYPE
    return info


def open_tars(folder: Path, names: Sequence[str], **options: Any) -> TarImages:
    """Tars that are all of one class."""
    return TarImages.open(folder, TarClasses(class_of_tar=dict.fromkeys(names, 0)), **options)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def tars(tmp_path, make_tar, jpeg) -> Path:
    make_tar(tmp_path / "b.tar", {"1.JPEG": jpeg(10, 20, 0), "long/" + "n" * 150: jpeg(30, 8, 50)})
    make_tar(tmp_path / "a.tar", {"z.JPEG": gzip.compress(jpeg(5, 6, 200))})
    return tmp_path


def test_images_are_read_in_place(tars):
    index = open_tars(tars, ["b.tar", "a.tar"])
    assert index.tars == ("a.tar", "b.tar")
    assert index.tar_I.tolist() == [0, 1, 1]
    assert index.shapes_I2.tolist() == [[5, 6], [10, 20], [30, 8]]
    assert [index.name(row) for row in range(2)] == ["a.tar/z.JPEG", "b.tar/1.JPEG"]
    assert [round(read_image(index.encoded(row)).mean()) for row in range(3)] == [200, 0, 50]
    assert index.report.gzipped == 1
    assert index.notes() == []


def test_processes_give_the_same_index(tars, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    one = open_tars(tars, ["b.tar", "a.tar"], cache=tmp_path / "1")
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    two = open_tars(tars, ["a.tar", "b.tar"], cache=tmp_path / "2")
    assert one.path.read_bytes() == two.path.read_bytes()


def test_the_index_is_made_once_and_again_when_a_tar_changes(tars, make_tar, jpeg):
    first = open_tars(tars, ["a.tar"])
    made = first.path.stat()
    assert open_tars(tars, ["a.tar"]).path == first.path
    assert (first.path.stat().st_ino, first.path.stat().st_mtime_ns) == (
        made.st_ino,
        made.st_mtime_ns,
    )
    make_tar(tars / "a.tar", {"1": jpeg(1, 1), "2": jpeg(2, 2)})
    assert len(open_tars(tars, ["a.tar"])) == 2


def test_what_is_no_image_is_reported_by_name(tmp_path, make_tar, jpeg):
    make_tar(
        tmp_path / "t.tar",
        {
            "d": folder_of("d"),
            "d/ok.jpg": jpeg(4, 4),
            "notes.txt": b"hello",
            "empty.jpg": b"",
            "link.jpg": link("link.jpg"),
            "bad.gz": gzip.compress(jpeg(4, 4))[:-20],
            "text.gz": gzip.compress(b"hello"),
        },
    )
    make_tar(tmp_path / "none.tar", {"notes.txt": b"hello"})
    index = open_tars(tmp_path, ["t.tar", "none.tar"])
    assert [index.name(row) for row in range(len(index))] == ["t.tar/d/ok.jpg"]
    reported = {line.split(":")[0] for line in index.report.unreadable}
    assert reported == {"none.tar/notes.txt"} | {
        f"t.tar/{name}" for name in ("notes.txt", "empty.jpg", "link.jpg", "bad.gz", "text.gz")
    }
    assert any("link or a special file" in line for line in index.report.unreadable)
    assert index.report.gzipped == 0
    assert index.report.empty == ["none.tar"]
    (_, members, _), (_, empty, _) = index.notes()
    assert members.startswith("6 unreadable members: ")
    assert empty == "1 tar without images: none.tar"


def test_large_headers_before_the_size_are_read(tmp_path, make_tar):
    exif = Image.Exif()
    exif[0x010E] = "x" * 60000
    buffer = io.BytesIO()
    Image.new("RGB", (7, 3)).save(buffer, "JPEG", exif=exif, icc_profile=b"y" * 60000)
    make_tar(tmp_path / "t.tar", {"a.jpg": buffer.getvalue()})
    assert open_tars(tmp_path, ["t.tar"]).shapes_I2.tolist() == [[3, 7]]


def test_damaged_tars_give_what_is_before_the_damage(tmp_path, make_tar, jpeg):
    members = {str(number): jpeg(3, 3) for number in range(3)}
    whole = make_tar(tmp_path / "t.tar", members).read_bytes()
    size = 512 + -(-len(jpeg(3, 3)) // 512) * 512
    cases = {
        "in a member": (whole[: 2 * size + 700], 2, "in 2"),
        "in a header": (whole[: 2 * size + 100], 2, "no end mark"),
        "between members": (whole[: 2 * size], 2, "no end mark"),
        "a flipped header": (whole[:size] + b"x" + whole[size + 1 :], 1, "header in its middle"),
        "empty": (b"", 0, "empty"),
        "no tar": (b"any text" * 300, 0, "t.tar"),
        "a web page": (b"<html>" * 300, 0, "download it again"),
        "a pointer": (b"version https://git-lfs.github.com/spec/v1\n" * 20, 0, "git lfs pull"),
        "compressed": (gzip.compress(whole), 0, "t.tar"),
    }
    for name, (content, count, damage) in cases.items():
        (tmp_path / "t.tar").write_bytes(content)
        index = open_tars(tmp_path, ["t.tar"])
        assert len(index) == count, name
        assert damage in index.report.damaged[0], (name, index.report.damaged)
        assert index.report.empty == ([] if count else ["t.tar"])
    make_tar(tmp_path / "t.tar", members)
    assert open_tars(tmp_path, ["t.tar"]).report.damaged == []


def test_an_absent_tar_is_an_error_and_so_is_one_that_goes_away(tars):
    with pytest.raises(DataError, match=r"c\.tar"):
        open_tars(tars, ["c.tar"])
    index = open_tars(tars, ["a.tar", "b.tar"])
    (tars / "a.tar").unlink()
    with pytest.raises(DataError, match=r"a\.tar/z\.JPEG"):
        index.encoded(0)
    (tars / "b.tar").write_bytes((tars / "b.tar").read_bytes()[:600])
    with pytest.raises(DataError, match=r"b\.tar/1\.JPEG.*changed since"):
        index.encoded(1)


def test_many_tars_keep_few_files_open(tmp_path, make_tar, jpeg):
    names = [f"{number:03}.tar" for number in range(80)]
    for name in names:
        make_tar(tmp_path / name, {"a": jpeg(2, 2)})
    index = open_tars(tmp_path, names)
    before = open_files()
    for row in [*range(80), *range(80)]:
        index.encoded(row)
    assert open_files() - before <= 65
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(index.encoded, [*range(80), *range(80)]))) == 1
    again = pickle.loads(pickle.dumps(index))
    assert again.encoded(79) == index.encoded(79)
    del index, again
    assert open_files() <= before + 1


def test_members_of_one_name_are_each_reported(tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("notes.txt"))
    report = open_tars(tmp_path, ["t.tar"]).report
    assert [line.split(":")[0] for line in report.unreadable] == ["t.tar/notes.txt"] * 2


def test_a_tar_of_the_same_size_and_another_time_is_looked_through_again(tars):
    first = open_tars(tars, ["a.tar"]).path
    os.utime(tars / "a.tar", ns=(1, 1))
    assert open_tars(tars, ["a.tar"]).path != first


def test_a_compressed_bomb_is_refused(tmp_path, make_tar, monkeypatch):
    monkeypatch.setattr("proxydet.data.image_labels.LARGEST_MEMBER", 1000)
    make_tar(tmp_path / "t.tar", {"a.jpg": gzip.compress(bytes(1001))})
    assert "larger than 1000 bytes" in open_tars(tmp_path, ["t.tar"]).report.unreadable[0]


def test_a_member_of_negative_size_ends_a_tar(tmp_path, make_tar, jpeg):
    whole = bytearray(make_tar(tmp_path / "t.tar", {"0": jpeg(3, 3)}).read_bytes())
    header = whole[:512]
    # Base 256, as GNU tar writes what does not fit into octal digits; of an unknown kind. Reading on would go in circles.
    header[124:136] = b"\xff" * 10 + b"\xfe\x00"
    header[156:157] = b"Z"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    end = 512 + -(-len(jpeg(3, 3)) // 512) * 512
    (tmp_path / "t.tar").write_bytes(whole[:end] + header + bytes(1024))
    index = open_tars(tmp_path, ["t.tar"])
    assert [index.name(row) for row in range(len(index))] == ["t.tar/0"]
    assert "negative" in index.report.damaged[0]


@pytest.mark.parametrize(("size", "times"), [(2 << 20, 1), (512, 900)])
def test_headers_that_would_fill_the_memory_end_a_tar(tmp_path, make_tar, jpeg, size, times):
    whole = make_tar(tmp_path / "t.tar", {"0": jpeg(3, 3)}).read_bytes()
    long_name = tarfile.TarInfo()
    long_name.type, long_name.size = tarfile.GNUTYPE_LONGNAME, size
    header = long_name.tobuf(tarfile.GNU_FORMAT) + b"x" * size
    end = 512 + -(-len(jpeg(3, 3)) // 512) * 512
    (tmp_path / "t.tar").write_bytes(whole[:end] + header * times + whole)
    index = open_tars(tmp_path, ["t.tar"])
    assert [index.name(row) for row in range(len(index))] == ["t.tar/0"]
    assert len(index.report.damaged) == 1
