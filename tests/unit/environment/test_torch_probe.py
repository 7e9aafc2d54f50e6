"""What torch is asked, on a machine that pretends to have GPUs."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from proxydet.runtime import torch_probe
from proxydet.runtime.environment import complete_answer


@pytest.fixture
def two_gpus(monkeypatch):
    properties = SimpleNamespace(name="GPU", major=9, minor=0, total_memory=2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_90"])


def test_gpus_are_described(two_gpus, monkeypatch):
    monkeypatch.setattr(torch_probe, "_compute_error", lambda: "GPU 1: no kernel image")
    found = torch_probe.probe()
    assert found["gpus"] == [{"name": "GPU", "arch": "9.0", "memory": 2**30}] * 2
    assert found["gpu_error"] == "GPU 1: no kernel image"
    assert found["arch_list"] == ["sm_90"]


def test_a_training_process_does_not_touch_the_gpus_of_others(two_gpus, monkeypatch):
    monkeypatch.setattr(torch, "ones", lambda *_, **__: pytest.fail("computed on a GPU"))
    assert torch_probe.probe(compute=False)["gpu_error"] == ""


def test_a_gpu_that_does_not_compute_is_told(two_gpus, monkeypatch):
    def refuse(*_, device):
        raise RuntimeError(f"no kernel image for {device}\nmore")

    monkeypatch.setattr(torch, "ones", refuse)
    assert torch_probe._compute_error() == "GPU 0: RuntimeError: no kernel image for cuda:0"


def test_a_driver_that_breaks_on_asking_is_told(two_gpus, monkeypatch):
    def broken(_):
        raise RuntimeError("driver too old")

    monkeypatch.setattr(torch.cuda, "get_device_properties", broken)
    assert torch_probe.probe()["gpu_error"] == "RuntimeError: driver too old"


def test_this_torchvision_works():
    assert torch_probe._missing_operator() == ""
    assert torch_probe._other_cuda() == ""


def test_another_cuda_is_told(monkeypatch):
    operators = SimpleNamespace(_cuda_version=lambda: 11080, roi_align=1)
    monkeypatch.setattr(torch, "ops", SimpleNamespace(torchvision=operators))
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    assert torch_probe._other_cuda() == "it was built for CUDA 11, torch for CUDA 13.2"
    operators._cuda_version = lambda: -1
    assert torch_probe._other_cuda() == "it was built without CUDA, torch for CUDA 13.2"
    assert torch_probe._missing_operator() == "its operator nms is not there"


def written(*answers: dict) -> str:
    told = "".join(f"\n{json.dumps(answer)}\n" for answer in answers)
    return f'a greeting\n{told}\nbye\n{{"not": "ours"}}\n17\n{{'


def test_each_part_is_told_when_it_is_done(monkeypatch):
    told: list[dict] = []
    monkeypatch.setattr(torch_probe, "_torchvision_error", lambda: "")
    found = torch_probe.probe(tell=lambda answer: told.append(dict(answer)))
    assert [set(a) & {"torch", "gpu_available", "torchvision_error"} for a in told] == [
        {"torch"},
        {"torch", "gpu_available"},
        {"torch", "gpu_available", "torchvision_error"},
    ]
    assert told[-1] == found


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ((), {"torch_error": "importing it dies"}),
        (({"torch_error": "no"},), {"torch_error": "no"}),
        (
            ({"torch": "2"},),
            {"torch": "2", "gpu_error": "looking for GPUs dies"},
        ),
        (
            ({"torch": "2"}, {"torch": "2", "gpu_available": True}),
            {
                "torch": "2",
                "gpu_available": True,
                "torchvision_error": "loading its operators dies",
            },
        ),
        (
            ({"torch": "2"}, {"torch": "2", "torchvision_error": ""}),
            {"torch": "2", "torchvision_error": ""},
        ),
    ],
)
def test_a_crash_is_blamed_on_the_part_that_it_was_at(answers, expected):
    assert complete_answer(written(*answers), "dies") == expected
