import hashlib
import os
from pathlib import Path

import pytest

from proxydet.data.source_digest import source_digest
from proxydet.errors import DataError


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_the_digest_is_remembered_while_the_file_looks_unchanged(tmp_path: Path) -> None:
    source, memory = tmp_path / "s", tmp_path / "m"
    source.write_bytes(b"one")
    assert source_digest(source, memory) == sha(b"one")
    (note,) = memory.iterdir()
    note.write_bytes(note.read_bytes().replace(sha(b"one").encode(), b"0" * 64))
    assert source_digest(source, memory) == "0" * 64


def test_time_size_and_inode_each_betray_a_change(tmp_path: Path) -> None:
    source, memory = tmp_path / "s", tmp_path / "m"
    source.write_bytes(b"one")
    os.utime(source, ns=(10**18, 10**18))
    source_digest(source, memory)
    source.write_bytes(b"two")
    assert source_digest(source, memory) == sha(b"two")
    source.write_bytes(b"longer")
    stat = source.stat()
    source_digest(source, memory)
    with source.open("ab") as file:
        file.write(b"!")
    os.utime(source, ns=(stat.st_mtime_ns, stat.st_mtime_ns))
    assert source_digest(source, memory) == sha(b"longer!")
    stat = source.stat()
    (tmp_path / "other").write_bytes(b"longer?")
    os.utime(tmp_path / "other", ns=(stat.st_mtime_ns, stat.st_mtime_ns))
    (tmp_path / "other").replace(source)
    assert source_digest(source, memory) == sha(b"longer?")


def test_links_share_one_note_and_damaged_notes_are_made_again(tmp_path: Path) -> None:
    source, memory = tmp_path / "s", tmp_path / "m"
    source.write_bytes(b"one")
    (tmp_path / "link").symlink_to(source)
    assert source_digest(tmp_path / "link", memory) == source_digest(source, memory)
    (note,) = memory.iterdir()
    note.write_bytes(b"{")
    assert source_digest(source, memory) == sha(b"one")


def test_what_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no file"):
        source_digest(tmp_path / "absent", tmp_path / "m")
    with pytest.raises(DataError, match="cannot read"):
        source_digest(tmp_path, tmp_path / "m")
