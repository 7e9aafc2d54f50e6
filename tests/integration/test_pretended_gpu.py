"""Every way through the detector on a pretended GPU: no device mix, the CPU's numbers, few launches and fewer waits.

``python tests/support/launches.py`` prints where launches and waits come from.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import launches
import numpy as np
import pytest
import tiny_detector as tiny
import torch
from pretended_gpu import CUDA, DeviceMixError, GpuTensor, PretendedGpu
from torch import Tensor

from proxydet.detector import Detector
from proxydet.evaluation.detector_evaluation import result_rows
from proxydet.losses.config import MixupLossConfig
from proxydet.losses.criterion import Criterion
from proxydet.modeling.config import InferenceConfig
from proxydet.modeling.network import ProxyDetNetwork
from proxydet.modeling.postprocess import Prediction, masks, to_host
from proxydet.training.step import TrainingModel

ALL = InferenceConfig(score_threshold=0.0, max_detections=40)


def network(kind: str = "resnet") -> ProxyDetNetwork:
    return tiny.lively(tiny.network(tiny.model_config(kind)))


def assert_close(found: list[Prediction], expected: list[Prediction]) -> None:
    """Compare as sets: rounding may exchange detections of nearly equal scores."""
    for one, other in zip(found, expected, strict=True):
        assert len(one) == len(other)
        if len(one):
            same_NN = (
                (one.classes_N[:, None] == other.classes_N)
                & ((one.scores_N[:, None] - other.scores_N).abs() < 1e-4)
                & ((one.boxes_N4[:, None] - other.boxes_N4).abs().amax(dim=2) < 1e-2)
            )
            assert same_NN.any(dim=0).all()
            assert same_NN.any(dim=1).all()
            partner_N = same_NN.int().argmax(dim=1)
        if len(one) and one.has_masks:
            masks_NSS = other.mask_probs_MSS[other.mask_index_N[partner_N]]
            torch.testing.assert_close(
                one.mask_probs_MSS[one.mask_index_N], masks_NSS, rtol=0, atol=1e-3
            )


# -- inference ---------------------------------------------------------------------------------------------------------

SETTINGS = {
    "all": {},
    "nothing found": {"score_threshold": 1.0},
    "no masks": {"masks": False},
    "one class a proposal": {"one_class_per_proposal": True},
    "class by class": {"agnostic_nms": True, "class_chunk": 8},
}


@pytest.mark.parametrize(
    ("kind", "settings"), [("swin", "all"), *(("resnet", name) for name in SETTINGS)]
)
def test_inference_gives_the_cpus_detections(kind, settings):
    detector = network(kind)
    images = [tiny.image(60, 90, 0), tiny.image(90, 60, 1)]
    sizes = [(45, 60), (64, 96)]

    def detect() -> list[Prediction]:
        found = detector.detect(
            images,
            tiny.vocabulary(20) if settings == "class by class" else None,
            settings=dataclasses.replace(ALL, **SETTINGS[settings]),
            original_sizes=sizes,
        )
        return to_host(found)

    expected = detect()
    with PretendedGpu() as gpu:
        gpu.moved(detector)
        found = detect()
    assert_close(found, expected)


def test_views_batches_and_results_are_the_cpus():
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    detector = Detector(network(), shortest=64, longest=96, inference=ALL)
    augmented = detector.with_settings(flip=True, scales=(1.3,))

    def run() -> tuple[list[Prediction], list[list[dict]]]:
        predictions = [
            *augmented.predict_images([pixels]),
            *detector.predict_images([pixels, pixels[:30]]),
        ]
        assert len(detector.predict_batch([pixels])) == 1
        assert len(masks(predictions[0])) == len(predictions[0])
        rows = [result_rows(prediction, 7, range(tiny.CLASSES)) for prediction in predictions]
        return to_host(predictions), rows

    expected, _ = run()
    with PretendedGpu() as gpu:
        gpu.moved(detector.network)
        found, rows = run()
    assert_close(found, expected)
    for own, prediction in zip(rows, found, strict=True):
        assert [row["category_id"] for row in own] == prediction.classes_N.tolist()
        assert all(row["segmentation"] for row in own)


# -- training ----------------------------------------------------------------------------------------------------------


# A GPU draws other mixing ratios; with 0 and 1, whichever is drawn makes no difference.
LOSSES = dataclasses.replace(tiny.LOSSES, mixup=MixupLossConfig(beta=0.0))
BATCHES = {
    "polygons": tiny.box_batch,
    "bitmaps": lambda: tiny.box_batch("bitmaps"),
    "boxes": lambda: tiny.box_batch(None),
    "no objects": tiny.empty_batch,
    "labels": tiny.label_batch,
}


@pytest.mark.parametrize(
    ("kind", "kind_of_batch"), [("swin", "polygons"), *(("resnet", name) for name in BATCHES)]
)
def test_a_training_step_gives_the_cpus_losses_and_gradients(kind, kind_of_batch):
    batch = BATCHES[kind_of_batch]()

    def step(device: torch.device, net: ProxyDetNetwork) -> dict[str, Tensor]:
        model = TrainingModel(net, Criterion(LOSSES), device=device)
        losses = model(batch.to(device), 3)
        torch.stack(list(losses.values())).sum().backward()
        return {name: loss.detach().cpu() for name, loss in losses.items()}

    net = network(kind).train()
    twin = copy.deepcopy(net)
    expected = step(torch.device("cpu"), twin)
    with PretendedGpu() as gpu:
        found = step(CUDA, gpu.moved(net))
    torch.testing.assert_close(found, expected)
    for (name, moved), own in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert (moved.grad is None) == (own.grad is None), name
        if own.grad is not None:
            torch.testing.assert_close(moved.grad.values, own.grad, rtol=1e-3, atol=1e-4, msg=name)


# -- counts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("work", "launched", "waited"),
    [
        ("box step, 8 images", 1922, 6),
        ("label step, 2 images", 927, 4),
        ("box step, 8 images, published", 2110, 12),
        ("label step, 2 images, published", 1066, 9),
        ("inference, 1 image", 687, 8),
        ("inference, 4 images of 2 sizes", 960, 8),
        ("300 masks pasted", 92, 3),
    ],
)
def test_r50_launches_and_waits_no_more_often_than_it_did(work, launched, waited):
    gpu = launches.WORKS[work]()
    assert 0 < gpu.launches.total() <= launched, launches.report(gpu, 10)
    assert 0 < gpu.waits.total() <= waited, launches.report(gpu, 10)


@pytest.mark.parametrize("make", [launches.box_batch, launches.label_batch])
def test_a_step_waits_as_often_for_four_images_as_for_one(make):
    with PretendedGpu() as gpu:
        net = gpu.moved(network().train())
        model = TrainingModel(net, Criterion(tiny.LOSSES), device=CUDA)

        def waits(images: int) -> int:
            with gpu.counted():
                losses = model(make(images, classes=tiny.CLASSES).to(CUDA), 3)
                torch.stack(list(losses.values())).sum().backward()
            return gpu.waits.total()

        assert waits(1) == waits(4) > 0


@pytest.mark.parametrize("with_masks", [True, False])
def test_inference_waits_as_often_for_many_images_of_a_size_and_many_classes(with_masks):
    settings = dataclasses.replace(ALL, masks=with_masks)
    with PretendedGpu() as gpu:
        net = gpu.moved(network())

        def waits(images: int, classes: int) -> int:
            with gpu.counted():
                chosen = [tiny.image(90 + seed, 120, seed) for seed in range(images)]
                to_host(net.detect(chosen, tiny.vocabulary(classes), settings=settings))
            return gpu.waits.total()

        assert waits(1, 5) == waits(4, 5) == waits(1, 50) > 0


# -- the pretended GPU itself ------------------------------------------------------------------------------------------

WAITS: dict[str, Callable[[Tensor], object]] = {
    "nonzero": lambda values: (values > 2).nonzero(),
    "index by a mask": lambda values: values[values > 2],
    "index_put_ by a mask": lambda values: values.__setitem__(values > 2, values[3:] + 1),
    "__bool__": lambda values: bool((values > 2).any()),
    "_unique2": lambda values: values.unique(),
    "tolist": lambda values: values.tolist(),
    "item": lambda values: values[0].item(),
    "repeat_interleave": lambda values: values.repeat_interleave(values),
    "cpu": lambda values: values.cpu().numpy(),
    "copy to the host": lambda values: values.to("cpu"),
    "blocking copy to the device": lambda values: torch.arange(6).to(values.device),
}


@pytest.mark.parametrize("reason", WAITS)
def test_what_waits_is_counted(reason):
    with PretendedGpu() as gpu:
        values = torch.arange(6, device=CUDA)
        WAITS[reason](values)
    assert [reason for reason, _ in gpu.waits.elements()] == [reason]


def test_what_neither_waits_nor_launches_is_not_counted():
    with PretendedGpu() as gpu:
        values = torch.arange(6).to(CUDA, non_blocking=True)
        with gpu.counted():
            assert values.view(2, 3).T[1:].is_cuda
            assert values.device == CUDA
            assert len(values[:2].unbind()) == 2
        assert not gpu.launches
        assert not gpu.waits
        total = values.float() * 2 + torch.ones(())
    assert gpu.launches.total() == 3
    assert isinstance(total, GpuTensor)
    assert total.values.tolist() == [1, 3, 5, 7, 9, 11]


@pytest.mark.parametrize(
    "mix",
    [
        lambda values: values + torch.ones(6),
        lambda values: torch.ones(6) + values,
        lambda values: torch.ones(6)[values],
        lambda values: torch.cat([values, torch.arange(2)]),
        lambda values: torch.zeros(()).add_(values[0]),
    ],
)
def test_a_device_mix_is_refused(mix):
    with PretendedGpu(), pytest.raises(DeviceMixError):
        mix(torch.arange(6, device=CUDA))


def test_gradients_arrive_at_what_was_copied():
    weight = torch.ones(3, requires_grad=True)
    with PretendedGpu():
        (weight.to(CUDA) * torch.arange(3, device=CUDA)).sum().backward()
    assert weight.grad.tolist() == [0, 1, 2]
