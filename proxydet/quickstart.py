"""Make a data set, train on it, evaluate base and novel classes, predict other classes, write a report.

Every step goes through the function that the command for real data uses, so what works here works there.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shlex
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torchvision.ops import box_iou

from proxydet.data.synthetic import SyntheticConfig, make_dataset
from proxydet.detections import Detections
from proxydet.detector import Detector
from proxydet.errors import ConfigError, InputError
from proxydet.evaluation.detector_evaluation import evaluate
from proxydet.evaluation.evaluate import run_evaluation
from proxydet.evaluation.report import IOU_TYPE_NAMES, GroupScore, Report
from proxydet.evaluation.split import DescribedSplit
from proxydet.files import Lock, read_json, sweep, write_json
from proxydet.recipes import RunConfig, get_recipe
from proxydet.reporting import SILENT, Progress
from proxydet.training.runfolder import RunFolder
from proxydet.training.train import train
from proxydet.visualization.drawing import DrawnObject, draw_objects
from proxydet.visualization.plots import bar_plot, loss_plot, paired_plot, svg_of
from proxydet.visualization.report import CaptionedImage, Command, Section, Table, write_report
from proxydet.visualization.report import Report as Page

logger = logging.getLogger(__name__)

SHOWN_IMAGES = 6
"""Number of validation images that are shown."""

SHOWN_ABOVE = 0.3
"""Score from which a detection counts and is shown: the default of ``proxydet predict``."""

WELL_PLACED = 0.5
"""IoU from which a detection is of an annotated object."""


class QuickstartFolder:
    """Names of the files of a quickstart.

    ::

        FOLDER/
        ├── data/            the synthetic dataset; data/description.toml describes it
        ├── run/             the run folder: configuration, losses, checkpoints, weights
        ├── evaluation/      predictions on the validation images, and results.json
        ├── predictions/     detections of other classes on validation images, and their images
        ├── seconds.json     how long each step took
        ├── quickstart.lock  while it runs
        └── report.html
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.data = root / "data"
        self.description = self.data / "description.toml"
        self.run = RunFolder(root / "run")
        self.evaluation = root / "evaluation"
        self.predictions = root / "predictions"
        self.seconds = root / "seconds.json"
        self.report = root / "report.html"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other quickstarts and comparisons out of the folder.

        Raises:
            LockedError: Another one is using it; nothing in it was changed.
            RuntimeEnvironmentError: The folder cannot be written to.
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
class Annotated:
    """An annotated object of a validation image, and the label that the detector gives it.

    Attributes:
        name: Its class.
        box_xyxy: Its box, pixels.
        novel: Whether its class is novel.
        label: The label of the best detection of it; None where it was missed. A detection is of the object that its box
            overlaps most, and well placed where their IoU is above `WELL_PLACED`.
    """

    name: str
    box_xyxy: tuple[float, float, float, float]
    novel: bool
    label: str | None = None


@dataclass(frozen=True, kw_only=True)
class LabelAccuracy:
    """How many of some annotated objects were found, and of these, how many got the right label."""

    objects: int
    found: int
    right: int

    @classmethod
    def of(cls, objects: Sequence[Annotated]) -> LabelAccuracy:
        """Count right labels."""
        right = sum(item.label == item.name for item in objects)
        found = sum(item.label is not None for item in objects)
        return cls(objects=len(objects), found=found, right=right)

    @property
    def percent(self) -> str:
        """Right labels among those found as text, ``88.7%``; ``-`` where nothing was found."""
        return f"{self.right / self.found:.1%}" if self.found else "-"


@dataclass(frozen=True, kw_only=True)
class Example:
    """A validation image and what was found in it.

    Attributes:
        image: The file.
        annotated: What it holds.
        detections: What was found, of all classes.
        asked: Class names that the second search looked for, not all of them in the image.
        found: What that search found.
    """

    image: Path
    annotated: tuple[Annotated, ...]
    detections: Detections
    asked: tuple[str, ...]
    found: Detections


@dataclass(frozen=True, kw_only=True)
class QuickstartResult:
    """What a quickstart made.

    Attributes:
        folder: Where everything is.
        evaluation: Scores on the validation images; the groups ``base`` and ``novel`` are the point.
        coco: The same detections, scored by COCO's protocol.
        annotated: The objects of all validation images, with the labels that they got.
        examples: Images with detections.
        seconds: Wall-clock time of each step, in order; a training that was stopped and resumed counts in all.
    """

    folder: QuickstartFolder
    evaluation: Report
    coco: Report
    annotated: tuple[Annotated, ...] = field(repr=False)
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

    def labels(self, *, novel: bool) -> LabelAccuracy:
        """Right labels among the objects of novel or of base classes."""
        return LabelAccuracy.of([item for item in self.annotated if item.novel == novel])


