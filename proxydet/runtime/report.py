"""What this machine and its packages are, next to the environment of the published results.

::

    report = environment()
    report.worst                       # "may change results"
    print(report.to_markdown())        # a block for an issue

The published values are of 8 x V100, June 2022 to 2023. Probes collect facts; a table has for each fact its label, the
published value and the rule for a difference. The reasons state what was measured or what the code does; where
neither is known, the verdict is ``may change results``. No torch is imported here.
"""

from __future__ import annotations

import ast
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import msgspec

import proxydet
from proxydet._version import __version__
from proxydet.errors import InputError, RuntimeEnvironmentError
from proxydet.paths import datasets_folder
from proxydet.runtime.detectron2 import distribution_version, package_folder
from proxydet.runtime.patch import patch_status, roi_align_files
from proxydet.runtime.processes import Fact, run_program
from proxydet.runtime.torch_probe import NOT_ASKED, Facts, facts_before_crash, gpu_facts, probe

Verdict = Literal["same", "harmless", "may change results", "will fail", "not judged"]
"""What a difference from the published environment means, from the mildest to the worst; ``not judged`` where there
is nothing to compare."""

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

    @property
    def shown(self) -> str:
        """The value for people, with its problem in parentheses."""
        value = self.value or "missing"
        return f"{value} ({self.problem})" if self.problem else value


@dataclass(frozen=True, kw_only=True)
class EnvironmentReport:
    """The environment, next to that of the published results."""

    fields: tuple[Field, ...]
    """All fields, section by section."""
    created: str
    """UTC time, ISO 8601."""
    quick: bool
    """Whether torch was not asked."""

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
            return msgspec.convert(mapping, cls)
        except msgspec.ValidationError as error:
            raise InputError(
                f"The environment report is not one that proxydet writes: {error}.",
                hint="give an environment.json that proxydet wrote",
            ) from error

    def to_markdown(self) -> str:
        """Return a block to paste into an issue; the home folder is written ``~``."""
        lines = ["<details><summary>proxydet env</summary>", ""]
        blocks = [field for field in self.fields if field.value is not None and "\n" in field.value]
        for section, fields in self.sections().items():
            rows = []
            for field in fields:
                verdict = f"{field.verdict}: {field.reason}" if field.reason else field.verdict
                cells = (field.label, field.shown, field.published or "", verdict)
                if field not in blocks:
                    escaped = (cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells)
                    rows.append(f"| {' | '.join(escaped)} |")
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


