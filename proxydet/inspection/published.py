"""The fields of the report and their values in the published training (8 x V100, June 2022 to 2023)."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from proxydet.inspection import judge
from proxydet.inspection.facts import NOT_ASKED, Fact, Facts
from proxydet.inspection.report import Field

RECORDED = "Published environment's fields"
TODAY = "What else matters"
BUILD = "PyTorch built with"

_BUILT_WITH = """\
GCC 7.3; C++ 201402; MKL 2020.0.0; MKL-DNN 2.5.2; OpenMP 4.5; LAPACK; NNPACK; AVX2; CUDA Runtime 11.3; \
architectures 3.7, 5.0, 6.0, 7.0, 7.5, 8.0, 8.6; CuDNN 8.2; Magma 2.5.2"""

_SETUP = "run: proxydet setup"
_REINSTALL = "reinstall proxydet in this environment"
_NOT_COMPILED = "nothing is compiled for proxydet"
_DETECTRON2_NEEDS = "detectron2 needs it: reinstall proxydet in this environment"


@dataclass(frozen=True)
class _Spec:
    key: str
    label: str
    published: str | None
    rule: judge.Rule
    section: str = RECORDED


_SPECS = (
    _Spec("platform", "sys.platform", "linux", judge.platform),
    _Spec(
        "python",
        "Python",
        "3.8.10 (default, Jun 22 2022, 20:18:18) [GCC 9.4.0]",
        judge.needed((3, 10), "use another Python", judge.harmless("no number depends on it")),
    ),
    _Spec(
        "numpy",
        "numpy",
        "1.23.2",
        judge.needed(
            (1, 26),
            _REINSTALL,
            judge.harmless("its seeded random stream is the same in all versions (NEP 19)"),
        ),
    ),
    _Spec(
        "detectron2",
        "detectron2",
        "0.6",
        judge.needed((0, 6), _SETUP, judge.changes("a later detectron2 than the published")),
    ),
    _Spec(
        "detectron2._C",
        "detectron2._C",
        "built",
        judge.harmless("none of its compiled operators is used here"),
    ),
    _Spec("compiler", "Compiler", "GCC 9.4", judge.harmless(_NOT_COMPILED)),
    _Spec("cuda.compiler", "CUDA compiler", "CUDA 11.3", judge.harmless(_NOT_COMPILED)),
    _Spec("detectron2.arch", "detectron2 arch flags", "7.0", judge.harmless(_NOT_COMPILED)),
    _Spec(
        "DETECTRON2_ENV_MODULE",
        "DETECTRON2_ENV_MODULE",
        "<not set>",
        judge.unset("detectron2 runs that module of yours when it starts"),
    ),
    _Spec(
        "torch",
        "PyTorch",
        "1.11.0+cu113",
        judge.needed(
            (2, 6),
            _REINSTALL,
            judge.changes("kernels and the order of sums differ between versions"),
        ),
    ),
    _Spec("torch.debug", "PyTorch debug build", "False", judge.harmless("only slower")),
    _Spec("gpu.available", "GPU available", "Yes", judge.gpu),
    _Spec(
        "gpu.names",
        "GPU",
        "GPU 0,1,2,3,4,5,6,7: Tesla V100-SXM2-32GB (arch=7.0)",
        judge.gpu_names,
    ),
    _Spec("driver", "Driver version", "515.48.07", judge.driver),
    _Spec("cuda.home", "CUDA_HOME", "/usr/local/cuda", judge.harmless(_NOT_COMPILED)),
    _Spec(
        "TORCH_CUDA_ARCH_LIST",
        "TORCH_CUDA_ARCH_LIST",
        "<not set>",
        judge.harmless(_NOT_COMPILED),
    ),
    _Spec(
        "Pillow",
        "Pillow",
        "9.2.0",
        judge.needed(
            (10, 3),
            _REINSTALL,
            judge.harmless(
                "41 photographs decoded and resized alike, byte for byte, by 9.2.0 and 13.0"
            ),
        ),
    ),
    _Spec(
        "torchvision",
        "torchvision",
        "0.12.0+cu113",
        judge.needed(
            (0, 21),
            _REINSTALL,
            judge.changes("RoIAlign and NMS are its operators"),
        ),
    ),
    _Spec(
        "torchvision.arch",
        "torchvision arch flags",
        "3.5, 5.0, 6.0, 7.0, 7.5, 8.0, 8.6",
        judge.harmless("it computes the same on each"),
    ),
    _Spec(
        "fvcore",
        "fvcore",
        "0.1.5.post20220512",
        judge.needed(
            (0,), _DETECTRON2_NEEDS, judge.harmless("it only reads and writes files here")
        ),
    ),
    _Spec(
        "iopath",
        "iopath",
        "0.1.9",
        judge.needed((0,), _DETECTRON2_NEEDS, judge.harmless("it only opens files here")),
    ),
    _Spec("cv2", "cv2", "4.6.0", judge.harmless("training and evaluation do not use it")),
    _Spec("torch.import", "PyTorch loads", "works", judge.torch_import, TODAY),
    _Spec("torchvision.import", "torchvision loads", "works", judge.torchvision_import, TODAY),
    _Spec("roi_align", "roi_align change", "applied by hand to detectron2", judge.roi_align, TODAY),
    _Spec("torch.cuda", "CUDA of PyTorch", "11.3", judge.changes("its libraries compute"), TODAY),
    _Spec("cudnn", "cuDNN", "8.2.0", judge.changes("its convolutions compute"), TODAY),
    _Spec("nccl", "NCCL", None, judge.note, TODAY),
    _Spec("gpu.count", "GPUs", str(judge.PUBLISHED_GPUS), judge.gpu_count, TODAY),
    _Spec("gpu.memory", "GPU memory", "32 GB each", judge.gpu_memory, TODAY),
    _Spec("gpu.tf32", "TF32 convolutions", "not on these GPUs", judge.tf32, TODAY),
    _Spec("gpu.topology", "GPU topology", None, judge.note, TODAY),
    _Spec("torch.arch_list", "PyTorch arch flags", None, judge.note, TODAY),
    _Spec("cpu", "CPU", None, judge.note, TODAY),
    _Spec("cpu.cores", "CPU cores", None, judge.note, TODAY),
    _Spec("memory", "Memory", None, judge.note, TODAY),
    _Spec("disk", "Disk at the data root", None, judge.note, TODAY),
    _Spec("system", "System", None, judge.note, TODAY),
    _Spec("container", "Container", None, judge.note, TODAY),
    _Spec("scheduler", "Scheduler", None, judge.note, TODAY),
    _Spec("variables", "Variables", None, judge.note, TODAY),
    _Spec("proxydet", "proxydet", None, judge.note, TODAY),
    _Spec("dependencies", "Dependencies", None, judge.dependencies, TODAY),
    _Spec("torch.built_with", "PyTorch built with", _BUILT_WITH, judge.note, BUILD),
)


def judged_fields(facts: Facts) -> tuple[Field, ...]:
    """Put the facts next to the published values and judge the differences.

    Args:
        facts: What was found; fields that nobody asked for are left out.

    Returns:
        The report's fields, in its order.
    """
    # Rules look at other facts too, and those may be missing: a report never fails itself.
    known = defaultdict(lambda: Fact(None), facts)
    return tuple(_field(spec, known) for spec in _SPECS if spec.key in facts)


def _field(spec: _Spec, facts: Facts) -> Field:
    fact = facts[spec.key]
    verdict, reason = _judge(spec, fact, facts)
    return Field(
        key=spec.key,
        section=spec.section,
        label=spec.label,
        value=fact.value,
        problem=fact.problem,
        published=spec.published,
        verdict=verdict,
        reason=reason,
    )


def _judge(spec: _Spec, fact: Fact, facts: Facts) -> judge.Judgement:
    if fact.problem == NOT_ASKED:
        return judge.NOT_JUDGED
    found = spec.rule(fact.value, facts)
    # What cannot work here is told as such even where it is what the published training had.
    if found.verdict != "will fail" and _is_published(spec, fact):
        return judge.Judgement("same")
    return found


def _is_published(spec: _Spec, fact: Fact) -> bool:
    if spec.published is None or fact.value is None or fact.problem:
        return False
    return fact.value.split(" @")[0] == spec.published