def quickstart_config(
    description: Path, *, seed: int, mixup: bool = True, recipe: RunConfig | None = None
) -> RunConfig:
    """Return a configuration for a synthetic dataset.

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
    folder = QuickstartFolder(output.resolve())
    with folder.held():
        seconds: dict[str, float] = {}  # what earlier calls for the folder took, too
        try:
            content = read_json(folder.seconds, default={})
        except InputError as error:
            logger.warning("%s", error.message)
        else:
            seconds = {
                name: float(value) for name, value in content.items() if type(value) in (int, float)
            }
        with _timed(seconds, "draw the data set", add=True):
            description = make_dataset(folder.data, drawn, progress=progress)
        config = quickstart_config(description, seed=seed, recipe=recipe)
        with _timed(seconds, "train", add=True):
            train(config, output=folder.run.root, progress=progress)
        write_json(folder.seconds, seconds)
        detector = Detector.from_run(folder.run.root, device=config.training.device)
        with _timed(seconds, "evaluate"):
            evaluation = score(detector, description, folder.evaluation, config, progress)
            by_coco = dataclasses.replace(config.evaluation, protocol="coco", bootstrap=0)
            split = DescribedSplit.open(description, "val", protocol="coco", progress=progress)
            coco = run_evaluation(
                folder.evaluation / "predictions.json",
                split.truth,
                config=by_coco,
                groups=split.groups,
            ).report
        with _timed(seconds, "predict"):
            images = _labelled(detector, folder, progress)
            examples = tuple(_examples(detector, folder, images, progress))
        result = QuickstartResult(
            folder=folder,
            evaluation=evaluation,
            coco=coco,
            annotated=tuple(item for _, annotated, _ in images for item in annotated),
            examples=examples,
            seconds=seconds,
        )
        write_page(result)
        return result


def score(
    detector: Detector, description: Path, output: Path, config: RunConfig, progress: Progress
) -> Report:
    """Evaluate a detector on a synthetic dataset's validation images and keep the scores next to the predictions."""
    report = evaluate(
        detector, description, output=output, config=config.evaluation, progress=progress
    )
    if report is None:
        raise RuntimeError("a quickstart runs in one process, which scores")
    write_json(output / "results.json", report.to_dict())
    return report


def _labelled(
    detector: Detector, folder: QuickstartFolder, progress: Progress
) -> list[tuple[Path, tuple[Annotated, ...], Detections]]:
    """Run inference on the validation images as ``proxydet predict`` does, and compare the labels with the annotations.

    Each annotated object gets the label of the best well-placed detection of it.
    """
    content = json.loads((folder.data / "lvis_val.json").read_text(encoding="utf-8"))
    categories = {entry["id"]: entry for entry in content["categories"]}
    objects: dict[int, list[Annotated]] = {entry["id"]: [] for entry in content["images"]}
    for entry in content["annotations"]:
        category = categories[entry["category_id"]]
        x, y, width, height = entry["bbox"]
        box, novel = (x, y, x + width, y + height), category["frequency"] == "r"
        item = Annotated(name=category["name"], box_xyxy=box, novel=novel)
        objects[entry["image_id"]].append(item)
    files = [folder.data / "val" / entry["file_name"] for entry in content["images"]]
    with progress.task("predicting", total=len(files), unit="images") as task:
        found = detector.predict_batch(files, score_threshold=SHOWN_ABOVE)
        task.advance(len(files))
    images = []
    for file, annotated, detections in zip(files, objects.values(), found, strict=True):
        labels: dict[int | None, str] = {}
        for nearest, label in zip(_nearest(annotated, detections), detections.labels, strict=True):
            labels.setdefault(nearest, label)  # detections come best first
        labelled = (dataclasses.replace(x, label=labels.get(i)) for i, x in enumerate(annotated))
        images.append((file, tuple(labelled), detections))
    return images


def _nearest(annotated: Sequence[Annotated], detections: Detections) -> list[int | None]:
    """Return the number of the object that each detection is of; None where it is of none."""
    if not annotated or not len(detections):
        return [None] * len(detections)
    boxes_A4 = torch.tensor([item.box_xyxy for item in annotated])
    boxes_D4 = torch.tensor([item.box_xyxy for item in detections])
    iou_D, object_D = box_iou(boxes_D4, boxes_A4).max(dim=1)
    pairs = zip(iou_D.tolist(), object_D.tolist(), strict=True)
    return [index if iou > WELL_PLACED else None for iou, index in pairs]


