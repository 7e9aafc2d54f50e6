"""The environment report: each field's value next to that of the published training, with a verdict.

The published values are of 8 x V100, June 2022 to 2023.

A rule looks at one fact and at all others (those that nobody knows have no value) and returns a verdict with its
reason. The reasons state what was measured or what the code does; where neither is known, the verdict is ``may change
results``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from proxydet.errors import InputError

Verdict = Literal["same", "harmless", "may change results", "will fail", "not judged"]
"""What a difference from the published environment means, from the mildest to the worst; ``not judged`` where there
is nothing to compare or nothing to say."""

ORDER: tuple[Verdict, ...] = (
    "not judged",
    "same",
    "harmless",
    "may change results",
    "will fail",
)
"""Verdicts from the mildest to the worst."""

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Field:
    """One line of the report."""

    key: str
    """Its name in JSON and in comparisons."""

    section: str
    """The heading that it stands under."""

    label: str
    """Its name for people; those of detectron2's own report where it has the field."""

    value: str | None
    """What was found; None where nothing was."""

    problem: str = ""
    """Why there is no value, or what is wrong with it."""

    published: str | None = None
    """The value in the published training; None where it was not recorded."""

    verdict: Verdict = "not judged"
    """What the difference means."""

    reason: str = ""
    """Why it means that."""


@dataclass(frozen=True, kw_only=True)
class EnvironmentReport:
    """What is there, next to what the published results were made with."""

    fields: tuple[Field, ...]
    """All fields, section by section."""

    created: str
    """UTC time, ISO 8601."""

    quick: bool
    """Whether torch was left unasked."""

    @property
    def worst(self) -> Verdict:
        """The worst verdict of all fields."""
        return max((field.verdict for field in self.fields), key=ORDER.index, default="not judged")

    @property
    def failures(self) -> tuple[Field, ...]:
        """The fields with which something will fail."""
        return tuple(field for field in self.fields if field.verdict == "will fail")

    def sections(self) -> dict[str, list[Field]]:
        """Return the fields by section, in order."""
        grouped: dict[str, list[Field]] = {}
        for field in self.fields:
            grouped.setdefault(field.section, []).append(field)
        return grouped

    def value(self, key: str) -> str | None:
        """Return the value of a field; None where it is missing."""
        return next((field.value for field in self.fields if field.key == key), None)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "format": FORMAT,
            "created": self.created,
            "quick": self.quick,
            "worst": self.worst,
            "fields": [asdict(field) for field in self.fields],
        }

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> EnvironmentReport:
        """Read a report that :meth:`to_dict` wrote.

        Raises:
            InputError: It is of another format, or not a whole one.
        """
        if mapping.get("format") != FORMAT:
            raise InputError(
                f"The environment report has format {mapping.get('format')!r}, not {FORMAT}.",
                hint="it was written by another version of proxydet",
            )
        try:
            return cls(
                fields=tuple(Field(**field) for field in mapping["fields"]),
                created=mapping["created"],
                quick=mapping["quick"],
            )
        except (KeyError, TypeError) as error:
            raise InputError(
                f"The environment report has other keys than proxydet writes: {error}.",
                hint="give an environment.json that proxydet wrote",
            ) from error

    def to_markdown(self) -> str:
        """Return a block to paste into an issue; the home folder is written ``~``."""
        lines = ["<details><summary>proxydet env</summary>", ""]
        blocks = [field for field in self.fields if field.value is not None and "\n" in field.value]
        for section, fields in self.sections().items():
            rows = [_row(field) for field in fields if field not in blocks]
            if rows:
                heading = [f"**{section}**", "", "| field | here | published | verdict |"]
                lines += [*heading, "|---|---|---|---|", *rows, ""]
        for field in blocks:
            lines += [f"**{field.label}**", "", "```", field.value or "", "```", ""]
        return without_home("\n".join([*lines, "</details>"]))


def without_home(text: str) -> str:
    """Write ``~`` for the user's home folder, where a path of the text begins with it."""
    home = re.escape(str(Path.home()))
    return re.sub(rf"(?<![\w./~-]){home}(?![\w-])", "~", text)


def _row(field: Field) -> str:
    here = field.value or "missing"
    if field.problem:
        here += f" ({field.problem})"
    verdict = f"{field.verdict}: {field.reason}" if field.reason else field.verdict
    cells = (field.label, here, field.published or "", verdict)
    escaped = (cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells)
    return f"| {' | '.join(escaped)} |"


@dataclass(frozen=True)
class Fact:
    """A value, or the reason why there is none."""

    value: str | None
    """What was found; None where nothing was."""

    problem: str = ""
    """Why there is no value, or what is wrong with it; empty where all is well."""


