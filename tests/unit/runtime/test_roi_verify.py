"""The proof tells the three operators apart, by running them."""

import py_compile
import sys

import proxydet.runtime.d2  # noqa: F401

import pytest
import torch
from detectron2.layers import ROIAlign

from proxydet.errors import RuntimeEnvironmentError
from proxydet.runtime import roi_verify
from proxydet.runtime.modes import reproducibility_mode
from proxydet.runtime.patch import apply_patch, revert_patch
from proxydet.runtime.roi_verify import TOLERANCE, measure, verdict_of, verify_roi_align


@pytest.mark.parametrize(
    ("mode", "verdict"), [("off", "not active"), ("published", "active"), ("strict", "not active")]
)
def test_the_modes_are_told_apart(mode, verdict):
    with reproducibility_mode(mode):
        found = measure("cpu")
    assert verdict_of(found) == verdict
    assert found["between_the_two"] > 100 * TOLERANCE


def rounded(forward, self, x, boxes):
    return forward(self, x.half().double(), boxes.half().double()).float()


@pytest.mark.parametrize(
    "operator",
    [
        lambda forward, self, x, boxes: forward(self, x.half().double(), boxes),
        lambda forward, self, x, boxes: forward(self, x, boxes.half().float()),
        lambda forward, self, x, boxes: forward(self, x.half().float(), boxes),
        lambda forward, self, x, boxes: forward(self, x, boxes.round()),
        lambda forward, self, x, boxes: forward(self, x.half().double(), boxes.half().double()),
        lambda forward, self, x, boxes: (
            forward(self, x, boxes)
            + (rounded(forward, self, x, boxes) - forward(self, x, boxes)).detach()
        ),
        lambda forward, self, x, boxes: forward(self, x, boxes) * 1.001,
        lambda forward, self, x, boxes: x.sum() * 0 + forward(self, x.detach(), boxes),
    ],
)
def test_anything_else_is_altered(monkeypatch, operator):
    forward = ROIAlign.forward
    monkeypatch.setattr(
        ROIAlign, "forward", lambda self, x, boxes: operator(forward, self, x, boxes)
    )
    assert verdict_of(measure("cpu")) == "altered"


@pytest.mark.slow
def test_the_patch_on_disk_is_proved_in_a_fresh_interpreter(detectron2_copy):
    search = [str(detectron2_copy.parent), *sys.path]
    file = detectron2_copy / "layers" / "roi_align.py"
    original = file.read_bytes()
    apply_patch(file)
    report = verify_roi_align(device="cpu", search_path=search)
    assert (report.verdict, report.file_state, report.file) == ("active", "applied", file)
    revert_patch(file)
    assert file.read_bytes() == original


def test_an_operator_that_does_not_run_is_an_error_with_its_reason(tmp_path):
    broken = tmp_path / "detectron2"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise ImportError('torn apart')")
    with pytest.raises(RuntimeEnvironmentError, match="torn apart"):
        verify_roi_align(device="cpu", search_path=[str(tmp_path), *sys.path])


def test_a_verdict_that_the_file_does_not_explain_is_commented(roi_align_file, monkeypatch):
    plain = dict.fromkeys(("values_from_plain", "gradient_from_plain"), 0.0)
    figures = {"values_from_published": 1.0, "gradient_from_published": 1.0, **plain}
    versions = dict.fromkeys(("device", "torch", "torchvision", "detectron2"), "")
    answer = {"operator": str(roi_align_file), "dtype": "float32", "figures": figures, **versions}
    answer |= {"between_the_two": 1.0, "repeats": None}
    monkeypatch.setattr(roi_verify, "call_in_new_process", lambda *_, **__: answer)

    assert verify_roi_align().notes == ()
    apply_patch(roi_align_file)
    assert "replaces it" in verify_roi_align().notes[0]
    kind = py_compile.PycInvalidationMode.UNCHECKED_HASH
    py_compile.compile(str(roi_align_file), invalidation_mode=kind)
    roi_align_file.write_bytes(roi_align_file.read_bytes() + b"\n")
    assert "patch apply` deletes" in verify_roi_align().notes[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_the_backward_pass_is_repeated():
    report = verify_roi_align(device="cuda")
    assert report.repeats is not None
    assert report.repeats["times"] == 50