def _examples(
    detector: Detector,
    folder: QuickstartFolder,
    images: list[tuple[Path, tuple[Annotated, ...], Detections]],
    progress: Progress,
) -> Iterator[Example]:
    """Choose the images with the most different novel classes, and search them for a few names of one's own choice too.

    The words are novel classes and one base class. They are embedded by the data set's text encoder, as those of
    ``proxydet predict --vocabulary`` are.
    """
    names, base = detector.vocabulary.names, detector.vocabulary.base
    novel = tuple(name for name, known in zip(names, base, strict=True) if not known)
    known = tuple(name for name, seen in zip(names, base, strict=True) if seen)
    asked = (*novel[:7], *known[:1])
    folder.predictions.mkdir(parents=True, exist_ok=True)
    order = sorted(
        images, key=lambda image: (-len({i.name for i in image[1] if i.novel}), image[0])
    )
    with progress.task("predicting", total=SHOWN_IMAGES, unit="images") as task:
        for image, annotated, detections in order[:SHOWN_IMAGES]:
            example = Example(
                image=image,
                annotated=annotated,
                detections=detections,
                asked=asked,
                found=detector.predict(image, list(asked), score_threshold=SHOWN_ABOVE),
            )
            found = {"vocabulary": asked, **example.found.to_dict()}
            write_json(folder.predictions / f"{image.stem}.json", found)
            task.advance()
            yield example


@contextmanager
def _timed(seconds: dict[str, float], step: str, *, add: bool = False) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[step] = time.perf_counter() - start + (seconds.get(step, 0.0) if add else 0.0)


# --- The comparison: what class-wise mixup brings, with and without the mixup branch on the same seeds -----------------

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
            hint="a single pair of runs proves little: two runs that differ only in their seed may differ as much",
        )
    folder = QuickstartFolder(output.resolve())
    with folder.held():
        make_dataset(folder.data, drawn, progress=progress)
        values: dict[str, list[tuple[float, float]]] = {name: [] for name in MEASURES}
        with progress.task("comparing", total=2 * len(seeds), unit="runs") as task:
            for seed in seeds:
                reports = []
                for kind in ("with", "without"):
                    data, mixup = folder.description, kind == "with"
                    config = quickstart_config(data, seed=seed, mixup=mixup, recipe=recipe)
                    own = QuickstartFolder(folder.root / f"seed_{seed}_{kind}_mixup")
                    train(config, output=own.run.root, progress=progress)
                    detector = Detector.from_run(own.run.root, device=config.training.device)
                    reports.append(score(detector, data, own.evaluation, config, progress))
                    task.advance()
                for name, (group, score_name) in MEASURES.items():
                    first, second = (getattr(r.main.group(group), score_name) for r in reports)
                    values[name].append((_number(first), _number(second)))
        measures, rows, lines = [], [], {}
        for name, pairs in values.items():
            with_mixup, without_mixup = zip(*pairs, strict=True)
            differences = [first - second for first, second in pairs]
            measure = Measure(
                name=name,
                with_mixup=with_mixup,
                without_mixup=without_mixup,
                difference=statistics.fmean(differences),
                spread=statistics.stdev(differences),
            )
            measures.append(measure)
            means = statistics.fmean(with_mixup), statistics.fmean(without_mixup)
            rows.append((name, *means, measure.difference, measure.spread))
            lines[name] = [(without, with_) for with_, without in pairs]
        columns = ("masks, percent", "with mixup", "without", "difference", "its spread over seeds")
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
                    plots=[svg_of(paired_plot(lines, ("without", "with"), label="percent"))],
                )
            ],
        )
        report = write_report(page, folder.root / "comparison.html")
        comparison = Comparison(seeds=tuple(seeds), measures=tuple(measures), report=report)
        write_json(folder.root / "comparison.json", {**asdict(comparison), "report": str(report)})
        return comparison


# --- The report ---------------------------------------------------------------------------------------------------------