Facts = dict[str, Fact]

NOT_ASKED = "torch does not load, so it cannot be asked"
"""Why a fact that only torch knows is missing."""


def ask(command: Sequence[str], *, seconds: float = 10) -> Fact:
    """Run a program and take what it writes to stdout.

    Args:
        command: The program (a name is searched on PATH) and its arguments.
        seconds: How long it may take.

    Returns:
        Its output, stripped, or why there is none.
    """
    program = shutil.which(command[0])
    if program is None:
        return Fact(None, f"{command[0]} not found")
    try:
        done = subprocess.run(  # noqa: S603 - a list, no shell
            [program, *command[1:]],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Fact(None, f"{command[0]} did not answer within {seconds:g} s")
    except OSError as error:
        return Fact(None, f"{command[0]} does not run: {error.strerror or error}")
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        return Fact(None, f"{command[0]} failed: {said[-1] if said else done.returncode}")
    return Fact(done.stdout.strip())


def numbers(version: str) -> tuple[int, ...]:
    """Leading numbers of a version: ``"2.15.0+cu132"`` gives ``(2, 15, 0)``."""
    parts: list[int] = []
    for part in version.split("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        parts.append(int(digits))
    return tuple(parts)


PUBLISHED_GPUS = 8
PUBLISHED_GPU_GIB = 32


class Judgement(NamedTuple):
    """A verdict and its reason."""

    verdict: Verdict
    reason: str = ""


Rule = Callable[[str | None, Facts], Judgement]

NOT_JUDGED = Judgement("not judged")


def note(_value: str | None, _facts: Facts) -> Judgement:
    """A field that is only told."""
    return NOT_JUDGED


def harmless(reason: str) -> Rule:
    """A field whose difference changes no number."""
    return lambda _value, _facts: Judgement("harmless", reason)


def changes(reason: str, *, missing: str = "") -> Rule:
    """A field whose difference may change numbers.

    Args:
        reason: How.
        missing: Why its absence fails; empty where absence is not judged.
    """

    def rule(value: str | None, _facts: Facts) -> Judgement:
        if value is None:
            return Judgement("will fail", missing) if missing else NOT_JUDGED
        return Judgement("may change results", reason)

    return rule


def needed(oldest: tuple[int, ...], missing: str, otherwise: Rule) -> Rule:
    """A field that must be there in a least version.

    Args:
        oldest: The least version.
        missing: What to do where it is absent or older.
        otherwise: The rule for the rest.
    """

    def rule(value: str | None, facts: Facts) -> Judgement:
        if value is None:
            return Judgement("will fail", missing)
        if numbers(value) < oldest:
            least = ".".join(map(str, oldest))
            return Judgement("will fail", f"{least} or later is needed; {missing}")
        return otherwise(value, facts)

    return rule


def platform(value: str | None, _facts: Facts) -> Judgement:
    """Anything but Linux."""
    del value
    return Judgement(
        "may change results", "training on several GPUs needs NCCL, which is on Linux only"
    )


def torch_import(value: str | None, facts: Facts) -> Judgement:
    """Whether torch can be imported at all."""
    if value is not None:
        return Judgement("same")
    if facts["torch"].value is None:
        return Judgement("will fail", "nothing runs without torch: reinstall proxydet")
    return Judgement("will fail", "torch is there but damaged, or built for other system libraries")


def torchvision_import(value: str | None, facts: Facts) -> Judgement:
    """Whether torchvision's operators load into this torch."""
    if value is not None:
        return Judgement("same")
    if facts["torchvision"].value is None:
        return Judgement("will fail", "RoIAlign and NMS are torchvision's: reinstall proxydet")
    return Judgement(
        "will fail", "RoIAlign and NMS are its operators: install the torchvision of this torch"
    )


def gpu(value: str | None, facts: Facts) -> Judgement:
    """Whether a GPU can be used."""
    problem = facts["gpu.available"].problem
    if value is None:
        return Judgement("will fail", "torch's CUDA or the driver is damaged: reinstall them")
    if value == "Yes":
        return Judgement("will fail", "the GPU does not compute") if problem else Judgement("same")
    if os.environ.get("CUDA_VISIBLE_DEVICES") in {"", "-1"}:
        return Judgement("harmless", "CUDA_VISIBLE_DEVICES hides every GPU")
    if facts["driver"].value is not None:
        without = facts["torch.cuda"].value is None
        why = "torch was built without CUDA" if without else "torch cannot use it"
        return Judgement(
            "will fail", f"there is a GPU, but {why}: install a torch that this driver supports"
        )
    return Judgement(
        "harmless", "quickstart and prediction run on the CPU; the recipes of training need GPUs"
    )


def driver(_value: str | None, facts: Facts) -> Judgement:
    """A driver too old for torch's CUDA, or another than the published."""
    if facts["driver"].problem and facts["driver"].value is not None:
        return Judgement("will fail", "update the driver, or install a torch for an older CUDA")
    return Judgement("harmless", "kernels come with torch")


def gpu_names(value: str | None, facts: Facts) -> Judgement:
    """GPUs other than the published ones."""
    built = facts["torch.arch_list"].value or ""
    for arch in (value or "").split("arch=")[1:]:
        number = arch.split(")")[0].replace(".", "")
        if built and not _runs_on(number, built):
            return Judgement("will fail", f"this torch has no code for sm_{number}, only {built}")
    return Judgement(
        "may change results", "another GPU takes other kernels, which add in another order"
    )


def _runs_on(arch: str, built: str) -> bool:
    """Code for an older minor version of the same architecture runs, and so does portable code (compute_)."""
    for name in built.split(", "):
        kind, _, number = name.partition("_")
        number = number.rstrip("af")
        same_major = number[:-1] == arch[:-1] and int(number) <= int(arch)
        if (kind == "sm" and same_major) or (kind == "compute" and int(number) <= int(arch)):
            return True
    return False


def gpu_count(value: str | None, _facts: Facts) -> Judgement:
    """Another number of GPUs."""
    if value == str(PUBLISHED_GPUS):
        return Judgement("same")
    return Judgement(
        "may change results",
        f"the published batch is spread over {PUBLISHED_GPUS} GPUs, each drawing its own images",
    )


def gpu_memory(value: str | None, _facts: Facts) -> Judgement:
    """Less memory a GPU than the recipes were sized for."""
    least = min(float(part.split()[0]) for part in (value or "0 GiB").split("; "))
    if least >= PUBLISHED_GPU_GIB - 1:
        return Judgement("harmless", "enough for the published batch")
    return Judgement(
        "may change results", "the published batch may not fit; another changes results"
    )


def tf32(value: str | None, _facts: Facts) -> Judgement:
    """Convolutions in TF32, which the published GPUs did not have."""
    if value == "on":
        return Judgement(
            "may change results",
            "convolutions outside mixed precision round to 10 bits; the published ones did not",
        )
    return Judgement("same")


def unset(reason: str) -> Rule:
    """A variable that is best not set."""

    def rule(value: str | None, _facts: Facts) -> Judgement:
        same = value in {None, "<not set>"}
        return Judgement("same") if same else Judgement("may change results", reason)

    return rule


def roi_align(value: str | None, facts: Facts) -> Judgement:
    """The installed RoIAlign, next to the published change."""
    state = (value or "").split(" @")[0]
    if value is None:
        installed = facts["detectron2"].value is not None
        return Judgement(
            "will fail", "run: proxydet patch status" if installed else "run: proxydet setup"
        )
    if state == "applied" and not facts["roi_align"].problem:
        return Judgement("same")
    if state == "original" and not facts["roi_align"].problem:
        return Judgement(
            "harmless",
            "training's mode `published` makes the change at run time; other code: proxydet patch apply",
        )
    return Judgement("may change results", "run: proxydet patch status")


def dependencies(value: str | None, facts: Facts) -> Judgement:
    """Packages that proxydet declares and that are not there."""
    del value
    if facts["dependencies"].problem.startswith("not installed"):
        return Judgement("will fail", "reinstall proxydet in this environment")
    return NOT_JUDGED


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
    rule: Rule
    section: str = RECORDED


_SPECS = (
    _Spec("platform", "sys.platform", "linux", platform),
    _Spec(
        "python",
        "Python",
        "3.8.10 (default, Jun 22 2022, 20:18:18) [GCC 9.4.0]",
        needed((3, 10), "use another Python", harmless("no number depends on it")),
    ),
    _Spec(
        "numpy",
        "numpy",
        "1.23.2",
        needed(
            (1, 26),
            _REINSTALL,
            harmless("its seeded random stream is the same in all versions (NEP 19)"),
        ),
    ),
    _Spec(
        "detectron2",
        "detectron2",
        "0.6",
        needed((0, 6), _SETUP, changes("a later detectron2 than the published")),
    ),
    _Spec(
        "detectron2._C",
        "detectron2._C",
        "built",
        harmless("none of its compiled operators is used here"),
    ),
    _Spec("compiler", "Compiler", "GCC 9.4", harmless(_NOT_COMPILED)),
    _Spec("cuda.compiler", "CUDA compiler", "CUDA 11.3", harmless(_NOT_COMPILED)),
    _Spec("detectron2.arch", "detectron2 arch flags", "7.0", harmless(_NOT_COMPILED)),
    _Spec(
        "DETECTRON2_ENV_MODULE",
        "DETECTRON2_ENV_MODULE",
        "<not set>",
        unset("detectron2 runs that module of yours when it starts"),
    ),
    _Spec(
        "torch",
        "PyTorch",
        "1.11.0+cu113",
        needed(
            (2, 6),
            _REINSTALL,
            changes("kernels and the order of sums differ between versions"),
        ),
    ),
    _Spec("torch.debug", "PyTorch debug build", "False", harmless("only slower")),
    _Spec("gpu.available", "GPU available", "Yes", gpu),
    _Spec(
        "gpu.names",
        "GPU",
        "GPU 0,1,2,3,4,5,6,7: Tesla V100-SXM2-32GB (arch=7.0)",
        gpu_names,
    ),
    _Spec("driver", "Driver version", "515.48.07", driver),
    _Spec("cuda.home", "CUDA_HOME", "/usr/local/cuda", harmless(_NOT_COMPILED)),
    _Spec(
        "TORCH_CUDA_ARCH_LIST",
        "TORCH_CUDA_ARCH_LIST",
        "<not set>",
        harmless(_NOT_COMPILED),
    ),
    _Spec(
        "Pillow",
        "Pillow",
        "9.2.0",
        needed(
            (10, 3),
            _REINSTALL,
            harmless("41 photographs decoded and resized alike, byte for byte, by 9.2.0 and 13.0"),
        ),
    ),
    _Spec(
        "torchvision",
        "torchvision",
        "0.12.0+cu113",
        needed(
            (0, 21),
            _REINSTALL,
            changes("RoIAlign and NMS are its operators"),
        ),
    ),
    _Spec(
        "torchvision.arch",
        "torchvision arch flags",
        "3.5, 5.0, 6.0, 7.0, 7.5, 8.0, 8.6",
        harmless("it computes the same on each"),
    ),
    _Spec(
        "fvcore",
        "fvcore",
        "0.1.5.post20220512",
        needed((0,), _DETECTRON2_NEEDS, harmless("it only reads and writes files here")),
    ),
    _Spec(
        "iopath",
        "iopath",
        "0.1.9",
        needed((0,), _DETECTRON2_NEEDS, harmless("it only opens files here")),
    ),
    _Spec("cv2", "cv2", "4.6.0", harmless("training and evaluation do not use it")),
    _Spec("torch.import", "PyTorch loads", "works", torch_import, TODAY),
    _Spec("torchvision.import", "torchvision loads", "works", torchvision_import, TODAY),
    _Spec("roi_align", "roi_align change", "applied by hand to detectron2", roi_align, TODAY),
    _Spec("torch.cuda", "CUDA of PyTorch", "11.3", changes("its libraries compute"), TODAY),
    _Spec("cudnn", "cuDNN", "8.2.0", changes("its convolutions compute"), TODAY),
    _Spec("nccl", "NCCL", None, note, TODAY),
    _Spec("gpu.count", "GPUs", str(PUBLISHED_GPUS), gpu_count, TODAY),
    _Spec("gpu.memory", "GPU memory", "32 GB each", gpu_memory, TODAY),
    _Spec("gpu.tf32", "TF32 convolutions", "not on these GPUs", tf32, TODAY),
    _Spec("gpu.topology", "GPU topology", None, note, TODAY),
    _Spec("torch.arch_list", "PyTorch arch flags", None, note, TODAY),
    _Spec("cpu", "CPU", None, note, TODAY),
    _Spec("cpu.cores", "CPU cores", None, note, TODAY),
    _Spec("memory", "Memory", None, note, TODAY),
    _Spec("disk", "Disk at the data root", None, note, TODAY),
    _Spec("system", "System", None, note, TODAY),
    _Spec("container", "Container", None, note, TODAY),
    _Spec("scheduler", "Scheduler", None, note, TODAY),
    _Spec("variables", "Variables", None, note, TODAY),
    _Spec("proxydet", "proxydet", None, note, TODAY),
    _Spec("dependencies", "Dependencies", None, dependencies, TODAY),
    _Spec("torch.built_with", "PyTorch built with", _BUILT_WITH, note, BUILD),
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


def _judge(spec: _Spec, fact: Fact, facts: Facts) -> Judgement:
    if fact.problem == NOT_ASKED:
        return NOT_JUDGED
    found = spec.rule(fact.value, facts)
    # What cannot work here is told as such even where it is what the published training had.
    if found.verdict != "will fail" and _is_published(spec, fact):
        return Judgement("same")
    return found


def _is_published(spec: _Spec, fact: Fact) -> bool:
    if spec.published is None or fact.value is None or fact.problem:
        return False
    return fact.value.split(" @")[0] == spec.published
