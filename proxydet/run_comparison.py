"""What differed between two runs, the likeliest causes first.

The rank of a difference is how directly it acts on the numbers: other inputs or another configuration change every
step; another library, GPU or operator changes last bits that grow over the steps; the machine's name or memory
change nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from proxydet.inspection.report import EnvironmentReport
from proxydet.manifest import RunManifest, read_run_records

Suspicion = Literal["decides results", "changes last bits", "unlikely", "harmless"]
RANKS: tuple[Suspicion, ...] = ("decides results", "changes last bits", "unlikely", "harmless")
"""How much a difference explains, the most first."""

_ABSENT = "(absent)"

_Judge = Callable[[str], tuple[Suspicion, str]]

# What a configuration key decides, by its first words; anything else decides results.
_CONFIGURATION: tuple[tuple[str, Suspicion, str], ...] = (
    ("training.log", "harmless", "it only says what is written down"),
    ("training.checkpoints", "harmless", "it only says what is kept"),
    ("training.evaluation", "unlikely", "it decides when is evaluated, not how is trained"),
    ("training.precision", "changes last bits", "other number formats round differently"),
    ("evaluation", "unlikely", "it does not take part in training"),
    ("results", "harmless", "it is a file's place; what counts is its digest"),
    ("scoring.bootstrap", "harmless", "it only makes the intervals"),
    ("scoring.confidence", "harmless", "it only makes the intervals"),
    ("scoring.seed", "harmless", "it only makes the intervals"),
    ("scoring.engine", "changes last bits", "the engines agree but for rounding"),
    ("scoring.batch_size", "changes last bits", "images of other sizes are padded together"),
)

_ENVIRONMENT: dict[str, tuple[Suspicion, str]] = {
    "gpu.count": ("decides results", "the batch is spread and drawn otherwise"),
    "gpu.names": ("changes last bits", "another GPU takes other kernels"),
    "gpu.tf32": ("changes last bits", "convolutions round differently"),
    "torch": ("changes last bits", "kernels and the order of sums differ between versions"),
    "torchvision": ("changes last bits", "RoIAlign and NMS are its operators"),
    "torch.cuda": ("changes last bits", "its libraries compute"),
    "cudnn": ("changes last bits", "its convolutions compute"),
    "nccl": ("changes last bits", "it adds gradients across GPUs"),
    "torch.built_with": ("changes last bits", "on a CPU its libraries compute"),
    "roi_align": ("changes last bits", "the installed operator differs; the modes replace it"),
    "detectron2": ("changes last bits", "layers and box arithmetic are its"),
    "variables": ("changes last bits", "they choose code paths"),
    "cpu": ("changes last bits", "on a CPU, other vector instructions add in another order"),
    "cpu.cores": ("changes last bits", "on a CPU, sums are split over its cores"),
    "numpy": ("unlikely", "its seeded stream is the same in all versions"),
    "Pillow": ("unlikely", "it decodes and resizes; the versions tested agree"),
    "driver": ("unlikely", "kernels come with torch"),
}
_ELSEWHERE: tuple[Suspicion, str] = ("harmless", "it changes no number")


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One thing that differed."""

    key: str
    """Where: ``configuration.seed``, ``digests.vocabulary``, ``environment.cudnn``."""

    first: str
    """Its value in the first run."""

    second: str
    """Its value in the second run."""

    suspicion: Suspicion
    """How much it explains."""

    reason: str
    """Why."""


@dataclass(frozen=True, kw_only=True)
class RunComparison:
    """What differed between two runs."""

    differences: tuple[Difference, ...]
    """The likeliest causes first."""

    first_divergence: int | None
    """Iteration of the first record whose losses differ; None where none does."""

    compared_records: int
    """Records of losses that both runs have."""

    conclusion: str
    """What to suspect, one or two sentences."""


def compare_runs(first: Path, second: Path) -> RunComparison:
    """Compare what two runs recorded about themselves.

    Args:
        first: A run folder.
        second: Another.

    Returns:
        The differences, ranked, and where the losses part.

    Raises:
        InputError: A folder does not hold the records of a run.
    """
    one, other = read_run_records(first), read_run_records(second)
    found = [*_manifest_differences(one[0], other[0]), *_environment_differences(one[1], other[1])]
    ranked = tuple(sorted(found, key=lambda d: RANKS.index(d.suspicion)))
    divergence, compared = _first_divergence(first, second)
    return RunComparison(
        differences=ranked,
        first_divergence=divergence,
        compared_records=compared,
        conclusion=_conclude(ranked, divergence, compared, {one[0].mode, other[0].mode}),
    )


