"""What differed between two runs, the likeliest causes first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from proxydet.files import JsonLines
from proxydet.manifest import RunManifest, folder_of, read_run_records
from proxydet.runtime.modes import CUBLAS_VARIABLE
from proxydet.runtime.report import EnvironmentReport, Field

Suspicion = Literal["decides results", "changes last bits", "unlikely", "harmless"]
RANKS: tuple[Suspicion, ...] = ("decides results", "changes last bits", "unlikely", "harmless")
"""How much a difference explains, the most first."""

Suspect = tuple[Suspicion, str]
"""A rank and its reason."""

_PLACE: Suspect = ("harmless", "it is a file's place; what counts is its digest")
_SPREAD: Suspect = ("decides results", "the batch is spread and drawn otherwise")
_INTERVALS: Suspect = ("harmless", "it only makes the intervals")

# What a configuration key decides, by its first words; anything else decides results.
_TRAINING: dict[str, Suspect] = {
    "data.cache": ("harmless", "it is a folder's place; the digests say what was read"),
    "data.description": ("unlikely", "the digests say which annotations were read"),
    "data.prefetch": ("harmless", "batches are the same with any"),
    "data.test_longest_side": ("unlikely", "it does not take part in training"),
    "data.test_shortest_side": ("unlikely", "it does not take part in training"),
    "data.worker_timeout_s": ("harmless", "it only says how long is waited"),
    "data.workers": ("harmless", "batches are the same with any number"),
    "evaluation": ("unlikely", "it does not take part in training"),
    "inference": ("unlikely", "it does not take part in training"),
    "training.checkpoints": ("harmless", "it only says what is kept"),
    "training.device": ("changes last bits", "other kernels add in another order"),
    "training.evaluation": ("unlikely", "it decides when is evaluated, not how is trained"),
    "training.log": ("harmless", "it only says what is written down"),
    "training.precision": ("changes last bits", "other number formats round differently"),
    "training.threads": ("changes last bits", "on a CPU, sums are split over threads"),
    "training.weights": _PLACE,
}
_EVALUATION: dict[str, Suspect] = {
    "results": _PLACE,
    "scoring.batch_size": ("changes last bits", "images of other sizes are padded together"),
    "scoring.bootstrap": _INTERVALS,
    "scoring.confidence": _INTERVALS,
    "scoring.engine": ("changes last bits", "the engines agree but for rounding"),
    "scoring.seed": _INTERVALS,
}

_RUN: dict[str, Suspect] = {
    "kind": ("decides results", "the runs did different things"),
    "mode": (
        "changes last bits",
        "published rounds the inputs of RoIAlign, off adds in any order on a GPU",
    ),
    "proxydet": ("decides results", "the code differs"),
    "world_size": _SPREAD,
}

_ENVIRONMENT: dict[str, Suspect] = {
    "gpu.count": _SPREAD,
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
    "Pillow": ("unlikely", "it decodes and resizes; only 13.0.0 was measured"),
    "driver": ("unlikely", "kernels come with torch"),
}
_ELSEWHERE: Suspect = ("harmless", "it changes no number")


class Suspects:
    """The ranks of differences between two runs.

    Args:
        first: What one run was made from.
        second: What the other was.
    """

    def __init__(self, first: RunManifest, second: RunManifest) -> None:
        self._evaluations = first.kind == second.kind == "evaluation"
        self._configuration = _EVALUATION if self._evaluations else _TRAINING
        sources = {manifest.git.get("proxydet.source") for manifest in (first, second)}
        self._same_source = len(sources) == 1 and None not in sources

    def of_digest(self, _key: str) -> Suspect:
        """Rank another input."""
        return "decides results", "it is another input"

    def of_seed(self, _key: str) -> Suspect:
        """Rank another seed."""
        if self._evaluations:
            return _INTERVALS
        return "decides results", "every random number derives from it"

    def of_run(self, key: str) -> Suspect:
        """Rank another kind, mode, number of processes or version of proxydet."""
        if key == "world_size" and self._evaluations:
            return "harmless", "results are the same for any number of processes"
        return self._of_code() if key == "proxydet" else _RUN[key]

    def of_configuration(self, key: str) -> Suspect:
        """Rank another value of the configuration, by its dotted key."""
        for prefix, suspect in self._configuration.items():
            if key == prefix or key.startswith(f"{prefix}."):
                return suspect
        return "decides results", "the runs were told different things"

    def of_source(self, key: str) -> Suspect:
        """Rank another state of a source tree."""
        if key.startswith("proxydet."):
            return self._of_code()
        return "unlikely", "the working folder's own code, where it takes part"

    def of_package(self, key: str) -> Suspect:
        """Rank another version of a package; those that compute are fields of the environment, too."""
        return self.of_environment("Pillow" if key == "pillow" else key)

    def of_environment(self, key: str) -> Suspect:
        """Rank another value of a field of the environment report."""
        return _ENVIRONMENT.get(key, _ELSEWHERE)

    def _of_code(self) -> Suspect:
        if self._same_source:
            return "harmless", "the files of the package are the same"
        return _RUN["proxydet"]


_ABSENT = "(absent)"

_SAID_ELSEWHERE = frozenset({"seed", "reproducibility"})
"""Keys of a training's configuration that are its seeds and its mode, too."""

_NO_LOSSES = "The runs recorded no losses of the same iterations. "
_NO_SUSPECT = "Nothing recorded that acts on results differs."