LOSS_NAMES = {
    "total": ("sum of all losses", "what training makes smaller"),
    "loss_centernet_agn_pos": (
        "proposals: heatmap, objects",
        "how confidently the centres of objects are predicted",
    ),
    "loss_centernet_agn_neg": (
        "proposals: heatmap, elsewhere",
        "how confidently everything else is rejected",
    ),
    "loss_centernet_loc": ("proposals: boxes", "1 minus the overlap (GIoU) of proposed boxes"),
    "loss_cls_stage2": (
        "classes (federated, last step)",
        "how well regions are matched with the text embeddings of class names",
    ),
    "loss_box_reg_stage2": ("boxes (last step)", "how far the refined boxes are off"),
    "loss_mask": ("masks", "how many pixels inside the boxes are on the wrong side of the outline"),
    "image_loss_stage2": (
        "image labels (last step)",
        "whether the largest region of an image of a single object gets its label",
    ),
    "cmm_loss_stage2": (
        "class-wise mixup",
        "how far mixtures of two classes' regions are from the same mixture of their text embeddings",
    ),
}
"""Losses that are plotted: what the page calls them, and what they measure."""


def write_page(result: QuickstartResult) -> Path:
    """Write ``report.html``, and the drawn predictions as image files next to their JSON."""
    total, times = sum(result.seconds.values()), [*result.seconds.items()]
    page = Page(
        title="ProxyDet quickstart",
        summary=(
            "A small ProxyDet was trained on synthetic images: boxes and masks of base classes, and images of single "
            "objects of which only the class is known. Novel classes are combinations of colour, texture and shape "
            "that no training box shows. It finds them by comparing regions with the text embeddings of their names."
        ),
        facts=[
            ("correct labels, base classes", result.labels(novel=False).percent),
            ("correct labels, novel classes", result.labels(novel=True).percent),
            ("total time", f"{total / 60:.1f} min"),
        ],
        sections=[
            _found_section(result),
            _labels_section(result),
            _words_section(result),
            _scores_section(result),
            _training_section(result.folder),
            Section(title="Time", tables=[Table(columns=("step", "seconds"), rows=times)]),
            _commands_section(result.folder, result.examples),
        ],
    )
    return write_report(page, result.folder.report)


_RIGHT, _WRONG, _OTHER, _TRUTH = (30, 132, 73), (190, 45, 38), (96, 96, 96), (255, 255, 255)


def _found_section(result: QuickstartResult) -> Section:
    return Section(
        title="Detections",
        text="Validation images, not seen in training, searched for every class of the data set: on the left what they hold, "
        "on the right what was found with a score above "
        f"{SHOWN_ABOVE:g}. Green labels are correct, red ones wrong; grey boxes match no annotated object. "
        "Novel classes, of which training showed no box, are marked (novel).",
        images=[_beside(example) for example in result.examples],
    )


def _beside(example: Example) -> CaptionedImage:
    """Draw the annotations of an image next to its detections."""
    novel = {item.name for item in example.annotated if item.novel}

    def named(label: str) -> str:
        return f"{label} (novel)" if label in novel else label

    truths = [
        DrawnObject(label=named(item.name), box_xyxy=item.box_xyxy, colour=_TRUTH)
        for item in example.annotated
    ]
    found = []
    nearest_D = _nearest(example.annotated, example.detections)
    for item, nearest in zip(example.detections, nearest_D, strict=True):
        colour = _OTHER
        if nearest is not None:
            colour = _RIGHT if item.label == example.annotated[nearest].name else _WRONG
        label, box = named(item.label), item.box_xyxy
        found.append(DrawnObject(label=label, box_xyxy=box, colour=colour, score=item.score))
    with Image.open(example.image) as opened:
        halves = [draw_objects(opened.convert("RGB"), objects) for objects in (truths, found)]
    both = Image.new("RGB", (2 * halves[0].width + 12, halves[0].height), "white")
    for index, half in enumerate(halves):
        both.paste(half, (index * (half.width + 12), 0))
    counts = LabelAccuracy.of(example.annotated)
    caption = f"{example.image.name}: {counts.objects} objects, {counts.found} found, {counts.right} with the correct label"
    return CaptionedImage(image=both, caption=caption)


def _labels_section(result: QuickstartResult) -> Section:
    rows: list[tuple[str | float | int | None, ...]] = []
    for title, novel in (("base classes", False), ("novel classes", True)):
        counts = result.labels(novel=novel)
        words = [
            (item.name.split(), item.label.split())
            for item in result.annotated
            if item.novel == novel and item.label is not None
        ]
        right = [counts.right]
        right += [sum(true[place] == named[place] for true, named in words) for place in range(3)]
        shares = [_number(number / counts.found if counts.found else None) for number in right]
        rows.append((title, counts.objects, counts.found, *shares))
    shapes = sorted({item.name.split()[2] for item in result.annotated})
    taken = Counter(
        (item.name.split()[2], item.label.split()[2]) for item in result.annotated if item.label
    )
    return Section(
        title="Correct and wrong labels",
        text=f"Of each annotated object the best detection that overlaps it by more than {WELL_PLACED:g} (IoU): does its label "
        "name the class? Also word by word, in percent of the objects found. The second table counts which shapes were "
        "taken for which: a row for each true shape, a column for each that was named.",
        tables=[
            Table(
                columns=("", "objects", "found", "correct label", "colour", "texture", "shape"),
                rows=rows,
            ),
            Table(
                columns=("shape", *shapes),
                rows=[(true, *(taken[true, named] for named in shapes)) for true in shapes],
            ),
        ],
    )


