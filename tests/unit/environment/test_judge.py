"""Each difference from the published environment gets the verdict that it deserves."""

from __future__ import annotations

import pytest

from proxydet.runtime import report
from proxydet.runtime.environment import facts_from_answer
from proxydet.runtime.report import NOT_ASKED, Fact, ask, judged_fields, numbers

ANSWER = {
    "torch": "2.15.0+cu132",
    "debug": "False",
    "cuda": "13.2",
    "built_with": "PyTorch built with:\n  - GCC",
    "cudnn": 92600,
    "nccl": "2.30.7",
    "gpu_available": True,
    "gpu_warning": "",
    "gpus": [{"name": "NVIDIA A100", "arch": "8.0", "memory": 80 * 2**30}] * 8,
    "arch_list": ["sm_75", "sm_80", "sm_90"],
    "tf32_convolutions": True,
    "gpu_error": "",
    "torchvision_error": "",
}
BASE = {
    "torch": Fact("2.15.0+cu132 @/x"),
    "torchvision": Fact("0.29.2 @/x"),
    "driver": Fact("580.1"),
}


def verdicts(answer: dict, base: dict | None = None) -> dict:
    facts = {**(BASE if base is None else base), **facts_from_answer({**ANSWER, **answer})}
    return {field.key: (field.verdict, field.reason) for field in judged_fields(facts)}


def test_eight_modern_gpus():
    found = verdicts({})
    assert found["gpu.available"][0] == "same"
    assert found["gpu.count"][0] == "same"
    assert found["gpu.names"][0] == "may change results"
    assert found["gpu.memory"][0] == "harmless"
    assert found["gpu.tf32"][0] == "may change results"
    assert found["torch.import"][0] == "same"


def test_gpus_of_one_kind_are_named_together():
    facts = facts_from_answer(ANSWER)
    assert facts["gpu.names"].value == "GPU 0,1,2,3,4,5,6,7: NVIDIA A100 (arch=8.0)"
    assert facts["cudnn"].value == "9.26.0"
    assert facts_from_answer({**ANSWER, "cudnn": 8200})["cudnn"].value == "8.2.0"


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
    ],
)
def test_a_gpu_that_torch_has_no_code_for_fails(arch, built, fails):
    gpus = [{"name": "GPU", "arch": arch, "memory": 32 * 2**30}]
    verdict, reason = verdicts({"gpus": gpus, "arch_list": built})["gpu.names"]
    assert (verdict == "will fail") is fails
    assert ("no code for" in reason) is fails


def test_a_gpu_that_torch_cannot_use_fails(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    hidden = {"gpu_available": False, "gpu_warning": "the NVIDIA driver on your system is too old"}
    assert verdicts(hidden)["gpu.available"][0] == "will fail"
    without = verdicts({**hidden, "cuda": None})
    assert "built without CUDA" in without["gpu.available"][1]


def test_no_gpu_at_all_or_a_hidden_one_is_harmless(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    none = {"gpu_available": False}
    without_driver = {**BASE, "driver": Fact(None, "nvidia-smi not found")}
    assert verdicts(none, without_driver)["gpu.available"][0] == "harmless"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert verdicts(none)["gpu.available"][0] == "harmless"


def test_a_gpu_that_does_not_compute_fails():
    assert verdicts({"gpu_error": "GPU 0: no kernel image"})["gpu.available"][0] == "will fail"


@pytest.mark.parametrize(
    ("gib", "verdict"), [(16, "may change results"), (31.7, "harmless"), (80, "harmless")]
)
def test_gpus_with_little_memory_may_change_results(gib, verdict):
    # A card sold as 32 GB shows a little less.
    gpus = [{"name": "GPU", "arch": "8.0", "memory": int(gib * 2**30)}]
    assert verdicts({"gpus": gpus})["gpu.memory"][0] == verdict


def test_torch_that_does_not_load_fails_and_says_how():
    facts = facts_from_answer({"torch_error": "OSError: libcudart.so.11.0: cannot open"})
    (field,) = [f for f in judged_fields({**BASE, **facts}) if f.key == "torch.import"]
    assert field.verdict == "will fail"
    assert "libcudart" in field.problem


def test_torchvision_of_another_torch_fails():
    found = verdicts({"torchvision_error": "its operators do not load into this torch"})
    assert found["torchvision.import"][0] == "will fail"


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


def test_rules_that_need_other_facts_are_not_asked_without_them():
    assert report.note(None, {}) == report.NOT_JUDGED


def test_versions_are_compared_by_numbers():
    assert numbers("2.15.0+cu132") == (2, 15, 0)
    assert numbers("0.1.5.post20221221") == (0, 1, 5)
    assert numbers("2.10.0a0") > numbers("2.9.9")
    assert numbers("unknown") == ()


def test_a_program_that_is_missing_fails_or_hangs_is_a_reason():
    assert "not found" in ask(["no-such-program-here"]).problem
    assert "failed" in ask(["false"]).problem
    assert "within 0.2 s" in ask(["sleep", "5"], seconds=0.2).problem
    assert ask(["echo", "x"]).value == "x"


def test_the_published_gpus_fail_where_torch_has_no_code_for_them():
    v100 = {"name": "Tesla V100-SXM2-32GB", "arch": "7.0", "memory": 32 * 2**30}
    old, new = ({"gpus": [v100] * 8, "arch_list": built} for built in (["sm_70"], ["sm_75"]))
    assert verdicts(old)["gpu.names"] == ("same", "")
    assert verdicts(new)["gpu.names"][0] == "will fail"


def test_architectures_are_read_from_the_build_where_torch_sees_no_gpu():
    flags = (
        "CUDA_FLAGS= -gencode arch=compute_75,code=sm_75 -gencode arch=compute_90,code=compute_90"
    )
    facts = facts_from_answer(
        {**ANSWER, "gpu_available": False, "arch_list": [], "built_with": flags}
    )
    assert facts["torch.arch_list"].value == "sm_75, compute_90"
    assert "torch.arch_list" not in facts_from_answer({**ANSWER, "arch_list": []})


def test_a_torch_that_does_not_load_leaves_rows_that_say_so():
    facts = {**BASE, **facts_from_answer({"torch_error": "OSError: libcudart.so.11.0"})}
    rows = {field.key: field for field in judged_fields(facts)}
    for key in ("gpu.available", "torch.built_with", "cudnn", "nccl"):
        assert (rows[key].value, rows[key].problem) == (None, NOT_ASKED)


def test_a_crash_while_looking_for_gpus_is_told_and_nothing_is_said_of_torchvision():
    asked = {"torch", "debug", "cuda", "built_with", "cudnn", "nccl"}
    known = {key: ANSWER[key] for key in asked}
    facts = facts_from_answer({**known, "gpu_error": "looking for GPUs ends the process"})
    rows = {field.key: field for field in judged_fields({**BASE, **facts})}
    assert rows["gpu.available"].verdict == "will fail"
    assert rows["torch.import"].value == "works"
    assert "torchvision.import" not in rows