_NEVER_ALIKE = frozenset({"disk", "proxydet"})
"""Fields of the environment that differ between any two runs (free space), or stand in the manifest too."""


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
        first: A run folder, or a file in it.
        second: Another.

    Returns:
        The differences, ranked, and where the losses part.

    Raises:
        InputError: A folder does not hold the records of a run.
    """
    one, other = read_run_records(first), read_run_records(second)
    suspects = Suspects(one[0], other[0])
    found = [
        *_manifest_differences(one[0], other[0], suspects),
        *_environment_differences(
            one[1], other[1], suspects, one_mode=one[0].mode == other[0].mode
        ),
    ]
    ranked = tuple(sorted(found, key=lambda d: RANKS.index(d.suspicion)))
    losses = [_losses(folder_of(run) / "metrics.jsonl") for run in (first, second)]
    common = sorted(losses[0].keys() & losses[1].keys())
    divergence = next((i for i in common if not _equal(losses[0][i], losses[1][i])), None)
    if divergence is not None:
        cause = _suspicion(ranked) or _unexplained({one[0].mode, other[0].mode})
        conclusion = f"The losses part at the record of iteration {divergence}. {cause}"
    elif common:
        conclusion = _all_equal(losses, len(common))
    else:
        trained = {one[0].kind, other[0].kind} == {"training"}
        conclusion = f"{_NO_LOSSES if trained else ''}{_suspicion(ranked) or _NO_SUSPECT}"
    return RunComparison(
        differences=ranked,
        first_divergence=divergence,
        compared_records=len(common),
        conclusion=conclusion,
    )


def _all_equal(losses: Sequence[Mapping[int, object]], records: int) -> str:
    equal = f"The losses of all {records} common records are equal."
    first, last = sorted(max(side) for side in losses)
    if first == last:
        return equal
    return f"{equal} The records of one run end at iteration {first}, those of the other at {last}."


def _manifest_differences(
    first: RunManifest, second: RunManifest, suspects: Suspects
) -> Iterator[Difference]:
    yield from _compare("digests", first.digests, second.digests, suspects.of_digest)
    yield from _compare("seeds", first.seeds, second.seeds, suspects.of_seed)
    yield from _compare("", _one(first), _one(second), suspects.of_run)
    told = [_configuration(manifest) for manifest in (first, second)]
    yield from _compare("configuration", told[0], told[1], suspects.of_configuration)
    yield from _compare("git", first.git, second.git, suspects.of_source)
    yield from _compare("packages", first.packages, second.packages, suspects.of_package)


def _configuration(manifest: RunManifest) -> dict[str, object]:
    said = _SAID_ELSEWHERE if manifest.kind == "training" else frozenset()
    flat = _flat(manifest.configuration)
    return {key: value for key, value in flat.items() if key not in said}


def _environment_differences(
    first: EnvironmentReport, second: EnvironmentReport, suspects: Suspects, *, one_mode: bool
) -> Iterator[Difference]:
    values = [
        {field.key: _telling(field, one_mode=one_mode) for field in report.fields}
        for report in (first, second)
    ]
    common = values[0].keys() & values[1].keys()
    # A quick report did not ask torch: what it lacks is no difference.
    keys = common if first.quick or second.quick else values[0].keys() | values[1].keys()
    one, other = ({key: side[key] for key in keys - _NEVER_ALIKE if key in side} for side in values)
    yield from _compare("environment", one, other, suspects.of_environment)


def _telling(field: Field, *, one_mode: bool) -> str | None:
    """Return the part of a value that says something: not where a package lies, nor how much memory was free."""
    if field.value is None:
        return None
    if field.key == "memory":
        return field.value.split(",")[0]
    if field.key == "variables" and not one_mode:
        # The modes set this one themselves.
        parts = field.value.split(", ")
        return ", ".join(p for p in parts if not p.startswith(f"{CUBLAS_VARIABLE}=")) or "none set"
    return field.value.split(" @")[0]


def _compare(
    prefix: str,
    first: Mapping[str, object],
    second: Mapping[str, object],
    judge: Callable[[str], Suspect],
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


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            flat |= _flat(item, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = item
    return flat


def _losses(path: Path) -> dict[int, dict[str, float]]:
    return {
        record["iteration"]: record["losses"]
        for record in JsonLines(path).read()
        if isinstance(record.get("iteration"), int) and isinstance(record.get("losses"), dict)
    }


def _equal(first: Mapping[str, object], second: Mapping[str, object]) -> bool:
    # NaN, which differs from itself, is the same in both.
    return first.keys() == second.keys() and all(
        value == second[name] or (value != value and second[name] != second[name])
        for name, value in first.items()
    )


def _suspicion(ranked: tuple[Difference, ...]) -> str:
    """What to suspect first; empty where no difference acts on results."""
    suspects = [d.key for d in ranked if d.suspicion == "decides results"]
    if suspects:
        return f"The first suspects decide results: {', '.join(suspects[:3])}."
    suspects = [d.key for d in ranked if d.suspicion == "changes last bits"]
    if suspects:
        first = ", ".join(suspects[:3])
        return f"What differs changes last bits, which grow with the steps: {first}."
    return ""


def _unexplained(modes: set[str]) -> str:
    if modes == {"strict"}:
        return "Nothing recorded explains a difference: in mode strict that is a bug to report."
    return (
        "Nothing recorded explains a difference; outside mode strict, sums in changing order do: "
        "run: proxydet verify determinism"
    )
