"""What differed between two runs, the likeliest causes first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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

_PATH: Suspect = ("harmless", "it is a file's path; its digest counts")
_SPREAD: Suspect = ("decides results", "the batch is spread and drawn differently")
_INTERVALS: Suspect = ("harmless", "only the confidence intervals use it")

# By the first words of a configuration key; any other key decides results.
_TRAINING: dict[str, Suspect] = {
    "data.cache": ("harmless", "it is a folder's path; the digests show what was read"),
    "data.description": ("unlikely", "the digests show which annotations were read"),
    "data.prefetch": ("harmless", "batches are the same with any"),
    "data.test_longest_side": ("unlikely", "training does not use it"),
    "data.test_shortest_side": ("unlikely", "training does not use it"),
    "data.worker_timeout_s": ("harmless", "it only sets a time limit"),
    "data.workers": ("harmless", "batches are the same with any number"),
    "evaluation": ("unlikely", "training does not use it"),
    "inference": ("unlikely", "training does not use it"),
    "training.checkpoints": ("harmless", "it only sets what is kept"),
    "training.device": ("changes last bits", "other kernels sum in another order"),
    "training.evaluation": ("unlikely", "it sets when to evaluate, not how to train"),
    "training.log": ("harmless", "it only sets what is logged"),
    "training.precision": ("changes last bits", "other number formats round differently"),
    "training.threads": ("changes last bits", "on a CPU, sums are split over threads"),
    "training.weights": _PATH,
}
_EVALUATION: dict[str, Suspect] = {
    "results": _PATH,
    "scoring.batch_size": ("changes last bits", "images of other sizes are padded together"),
    "scoring.bootstrap": _INTERVALS,
    "scoring.confidence": _INTERVALS,
    "scoring.engine": ("changes last bits", "the engines differ by rounding only"),
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
    "gpu.names": ("changes last bits", "another GPU uses other kernels"),
    "gpu.tf32": ("changes last bits", "convolutions round differently"),
    "torch": ("changes last bits", "kernels and the order of sums differ between versions"),
    "torchvision": ("changes last bits", "RoIAlign and NMS are its operators"),
    "torch.cuda": ("changes last bits", "its libraries run the computations"),
    "cudnn": ("changes last bits", "it runs the convolutions"),
    "nccl": ("changes last bits", "it adds gradients across GPUs"),
    "torch.built_with": ("changes last bits", "on a CPU its libraries compute"),
    "roi_align": ("changes last bits", "the installed operator differs; the modes replace it"),
    "detectron2": ("changes last bits", "layers and box arithmetic come from it"),
    "variables": ("changes last bits", "they select code paths"),
    "cpu": ("changes last bits", "on a CPU, other vector instructions sum in another order"),
    "cpu.cores": ("changes last bits", "on a CPU, sums are split over its cores"),
    "numpy": ("unlikely", "its seeded stream is the same in all versions"),
    "Pillow": ("unlikely", "it decodes and resizes; only 13.0.0 was measured"),
    "driver": ("unlikely", "the kernels come with torch"),
}
_ELSEWHERE: Suspect = ("harmless", "it changes no number")

_IN_MANIFEST = frozenset({"seed", "reproducibility"})
"""Keys of a training's configuration that are its seeds and its mode, too."""

