"""The image-label loss and the mask loss against slow versions."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from proxydet.losses.criterion import image_label_loss, image_label_targets, mask_loss, mask_targets
from proxydet.modeling.roi_heads import BatchObjects, ImageStepOutput, MaskOutput


def test_targets_hold_every_label_once():
    targets = image_label_targets((torch.tensor([1]), torch.tensor([0, 3, 3])), 5)
    assert targets.tolist() == [[0, 1, 0, 0, 0], [1, 0, 0, 1, 0]]


@pytest.mark.parametrize("bias", [None, -1.5])
def test_the_image_label_loss_equals_the_slow_one(bias):
    generator = torch.Generator().manual_seed(0)
    text = normalize(torch.randn(4, 3, generator=generator), dim=0)
    text = torch.cat([text, torch.zeros(4, 1)], dim=1)
    embeddings = normalize(torch.randn(3, 4, generator=generator), dim=1)
    step = ImageStepOutput(
        embeddings_BD=embeddings,
        valid_B=torch.tensor([True, True, False]),
        bias=None if bias is None else torch.tensor([bias]),
    )
    targets = image_label_targets((torch.tensor([1]), torch.tensor([0]), torch.tensor([2])), 4)
    total = 0.0
    for image in range(2):
        for column in range(4):
            logit = 50 * float(embeddings[image] @ text[:, column]) + (bias or 0.0)
            p = 1 / (1 + np.exp(-logit))
            total -= np.log(p if targets[image, column] else 1 - p)
    loss = image_label_loss(step, targets, text, 50.0)
    assert float(loss) == pytest.approx(total / 3, rel=1e-4)


@pytest.mark.parametrize("kind", ["polygons", "bitmaps"])
def test_mask_targets_are_cut_from_the_right_object(tiny, kind):
    truth = BatchObjects.from_instances(tiny.box_batch(kind).instances, torch.device("cpu"))
    # The second object of the first image from its own box, the first one from a box twice as wide, and the object of the
    # second image.
    output = MaskOutput(
        logits_PSS=torch.zeros(3, 8, 8),
        boxes_P4=torch.tensor([[50.0, 20, 120, 90], [8, 8, 72, 40], [10, 10, 80, 110]]),
        image_P=torch.tensor([0, 0, 1]),
        object_P=torch.tensor([1, 0, 0]),
    )
    targets = mask_targets(output, truth)
    assert targets[0].mean() > 0.95
    assert targets[1, :, :4].mean() > 0.95
    assert targets[1, :, 4:].mean() < 0.05
    assert targets[2].mean() > 0.95
    expected = torch.nn.functional.binary_cross_entropy(torch.full_like(targets, 0.5), targets)
    assert float(mask_loss(output, truth)) == pytest.approx(float(expected))


def test_no_object_is_zero_and_connected(tiny):
    truth = BatchObjects.from_instances(tiny.empty_batch().instances, torch.device("cpu"))
    logits = torch.zeros(0, 8, 8, requires_grad=True)
    nothing = torch.zeros(0, dtype=torch.int64)
    output = MaskOutput(
        logits_PSS=logits, boxes_P4=torch.zeros(0, 4), image_P=nothing, object_P=nothing
    )
    loss = mask_loss(output, truth)
    loss.backward()
    assert float(loss.detach()) == 0
    assert logits.grad is not None
