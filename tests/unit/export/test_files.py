"""Exported files, run as a user without torch or without detectron2 runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from types import ModuleType

import numpy as np
import onnx
import pytest
from PIL import Image

from proxydet.detector import Detector
from proxydet.errors import InputError, NumericsError
from proxydet.export.exporter import TorchProgram, compare, export_detector, synthetic_image
from proxydet.export.runtime import INPUTS, OUTPUTS, SCORER_INPUTS, OnnxDetector

# One export takes longer than a quick test may; what is exported is tested without in test_graph.py.
pytestmark = pytest.mark.slow

SIZES = [(60, 90), (160, 60), (31, 200), (128, 128)]

BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Block())
"""

WITHOUT_TORCH = """
import json
from proxydet.export.runtime import OnnxDetector
found = OnnxDetector.from_file(sys.argv[1]).predict(sys.argv[2], sys.argv[3], score_threshold=0.02)
print(json.dumps([found.boxes_xyxy.tolist(), found.scores.tolist(), found.labels, int(found.masks.sum())]))
"""

WITHOUT_DETECTRON2 = """
import numpy as np, torch, torchvision
program = torch.export.load(sys.argv[1]).module()
arrays = np.load(sys.argv[2])
names = ("image", "text", "base", "score_threshold", "bias", "scale", "threshold", "background")
inputs = [torch.from_numpy(arrays[name]) for name in names]
np.savez(sys.argv[3], **{name: value.numpy() for name, value in program(*inputs).items()})
"""


