"""How much a difference between two runs explains: by where it stands in their records, and why.

The rank of a difference is how directly it acts on the numbers: other inputs or another configuration change every
step; another library, GPU or operator changes last bits that grow over the steps; the machine's name or memory
change nothing.
"""

from __future__ import annotations

from typing import Literal

from proxydet.manifest import RunManifest

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
