from pathlib import Path

import numpy as np
import pytest

from proxydet.data.store import ColumnFile, ColumnWriter
from proxydet.errors import DataError


def write(path: Path) -> Path:
    with ColumnWriter(path) as writer:
        writer.add("long", np.arange(5, dtype=np.int64))
        writer.add("long", np.arange(5, 7, dtype=np.int64))
        writer.add("table", np.arange(6, dtype=">f4").reshape(3, 2))
        writer.add("none", np.empty((0, 4), dtype=np.float32))
        writer.add("flags", np.array([True, False]))
        writer.finish(kind="test", version=2, meta={"a": [1]})
    return path


def test_columns_come_back_with_shape_and_type(tmp_path):
    opened = ColumnFile(write(tmp_path / "c"), kind="test", version=2)
    np.testing.assert_array_equal(opened["long"], np.arange(7))
    assert opened["table"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert opened["none"].shape == (0, 4)
    assert opened["flags"].tolist() == [True, False]
    assert opened.meta(dict[str, list[int]]) == {"a": [1]}
    assert "flags" in opened
    assert "other" not in opened
    assert opened.damaged_columns() == []
    with pytest.raises(ValueError, match="read-only"):
        opened["long"][0] = 3


def test_nothing_is_left_of_an_unfinished_file(tmp_path):
    writer = ColumnWriter(tmp_path / "c")
    with pytest.raises(ValueError, match="column a"), writer:
        writer.add("a", writer.add("a", np.zeros(3)) or np.zeros(3, dtype=np.int8))
    with ColumnWriter(tmp_path / "c") as writer:
        writer.add("a", np.zeros(3))
    assert list(tmp_path.iterdir()) == []


def test_parts_continue_the_column_added_last_and_only_that(tmp_path):
    with ColumnWriter(tmp_path / "c") as writer:
        writer.add("a", np.zeros(3))
        writer.add("b", np.zeros((1, 4)))
        writer.add("b", np.ones((2, 4)))
        with pytest.raises(ValueError, match="column a"):
            writer.add("a", np.zeros(3))
        for other in (np.zeros((2, 4), dtype=np.int8), np.zeros(4), np.zeros((2, 3))):
            with pytest.raises(ValueError, match="column b"):
                writer.add("b", other)
        writer.finish(kind="test", version=2, meta={})
    opened = ColumnFile(tmp_path / "c", kind="test", version=2)
    assert opened["b"].sum(axis=1).tolist() == [0, 4, 4]
    assert opened.damaged_columns() == []


def test_other_kinds_and_versions_are_refused(tmp_path):
    path = write(tmp_path / "c")
    for kind, version in (("other", 2), ("test", 1)):
        with pytest.raises(DataError, match="it holds test version 2"):
            ColumnFile(path, kind=kind, version=version)


@pytest.mark.parametrize("keep", [0, 4, 20, 200, -1, None])
def test_a_cut_file_and_an_absent_one_are_refused(tmp_path, keep):
    path = write(tmp_path / "c")
    path.write_bytes(path.read_bytes()[:keep])
    if keep is None:
        path.unlink()
    with pytest.raises(DataError, match="cannot use"):
        ColumnFile(path, kind="test", version=2)


def test_flipped_bits_are_found_or_refused(tmp_path):
    path = write(tmp_path / "c")
    whole = path.read_bytes()
    found = refused = 0
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        try:
            found += bool(ColumnFile(path, kind="test", version=2).damaged_columns())
        except DataError:
            refused += 1
    # All bytes of all columns: 7 int64, 6 float32, 2 bool; and of magic, footer and tail.
    assert found == 56 + 24 + 2
    assert refused == 8 + len(whole) - whole.index(b'{"kind"')


def without_check_sum(path: Path, old: bytes, new: bytes) -> Path:
    """Change the footer of a file as it was written before footers had a check sum."""
    whole = path.read_bytes()
    assert whole.count(old) == 1
    assert len(old) == len(new)
    whole = whole.replace(old, new)
    path.write_bytes(whole[:-12] + bytes(4) + whole[-8:])
    return path


def test_a_footer_without_a_check_sum_is_read(tmp_path):
    path = without_check_sum(write(tmp_path / "c"), b'"flags"', b'"flegs"')
    opened = ColumnFile(path, kind="test", version=2)
    assert opened["long"].tolist() == list(range(7))
    with pytest.raises(DataError, match="has no column flags") as caught:
        opened["flags"]
    assert "delete the file" in (caught.value.hint or "")
    with pytest.raises(DataError, match="footer is damaged"):
        opened.meta(list[int])


def test_a_file_can_be_written_twice_at_once(tmp_path):
    with ColumnWriter(tmp_path / "c.columns") as slow:
        slow.add("a", np.zeros(3))
        write(tmp_path / "c.columns")
        slow.finish(kind="slow", version=1, meta={})
    ColumnFile(tmp_path / "c.columns", kind="slow", version=1)
    assert [path.name for path in tmp_path.iterdir()] == ["c.columns"]


def test_a_column_that_claims_to_reach_beyond_the_file_is_refused(tmp_path):
    with ColumnWriter(tmp_path / "c") as writer:
        writer.add("a", np.arange(7))
        writer.finish(kind="test", version=2, meta=None)
    without_check_sum(tmp_path / "c", b'"shape":[7]', b'"shape":[8]')
    with pytest.raises(DataError, match="reaches beyond its end"):
        ColumnFile(tmp_path / "c", kind="test", version=2)