def environment(*, quick: bool = False, data_root: Path | None = None) -> EnvironmentReport:
    """Report the environment; what is missing or broken is a field, never an error.

    Args:
        quick: Do not import torch; its fields then come from its files, and the GPUs from nvidia-smi.
        data_root: The folder of the data sets, whose disk is measured; None for the default.

    Returns:
        All fields with the published values and a verdict for each difference. Torch is asked in a process of its
        own unless this one has imported it: a torch that crashes is reported like one that is missing.
    """
    torch_process = None
    if not quick and "torch" not in sys.modules:
        torch_process = subprocess.Popen(  # noqa: S603 - a list, no shell, our own module
            [sys.executable, "-c", _START, json.dumps(sys.path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
    facts = machine_facts(datasets_folder() if data_root is None else data_root)
    facts |= package_facts() | tool_facts() | driver_facts()
    if torch_process is not None:
        facts |= _answer_of(torch_process)
    elif not quick:
        facts |= probe(compute=False)
    facts["driver"] = judged_driver(facts)
    return EnvironmentReport(
        fields=judged_fields(facts),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        quick=quick,
    )


_TORCH_SECONDS = 120
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from proxydet.runtime.torch_probe import main; main()"
)


def _answer_of(process: subprocess.Popen[str]) -> Facts:
    """Wait for the process that asks torch, and return its facts; a crash or a hang is one, too."""
    try:
        output, errors = process.communicate(timeout=_TORCH_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        output, errors = process.communicate()
        return facts_before_crash(output, f"takes more than {_TORCH_SECONDS} s")
    if process.returncode == 0:
        return facts_before_crash(output, "")
    try:
        how = signal.Signals(-process.returncode).name
    except ValueError:
        how = f"exit code {process.returncode}"
    last = (errors.strip().splitlines() or ["no message"])[-1]
    return facts_before_crash(output, f"ends the process ({how}): {last}")


# ---- the table -------------------------------------------------------------------------------------------------------

Judgement = tuple[Verdict, str]
Rule = Callable[[Fact, Facts], Judgement]
"""A fact and all facts (those that are not known have no value) to a verdict and its reason."""


@dataclass(frozen=True)
class _Row:
    """One fact of the report: what a difference from the published value means."""

    key: str
    label: str = ""
    """Empty: the key."""
    published: str | None = None
    harmless: str = ""
    """Why another value does no harm; empty where it may."""
    changes: str = ""
    """Why another value may change results; one that is missing cannot."""
    oldest: tuple[int, ...] = ()
    """The least version; an older one fails."""
    missing: str = ""
    """What to do where it is missing or too old, which fails; empty where that is not judged."""
    rule: Rule | None = None
    """Judges instead of the four above."""


def _loads(package: str, absent: str, damaged: str) -> Rule:
    def rule(fact: Fact, facts: Facts) -> Judgement:
        if fact.value is not None:
            return "same", ""
        return "will fail", absent if facts[package].value is None else damaged

    return rule


def _gpu(fact: Fact, facts: Facts) -> Judgement:
    if fact.value is None:
        return "will fail", "torch's CUDA or the driver is damaged: reinstall them"
    if fact.value == "Yes":
        return ("will fail", "the GPU does not compute") if fact.problem else ("same", "")
    if os.environ.get("CUDA_VISIBLE_DEVICES") in {"", "-1"}:
        return "harmless", "CUDA_VISIBLE_DEVICES hides every GPU"
    if facts["driver"].value is None:
        reason = "quickstart and prediction run on the CPU; the training recipes need GPUs"
        return "harmless", reason
    without = facts["torch.cuda"].value is None
    why = "torch was built without CUDA" if without else "torch cannot use it"
    return "will fail", f"there is a GPU, but {why}: install a torch that this driver supports"


def _driver(fact: Fact, _facts: Facts) -> Judgement:
    if fact.problem and fact.value is not None:
        return "will fail", "update the driver, or install a torch for an older CUDA"
    return "harmless", "the kernels come with torch"


def _gpu_names(fact: Fact, facts: Facts) -> Judgement:
    built = facts["torch.arch_list"].value
    for arch in re.findall(r"arch=(\d+\.\d+)\)", fact.value or "") if built else ():
        arch_number = int(arch.replace(".", ""))
        for name in (built or "").split(", "):
            kind, _, number = name.partition("_")
            code = int(number.rstrip("af"))
            # Portable code (compute_) runs on anything newer, other code within the same major version only.
            if code <= arch_number and (kind == "compute" or code // 10 == arch_number // 10):
                break
        else:
            return "will fail", f"this torch has no code for sm_{arch_number}, only {built}"
    return "may change results", "another GPU uses other kernels, which sum in another order"


def _gpu_memory(fact: Fact, _facts: Facts) -> Judgement:
    # A card sold as 32 GB shows a little less.
    if min(float(part.split()[0]) for part in (fact.value or "0 GiB").split("; ")) >= 31:
        return "harmless", "enough for the published batch"
    return (
        "may change results",
        "the published batch may not fit, and another batch size changes results",
    )


def _tf32(fact: Fact, _facts: Facts) -> Judgement:
    if fact.value != "on":
        return "same", ""
    reason = "convolutions outside mixed precision round to 10 bits; the published ones did not"
    return "may change results", reason


def _roi_align(fact: Fact, facts: Facts) -> Judgement:
    if fact.value is None:
        installed = facts["detectron2"].value is not None
        return "will fail", "run: proxydet patch status" if installed else "run: proxydet setup"
    state = "" if fact.problem else fact.value.split(" @")[0]
    if state == "applied":
        return "same", ""
    if state == "original":
        run_time = "training's mode `published` makes the change at run time"
        return "harmless", f"{run_time}; other code: proxydet patch apply"
    return "may change results", "run: proxydet patch status"


def _dependencies(fact: Fact, _facts: Facts) -> Judgement:
    failing = fact.problem.startswith("not installed")
    return ("will fail", _REINSTALL) if failing else ("not judged", "")


_REINSTALL = "reinstall proxydet in this environment"
_DETECTRON2_NEEDS = f"detectron2 needs it: {_REINSTALL}"
_NOT_COMPILED = "nothing is compiled for proxydet"
_PYTHON = "3.8.10 (default, Jun 22 2022, 20:18:18) [GCC 9.4.0]"
_V100S = "GPU 0,1,2,3,4,5,6,7: Tesla V100-SXM2-32GB (arch=7.0)"
_PUBLISHED_BUILD = """\
GCC 7.3; C++ 201402; MKL 2020.0.0; MKL-DNN 2.5.2; OpenMP 4.5; LAPACK; NNPACK; AVX2; CUDA Runtime 11.3; \
architectures 3.7, 5.0, 6.0, 7.0, 7.5, 8.0, 8.6; CuDNN 8.2; Magma 2.5.2"""

_NO_NUMBER = "no number depends on it"
_LATER = "newer than the detectron2 of the published training"
_OWN_MODULE = "detectron2 imports this module of yours when it starts"
_NMS = "RoIAlign and NMS are its operators"
_ARCHITECTURES = "3.5, 5.0, 6.0, 7.0, 7.5, 8.0, 8.6"
_SAME_ON_EACH = "it computes the same on each"
_ONLY_FILES = "it only reads and writes files here"
_NCCL = "training on several GPUs needs NCCL, which is on Linux only"
_SEEDED = "its seeded random stream is the same in all versions (NEP 19)"
_DECODED = "41 photographs decoded and resized alike, byte for byte, by 9.2.0 and 13.0"
_KERNELS = "kernels and the order of sums differ between versions"
_SPREAD = "the published batch is spread over 8 GPUs, and each draws its own images"
_TORCH = _loads(
    "torch",
    "nothing runs without torch: reinstall proxydet",
    "torch is installed but damaged, or built for other system libraries",
)
_TORCHVISION = _loads(
    "torchvision",
    "RoIAlign and NMS are torchvision's: reinstall proxydet",
    "RoIAlign and NMS are its operators: install the torchvision of this torch",
)

_TABLE: dict[str, list[_Row]] = {
    "Published environment's fields": [
        _Row("platform", "sys.platform", "linux", changes=_NCCL),
        _Row("python", "Python", _PYTHON, _NO_NUMBER, oldest=(3, 10), missing="use another Python"),
        _Row("numpy", "", "1.23.2", _SEEDED, oldest=(1, 26), missing=_REINSTALL),
        _Row("detectron2", "", "0.6", changes=_LATER, oldest=(0, 6), missing="run: proxydet setup"),
        _Row("detectron2._C", "", "built", "none of its compiled operators is used here"),
        _Row("compiler", "Compiler", "GCC 9.4", _NOT_COMPILED),
        _Row("cuda.compiler", "CUDA compiler", "CUDA 11.3", _NOT_COMPILED),
        _Row("detectron2.arch", "detectron2 arch flags", "7.0", _NOT_COMPILED),
        _Row("DETECTRON2_ENV_MODULE", "", "<not set>", changes=_OWN_MODULE),
        _Row("torch", "PyTorch", "1.11.0+cu113", "", _KERNELS, oldest=(2, 6), missing=_REINSTALL),
        _Row("torch.debug", "PyTorch debug build", "False", "only slower"),
        _Row("gpu.available", "GPU available", "Yes", rule=_gpu),
        _Row("gpu.names", "GPU", _V100S, rule=_gpu_names),
        _Row("driver", "Driver version", "515.48.07", rule=_driver),
        _Row("cuda.home", "CUDA_HOME", "/usr/local/cuda", _NOT_COMPILED),
        _Row("TORCH_CUDA_ARCH_LIST", "", "<not set>", _NOT_COMPILED),
        _Row("Pillow", "", "9.2.0", _DECODED, oldest=(10, 3), missing=_REINSTALL),
        _Row("torchvision", "", "0.12.0+cu113", "", _NMS, oldest=(0, 21), missing=_REINSTALL),
        _Row("torchvision.arch", "torchvision arch flags", _ARCHITECTURES, _SAME_ON_EACH),
        _Row("fvcore", "", "0.1.5.post20220512", _ONLY_FILES, missing=_DETECTRON2_NEEDS),
        _Row("iopath", "", "0.1.9", _ONLY_FILES, missing=_DETECTRON2_NEEDS),
        _Row("cv2", "", "4.6.0", "training and evaluation do not use it"),
    ],
    "What else matters": [
        _Row("torch.import", "PyTorch loads", "works", rule=_TORCH),
        _Row("torchvision.import", "torchvision loads", "works", rule=_TORCHVISION),
        _Row("roi_align", "roi_align change", "applied by hand to detectron2", rule=_roi_align),
        _Row("torch.cuda", "CUDA of PyTorch", "11.3", changes="its libraries run the computations"),
        _Row("cudnn", "cuDNN", "8.2.0", changes="it runs the convolutions"),
        _Row("nccl", "NCCL"),
        _Row("gpu.count", "GPUs", "8", changes=_SPREAD),
        _Row("gpu.memory", "GPU memory", "32 GB each", rule=_gpu_memory),
        _Row("gpu.tf32", "TF32 convolutions", "not on these GPUs", rule=_tf32),
        _Row("gpu.bf16", "GPU units for bf16"),
        _Row("gpu.fp16", "GPU units for fp16"),
        _Row("gpu.topology", "GPU topology"),
        _Row("torch.arch_list", "PyTorch arch flags"),
        _Row("cpu", "CPU"),
        _Row("cpu.bf16", "CPU units for bf16"),
        _Row("cpu.cores", "CPU cores"),
        _Row("memory", "Memory"),
        _Row("disk", "Disk at the data root"),
        _Row("system", "System"),
        _Row("container", "Container"),
        _Row("scheduler", "Scheduler"),
        _Row("variables", "Variables"),
        _Row("proxydet"),
        _Row("dependencies", "Dependencies", rule=_dependencies),
    ],
    "PyTorch built with": [_Row("torch.built_with", "PyTorch built with", _PUBLISHED_BUILD)],
}


def judged_fields(facts: Facts) -> tuple[Field, ...]:
    """Compare the facts with the published values and judge the differences; fields without a fact are left out."""
    # Rules read other facts too, and those may be missing: a report never fails itself.
    known = defaultdict(lambda: Fact(None), facts)
    fields = []
    for section, row in ((section, row) for section, rows in _TABLE.items() for row in rows):
        if row.key not in facts:
            continue
        fact = facts[row.key]
        verdict: Verdict = "not judged"
        reason = row.harmless or row.changes
        if fact.problem == NOT_ASKED:
            reason = ""
        elif row.rule is not None:
            verdict, reason = row.rule(fact, known)
        elif fact.value is None and row.missing:
            verdict, reason = "will fail", row.missing
        elif fact.value is not None and row.oldest and numbers(fact.value) < row.oldest:
            least = ".".join(map(str, row.oldest))
            verdict, reason = "will fail", f"{least} or later is needed; {row.missing}"
        elif row.harmless:
            verdict = "harmless"
        elif row.changes and fact.value is not None:
            verdict = "may change results"
        else:
            reason = ""
        # What cannot work here fails even where it is what the published training had.
        value = None if fact.value is None or fact.problem else fact.value.split(" @")[0]
        if verdict != "will fail" and value is not None and value == row.published:
            verdict, reason = "same", ""
        fields.append(
            Field(
                key=row.key,
                section=section,
                label=row.label or row.key,
                value=fact.value,
                problem=fact.problem,
                published=row.published,
                verdict=verdict,
                reason=reason,
            )
        )
    return tuple(fields)


def numbers(version: str) -> tuple[int, ...]:
    """Leading numbers of a version: ``"2.15.0+cu132"`` gives ``(2, 15, 0)``."""
    parts: list[int] = []
    for part in version.split("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        parts.append(int(digits))
    return tuple(parts)


# ---- probes: the driver and the compilers ----------------------------------------------------------------------------

_QUERIES = ("driver_version,name,memory.total,compute_cap", "driver_version,name,memory.total")
"""One after the other: drivers before 470 do not know the compute capability."""

_OLDEST_DRIVER = {11: (450, 80), 12: (525, 60), 13: (580,)}
"""By major version of CUDA, the least driver on Linux (NVIDIA's CUDA compatibility guide, minor versions)."""


def driver_facts() -> Facts:
    """Ask nvidia-smi for the driver, the GPUs (no facts of them where it lists none) and their topology."""
    listed = Fact(None)
    for query in _QUERIES:
        listed = run_program(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"])
        if listed.value is not None or listed.problem.endswith("not found"):
            break
    topology = listed
    if listed.value is not None:
        topology = run_program(["nvidia-smi", "topo", "-m"])
        if topology.value:
            # It underlines its headings, not only on a terminal.
            topology = Fact(re.sub(r"\x1b\[[0-9;]*m", "", topology.value))
    lines = (listed.value or "").splitlines()
    rows = [[cell.strip() for cell in line.split(",")] for line in lines]
    if not rows or min(map(len, rows)) < 3:
        # Without a GPU it may print a sentence and exit with 0.
        driver = Fact(None, f"nvidia-smi: {lines[0]}") if lines else listed
        return {"driver": driver, "gpu.topology": topology}
    gpus = []
    for _, name, memory, *arch in rows:
        mib = memory.split()[0]  # "32768 MiB", or "[N/A]"
        gpus.append(
            (name, arch[0] if arch else "unknown", int(mib) * 2**20 if mib.isdigit() else 0)
        )
    return {"driver": Fact(rows[0][0]), "gpu.topology": topology, **gpu_facts(gpus)}


def judged_driver(facts: Facts) -> Fact:
    """Add to the driver that it is too old for the CUDA which torch was built with, where it is.

    A GPU that torch can use makes it good enough: NVIDIA's compatibility package lets old ones serve.
    """
    driver, cuda = facts["driver"], facts.get("torch.cuda", Fact(None))
    works = facts.get("gpu.available", Fact(None)).value == "Yes"
    if driver.value is None or cuda.value is None or works:
        return driver
    least = _OLDEST_DRIVER.get(numbers(cuda.value)[0])
    if least is None or numbers(driver.value) >= least:
        return driver
    required = ".".join(map(str, least))
    return Fact(driver.value, f"CUDA {cuda.value} of PyTorch needs {required} or later")


def tool_facts() -> Facts:
    """Collect facts about compilers, the CUDA toolkit and compiled architectures; needs no torch."""
    # The toolkit: $CUDA_HOME, else where nvcc is, else /usr/local/cuda.
    home = None
    if named := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        home = Path(named)
    elif on_path := shutil.which("nvcc"):
        home = Path(on_path).resolve().parent.parent
    elif Path("/usr/local/cuda").is_dir():
        home = Path("/usr/local/cuda")
    nvcc = run_program([str(home / "bin" / "nvcc") if home else "nvcc", "-V"])
    if nvcc.value is not None:
        release = re.search(r"release (\S+?),", nvcc.value)
        nvcc = Fact(f"CUDA {release[1]}" if release else nvcc.value.splitlines()[-1])
    compiler = run_program([os.environ.get("CXX", "c++"), "--version"])
    return {
        "compiler": Fact(compiler.value.splitlines()[0]) if compiler.value else compiler,
        "cuda.compiler": nvcc,
        "cuda.home": Fact(str(home) if home else None, "" if home else "not found"),
        "detectron2.arch": _arch_flags("detectron2", home),
        "torchvision.arch": _arch_flags("torchvision", home),
        "TORCH_CUDA_ARCH_LIST": Fact(os.environ.get("TORCH_CUDA_ARCH_LIST", "<not set>")),
        "DETECTRON2_ENV_MODULE": Fact(os.environ.get("DETECTRON2_ENV_MODULE", "<not set>")),
    }


def _arch_flags(package: str, home: Path | None) -> Fact:
    """Which GPU architectures a package's compiled file holds code for, as CUDA's cuobjdump lists them."""
    folder = package_folder(package)
    files = sorted(folder.glob("_C*.so")) if folder is not None else []
    if not files:
        return Fact(None, "no compiled file")
    next_to_nvcc = home / "bin" / "cuobjdump" if home else None
    tool = str(next_to_nvcc) if next_to_nvcc and next_to_nvcc.is_file() else "cuobjdump"
    if shutil.which(tool) is None:
        return Fact(None, "cuobjdump, which lists them, is not installed")
    listed = run_program([tool, "--list-elf", str(files[0])])
    if listed.value is None:
        return listed
    found = {int(number) for number in re.findall(r"\.sm_(\d+)", listed.value)}
    text = ", ".join(f"{number // 10}.{number % 10}" for number in sorted(found))
    return Fact(text or None, "" if text else "it holds no GPU code")


# ---- probes: packages ------------------------------------------------------------------------------------------------

_OPENCV = ("opencv-python", "opencv-contrib-python")
"""Distributions that bring ``cv2``, each also with ``-headless`` behind."""


def package_facts() -> Facts:
    """Collect versions and folders of the packages that matter, and the state of the installed RoIAlign."""
    package = Path(proxydet.__file__).parent
    revision = commit_of(package)
    facts: Facts = {
        "python": Fact(sys.version.replace("\n", "")),
        "proxydet": Fact(f"{__version__} @{package}" + (f", {revision}" if revision else "")),
    }
    for key in ("numpy", "Pillow", "fvcore", "iopath", "cv2", "torch", "torchvision", "detectron2"):
        facts[key] = installed_version("PIL" if key == "Pillow" else key)
    for key in ("numpy", "Pillow", "fvcore", "iopath", "cv2"):
        names = [f"{n}{h}" for n in _OPENCV for h in ("-headless", "")] if key == "cv2" else [key]
        found = {name: version for name in names if (version := distribution_version(name))}
        if found and facts[key].value is not None:
            listed = ", ".join(f"{name} {version}" for name, version in found.items())
            problem = f"several packages write the same files: {listed}" if len(found) > 1 else ""
            facts[key] = Fact(next(iter(found.values())), problem)

    # What torch's version file states is known even where torch does not load.
    folder = package_folder("torch")
    stated = {} if folder is None else _constants(folder / "version.py")
    if "debug" in stated:
        facts["torch.debug"] = Fact(str(bool(stated["debug"])))
    if "cuda" in stated:
        cuda = stated["cuda"]
        facts["torch.cuda"] = Fact(str(cuda)) if cuda else Fact(None, "built without CUDA")

    folder = package_folder("detectron2")
    if folder is None:
        facts |= dict.fromkeys(
            ("detectron2._C", "roi_align"), Fact(None, "detectron2 is not installed")
        )
    else:
        built = sorted(path.name for path in folder.glob("_C*") if path.suffix in {".so", ".pyd"})
        facts["detectron2._C"] = Fact(built[0] if built else "not built")
        files = roi_align_files()
        try:
            status = patch_status(files[0])
        except (RuntimeEnvironmentError, OSError) as error:
            facts["roi_align"] = Fact(None, str(error))
        else:
            problems = [] if status.state in {"original", "applied"} else [status.reason]
            if status.stale_bytecode:
                problems.append("Python runs stale bytecode, compiled from another source")
            if len(files) > 1:
                problems.append(f"{len(files)} copies of detectron2 are on Python's path")
            facts["roi_align"] = Fact(f"{status.state} @{status.file}", "; ".join(problems))
    facts["dependencies"] = _dependencies_fact()
    return facts


def _dependencies_fact() -> Fact:
    """Which of proxydet's own requirements are not installed at all."""
    try:
        required = metadata.requires("proxydet") or []
    except metadata.PackageNotFoundError:
        return Fact(None, "proxydet itself is not installed, only on Python's path")
    always = (line for line in required if not re.search("extra ==|python_version", line))
    names = [re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0] for line in always]
    missing = [name for name in names if distribution_version(name) is None]
    problem = f"not installed: {', '.join(missing)}" if missing else ""
    return Fact(f"{len(names) - len(missing)} of {len(names)} installed", problem)


def installed_version(name: str) -> Fact:
    """Return version and folder of a package, by its name on import: ``"2.15.0+cu132 @/.../torch"``.

    The version is what its ``version.py`` or ``__init__.py`` states, else that of its metadata.
    """
    folder = package_folder(name)
    if folder is None:
        return Fact(None, "not installed")
    for file in (folder / "version.py", folder / "__init__.py"):
        version = _constants(file).get("__version__")
        if isinstance(version, str):
            return Fact(f"{version} @{folder}")
    for distribution in metadata.packages_distributions().get(name, []):
        return Fact(f"{metadata.version(distribution)} @{folder}")
    return Fact(f"unknown @{folder}", "its files do not state its version")


def _constants(file: Path) -> dict[str, object]:
    """The names that a Python file gives constants at its top level; empty where it cannot be read as one."""
    if not file.is_file():
        return {}
    try:
        module = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return {}
    found: dict[str, object] = {}
    for node in module.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Constant):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {t.id: node.value.value for t in targets if isinstance(t, ast.Name)}
    return found


def commit_of(folder: Path) -> str | None:
    """Return the commit of the source tree that holds a folder, and whether there are changes; None outside of one."""
    if "site-packages" in folder.parts or "dist-packages" in folder.parts:
        return None
    head = run_program(["git", "-C", str(folder), "rev-parse", "HEAD"])
    if head.value is None:
        return None
    changes = run_program(["git", "-C", str(folder), "status", "--porcelain", "--", "."])
    return f"commit {head.value}" + (" and uncommitted changes" if changes.value else "")


# ---- probes: the computer --------------------------------------------------------------------------------------------

_GIB = 2**30

VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "PYTHONHASHSEED",
    "PYTHONPATH",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
)
"""Environment variables that change which code runs, or how."""

_SCHEDULERS = {
    "SLURM_JOB_ID": "SLURM",
    "PBS_JOBID": "PBS",
    "LSB_JOBID": "LSF",
    "JOB_ID": "Grid Engine",
    "TORCHELASTIC_RUN_ID": "torchrun",
}

_SLURM_DETAILS = ("SLURM_JOB_NUM_NODES", "SLURM_NTASKS", "SLURM_GPUS_ON_NODE")


def machine_facts(data_root: Path, root: Path = Path("/")) -> Facts:
    """Collect the facts of this computer and of the job that this process belongs to.

    Args:
        data_root: The folder of the data sets, or one above it: whose disk is measured.
        root: The root of the file system (tests use another).
    """

    def read(name: str) -> str:
        path = root / name
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

    model = re.search(r"^model name\s*:\s*(.+)$", read("proc/cpuinfo"), re.MULTILINE)
    cpu = model[1].strip() if model else platform.processor() or platform.machine()

    total = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else total
    cores = f"{usable} of {total}" if usable != total else str(total)
    quota = read("sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0] != "max":
        cores += f", limited to {int(quota[0]) / int(quota[1]):g} by its control group"

    unknown = Fact(None, "the system does not report it")
    memory = unknown
    kib = dict(re.findall(r"^(MemTotal|MemAvailable):\s*(\d+)", read("proc/meminfo"), re.MULTILINE))
    if "MemTotal" in kib:
        gib = {name: int(size) / 2**20 for name, size in kib.items()}
        text = f"{gib['MemTotal']:.1f} GiB, {gib['MemAvailable']:.1f} GiB available"
        for limit in ("memory.max", "memory/memory.limit_in_bytes"):
            size = read(f"sys/fs/cgroup/{limit}").strip()
            if size.isdigit() and int(size) / _GIB < gib["MemTotal"]:
                text += f", limited to {int(size) / _GIB:.1f} GiB by its control group"
                break
        memory = Fact(text)

    container = os.environ.get("container") or "none found"  # noqa: SIM112 - its name
    if "APPTAINER_NAME" in os.environ or "SINGULARITY_NAME" in os.environ:
        container = "Apptainer"
    elif "KUBERNETES_SERVICE_HOST" in os.environ:
        container = "Kubernetes"
    elif (root / ".dockerenv").exists():
        container = "Docker"
    elif (root / "run/.containerenv").exists():
        container = "Podman"

    job = [f"{name} {os.environ[key]}" for key, name in _SCHEDULERS.items() if key in os.environ]
    if "SLURM_JOB_ID" in os.environ:
        job += [f"{key}={os.environ[key]}" for key in _SLURM_DETAILS if key in os.environ]
    variables = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    return {
        "platform": Fact(sys.platform),
        "system": Fact(platform.platform()),
        "cpu": Fact(cpu) if cpu else unknown,
        "cpu.cores": Fact(cores),
        "memory": memory,
        "disk": _disk(data_root),
        "container": Fact(container),
        "scheduler": Fact(", ".join(job) or "none found"),
        "variables": Fact(", ".join(variables) or "none set"),
    }


def _disk(folder: Path) -> Fact:
    existing = folder.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        usage = shutil.disk_usage(existing)
    except OSError as error:
        return Fact(None, f"{existing}: {error.strerror}")
    missing = "" if existing == folder.absolute() else f" (not there yet; of {existing})"
    free, size = usage.free / _GIB, usage.total / _GIB
    return Fact(f"{folder}{missing}: {free:.1f} GiB free of {size:.1f} GiB")
