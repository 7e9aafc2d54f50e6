"""Each difference from the published environment gets the verdict that it deserves."""

from __future__ import annotations

import pytest

from proxydet.runtime.processes import Fact, run_program
from proxydet.runtime.report import judged_fields, numbers
from proxydet.runtime.torch_probe import NOT_ASKED, Facts, gpu_facts

A100 = ("NVIDIA A100", "8.0", 80 * 2**30)
FACTS: Facts = {
    "torch": Fact("2.15.0+cu132 @/x"),
    "torchvision": Fact("0.29.2 @/x"),
    "driver": Fact("580.1"),
    "torch.import": Fact("works"),
    "torchvision.import": Fact("works"),
    "torch.cuda": Fact("13.2"),
    "gpu.available": Fact("Yes"),
    "gpu.tf32": Fact("on"),
    "torch.arch_list": Fact("sm_75, sm_80, sm_90"),
    **gpu_facts([A100] * 8),
}


def verdicts(facts: Facts) -> dict:
    fields = judged_fields({**FACTS, **facts})
    return {field.key: (field.verdict, field.reason) for field in fields}


def test_eight_modern_gpus():
    found = verdicts({})
    assert found["gpu.available"][0] == "same"
    assert found["gpu.count"][0] == "same"
    assert found["gpu.names"][0] == "may change results"
    assert found["gpu.memory"][0] == "harmless"
    assert found["gpu.tf32"][0] == "may change results"
    assert found["torch.import"][0] == "same"


@pytest.mark.parametrize(
    ("arch", "built", "fails"),
    [
        ("7.0", ["sm_75", "sm_80"], True),
        ("8.9", ["sm_75", "sm_86"], False),
        ("9.0", ["sm_80"], True),
        ("9.0", ["sm_80", "compute_80"], False),
        ("9.0", ["sm_90a"], False),
        ("12.0", ["sm_100", "sm_120"], False),
        ("7.0", [], False),
        ("unknown", ["sm_80"], False),
    ],
)
def test_a_gpu_that_torch_has_no_code_for_fails(arch, built, fails):
    facts = gpu_facts([("GPU", arch, 32 * 2**30)])
    facts["torch.arch_list"] = Fact(", ".join(built) or None)
    verdict, reason = verdicts(facts)["gpu.names"]
    assert (verdict == "will fail") is fails
    assert ("no code for" in reason) is fails


