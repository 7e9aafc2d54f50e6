"""What class-wise mixup brings: the quickstart with and without the mixup branch, on the same seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from proxydet.data.synthetic import SyntheticConfig, make_dataset
from proxydet.detector import Detector
from proxydet.errors import ConfigError
from proxydet.files import write_json
from proxydet.quickstart.job import QuickstartFolder, quickstart_config, score
from proxydet.recipes import RunConfig
from proxydet.reporting import SILENT, Progress
from proxydet.training.train import train
from proxydet.visualization.plots import paired_plot, svg_of
from proxydet.visualization.report import Report as Page
from proxydet.visualization.report import Section, Table, write_report

LEAST_SEEDS = 3
MEASURES = {
    "novel AP50": ("novel", "ap50"),
    "novel AP": ("novel", "ap"),
    "base AP50": ("base", "ap50"),
    "base AP": ("base", "ap"),
}


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One measure over all seeds, in percent; masks.

    Attributes:
        name: What is measured.
        with_mixup: One value a seed.
        without_mixup: One value a seed.
        difference: Mean over the seeds of with minus without.
        spread: Standard deviation of that difference over the seeds.
    """

    name: str
    with_mixup: tuple[float, ...]
    without_mixup: tuple[float, ...]
    difference: float
    spread: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The result of training with and without mixup.

    Attributes:
        seeds: Seeds of the trainings; both variants used each.
        measures: What was measured.
        report: The page that shows it.
    """

    seeds: tuple[int, ...]
    measures: tuple[Measure, ...]
    report: Path


def compare_mixup(
    output: Path,
    *,
    seeds: Sequence[int],
    drawn: SyntheticConfig | None = None,
    recipe: RunConfig | None = None,
    progress: Progress = SILENT,
) -> Comparison:
    """Train with and without the mixup branch on each seed, and compare the scores.

    Both variants of a seed start from the same weights and see the same batches. Runs that are finished already in
    the folder are not trained again.

    Args:
        output: Folder for everything.
        seeds: At least 3 different seeds.
        drawn: What to draw; None takes the defaults.
        recipe: What both configurations start from; None takes the recipe ``quickstart``.
        progress: Where progress is shown.

    Raises:
        ConfigError: There are fewer than 3 seeds, or some are the same.
        LockedError: Another comparison or quickstart is using the folder.
    """
    if len(set(seeds)) < max(LEAST_SEEDS, len(seeds)):
        raise ConfigError(
            f"A comparison needs at least {LEAST_SEEDS} different seeds, not {list(seeds)}.",
            hint="one pair of runs says little: the difference of two runs that differ by seed alone may be as large",
        )
    folder = QuickstartFolder(output.resolve())
    with folder.held():
        make_dataset(folder.data, drawn, progress=progress)
        values: dict[bool, list[dict[str, float]]] = {True: [], False: []}
        with progress.task("comparing", total=2 * len(seeds), unit="runs") as task:
            for seed in seeds:
                for mixup in (True, False):
                    config = quickstart_config(
                        folder.description, seed=seed, mixup=mixup, recipe=recipe
                    )
                    values[mixup].append(_run(folder, config, progress))
                    task.advance()
        measures = tuple(_measure(name, values) for name in MEASURES)
        report = _write_page(folder, tuple(seeds), measures)
        comparison = Comparison(seeds=tuple(seeds), measures=measures, report=report)
        write_json(folder.root / "comparison.json", {**asdict(comparison), "report": str(report)})
        return comparison


def _run(folder: QuickstartFolder, config: RunConfig, progress: Progress) -> dict[str, float]:
    variant = "with" if config.model.mixup_branch else "without"
    own = QuickstartFolder(folder.root / f"seed_{config.seed}_{variant}_mixup")
    train(config, output=own.run.root, progress=progress)
    detector = Detector.from_run(own.run.root, device=config.training.device)
    report = score(detector, folder.description, own.evaluation, config, progress)
    found = {}
    for measure, (group, field) in MEASURES.items():
        value: float | None = getattr(report.main.group(group), field)
        found[measure] = float("nan") if value is None else 100 * value
    return found


def _measure(name: str, values: dict[bool, list[dict[str, float]]]) -> Measure:
    with_mixup = tuple(run[name] for run in values[True])
    without_mixup = tuple(run[name] for run in values[False])
    differences = [a - b for a, b in zip(with_mixup, without_mixup, strict=True)]
    return Measure(
        name=name,
        with_mixup=with_mixup,
        without_mixup=without_mixup,
        difference=statistics.fmean(differences),
        spread=statistics.stdev(differences),
    )


def _write_page(
    folder: QuickstartFolder, seeds: tuple[int, ...], measures: tuple[Measure, ...]
) -> Path:
    rows = [
        (
            measure.name,
            statistics.fmean(measure.with_mixup),
            statistics.fmean(measure.without_mixup),
            measure.difference,
            measure.spread,
        )
        for measure in measures
    ]
    columns = ("masks, percent", "with mixup", "without", "difference", "its spread over seeds")
    pairs = {
        measure.name: list(zip(measure.without_mixup, measure.with_mixup, strict=True))
        for measure in measures
    }
    page = Page(
        title="Class-wise mixup: with and without",
        summary=(
            f"The quickstart's detector trained with and without the mixup branch on {len(seeds)} seeds "
            f"({', '.join(map(str, seeds))}); both variants of a seed share starting weights and batches. The spread "
            "is the standard deviation of the difference over the seeds: a mean difference well below it says nothing."
        ),
        facts=[
            (measure.name, f"{measure.difference:+.1f} ± {measure.spread:.1f}")
            for measure in measures
        ],
        sections=[
            Section(
                title="Difference",
                tables=[Table(columns=columns, rows=rows)],
                plots=[svg_of(paired_plot(pairs, ("without", "with"), label="percent"))],
            )
        ],
    )
    return write_report(page, folder.root / "comparison.html")
