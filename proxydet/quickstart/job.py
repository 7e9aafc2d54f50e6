"""Make a data set, train on it, evaluate base and novel classes, predict other classes, write a report.

Every step goes through the function that the command for real data uses, so what works here works there.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from proxydet.data.synthetic import SyntheticConfig, make_dataset
from proxydet.detections import Detections
from proxydet.detector import Detector
from proxydet.errors import InputError
from proxydet.evaluation.detector_evaluation import evaluate
from proxydet.evaluation.report import GroupScore, Report
from proxydet.files import Lock, read_json, sweep, write_json
from proxydet.recipes import RunConfig, get_recipe
from proxydet.reporting import SILENT, Progress
from proxydet.training.runfolder import RunFolder
from proxydet.training.train import train

logger = logging.getLogger(__name__)

SHOWN_IMAGES = 6
"""Number of validation images that are shown."""

SHOWN_ABOVE = 0.4
"""Score from which a detection is shown in a image."""


@dataclass(frozen=True)
class QuickstartFolder:
    """Names of the files of a quickstart.

    ::

        FOLDER/
        ├── data/            the drawn data set; data/description.toml describes it
        ├── run/             the run folder: configuration, losses, checkpoints, weights
        ├── evaluation/      predictions on the validation images, and results.json
        ├── predictions/     detections of other classes on validation images, and their images
        ├── seconds.json     how long each step took
        ├── quickstart.lock  while it runs
        └── report.html
    """

    root: Path

    @property
    def data(self) -> Path:
        """The drawn data set."""
        return self.root / "data"

    @property
    def description(self) -> Path:
        """Its description."""
        return self.data / "description.toml"

    @property
    def run(self) -> RunFolder:
        """The training run."""
        return RunFolder(self.root / "run")

    @property
    def evaluation(self) -> Path:
        """Predictions and scores."""
        return self.root / "evaluation"

    @property
    def predictions(self) -> Path:
        """Detections of other classes."""
        return self.root / "predictions"

    @property
    def seconds(self) -> Path:
        """How long each step took."""
        return self.root / "seconds.json"

    @property
    def report(self) -> Path:
        """The report."""
        return self.root / "report.html"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other quickstarts and comparisons out of the folder.

        Raises:
            LockedError: Another one is using it; nothing in it was changed.
            EnvironmentProblem: The folder cannot be written to.
        """
        lock = Lock(
            self.root / "quickstart.lock",
            subject=f"the folder {self.root}",
            hint="wait for it to end, or stop it; or use another folder: --output",
        )
        lock.acquire(wait=False)
        try:
            if lock.held:
                sweep(self.root, sole_writer=True)
            yield
        finally:
            lock.release()


@dataclass(frozen=True, kw_only=True)
class Example:
    """A validation image and what was found in it.

    Attributes:
        image: The file.
        detections: What was found, of all classes.
        asked: Class names that the second search looked for, not all of them in the image.
        found: What that search found.
    """

    image: Path
    detections: Detections
    asked: tuple[str, ...]
    found: Detections


@dataclass(frozen=True, kw_only=True)
class QuickstartResult:
    """What a quickstart made.

    Attributes:
        folder: Where everything is.
        evaluation: Scores on the validation images; the groups ``base`` and ``novel`` are the point.
        examples: Images with detections.
        seconds: Wall-clock time of each step, in order; a training that was stopped and resumed counts in all.
    """

    folder: QuickstartFolder
    evaluation: Report
    examples: tuple[Example, ...] = field(repr=False)
    seconds: dict[str, float]

    @property
    def base(self) -> GroupScore:
        """Mask AP of the base classes, as fractions."""
        return self.evaluation.main.group("base")

    @property
    def novel(self) -> GroupScore:
        """Mask AP of the novel classes, as fractions."""
        return self.evaluation.main.group("novel")


def quickstart_config(
    description: Path, *, seed: int, mixup: bool = True, recipe: RunConfig | None = None
) -> RunConfig:
    """Return a configuration for a drawn data set.

    Args:
        description: The data set.
        seed: Seed of weights, batches and augmentation.
        mixup: Whether the mixup branch is there; without it the detector is trained on boxes and image labels alone.
        recipe: What to start from; None takes the recipe ``quickstart``.
    """
    recipe = recipe or get_recipe("quickstart")
    return dataclasses.replace(
        recipe,
        seed=seed,
        data=dataclasses.replace(recipe.data, description=description),
        model=dataclasses.replace(recipe.model, mixup_branch=mixup),
    )


