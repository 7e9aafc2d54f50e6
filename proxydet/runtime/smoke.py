"""Proves in a fresh interpreter that the libraries work: ``python -m proxydet.runtime.smoke torch | detectron2``.

Writes one JSON object to stdout. A library that is broken shows as an ordinary Python error and exit code 1,
which :mod:`proxydet.runtime.setup` reads from outside: a broken binary may take the whole process down.
"""

from __future__ import annotations

import json
import sys
from typing import Any

TORCH = "torch"
DETECTRON2 = "detectron2"


def check_torch() -> dict[str, Any]:
    """Run an operator of torchvision, which fails where torch and torchvision do not fit each other.

    Returns:
        The versions of both.

    Raises:
        RuntimeError: The operator gives a wrong result.
    """
    import torch
    import torchvision
    from torchvision.ops import nms

    boxes_N4 = torch.tensor(
        [[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 9.0], [20.0, 20.0, 30.0, 30.0]]
    )
    kept = nms(boxes_N4, torch.tensor([0.5, 0.9, 0.7]), 0.5).tolist()
    _expect("nms", kept, [1, 2])
    return {"torch": str(torch.__version__), "torchvision": str(torchvision.__version__)}


def check_detectron2() -> dict[str, Any]:
    """Run what the detector is built from: RoIAlign, boxes, and a feature pyramid with its gradient.

    Returns:
        Version, folder and state of the compiled operators of the installation that is in use.

    Raises:
        RuntimeError: A result is wrong.
    """
    import proxydet.runtime.d2 as d2

    import torch
    from detectron2.layers import ROIAlign
    from detectron2.modeling.backbone import FPN, BasicStem, ResNet
    from detectron2.modeling.backbone.resnet import BasicBlock
    from detectron2.structures import Boxes, pairwise_iou

    ramp_1CHW = torch.arange(16.0).expand(1, 1, 16, 16)
    pooled = ROIAlign((1, 2), 1.0, 0, aligned=True)(
        ramp_1CHW, torch.tensor([[0, 4.0, 4.0, 8.0, 8.0]])
    )
    _expect("roi_align", [round(v, 4) for v in pooled.flatten().tolist()], [4.5, 6.5])
    square = Boxes(torch.tensor([[0.0, 0.0, 2.0, 2.0]]))
    half = Boxes(torch.tensor([[0.0, 0.0, 2.0, 1.0]]))
    _expect("pairwise_iou", pairwise_iou(square, half).item(), 0.5)

    stages = [
        ResNet.make_stage(
            BasicBlock, 1, stride_per_block=[1], in_channels=4, out_channels=4, norm=""
        ),
        ResNet.make_stage(
            BasicBlock, 1, stride_per_block=[2], in_channels=4, out_channels=8, norm=""
        ),
    ]
    bottom = ResNet(BasicStem(3, 4, norm=""), stages, out_features=["res2", "res3"])
    levels = FPN(bottom, ["res2", "res3"], out_channels=4)(torch.ones(1, 3, 32, 32))
    _expect(
        "pyramid",
        {k: list(v.shape) for k, v in levels.items()},
        {"p2": [1, 4, 8, 8], "p3": [1, 4, 4, 4]},
    )
    sum(level.sum() for level in levels.values()).backward()
    gradients = [p.grad for p in bottom.parameters() if p.requires_grad]
    _expect("gradients", all(g is not None and bool(g.isfinite().all()) for g in gradients), True)
    found = d2.INSTALLED
    return {"version": found.version, "folder": str(found.folder), "operators": found.operators}


def _expect(what: str, actual: object, expected: object) -> None:
    if actual != expected:
        raise RuntimeError(f"{what} gives {actual}, not {expected}")


if __name__ == "__main__":
    check = {TORCH: check_torch, DETECTRON2: check_detectron2}[sys.argv[1]]
    sys.stdout.write(json.dumps(check()) + "\n")
