import json
from pathlib import Path

import pytest

from proxydet.data.annotation_json import read_annotations
from proxydet.errors import DataError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot read"),
        ('{"images": [1,\n  {"a": }]}', "line 2, column 9"),
        ('{"images": [], "categories": []', "ends in the middle of its JSON"),
        ('{"images": [], "categories": []} x', "not JSON"),
        ("[]", "not an annotation file"),
        ("3", "not an annotation file"),
        ('{"images": []}', "missing required field `categories`"),
        ('{"images": {}, "categories": []}', "not an annotation file"),
        ('{"images": [NaN], "categories": [', "not JSON"),
        ('{"images": NaN, "categories": []}', "not an annotation file"),
        ("[" * 100_000, "not an annotation file"),
    ],
)
def test_what_is_no_annotation_file_is_refused(write_json, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_annotations(write_json(text))
    assert "annotations.json" in caught.value.message


def test_an_absent_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no annotation file"):
        read_annotations(tmp_path / "x.json")
    with pytest.raises(DataError, match="cannot read"):
        read_annotations(tmp_path)


def test_nan_and_a_byte_order_mark_are_read_slowly(write_json, tmp_path: Path) -> None:
    content = '{"images": [{"id": 1}], "annotations": [{"bbox": [NaN, 1, -Infinity, 2]}], "categories": []}'
    assert b"null,1,null,2" in bytes(read_annotations(write_json(content)).annotations[0])
    marked = tmp_path / "bom.json"
    marked.write_bytes(b"\xef\xbb\xbf" + json.dumps({"images": [1, 2], "categories": []}).encode())
    assert len(read_annotations(marked).images) == 2


def test_records_outlive_the_reading(write_json) -> None:
    images = read_annotations(write_json({"images": [{"id": 5}], "categories": []})).images
    assert bytes(images[0]) == b'{"id": 5}'