def run_quickstart(
    output: Path,
    *,
    seed: int = 7,
    drawn: SyntheticConfig | None = None,
    recipe: RunConfig | None = None,
    progress: Progress = SILENT,
) -> QuickstartResult:
    """Do the whole job; steps that are done already in the folder are not done again.

    Args:
        output: Folder for everything; made where absent.
        seed: Seed of the training. The data set has its own, in ``drawn``.
        drawn: What to draw; None takes the defaults.
        recipe: What the run's configuration starts from; None takes the recipe ``quickstart``.
        progress: Where progress is shown.

    Raises:
        ConfigError: The folder holds a run of another configuration.
        LockedError: Another quickstart, or a training, is using the folder.
        ProxydetError: As `make_dataset`, `train` and `evaluate`.
    """
    from proxydet.quickstart.page import write_page

    folder = QuickstartFolder(output.resolve())
    with folder.held():
        seconds = _read_seconds(folder)
        with _timed(seconds, "draw the data set", add=True):
            description = make_dataset(folder.data, drawn, progress=progress)
        config = quickstart_config(description, seed=seed, recipe=recipe)
        with _timed(seconds, "train", add=True):
            train(config, output=folder.run.root, progress=progress)
        write_json(folder.seconds, seconds)
        detector = Detector.from_run(folder.run.root, device=config.training.device)
        with _timed(seconds, "evaluate"):
            evaluation = score(detector, description, folder.evaluation, config, progress)
        with _timed(seconds, "predict"):
            examples = tuple(predict_examples(detector, folder, progress))
        result = QuickstartResult(
            folder=folder, evaluation=evaluation, examples=examples, seconds=seconds
        )
        write_page(result)
        return result


def score(
    detector: Detector, description: Path, output: Path, config: RunConfig, progress: Progress
) -> Report:
    """Evaluate a detector on a drawn data set's validation images and keep the scores next to the predictions."""
    report = evaluate(
        detector, description, output=output, config=config.evaluation, progress=progress
    )
    if report is None:
        raise RuntimeError("a quickstart runs in one process, which scores")
    write_json(output / "results.json", report.to_dict())
    return report


def predict_examples(
    detector: Detector, folder: QuickstartFolder, progress: Progress
) -> Iterator[Example]:
    """Run inference on images that training never saw: for all classes, and for a few names of one's own choice.

    The words are novel classes and one base class. They are embedded by the data set's text encoder, as those of
    ``proxydet predict --vocabulary`` are.
    """
    # One name an object reads better in an image; scores need every class of a region.
    detector = detector.with_settings(one_class_per_proposal=True)
    names, base = detector.vocabulary.names, detector.vocabulary.base
    novel = tuple(name for name, known in zip(names, base, strict=True) if not known)
    known = tuple(name for name, seen in zip(names, base, strict=True) if seen)
    asked = (*novel[:7], *known[:1])
    folder.predictions.mkdir(parents=True, exist_ok=True)
    images = _images_with(folder, set(novel))[:SHOWN_IMAGES]
    with progress.task("predicting", total=len(images), unit="images") as task:
        for image in images:
            example = Example(
                image=image,
                detections=detector.predict(image, score_threshold=SHOWN_ABOVE),
                asked=asked,
                found=detector.predict(image, list(asked), score_threshold=SHOWN_ABOVE),
            )
            found = {"vocabulary": asked, **example.found.to_dict()}
            write_json(folder.predictions / f"{image.stem}.json", found)
            task.advance()
            yield example


def _images_with(folder: QuickstartFolder, wanted: set[str]) -> list[Path]:
    """Return validation images, those with the most different wanted classes first."""
    annotations = json.loads((folder.data / "lvis_val.json").read_text(encoding="utf-8"))
    names = {entry["id"]: entry["name"] for entry in annotations["categories"]}
    classes: dict[int, set[str]] = {image["id"]: set() for image in annotations["images"]}
    for annotation in annotations["annotations"]:
        classes[annotation["image_id"]].add(names[annotation["category_id"]])
    order = sorted(classes, key=lambda image: (-len(classes[image] & wanted), image))
    files = {path.stem.lstrip("0"): path for path in (folder.data / "val").iterdir()}
    return [files[str(image)] for image in order]


def _read_seconds(folder: QuickstartFolder) -> dict[str, float]:
    """Return what earlier calls for the folder took; nothing for a new one."""
    try:
        content = read_json(folder.seconds, default={})
    except InputError as error:
        logger.warning("%s", error.message)
        return {}
    return {name: float(value) for name, value in content.items() if type(value) in (int, float)}


@contextmanager
def _timed(seconds: dict[str, float], step: str, *, add: bool = False) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[step] = time.perf_counter() - start + (seconds.get(step, 0.0) if add else 0.0)