def run_without(blocked: set[str], code: str, *words: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED.format(blocked=blocked) + code, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_agrees(
    detector: Detector, exported: OnnxDetector | TorchProgram, tiny: ModuleType
) -> None:
    """Sizes and vocabularies other than the traced ones, and a threshold that leaves nothing."""
    for size, classes, threshold in zip(
        SIZES, (1, 7, 80, 1203), (0.02, 0.02, 0.3, 0.9999), strict=True
    ):
        result = compare(
            detector,
            exported,
            synthetic_image(*size, seed=classes),
            tiny.vocabulary(classes, seed=classes),
            name=f"{size}",
            score_threshold=threshold,
        )
        assert result.good, result
        assert (result.detections > 0) == (threshold < 0.9)
    words = tiny.vocabulary(7).with_scorers(
        bias=np.linspace(-0.5, 0.5, 7),
        threshold=[0.1, np.nan, 0.9, *[np.nan] * 4],
        background=[0, 0, 0, 0, 0, 1, 1],
    )
    image = synthetic_image(60, 90)
    result = compare(detector, exported, image, words, name="scorers", score_threshold=0.3)
    assert result.good, result
    assert result.detections > 0


def test_onnx_finds_what_the_detector_finds(detector, onnx_export, tiny):
    assert_agrees(detector, OnnxDetector.from_file(onnx_export.path, threads=1), tiny)


def test_onnx_says_what_it_is(detector, onnx_export):
    model = onnx.load(onnx_export.path)
    assert [value.name for value in model.graph.input] == [*INPUTS, *SCORER_INPUTS]
    assert [value.name for value in model.graph.output] == list(OUTPUTS)
    assert {opset.domain for opset in model.opset_import} == {""}
    assert onnx_export.bytes == onnx_export.path.stat().st_size
    metadata = OnnxDetector.from_file(onnx_export.path).metadata
    assert metadata == onnx_export.metadata
    assert (metadata.shortest, metadata.longest) == detector.sides
    assert metadata.embedding_dimension == detector.vocabulary.dimension
    assert list(onnx_export.path.parent.iterdir()) == [onnx_export.path]


def test_onnx_runs_without_torch_and_detectron2(detector, onnx_export, tiny, tmp_path):
    words = tiny.vocabulary(5, seed=5)
    Image.fromarray(synthetic_image(70, 90)).save(tmp_path / "image.png")
    words.save(tmp_path / "words.npz")
    blocked = {"torch", "torchvision", "detectron2", "pycocotools", "fvcore", "open_clip", "yaml"}
    text = run_without(
        blocked, WITHOUT_TORCH, onnx_export.path, tmp_path / "image.png", tmp_path / "words.npz"
    )
    boxes, scores, labels, area = json.loads(text)
    wanted = detector.predict(tmp_path / "image.png", words, score_threshold=0.02, one_label=False)
    assert len(wanted) > 5
    assert tuple(labels) == wanted.labels
    np.testing.assert_allclose(boxes, wanted.boxes_xyxy, atol=0.01)
    np.testing.assert_allclose(scores, wanted.scores, atol=1e-4)
    assert abs(area - int(wanted.masks.sum())) <= 0.01 * max(area, 1)


def without_digest(model: onnx.ModelProto) -> None:
    """As one does to change a file on purpose."""
    [digest] = [entry for entry in model.metadata_props if entry.key == "proxydet_sha256"]
    model.metadata_props.remove(digest)
    [description] = [entry for entry in model.metadata_props if entry.key == "proxydet"]
    description.value = json.dumps(
        {k: v for k, v in json.loads(description.value).items() if k != "sealed"}
    )


def test_an_onnx_file_of_others_is_refused(onnx_export, tmp_path):
    model = onnx.load(onnx_export.path)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(InputError, match="was not made by proxydet"):
        OnnxDetector.from_file(tmp_path / "other.onnx")


def test_damaged_weights_in_the_file_are_reported(onnx_export, tiny, tmp_path):
    model = onnx.load(onnx_export.path)
    [stem] = [t for t in model.graph.initializer if list(t.dims) == [8, 3, 7, 7]]
    stem.raw_data = np.full(stem.dims, np.nan, dtype=np.float32).tobytes()
    without_digest(model)
    onnx.save(model, tmp_path / "damaged.onnx")
    with pytest.raises(NumericsError, match="not finite"):
        OnnxDetector.from_file(tmp_path / "damaged.onnx").predict(
            synthetic_image(60, 60), tiny.vocabulary(3)
        )


def test_torch_finds_what_the_detector_finds_without_detectron2(
    detector, torch_export, tiny, tmp_path
):
    assert_agrees(detector, TorchProgram(torch_export.path), tiny)
    words = tiny.vocabulary(5, seed=5)
    inputs = {
        "image": synthetic_image(70, 90),
        "text": words.embeddings,
        "base": words.base,
        "score_threshold": np.float32(0.02),
        **words.scorers,
    }
    np.savez(tmp_path / "inputs.npz", **inputs)
    run_without(
        {"detectron2", "proxydet"},
        WITHOUT_DETECTRON2,
        torch_export.path,
        tmp_path / "inputs.npz",
        tmp_path / "outputs.npz",
    )
    here = TorchProgram(torch_export.path).run(inputs["image"], words, 0.02)
    there = np.load(tmp_path / "outputs.npz")
    assert len(here["scores"]) > 5
    for name in OUTPUTS:
        np.testing.assert_allclose(there[name], here[name], atol=1e-4)


@pytest.mark.parametrize("ending", [".onnx", ".pt2"])
def test_swin(make_detector, tiny, tmp_path, ending):
    detector = make_detector(tiny, "swin")
    report = export_detector(detector, tmp_path / f"swin{ending}", vocabulary=tiny.vocabulary(2))
    opened = OnnxDetector.from_file if ending == ".onnx" else TorchProgram
    assert_agrees(detector, opened(report.path), tiny)
    assert report.metadata.backbone == "swin"
    assert (tmp_path / "swin.npz").is_file()


@pytest.mark.parametrize("opset", [19, 20, 21])
def test_newer_operator_sets(detector, tiny, tmp_path, opset):
    report = export_detector(detector, tmp_path / "new.onnx", opset=opset)
    assert onnx.load(report.path).opset_import[0].version == opset
    assert_agrees(detector, OnnxDetector.from_file(report.path), tiny)


@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_a_flipped_bit_is_refused(format, onnx_export, torch_export, tmp_path):
    source = (onnx_export if format == "onnx" else torch_export).path
    whole, random = source.read_bytes(), np.random.default_rng(0)
    path = tmp_path / source.name
    for place in (*random.integers(0, len(whole) - 200, 20), len(whole) - 3):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(random.integers(8))
        path.write_bytes(bytes(damaged))
        with pytest.raises(InputError, match="SHA-256") as caught:
            OnnxDetector.from_file(path) if format == "onnx" else TorchProgram(path)
        assert "proxydet export" in str(caught.value.hint)


@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_damage_to_the_digests_own_mark_is_refused(format, onnx_export, torch_export, tmp_path):
    source = (onnx_export if format == "onnx" else torch_export).path
    whole, path = source.read_bytes(), tmp_path / source.name
    place = whole.rindex(b"sha256")
    for damaged in (whole[:place] + b"S" + whole[place + 1 :], whole[:-5]):
        path.write_bytes(damaged)
        with pytest.raises(InputError) as caught:
            OnnxDetector.from_file(path) if format == "onnx" else TorchProgram(path)
        assert "proxydet export" in str(caught.value.hint)