def _manifest_differences(first: RunManifest, second: RunManifest) -> Iterator[Difference]:
    yield from _compare("digests", first.digests, second.digests, _always("it is another input"))
    seeds = _always("every random number derives from it")
    run = _of_run
    if first.kind == second.kind == "evaluation":
        seeds, run = _of_resamples, _of_evaluation
    yield from _compare("seeds", first.seeds, second.seeds, seeds)
    yield from _compare("", _one(first), _one(second), run)
    yield from _compare(
        "configuration", _flat(first.configuration), _flat(second.configuration), _of_configuration
    )
    yield from _compare("git", first.git, second.git, _of_source)
    yield from _compare("packages", first.packages, second.packages, lambda _: _ELSEWHERE)


def _environment_differences(
    first: EnvironmentReport, second: EnvironmentReport
) -> Iterator[Difference]:
    yield from _compare(
        "environment",
        {field.key: field.value for field in first.fields},
        {field.key: field.value for field in second.fields},
        lambda key: _ENVIRONMENT.get(key, _ELSEWHERE),
    )


def _compare(
    prefix: str, first: Mapping[str, object], second: Mapping[str, object], judge: _Judge
) -> Iterator[Difference]:
    for key in sorted({*first, *second}):
        values = [str(side.get(key, _ABSENT)) for side in (first, second)]
        if values[0] != values[1]:
            suspicion, reason = judge(key)
            yield Difference(
                key=f"{prefix}.{key}" if prefix else key,
                first=values[0],
                second=values[1],
                suspicion=suspicion,
                reason=reason,
            )


def _one(manifest: RunManifest) -> dict[str, object]:
    return {
        "kind": manifest.kind,
        "mode": manifest.mode,
        "world_size": manifest.world_size,
        "proxydet": manifest.proxydet,
    }


def _of_run(key: str) -> tuple[Suspicion, str]:
    if key == "mode":
        return "changes last bits", "published rounds the inputs of RoIAlign, off adds in any order"
    reasons = {
        "kind": "the runs did different things",
        "world_size": "the batch is spread and drawn otherwise",
        "proxydet": "the code differs",
    }
    return "decides results", reasons[key]


def _of_evaluation(key: str) -> tuple[Suspicion, str]:
    if key == "world_size":
        return "harmless", "results are the same for any number of processes"
    return _of_run(key)


def _of_resamples(_key: str) -> tuple[Suspicion, str]:
    return "harmless", "it only makes the intervals"


def _of_configuration(key: str) -> tuple[Suspicion, str]:
    for prefix, suspicion, reason in _CONFIGURATION:
        if key == prefix or key.startswith(f"{prefix}."):
            return suspicion, reason
    return "decides results", "the runs were told different things"


def _of_source(key: str) -> tuple[Suspicion, str]:
    if key.startswith("proxydet."):
        return "decides results", "the code differs"
    return "unlikely", "the working folder's own code, where it takes part"


def _always(reason: str) -> _Judge:
    return lambda _key: ("decides results", reason)


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            flat |= _flat(item, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = item
    return flat


def _first_divergence(first: Path, second: Path) -> tuple[int | None, int]:
    """Iteration of the first common record with other losses, and the number of common records."""
    losses = [_losses(folder / "metrics.jsonl") for folder in (first, second)]
    common = sorted(losses[0].keys() & losses[1].keys())
    for iteration in common:
        if not _equal(losses[0][iteration], losses[1][iteration]):
            return iteration, len(common)
    return None, len(common)


def _losses(path: Path) -> dict[int, dict[str, float]]:
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    # A run that was killed may have left half a line at the end.
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return {record["iteration"]: record["losses"] for record in records if "losses" in record}


def _equal(first: Mapping[str, float], second: Mapping[str, float]) -> bool:
    return first.keys() == second.keys() and all(
        value == second[name] or (math.isnan(value) and math.isnan(second[name]))
        for name, value in first.items()
    )


def _conclude(
    ranked: tuple[Difference, ...], divergence: int | None, compared: int, modes: set[str]
) -> str:
    if compared and divergence is None:
        return f"The losses of all {compared} common records are equal."
    parted = f"The losses part at the record of iteration {divergence}. " if compared else ""
    suspects = [d.key for d in ranked if d.suspicion == "decides results"]
    if suspects:
        return f"{parted}The first suspects decide results: {', '.join(suspects[:3])}."
    suspects = [d.key for d in ranked if d.suspicion == "changes last bits"]
    if suspects:
        return f"{parted}What differs changes last bits, which grow with the steps: {', '.join(suspects[:3])}."
    if modes == {"strict"}:
        return f"{parted}Nothing recorded explains a difference: in mode strict that is a bug to report."
    return (
        f"{parted}Nothing recorded explains a difference; outside mode strict, sums in changing order do: "
        "run: proxydet verify determinism"
    )