def test_a_gpu_that_torch_cannot_use_fails(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    hidden = {"gpu.available": Fact("No", "the NVIDIA driver on your system is too old")}
    assert verdicts(hidden)["gpu.available"][0] == "will fail"
    without = verdicts({**hidden, "torch.cuda": Fact(None, "built without CUDA")})
    assert "built without CUDA" in without["gpu.available"][1]


def test_no_gpu_at_all_or_a_hidden_one_is_harmless(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    none = {"gpu.available": Fact("No")}
    without_driver = {"driver": Fact(None, "nvidia-smi not found")}
    assert verdicts({**none, **without_driver})["gpu.available"][0] == "harmless"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert verdicts(none)["gpu.available"][0] == "harmless"


@pytest.mark.parametrize(
    ("gib", "verdict"), [(16, "may change results"), (31.7, "harmless"), (80, "harmless")]
)
def test_gpus_with_little_memory_may_change_results(gib, verdict):
    # A card sold as 32 GB shows a little less.
    facts = gpu_facts([("GPU", "8.0", int(gib * 2**30))])
    assert verdicts(facts)["gpu.memory"][0] == verdict


def test_torch_that_does_not_load_fails():
    broken = {"torch.import": Fact(None, "OSError: libcudart.so.11.0: cannot open")}
    assert "damaged" in verdicts(broken)["torch.import"][1]
    absent = {"torch.import": Fact(None, "No module"), "torch": Fact(None, "not installed")}
    assert "reinstall" in verdicts(absent)["torch.import"][1]


def test_torchvision_of_another_torch_fails():
    other = {"torchvision.import": Fact(None, "its operators do not load into this torch")}
    assert verdicts(other)["torchvision.import"][0] == "will fail"


@pytest.mark.parametrize(
    ("key", "fact", "verdict"),
    [
        ("numpy", Fact("1.24.0"), "will fail"),
        ("numpy", Fact("2.4.0"), "harmless"),
        ("numpy", Fact("1.23.2"), "will fail"),
        ("torch", Fact(None, "not installed"), "will fail"),
        ("torch", Fact("2.5.1 @/x"), "will fail"),
        ("torch", Fact("2.6.0 @/x"), "may change results"),
        ("torch", Fact("1.11.0+cu113 @/x"), "will fail"),
        ("iopath", Fact("0.1.9"), "same"),
        ("detectron2", Fact(None, "not installed"), "will fail"),
        ("detectron2", Fact("0.6 @/x"), "same"),
        ("detectron2", Fact("0.5 @/x"), "will fail"),
        ("python", Fact("3.9.1 (main)"), "will fail"),
        ("platform", Fact("darwin"), "may change results"),
        ("fvcore", Fact(None, "not installed"), "will fail"),
        ("DETECTRON2_ENV_MODULE", Fact("mine"), "may change results"),
        ("roi_align", Fact("original @/x"), "harmless"),
        ("roi_align", Fact("applied @/x"), "same"),
        ("roi_align", Fact("applied @/x", "stale"), "may change results"),
        ("roi_align", Fact("altered @/x", "why"), "may change results"),
        ("roi_align", Fact(None, "detectron2 is not installed"), "will fail"),
        ("driver", Fact("515.48.07"), "same"),
        ("driver", Fact("470.1"), "harmless"),
        ("driver", Fact("515.48.07", "CUDA 13.2 of PyTorch needs 580 or later"), "will fail"),
        ("gpu.available", Fact("No"), "harmless"),
        ("gpu.available", Fact("Yes", "GPU 0: no kernel image"), "will fail"),
        ("gpu.available", Fact(None, "looking for GPUs ends the process"), "will fail"),
        ("gpu.available", Fact(None, NOT_ASKED), "not judged"),
        ("gpu.names", Fact("GPU 0: Tesla T4 (arch=7.5)"), "may change results"),
        ("dependencies", Fact("1 of 2 installed", "not installed: lvis"), "will fail"),
        ("dependencies", Fact("2 of 2 installed"), "not judged"),
        ("gpu.count", Fact("4"), "may change results"),
    ],
)
def test_verdicts_of_single_fields(key, fact, verdict):
    (field,) = judged_fields({key: fact})
    assert field.verdict == verdict


def test_versions_are_compared_by_numbers():
    assert numbers("2.15.0+cu132") == (2, 15, 0)
    assert numbers("0.1.5.post20221221") == (0, 1, 5)
    assert numbers("2.10.0a0") > numbers("2.9.9")
    assert numbers("unknown") == ()


def test_a_program_that_is_missing_fails_or_hangs_is_a_reason():
    assert "not found" in run_program(["no-such-program-here"]).problem
    assert "failed" in run_program(["false"]).problem
    assert "within 0.2 s" in run_program(["sleep", "5"], seconds=0.2).problem
    assert run_program(["echo", "x"]).value == "x"


def test_the_published_gpus_fail_where_torch_has_no_code_for_them():
    v100s = gpu_facts([("Tesla V100-SXM2-32GB", "7.0", 32 * 2**30)] * 8)
    assert verdicts({**v100s, "torch.arch_list": Fact("sm_70")})["gpu.names"] == ("same", "")
    assert verdicts({**v100s, "torch.arch_list": Fact("sm_75")})["gpu.names"][0] == "will fail"


def test_a_report_of_one_fact_does_not_fail_for_want_of_others():
    for key, fact in FACTS.items():
        assert [field.key for field in judged_fields({key: fact})] == [key]
