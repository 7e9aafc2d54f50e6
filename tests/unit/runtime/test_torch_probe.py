"""What torch is asked, on a machine that pretends to have GPUs."""

from __future__ import annotations

import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch

from proxydet.errors import ConfigError
from proxydet.modeling.network import usable_precision
from proxydet.runtime import torch_probe
from proxydet.runtime.processes import Fact
from proxydet.runtime.torch_probe import (
    NOT_ASKED,
    Facts,
    cudnn_version,
    facts_before_crash,
    half_speed,
    main,
    probe,
)


@pytest.fixture
def two_gpus(monkeypatch):
    properties = SimpleNamespace(name="GPU", major=9, minor=0, total_memory=2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_90"])


def refuse(*_, device):
    raise RuntimeError(f"no kernel image for {device}\nmore")


def test_gpus_are_described_and_one_that_does_not_compute_is_reported(two_gpus, monkeypatch):
    monkeypatch.setattr(torch, "ones", refuse)
    found = probe()
    problem = "GPU 0: RuntimeError: no kernel image for cuda:0"
    assert found["gpu.available"] == Fact("Yes", problem)
    assert found["gpu.names"] == Fact("GPU 0,1: GPU (arch=9.0)")
    assert found["gpu.memory"] == Fact("1.0 GiB")
    assert found["torch.arch_list"] == Fact("sm_90")
    assert found["gpu.tf32"].value in {"on", "off"}


def test_a_training_process_does_not_touch_the_gpus_of_others(two_gpus, monkeypatch):
    monkeypatch.setattr(torch, "ones", lambda *_, **__: pytest.fail("computed on a GPU"))
    assert probe(compute=False)["gpu.available"] == Fact("Yes")


def test_a_driver_that_fails_when_it_is_asked_is_reported(two_gpus, monkeypatch):
    def broken(_):
        raise RuntimeError("driver too old")

    monkeypatch.setattr(torch.cuda, "get_device_properties", broken)
    found = probe()
    assert found["gpu.available"] == Fact("Yes", "RuntimeError: driver too old")
    assert "gpu.names" not in found


def test_this_torch_and_torchvision_work():
    found = probe()
    assert found["torch.import"] == found["torchvision.import"] == Fact("works")


def test_architectures_are_read_from_the_build_where_torch_sees_no_gpu(monkeypatch):
    flags = "-gencode arch=compute_75,code=sm_75 -gencode arch=compute_90,code=compute_90"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.__config__, "show", lambda: flags)
    assert probe()["torch.arch_list"] == Fact("sm_75, compute_90")


@pytest.mark.parametrize(
    ("operators", "problem"),
    [
        ({"_cuda_version": lambda: 11080}, "it was built for CUDA 11, torch for CUDA 13.2"),
        ({"_cuda_version": lambda: -1}, "it was built without CUDA, torch for CUDA 13.2"),
        ({"_cuda_version": lambda: 13020}, ""),
        ({"nms": None}, "its operator nms is missing"),
    ],
)
def test_operators_of_another_build_are_reported(monkeypatch, operators, problem):
    present = {"nms": 1, "roi_align": 1, **operators}
    present = {name: value for name, value in present.items() if value is not None}
    monkeypatch.setattr(torch, "ops", SimpleNamespace(torchvision=SimpleNamespace(**present)))
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace())
    found = probe(compute=False)["torchvision.import"]
    assert found == Fact(None if problem else "works", problem)


@pytest.mark.parametrize(("ratio", "value"), [(5.21, "yes (.*5.2 times"), (0.004, "no (.*250")])
def test_units_for_16_bits_are_reported_as_measured(two_gpus, monkeypatch, ratio, value):
    monkeypatch.setattr(torch_probe, "half_speed", lambda *_: ratio)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: torch.full((2,), 1))
    found = probe()
    for key in ("cpu.bf16", "gpu.bf16", "gpu.fp16"):
        assert re.match(value.replace("(", r"\("), found[key].value)
    assert "cpu.bf16" not in probe(compute=False)


def test_the_speed_of_16_bits_is_measured_once():
    assert half_speed("bf16", "cpu") > 0
    assert half_speed("bf16", "cpu") == half_speed("bf16", "cpu")


@pytest.mark.parametrize("device", ["mps", "xpu", "hpu"])
def test_other_devices_are_not_measured_and_stay_in_float32(device, monkeypatch):
    monkeypatch.delenv("PROXYDET_ALLOW_SLOW_PRECISION", raising=False)
    assert half_speed("bf16", device) == half_speed("fp16", device) == 0
    assert usable_precision("auto", torch.device(device)) == "fp32"
    with pytest.raises(ConfigError, match=device):
        usable_precision("fp16", torch.device(device))


def test_versions_of_cudnn():
    assert [cudnn_version(n) for n in (8200, 92600, None)] == ["8.2.0", "9.26.0", None]


def test_each_part_is_reported_when_it_is_done():
    reported: list[Facts] = []
    found = probe(report=lambda facts: reported.append(dict(facts)))
    parts = {"torch.import", "gpu.available", "torchvision.import", "cpu.bf16"}
    assert [set(facts) & parts for facts in reported] == [
        {"torch.import"},
        {"torch.import", "gpu.available"},
        parts - {"cpu.bf16"},
        parts,
    ]
    assert reported[-1] == found


def test_what_is_written_is_read_again(capsys):
    main()
    output = f'a greeting\n{capsys.readouterr().out}bye\n{{"not": "ours"}}\n17\n{{'
    assert facts_before_crash(output, "") == probe()


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({}, {"torch.import": (None, "importing it dies")}),
        ({"torch.import": (None, "no")}, {"torch.import": (None, "no")}),
        (
            {"torch.import": ("works", "")},
            {"torch.import": ("works", ""), "gpu.available": (None, "looking for GPUs dies")},
        ),
        (
            {"torch.import": ("works", ""), "gpu.available": ("No", "")},
            {
                "torch.import": ("works", ""),
                "gpu.available": ("No", ""),
                "torchvision.import": (None, "loading its operators dies"),
            },
        ),
        (
            {
                "torch.import": ("works", ""),
                "gpu.available": ("No", ""),
                "torchvision.import": ("works", ""),
            },
            {
                "torch.import": ("works", ""),
                "gpu.available": ("No", ""),
                "torchvision.import": ("works", ""),
                "cpu.bf16": (None, "multiplying in bf16 dies"),
            },
        ),
    ],
)
def test_a_crash_is_attributed_to_the_part_that_it_was_in(known, expected):
    found = facts_before_crash(json.dumps({"facts": known}), "dies")
    assert found == {key: Fact(*fact) for key, fact in expected.items()}


def test_a_torch_that_does_not_load_leaves_rows_that_say_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    found = probe()
    assert found["torch.import"].value is None
    assert all(
        found[key] == Fact(None, NOT_ASKED)
        for key in ("gpu.available", "torch.built_with", "cudnn", "nccl")
    )
