"""The network in training: what reaches the losses, on full, empty and odd batches."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from proxydet.data.loader import BoxBatch
from proxydet.errors import DataError
from proxydet.losses.criterion import Criterion, mask_targets
from proxydet.modeling import roi_heads
from proxydet.modeling.boxes import Regions, clip
from proxydet.modeling.roi_heads import (
    BoxTrainingOutput,
    ImageLabelTrainingOutput,
    largest_but_last,
    scale_gradient,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def network(tiny):
    return tiny.lively(tiny.network()).train()


def test_a_box_batch(network, tiny):
    output = network(tiny.box_batch(), generator=generator())
    assert isinstance(output, BoxTrainingOutput)
    assert len(output.steps) == 3
    for step in output.steps:
        labels = step.assignment.labels_BR
        assert labels.shape == step.regions.valid_BR.shape == (2, 32)
        assert step.embeddings_BRD.shape == (2, 32, 16)
        lengths = step.embeddings_BRD.norm(dim=2)
        torch.testing.assert_close(lengths, torch.ones_like(lengths))
        assert torch.equal(labels >= 0, step.regions.valid_BR)
        assert step.embeddings_BRD.requires_grad
        assert not step.regions.boxes_BR4.requires_grad
    first = output.steps[0].assignment.labels_BR
    # Each object's own box is among the regions, and a quarter of 32 may be objects.
    assert 1 <= int(((first >= 0) & (first < 6)).sum(dim=1).max()) <= 8
    assert output.mixup is not None
    assert output.masks is not None
    assert len(output.masks.logits_PSS) == int(((first >= 0) & (first < 6)).sum())


def test_the_generator_decides_and_the_global_one_does_not(network, tiny):
    torch.manual_seed(0)
    first = network(tiny.box_batch(), generator=generator(1))
    torch.manual_seed(5)
    again = network(tiny.box_batch(), generator=generator(1))
    other = network(tiny.box_batch(), generator=generator(2))
    boxes = [output.steps[0].regions.boxes_BR4 for output in (first, again, other)]
    assert torch.equal(boxes[0], boxes[1])
    assert not torch.equal(boxes[0], boxes[2])


def test_boxes_that_became_empty_leave_the_cascade(network, tiny):
    with torch.no_grad():
        # Far to the left of the image: all boxes are empty once clipped.
        network.roi_heads.box_predictor[0].bbox_pred[2].bias[0] = -1e5
    output = network(tiny.box_batch(), generator=generator())
    assert output.steps[0].regions.valid_BR.any()
    for step in output.steps[1:]:
        assert not step.regions.valid_BR.any()
        assert (step.assignment.labels_BR == -1).all()
    assert output.mixup is not None
    assert len(output.mixup.labels_P) == 0


def test_no_objects_in_any_image(network, tiny):
    output = network(tiny.empty_batch(), generator=generator())
    assert (output.steps[0].assignment.labels_BR == 6).any()
    assert len(output.masks.logits_PSS) == 0
    assert len(output.mixup.labels_P) == 0


def test_one_image_without_objects_beside_one_with(network, tiny):
    full, empty = tiny.box_batch(), tiny.empty_batch()
    batch = BoxBatch(
        images=full.images + empty.images,
        instances=full.instances + empty.instances,
        image_ids=(1, 2, 3),
    )
    output = network(batch, generator=generator())
    labels = output.steps[0].assignment.labels_BR
    assert set(labels[2].tolist()) <= {6, -1}
    assert (output.masks.image_P < 2).all()


def test_neither_proposals_nor_objects(network, tiny):
    with torch.no_grad():
        network.proposal_generator.centernet_head.agn_hm.weight.zero_()
        network.proposal_generator.centernet_head.agn_hm.bias.fill_(-40.0)
    output = network(tiny.empty_batch(), generator=generator())
    assert output.steps[0].embeddings_BRD.shape[:2] == (1, 0)
    labels = network(tiny.label_batch(), generator=generator())
    assert labels.steps[0].valid_B.tolist() == [False, False]


def test_masks_as_bitmaps_and_absent(network, tiny):
    assert network(tiny.box_batch("bitmaps"), generator=generator()).masks is not None
    assert network(tiny.box_batch(None), generator=generator()).masks is None


def test_masks_are_trained_on_the_objects_that_have_one(network, tiny):
    batch = tiny.box_batch()
    every = network(batch, generator=generator()).masks
    first, second = batch.instances
    first.gt_masked = torch.tensor([True, False, False])
    second.remove("gt_masks")
    some = network(batch, generator=generator()).masks
    assert 0 < len(some.logits_PSS) < len(every.logits_PSS)
    assert set(zip(some.image_P.tolist(), some.object_P.tolist(), strict=True)) == {(0, 0)}
    first.gt_masked[:] = False
    assert len(network(batch, generator=generator()).masks.logits_PSS) == 0


def test_polygons_are_drawn_while_the_cascade_runs(network, tiny):
    output = network(tiny.box_batch(), generator=generator())
    masks = output.masks
    drawn = masks.targets_PSS.result()
    assert drawn.shape == masks.logits_PSS.shape
    assert drawn.any()
    afterwards = dataclasses.replace(masks, targets_PSS=None)
    assert torch.equal(mask_targets(masks, output.truth), mask_targets(afterwards, output.truth))
    bitmaps = network(tiny.box_batch("bitmaps"), generator=generator())
    assert bitmaps.masks.targets_PSS is None
    assert mask_targets(bitmaps.masks, bitmaps.truth).shape == bitmaps.masks.logits_PSS.shape


def test_a_polygon_that_cannot_be_drawn_is_an_error_of_the_loss(network, tiny, monkeypatch):
    def refuse(*_: object) -> None:
        raise DataError("not a polygon", hint="mend it")

    monkeypatch.setattr(roi_heads, "crop_masks", refuse)
    output = network(tiny.box_batch(), generator=generator())
    with pytest.raises(DataError):
        Criterion(tiny.LOSSES)(output)


def test_a_model_without_a_mask_head_takes_any_batch(tiny):
    network = tiny.lively(tiny.network(tiny.model_config(masks=None))).train()
    assert not [name for name, _ in network.named_parameters() if "mask" in name]
    for masks in ("polygons", None):
        assert network(tiny.box_batch(masks), generator=generator()).masks is None
    with_head = tiny.lively(tiny.network()).state_dict()
    assert all(
        torch.equal(with_head[name], value) for name, value in network.state_dict().items()
    ), "leaving the mask head out must not change the other fresh weights"


def test_without_a_mixup_branch(tiny):
    network = tiny.network(tiny.model_config(mixup_branch=False)).train()
    assert network(tiny.box_batch(), generator=generator()).mixup is None


def test_the_mixup_branch_starts_as_a_copy_and_only_its_last_step_learns(tiny):
    network = tiny.network()
    state = network.state_dict()
    for name, value in state.items():
        if "_cmm" in name:
            assert torch.equal(value, state[name.replace("_cmm", "")])
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if "_cmm" in name} == {
        "roi_heads.box_head_cmm.2.fc1.weight",
        "roi_heads.box_head_cmm.2.fc1.bias",
        "roi_heads.box_head_cmm.2.fc2.weight",
        "roi_heads.box_head_cmm.2.fc2.bias",
        "roi_heads.box_predictor_cmm.2.cls_score.linear.weight",
        "roi_heads.box_predictor_cmm.2.cls_score.linear.bias",
    }


def test_an_image_label_batch(network, tiny):
    output = network(tiny.label_batch(), generator=generator())
    assert isinstance(output, ImageLabelTrainingOutput)
    assert [labels.tolist() for labels in output.labels] == [[1], [2, 5]]
    for step in output.steps:
        assert step.embeddings_BD.shape == (2, 16)
        assert step.valid_B.tolist() == [True, True]
        assert step.embeddings_BD.requires_grad


def test_only_the_chosen_region_needs_a_gradient(network, tiny):
    # Seeing all regions with gradient and then choosing, as the published code does, gives the same.
    batch, heads = tiny.label_batch(), network.roi_heads
    output = network(batch, generator=generator())
    (short,) = torch.autograd.grad(
        output.steps[0].embeddings_BD[:, 0].sum(), heads.box_head[0].fc1.weight
    )
    images = network._stack(batch.images)
    features = network._features(images, "fp32")
    centernet = network.proposal_generator(list(features.values()))
    regions = network.proposal_generator.propose(centernet)
    scene = network._feature_batch(features, images)
    boxes = clip(regions.boxes_BR4, images.sizes_B2[:, None])
    regions = regions.with_boxes(boxes, regions.valid_BR)
    hidden = heads.box_head[0](scale_gradient(heads.pool(scene, regions), 1 / 3))
    embeddings = heads.detection.classifier(0)(hidden).unflatten(0, regions.valid_BR.shape)
    chosen, _ = largest_but_last(regions)
    places = (regions.boxes_BR4 == chosen[:, None]).all(dim=2).to(torch.uint8).argmax(dim=1)
    picked = embeddings[torch.arange(2), places]
    torch.testing.assert_close(picked, output.steps[0].embeddings_BD, atol=1e-5, rtol=1e-4)
    (long,) = torch.autograd.grad(picked[:, 0].sum(), heads.box_head[0].fc1.weight)
    torch.testing.assert_close(short, long, atol=1e-5, rtol=1e-3)


def test_the_proposal_network_gets_the_zeros_of_a_backward_pass_without_going_through_it(
    network, tiny
):
    batch, losses = tiny.label_batch(), Criterion(tiny.LOSSES)
    sum(losses(network(batch)).values()).backward()
    short = {name: p.grad for name, p in network.named_parameters()}
    network.zero_grad()
    # As published: the head's maps times 0.
    total = sum(
        value for name, value in losses(network(batch)).items() if name.startswith("image_loss")
    )
    images = network._stack(batch.images)
    maps = network.proposal_generator(list(network.backbone(images.pixels_B3HW).values()))
    total = total + sum(m.sum() * 0 for m in (*maps.heatmaps, *maps.distances))
    total.backward()
    long = {name: p.grad for name, p in network.named_parameters()}
    assert {name for name in long if long[name] is None} == {n for n in short if short[n] is None}
    for name, gradient in long.items():
        if gradient is not None:
            assert torch.equal(gradient, short[name]), name
    silent = [n for n in long if n.startswith(("proposal_generator", "backbone.top_block"))]
    assert len(silent) > 10
    assert all(not short[name].any() for name in silent)


@pytest.mark.parametrize(
    ("sides", "valid", "chosen"),
    [
        ([3, 9, 5, 20], [1, 1, 1, 1], 9),  # the last one is the largest, and left out
        ([3, 9, 5, 20], [1, 1, 1, 0], 9),  # the third is the last one then
        ([3, 2, 9, 20], [1, 1, 1, 0], 3),
        ([3, 9, 5, 20], [1, 0, 0, 0], 3),  # alone
        ([3, 9, 9, 20], [1, 0, 1, 1], 9),
    ],
)
def test_the_largest_region_but_the_last(sides, valid, chosen):
    corners = torch.tensor(sides, dtype=torch.float32)
    boxes = torch.stack([torch.zeros(4), torch.zeros(4), corners, corners], dim=1)[None]
    valid_BR = torch.tensor([valid], dtype=torch.bool)
    regions = Regions(boxes_BR4=boxes, objectness_BR=torch.ones(1, 4), valid_BR=valid_BR)
    box, found = largest_but_last(regions)
    assert box[0, 2] == chosen
    assert found.tolist() == [True]


def test_the_largest_region_of_an_image_without_any():
    regions = Regions(
        boxes_BR4=torch.zeros(2, 3, 4),
        objectness_BR=torch.zeros(2, 3),
        valid_BR=torch.tensor([[True, True, True], [False, False, False]]),
    )
    assert largest_but_last(regions)[1].tolist() == [True, False]


def test_gradients_into_shared_features_are_a_third_a_step(tiny):
    # Three equal steps on equal regions would add up to one whole gradient.
    values = torch.ones(3, requires_grad=True)
    scaled = scale_gradient(values, 1 / 3)
    assert torch.equal(scaled, values)
    scaled.sum().backward()
    torch.testing.assert_close(values.grad, torch.full((3,), 1 / 3))


@pytest.mark.parametrize("share", [1.0, 0.25, 0.0])
def test_a_share_of_the_mixup_branchs_gradient_reaches_the_backbone(tiny, share):
    gradients = []
    for own in (1.0, share):
        cascade = dataclasses.replace(tiny.model_config().cascade, mixup_gradient=own)
        network = tiny.lively(
            tiny.network(dataclasses.replace(tiny.model_config(), cascade=cascade))
        )
        mixup = network.train()(tiny.box_batch(), generator=generator()).mixup
        mixup.embeddings_PD.sum().backward()
        parts = (network.backbone, network.roi_heads.box_head_cmm)
        gradients.append([[p.grad for p in part.parameters()] for part in parts])
    (whole, own_whole), (scaled, own_scaled) = gradients
    assert any(grad is not None and grad.abs().sum() > 0 for grad in whole)
    for before, after in zip(whole, scaled, strict=True):
        if before is not None:
            torch.testing.assert_close(after, before * share)
    for before, after in zip(own_whole, own_scaled, strict=True):
        assert before is None or torch.equal(before, after)  # the branch itself learns all the same


def test_wrong_images_are_named(network, tiny):
    batch = dataclasses.replace(
        tiny.label_batch(), images=(torch.zeros(3, 8, 8), torch.zeros(1, 8, 8))
    )
    with pytest.raises(DataError, match="image 1"):
        network(batch)


def test_a_finer_level_can_be_pooled_from_that_proposes_nothing(tiny):
    config = tiny.model_config(
        pyramid=dataclasses.replace(tiny.model_config().pyramid, levels=(2, 3, 4, 5)),
        proposals=dataclasses.replace(tiny.model_config().proposals, first_level=3),
        cascade=dataclasses.replace(tiny.model_config().cascade, pool_levels=(2,)),
    )
    network = tiny.lively(tiny.network(config)).train()
    output = network(tiny.box_batch(), generator=generator())
    assert output.centernet.strides == (8, 16, 32, 64)
    assert [maps.shape[2] for maps in output.centernet.heatmaps] == [16, 8, 4, 2]
    loss = output.steps[0].embeddings_BRD[..., 0].sum()
    (finest,) = torch.autograd.grad(loss, network.backbone.fpn_output2.weight, retain_graph=True)
    assert finest.abs().sum() > 0
    (found,) = network.eval().detect([tiny.image(64, 64)])
    assert len(found)
