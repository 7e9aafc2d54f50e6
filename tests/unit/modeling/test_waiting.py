"""How often the host waits for the device: as often for a batch as for one image, and for many classes as for few.

There is no GPU here, so what would wait on one is counted: operations whose result's size depends on the data, values that
are read into Python, and blocking copies to a device. The way that a GPU takes is forced where it differs.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from proxydet.data.loader import BoxBatch, ImageLabelBatch
from proxydet.losses.criterion import Criterion
from proxydet.modeling import boxes, roi_heads
from proxydet.modeling.config import InferenceConfig
from proxydet.modeling.postprocess import to_host

# Their output's size depends on the data (bincount and repeat_interleave look at the largest value, or the sum).
_DATA_DEPENDENT = {
    "aten::_local_scalar_dense",
    "aten::_unique2",
    "aten::bincount",
    "aten::masked_select",
    "aten::nonzero",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "torchvision::nms",
}
_READS = {"tolist", "cpu", "numpy", "__array__"}


class Waits(TorchDispatchMode):
    """Counts operations that wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        """Waits by operation."""
        self._calls = _Calls(self.counts)

    def __enter__(self) -> Waits:
        self._calls.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        super().__exit__(*details)
        self._calls.__exit__(*details)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        waits = name in _DATA_DEPENDENT
        if name in ("aten::index", "aten::index_put", "aten::index_put_"):
            waits = any(index is not None and index.dtype == torch.bool for index in args[1])
        if name == "aten::repeat_interleave":
            waits = (kwargs or {}).get("output_size") is None and not isinstance(args[-1], int)
        self.counts[name] += waits
        return function(*args, **(kwargs or {}))


class _Calls(TorchFunctionMode):
    """Counts calls from Python that read values or copy to a device without ``non_blocking``."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self._counts = counts

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name in _READS:
            self._counts[name] += 1
        if name == "to" and not kwargs.get("non_blocking"):
            self._counts["to"] += any(isinstance(value, torch.device | str) for value in args[1:])
        if name == "tensor" and kwargs.get("device") is not None:
            self._counts["tensor"] += 1
        return function(*args, **kwargs)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr(boxes, "_waits", lambda _device: True)
    monkeypatch.setattr(roi_heads, "is_rounded", lambda: True)


def counted(work: Callable[[], Any]) -> Counter[str]:
    with Waits() as waits:
        work()
    return +waits.counts


SETTINGS = InferenceConfig(score_threshold=0.0)


@pytest.mark.parametrize("with_masks", [True, False])
def test_inference_waits_as_often_for_four_images_as_for_one(tiny, with_masks):
    network = tiny.lively(tiny.network())
    settings = dataclasses.replace(SETTINGS, masks=with_masks)
    images = [tiny.image(90 + seed, 120, seed) for seed in range(4)]
    one = counted(lambda: network.detect(images[:1], settings=settings))
    four = counted(lambda: network.detect(images, settings=settings))
    assert one["torchvision::nms"] == 2
    assert one == four


def test_results_reach_the_host_in_as_many_pieces_for_four_images_as_for_one(tiny):
    network = tiny.lively(tiny.network())
    found = network.detect([tiny.image(64, 96, seed) for seed in range(4)], settings=SETTINGS)
    one = counted(lambda: to_host(found[:1]))
    four = counted(lambda: to_host(found))
    assert one == four == {"cpu": 5}


def test_inference_waits_as_often_for_many_classes_as_for_few(tiny):
    network = tiny.lively(tiny.network())
    image = tiny.image(90, 120)
    few = counted(lambda: network.detect([image], tiny.vocabulary(5), settings=SETTINGS))
    many = counted(lambda: network.detect([image], tiny.vocabulary(500), settings=SETTINGS))
    assert few == many


def box_batch(tiny, images: int) -> BoxBatch:
    """Return images with as many objects each, so that only their number differs."""
    return BoxBatch(
        images=tuple(tiny.image(96, 128, seed) for seed in range(images)),
        instances=tuple(
            tiny.objects((96, 128), [[8, 8, 40, 40], [50, 20, 120, 90]], [0, 3])
            for _ in range(images)
        ),
        image_ids=tuple(range(images)),
    )


def label_batch(tiny, images: int) -> ImageLabelBatch:
    return ImageLabelBatch(
        images=tuple(tiny.image(96, 128, seed) for seed in range(images)),
        labels=tuple(torch.tensor([seed]) for seed in range(images)),
        image_ids=tuple(range(images)),
    )


@pytest.mark.parametrize("make", [box_batch, label_batch])
def test_a_training_step_waits_as_often_for_four_images_as_for_one(tiny, make):
    network = tiny.lively(tiny.network()).train()
    criterion, source = Criterion(tiny.LOSSES), torch.Generator().manual_seed(0)

    def step(batch: BoxBatch | ImageLabelBatch) -> None:
        losses = criterion(network(batch.to("cpu"), generator=source), generator=source)
        torch.stack(list(losses.values())).sum().backward()

    one = counted(lambda: step(make(tiny, 1)))
    four = counted(lambda: step(make(tiny, 4)))
    assert one["torchvision::nms"] == 1
    assert one == four


def test_the_counter_sees_what_waits():
    values = torch.arange(6)
    work: dict[str, Callable[[], Any]] = {
        "aten::nonzero": lambda: (values > 2).nonzero(),
        "aten::index": lambda: values[values > 2],
        "aten::_local_scalar_dense": lambda: bool((values > 2).any()),
        "aten::_unique2": lambda: values.unique(),
        "tolist": lambda: values.tolist(),
        "to": lambda: values.to(torch.device("cpu")),
        "aten::repeat_interleave": lambda: values.repeat_interleave(values),
    }
    for name, act in work.items():
        assert counted(act)[name] == 1, name
    assert not counted(lambda: values.to(torch.device("cpu"), non_blocking=True)[[1, 2]] + 1)
