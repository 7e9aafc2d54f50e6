"""The options of ``proxydet eval``, and the files that they mean."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from proxydet.errors import ConfigError, DataError, InputError

if TYPE_CHECKING:
    from proxydet.data.dataset import DatasetConfig
    from proxydet.evaluation.config import EvaluationConfig

PREDICTIONS = "predictions"
"""Folder below an evaluation's output that holds what the detector found."""


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What to evaluate, on what, and how."""

    run: Path | None
    weights: str | None
    model: str | None
    results: Path | None
    data: str | None
    split: str
    vocabulary: Path | None
    output: Path | None
    device: str
    gpus: int | None
    config: EvaluationConfig
    tta: bool = False

    def check(self) -> None:
        """Raise ConfigError where options contradict each other or something is missing."""
        if self.split not in ("val", "train"):
            raise ConfigError(
                f"--split is {self.split!r}; it can be val or train.",
                hint="to evaluate on other images, name their annotations as [val] in a dataset config",
            )
        if self.results is not None:
            self._check_scoring()
        if self.config.hierarchy is not None and not self.config.hierarchy.is_file():
            raise InputError(
                f"there is no class hierarchy {self.config.hierarchy}",
                hint="--hierarchy takes OpenImages' own file, challenge-2019-label500-hierarchy.json",
                path=self.config.hierarchy,
            )
        if self.results is not None and self.data is None:
            raise ConfigError(
                "--results need the data set that they are of.",
                hint="--data with an annotation file (JSON) or a dataset config (TOML)",
            )
        if self.results is None and self.vocabulary is not None and self.data is None:
            raise ConfigError("--vocabulary belongs to a data set.", hint="give --data too")

    def _detecting(self) -> list[str]:
        """Names of the given options that say how to detect, which has no part where results are there already."""
        options = {
            "--run": self.run is not None,
            "--weights": self.weights is not None,
            "--config": self.model is not None,
            "--device": self.device != "auto",
            "--gpus": self.gpus is not None,
            "--batch-size": self.config.batch_size != 1,
            "--tta": self.tta,
        }
        return [name for name, given in options.items() if given]

    def _check_scoring(self) -> None:
        given = self._detecting()
        if given:
            raise ConfigError(
                f"--results are scored as they are: {', '.join(given)} has no part in it.",
                hint="leave it out, or leave out --results to detect anew",
            )

    def check_comparison(self) -> None:
        """Raise ConfigError where the options are not those of a comparison."""
        others = {"--results": self.results, "--output": self.output}
        given = [name for name, value in others.items() if value is not None] + self._detecting()
        if given:
            raise ConfigError(
                f"--compare looks at results that are there, and writes no files: {', '.join(given)} has no part in it.",
                hint="make each result with a proxydet eval of its own, then compare the two folders",
            )
        if self.data is None:
            raise ConfigError(
                "--compare needs the data set that both results are of.",
                hint="--data with an annotation file (JSON) or a dataset config (TOML)",
            )

    def words(self) -> list[str]:
        """Return the options as words of a command line, for the processes that do the work together."""
        config = self.config
        given = {
            "--run": self.run,
            "--weights": self.weights,
            "--config": self.model,
            "--data": self.data,
            "--split": self.split,
            "--vocabulary": self.vocabulary,
            "--output": self.output,
            "--device": self.device,
            "--protocol": config.protocol,
            "--iou-type": ",".join(config.iou_types),
            "--engine": config.engine,
            "--bootstrap": config.bootstrap,
            "--hierarchy": config.hierarchy,
            "--batch-size": config.batch_size,
        }
        words = [
            word
            for key, value in given.items()
            if value not in (None, "")
            for word in (key, str(value))
        ]
        switches = {
            "--fixed": config.fixed,
            "--allow-outside": config.allow_outside,
            "--allow-duplicates": config.allow_duplicates,
            "--tta": self.tta,
        }
        return words + [key for key, on in switches.items() if on]

    def annotations_only(self) -> bool:
        """Whether ``--data`` names annotations (a JSON file, Pascal VOC) rather than a dataset config."""
        if self.data is None:
            return False
        place = Path(self.data)
        return _is_json(self.data) or place.is_dir() or place.suffix.lower() in (".xml", ".txt")

    def folder(self, dataset: str) -> Path:
        """Return where the files of the evaluation go."""
        if self.output is not None:
            return self.output
        place = f"{dataset}-{self.split}"
        if self.annotations_only():
            place = Path(self.data or "").name.split(".")[0]
        if self.run is not None:
            return self.run / "evaluation" / place
        if self.results is not None:
            return Path("evaluation") / f"{self.results.name.split('.')[0]}-{place}"
        return Path("evaluation") / f"{Path(self.weights or 'proxydet-r50-inl').stem}-{place}"


def results_of(place: Path) -> Path:
    """Return the results file that a path means: itself, or the one that an evaluation's folder holds or scored.

    Raises:
        InputError: There is none.
    """
    from proxydet.evaluation.records import recorded_results

    if not place.exists():
        raise InputError(
            f"there is no {place}",
            hint="give a results file, or the output folder of a finished proxydet eval",
            path=place,
        )
    if not place.is_dir():
        return place
    for file in (place / "predictions.json", place / PREDICTIONS / "predictions.json"):
        if file.is_file():
            return file
    recorded = recorded_results(place)
    if recorded is not None:
        return recorded
    raise InputError(
        f"{place} holds no finished predictions.",
        hint=_evaluations_below(place)
        or "give a results file, or the output folder of a finished proxydet eval",
        path=place,
    )


def _evaluations_below(place: Path) -> str:
    """Name a run's evaluations, each of which could be compared; empty where it has none."""
    from proxydet.paths import run_in

    found = sorted((run_in(place) / "evaluation").glob("*/results.json"))
    return (
        f"its evaluations are in {', '.join(str(file.parent) for file in found)}" if found else ""
    )


def read_description(options: EvalOptions) -> DatasetConfig:
    """Read the dataset config that was named, or that the run was trained with."""
    from proxydet.data.dataset import DatasetConfig

    path = _description_path(options)
    if not path.is_file():
        raise DataError(
            f"{path} is a folder, not a dataset config"
            if path.is_dir()
            else f"there is no dataset config {path}",
            hint="--data takes a TOML file, or the name of a prepared data set: proxydet data prepare --help",
            path=path,
        )
    return DatasetConfig.from_toml(path)


def _description_path(options: EvalOptions) -> Path:
    from proxydet.paths import datasets_folder, require_run

    if options.data is not None:
        path = Path(options.data)
        if path.suffix or path.exists():
            return path
        return datasets_folder() / f"{options.data}.toml"
    if options.run is not None:
        from proxydet.recipes import resolve_config

        config = require_run(options.run) / "config.yaml"
        found = resolve_config(None, config, []).data.description
        if found is not None:
            return found
    return datasets_folder() / "lvis.toml"


def _is_json(name: str) -> bool:
    return name.endswith((".json", ".json.gz"))