_NEVER_ALIKE = frozenset({"disk", "proxydet"})
"""Fields of the environment that differ between any two runs (free space), or are in the manifest too."""


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
        The differences, ranked, and where the losses diverge.

    Raises:
        InputError: A folder does not hold the records of a run.
    """
    (manifest, report), (other_manifest, other_report) = map(read_run_records, (first, second))
    found = list(_manifest_differences(manifest, other_manifest))
    same_mode = manifest.mode == other_manifest.mode
    found += _environment_differences(report, other_report, same_mode=same_mode)
    ranked = tuple(sorted(found, key=lambda d: RANKS.index(d.suspicion)))
    losses, other_losses = (_losses(folder_of(run)) for run in (first, second))
    common = sorted(losses.keys() & other_losses.keys())
    divergence = next((i for i in common if not _equal(losses[i], other_losses[i])), None)

    suspects = ""
    for suspicion, text in (
        ("decides results", "The first suspects decide results"),
        ("changes last bits", "What differs changes last bits, which grow with the steps"),
    ):
        keys = [d.key for d in ranked if d.suspicion == suspicion]
        if keys:
            suspects = f"{text}: {', '.join(keys[:3])}."
            break
    if divergence is not None:
        conclusion = f"The losses diverge at the record of iteration {divergence}. "
        if suspects:
            conclusion += suspects
        elif {manifest.mode, other_manifest.mode} == {"strict"}:
            conclusion += "Nothing recorded explains it: in mode strict that is a bug to report."
        else:
            conclusion += (
                "Nothing recorded explains it; outside mode strict, sums in changing order do: "
                "run: proxydet verify determinism"
            )
    elif common:
        conclusion = f"The losses of all {len(common)} common records are equal."
        end, other_end = sorted((max(losses), max(other_losses)))
        if end != other_end:
            conclusion += f" The records of one run end at iteration {end}, those of the other at {other_end}."
    else:
        conclusion = suspects or "Nothing recorded that acts on results differs."
        if manifest.kind == other_manifest.kind == "training":
            conclusion = f"The runs recorded no losses of the same iterations. {conclusion}"
    return RunComparison(
        differences=ranked,
        first_divergence=divergence,
        compared_records=len(common),
        conclusion=conclusion,
    )


def _manifest_differences(first: RunManifest, second: RunManifest) -> Iterator[Difference]:
    evaluations = first.kind == second.kind == "evaluation"
    run = dict(_RUN)
    source = first.git.get("proxydet.source")
    if source is not None and source == second.git.get("proxydet.source"):
        run["proxydet"] = "harmless", "the files of the package are the same"
    seed: Suspect = "decides results", "every random number derives from it"
    if evaluations:
        seed = _INTERVALS
        run["world_size"] = "harmless", "results are the same for any number of processes"

    def of_setting(key: str) -> Suspect:
        for prefix, suspect in (_EVALUATION if evaluations else _TRAINING).items():
            if key == prefix or key.startswith(f"{prefix}."):
                return suspect
        return "decides results", "the runs had different settings"

    def of_source(key: str) -> Suspect:
        if key.startswith("proxydet."):
            return run["proxydet"]
        return "unlikely", "the working folder's own code, where a run uses it"

    def settings(manifest: RunManifest) -> dict[str, object]:
        hidden = _IN_MANIFEST if manifest.kind == "training" else frozenset()
        flat = _flat(manifest.configuration)
        return {key: value for key, value in flat.items() if key not in hidden}

    def of_package(key: str) -> Suspect:
        # Those that compute are fields of the environment, too.
        return _ENVIRONMENT.get("Pillow" if key == "pillow" else key, _ELSEWHERE)

    another: Suspect = "decides results", "it is another input"
    yield from _compare("digests", first.digests, second.digests, lambda _: another)
    yield from _compare("seeds", first.seeds, second.seeds, lambda _: seed)
    own, other = ({key: getattr(side, key) for key in run} for side in (first, second))
    yield from _compare("", own, other, run.__getitem__)
    yield from _compare("configuration", settings(first), settings(second), of_setting)
    yield from _compare("git", first.git, second.git, of_source)
    yield from _compare("packages", first.packages, second.packages, of_package)


def _environment_differences(
    first: EnvironmentReport, second: EnvironmentReport, *, same_mode: bool
) -> Iterator[Difference]:
    def comparable(field: Field) -> str | None:
        """The part of a value that matters: not where a package lies, nor how much memory was free."""
        if field.value is None:
            return None
        if field.key == "memory":
            return field.value.split(",")[0]
        if field.key == "variables" and not same_mode:
            # The modes set this one themselves.
            parts = field.value.split(", ")
            kept = [part for part in parts if not part.startswith(f"{CUBLAS_VARIABLE}=")]
            return ", ".join(kept) or "none set"
        return field.value.split(" @")[0]

    one, other = ({f.key: comparable(f) for f in report.fields} for report in (first, second))
    # A quick report did not ask torch: what it lacks is not a difference.
    keys = one.keys() & other.keys() if first.quick or second.quick else one.keys() | other.keys()
    one, other = ({k: side[k] for k in keys - _NEVER_ALIKE if k in side} for side in (one, other))
    yield from _compare("environment", one, other, lambda key: _ENVIRONMENT.get(key, _ELSEWHERE))


def _compare(
    prefix: str,
    first: Mapping[str, object],
    second: Mapping[str, object],
    judge: Callable[[str], Suspect],
) -> Iterator[Difference]:
    for key in sorted({*first, *second}):
        one, other = (str(side.get(key, "(absent)")) for side in (first, second))
        if one != other:
            suspicion, reason = judge(key)
            name = f"{prefix}.{key}" if prefix else key
            yield Difference(key=name, first=one, second=other, suspicion=suspicion, reason=reason)


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            flat |= _flat(item, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = item
    return flat


def _losses(folder: Path) -> dict[int, dict[str, float]]:
    return {
        record["iteration"]: record["losses"]
        for record in JsonLines(folder / "metrics.jsonl").read()
        if isinstance(record.get("iteration"), int) and isinstance(record.get("losses"), dict)
    }


def _equal(first: Mapping[str, object], second: Mapping[str, object]) -> bool:
    # NaN, which differs from itself, is the same in both.
    return first.keys() == second.keys() and all(
        value == second[name] or (value != value and second[name] != second[name])
        for name, value in first.items()
    )
