"""What takes a form of its own in ONNX, exported for real; the whole detector takes too long for a quick test."""

from __future__ import annotations

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import nms

from proxydet.export.exporter import describe, save_onnx
from proxydet.export.graph import OnnxSuppression, TorchvisionSuppression

IOU = 0.5
LIMIT = 8
CLASS_IOU, CLASS_LIMIT = 0.4, 20


class Suppressed(nn.Module):
    """Both uses of the operator, as the detector's graph makes them."""

    def forward(self, boxes: Tensor, scores: Tensor, threshold: Tensor) -> tuple[Tensor, ...]:
        """Return the positions that are kept, and the pairs."""
        suppression = OnnxSuppression()
        kept = suppression.keep_best(boxes, scores[:, 0], IOU, LIMIT)
        return kept, *suppression.keep_best_by_class(
            boxes, scores, threshold, CLASS_IOU, CLASS_LIMIT
        )


def drawn(count: int, classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    corners = torch.rand(count, 2, 2, generator=generator) * 60
    boxes = torch.cat([corners.amin(dim=1), corners.amax(dim=1) + 4], dim=1)
    return boxes, torch.rand(count, classes, generator=generator) + 0.01


@pytest.fixture(scope="module")
def session(detector, tmp_path_factory) -> onnxruntime.InferenceSession:
    path = tmp_path_factory.mktemp("operators") / "suppressed.onnx"
    free = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        Suppressed(),
        (*drawn(9, 3), torch.tensor(0.1)),
        dynamic_shapes=({0: free}, {0: free, 1: free}, {}),
        strict=False,
    )
    save_onnx(program, path, describe(detector), 18, output_names=("kept", "regions", "classes"))
    assert {node.domain for node in onnx.load(path).graph.node} == {""}
    return onnxruntime.InferenceSession(str(path))


def run(session: onnxruntime.InferenceSession, *values: Tensor) -> list[list[int]]:
    names = [value.name for value in session.get_inputs()]
    inputs = {name: value.numpy() for name, value in zip(names, values, strict=True)}
    return [array.tolist() for array in session.run(None, inputs)]


@pytest.mark.parametrize(("count", "classes"), [(40, 5), (3, 1), (200, 2)])
def test_suppression_keeps_what_torchvisions_does(session, count, classes):
    boxes, scores = drawn(count, classes)
    threshold = torch.tensor(0.3)
    kept, regions, found = run(session, boxes, scores, threshold)
    best = nms(boxes, scores[:, 0], IOU)[:LIMIT].tolist()
    assert kept == best + [count] * (LIMIT - len(best))
    of_class = TorchvisionSuppression().keep_best_by_class(
        boxes, scores, threshold, CLASS_IOU, CLASS_LIMIT
    )
    wanted = set(zip(*(part.tolist() for part in of_class), strict=True))
    assert 0 < len(wanted) < count * classes
    pairs = set(zip(regions, found, strict=True))
    # Of a class ONNX's operator keeps no more than an image may have: the best of all are the same.
    assert pairs <= wanted
    by_score = sorted(wanted, key=lambda pair: -scores[pair])[:CLASS_LIMIT]
    assert pairs >= set(by_score)


def test_a_threshold_that_nothing_passes_and_scores_of_nothing(session):
    boxes, scores = drawn(12, 3)
    assert run(session, boxes, scores, torch.tensor(2.0))[1:] == [[], []]
    assert run(session, boxes, scores * 0, torch.tensor(0.0)) == [[12] * LIMIT, [], []]


class Probabilities(nn.Module):
    """Probabilities as the detector's heads make them."""

    def forward(self, logits: Tensor) -> Tensor:
        """Return the sigmoid."""
        return logits.sigmoid()


def test_small_probabilities_are_exact_in_proportion(detector, tmp_path):
    """onnxruntime's ``Sigmoid`` gives 0 for the smallest, and a product of powers with them is 0 too."""
    path = tmp_path / "sigmoid.onnx"
    logits = torch.linspace(-80, 80, 321)
    program = torch.export.export(Probabilities(), (logits,), strict=False)
    save_onnx(program, path, describe(detector), 18, output_names=("probabilities",))
    (found,) = onnxruntime.InferenceSession(str(path)).run(None, {"logits": logits.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), logits.sigmoid(), rtol=1e-5, atol=0.0)
    extreme = torch.full_like(logits, -1000.0)
    (found,) = onnxruntime.InferenceSession(str(path)).run(None, {"logits": extreme.numpy()})
    assert not found.any()
