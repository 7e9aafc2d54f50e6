"""The call is found by what it is, wherever it stands; what is not detectron2's code is recognised as such."""

from __future__ import annotations

import pytest

from proxydet.compat import patch_source
from proxydet.compat.patch_source import expected_text, read_source, with_change


@pytest.fixture
def source(roi_align_file) -> bytes:
    return roi_align_file.read_bytes()


def test_the_original_is_recognised_and_changed_in_three_places(source):
    assert read_source(source).state == "original"
    changed = with_change(source)
    assert read_source(changed).state == "applied"
    before, after = source.decode().splitlines(), changed.decode().splitlines()
    differing = [line.strip() for old, line in zip(before, after, strict=True) if old != line]
    assert differing == [
        "input.half().double(),",
        "rois.half().double(),",
        ").to(dtype=input.dtype)",
    ]


@pytest.mark.parametrize(
    "move",
    [
        lambda s: b"# a comment\n" * 40 + s,
        lambda s: s.replace(b"\n", b"\r\n"),
        lambda s: s.replace(b"Copyright", "Cöpyright ©".encode()),
        lambda s: s.replace(
            b"            rois.to(dtype=input.dtype),\n", b" rois.to(dtype=input.dtype) ,"
        ),
        lambda s: s.replace(b"return roi_align(", b"return roi_align(  # \xc3\xa9 pooled\n"),
        lambda s: s.replace(b"input,\n            rois", b"input, rois"),
    ],
)
def test_position_layout_and_comments_do_not_matter(source, move):
    moved = move(source)
    assert moved != source
    changed = with_change(moved)
    assert read_source(changed).state == "applied"
    assert changed.count(b".half().double()") == 2
    without = changed.replace(b"input.half().double()", b"input")
    without = without.replace(b"rois.half().double()", b"rois.to(dtype=input.dtype)")
    assert without.replace(b").to(dtype=input.dtype)", b")") == moved


@pytest.mark.parametrize(
    ("old", "new", "missing"),
    [
        (b"input,\n", b"input.half().double(),\n", "boxes"),
        (b"rois.to(dtype=input.dtype)", b"rois.half().double()", "features"),
        (
            b"            self.aligned,\n        )",
            b"            self.aligned,\n        ).to(dtype=input.dtype)",
            "boxes",
        ),
    ],
)
def test_a_part_of_the_change_is_told_apart(source, old, new, missing):
    reading = read_source(source.replace(old, new, 1))
    assert reading.state == "half"
    assert f"not {missing}" in reading.reason or f", {missing}" in reading.reason


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"self.sampling_ratio,\n            self.aligned", b"2,\n            self.aligned"),
        (b"rois.to(dtype=input.dtype)", b"rois.double()"),
        (b"input,\n            rois", b"input.double(),\n            rois"),
        (b"        return roi_align(", b"        input = input.half()\n        return roi_align("),
        (b"input = input.dequantize()", b"input = input.float()"),
        (b"from torchvision.ops import roi_align", b"from mine import roi_align"),
        (
            b"from torchvision.ops import roi_align",
            b"from torchvision.ops import roi_align\nroi_align = abs",
        ),
        (
            b"from torchvision.ops import roi_align",
            b"from torchvision.ops import roi_align\ndef roi_align(*a): ...",
        ),
        (
            b"from torchvision.ops import roi_align",
            b"from torchvision.ops import roi_align\nimport mine as roi_align",
        ),
        (b"from torchvision.ops import roi_align", b"from torchvision.ops import *"),
        (b"            self.aligned,", b"            self.aligned, extra=1,"),
        (b"class ROIAlign(", b"class RoIAlign("),
        (b"class ROIAlign(", b"class ROIAlign: ...\nclass ROIAlign("),
        (b"def forward(self, input, rois)", b"def forward(self, input, rois, extra=None)"),
        (b"def forward(self, input, rois)", b"def forward(self, input, rois, *extra)"),
        (b"def forward(self, input, rois)", b"def forward(self, input, rois, *, extra=None)"),
        (b"def forward(", b"@staticmethod\n    def forward("),
        (b"def __repr__", b"def forward(self): ...\n    def __repr__"),
        (b"return roi_align(", b"return 2 * roi_align("),
        (b"return roi_align(", b"return roi_align("[:-1]),
    ],
)
def test_other_code_is_altered_and_says_why(source, old, new):
    changed = source.replace(old, new, 1)
    assert changed != source
    reading = read_source(changed)
    assert reading.state == "altered"
    assert len(reading.reason) > 10
    with pytest.raises(ValueError, match="not detectron2's original"):
        with_change(changed)


def test_a_dtype_given_by_position_is_the_same_code(source):
    changed = with_change(source.replace(b"rois.to(dtype=input.dtype)", b"rois.to(input.dtype)"))
    assert changed == with_change(source)


def test_a_later_replacement_of_the_method_is_seen(source):
    assert read_source(source + b"\nROIAlign.forward = None\n").state == "altered"


def test_the_expected_text_of_changed_code_is_the_original(source):
    assert expected_text(with_change(source)) == source
    half = source.replace(b"input,\n", b"input.half().double(),\n", 1)
    assert expected_text(half) == source


def test_the_expected_text_of_foreign_code_shows_the_call(source):
    foreign = source.replace(b"return roi_align(", b"return other(")
    shown = patch_source.diff(
        expected_text(foreign), foreign, "roi_align.py", ("expected", "found")
    )
    assert "-        return roi_align(" in shown
    assert "+        return other(" in shown
    assert expected_text(b"x = 1\n") is None