def _words_section(result: QuickstartResult) -> Section:
    images = []
    for example in result.examples:
        with Image.open(example.image) as opened:
            drawn = example.found.draw(opened.convert("RGB"))
        drawn.save(result.folder.predictions / f"{example.image.stem}.jpg", quality=92)
        images.append(CaptionedImage(image=drawn, caption=f"{example.image.name}"))
    asked = ", ".join(result.examples[0].asked) if result.examples else ""
    return Section(
        title="Detections of other class names",
        text=f"The same images, with these class names only: {asked}.",
        images=images,
    )


def _scores_section(result: QuickstartResult) -> Section:
    rows = []
    bars: dict[str, dict[str, float]] = {}
    for protocol, report in (("LVIS", result.evaluation), ("COCO", result.coco)):
        for kind, part in report.types.items():
            name, metrics = IOU_TYPE_NAMES[kind], part.metrics
            values = [_number(metrics.get(key)) for key in ("AP", "AP50", "AP75")]
            rows.append((f"{protocol}, {name}", "all", None, *values))
            for group in part.groups:
                values = [_number(value) for value in (group.ap, group.ap50, group.ap75)]
                rows.append((f"{protocol}, {name}", group.name, group.scored, *values))
                if protocol == "LVIS":
                    bars.setdefault(group.name, {})[f"{name} AP50"] = values[1]
    return Section(
        title="Scores",
        text=(
            "Average precision in percent. LVIS's federated protocol asks in each image only for some classes, those that "
            "somebody checked; COCO's asks for all of them, so that every wrong label counts, and its numbers are lower. "
            "Novel classes are the rare ones here; for some of them, training has images of single objects "
            "(with image labels)."
        ),
        tables=[Table(columns=("protocol", "classes", "scored", "AP", "AP50", "AP75"), rows=rows)],
        plots=[svg_of(bar_plot(bars, label="AP50"))],
    )


def _training_section(folder: QuickstartFolder) -> Section:
    lines = folder.run.metrics.read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    shown, rows = {}, []
    for name, (title, meaning) in LOSS_NAMES.items():
        points = [(r["iteration"], r["losses"][name]) for r in records if name in r["losses"]]
        if points:
            shown[title] = points
            rows.append((title, meaning))
    return Section(
        title="Training",
        text="Losses against iterations. They should fall and then level off. Only the loss of the boxes may rise: it is summed over the "
        "regions that overlap an object enough (by 0.8 in the last step) and divided by the number of all regions, so it is small while few "
        "do. They jump from one point to the next because each is of a few images.",
        tables=[Table(columns=("curve", "what it measures"), rows=rows)],
        plots=[svg_of(loss_plot(shown, columns=3))],
    )


def _commands_section(folder: QuickstartFolder, examples: Sequence[Example]) -> Section:
    run, data = (shlex.quote(str(path)) for path in (folder.run.root, folder.description))
    commands = []
    if examples:
        image = shlex.quote(str(examples[0].image))
        words = ", ".join(dict.fromkeys(item.name for item in examples[0].annotated))
        commands = [
            Command(
                command=f'proxydet predict {image} --run {run} -v "{words}"',
                does="Search an image for words of your choice: any combination of a colour, a texture and a shape.",
            )
        ]
    return Section(
        title="Next steps",
        text="For your own photographs: proxydet data init FOLDER finds annotations of eight formats and writes a dataset config, "
        "proxydet train trains on it.",
        commands=[
            *commands,
            Command(
                command=f"proxydet serve --run {run}",
                does="Try it in the browser, with images of your own.",
            ),
            Command(
                command=f"proxydet eval --run {run} --data {data} --split val",
                does="Evaluate again; the same command works for your own dataset config.",
            ),
            Command(
                command=f"proxydet train --recipe quickstart --data {data} --dry-run",
                does="Show what a training would do, and how long it would take.",
            ),
        ],
    )


def _number(value: float | None) -> float:
    return float("nan") if value is None else 100 * value
