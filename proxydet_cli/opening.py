"""A detector and its classes: the options that name them, and opening them; what is missing is downloaded after a question."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from proxydet_cli.options import panel

if TYPE_CHECKING:
    from proxydet.detector import Detector
    from proxydet.models import NamedDetector
    from proxydet.vocabulary.sources import TrainedClasses
    from proxydet.vocabulary.vocabulary import Vocabulary

# --- Classes -----------------------------------------------------------------------------------------------------------

_classes = panel("Classes")
Classes = Annotated[
    str | None,
    _classes(
        "--classes",
        "-v",
        metavar="NAMES",
        help="Classes to detect: 'cup, plate, \"knife, fork\"', or a file as for --vocabulary.",
    ),
]
Background = Annotated[
    str | None,
    _classes(
        "--background",
        metavar="NAMES",
        help="Classes that absorb false hits and are never reported: 'wall, floor', a file as for --vocabulary, or training: all classes "
        "of the training that are not asked for.",
    ),
]
BaseAbove = Annotated[
    float,
    _classes(
        "--base-above",
        min=-1.0,
        max=1.0,
        help="Cosine with a base class of training above which a class counts as base.",
    ),
]


@dataclass(frozen=True, kw_only=True)
class ClassOptions:
    """Options that name the classes to detect."""

    classes: Classes = None
    vocabulary: Annotated[
        str | None,
        _classes(
            "--vocabulary",
            metavar="NAME|FILE",
            help="Instead of -v: a published vocabulary (lvis, coco, objects365, openimages; all: the classes of these four; "
            "lvis-descriptions, lvis-exemplars, lvis-multimodal, ...), a file of names (.txt, .json, .yaml, a COCO annotation "
            "file), of proxydet vocab build (.npz, .vocab), or of embeddings (.npy, with --names).",
        ),
    ] = None
    names: Annotated[
        Path | None, _classes("--names", metavar="FILE", help="Class names of a .npy --vocabulary.")
    ] = None
    background: Background = None

    @property
    def given(self) -> bool:
        """Whether they name classes; otherwise those of the training are meant."""
        return (self.classes, self.vocabulary, self.background) != (None, None, None)

    @cached_property
    def listed(self) -> list[str] | None:
        """The class names that stand in ``-v``; None where it names a file, or is not given."""
        from proxydet.vocabulary.names import split_names

        if self.classes is None or _means_file(self.classes):
            return None
        return split_names(self.classes)

    @property
    def embedded(self) -> bool:
        """Whether there are names among them that a text encoder has to embed."""
        from proxydet.vocabulary.sources import PUBLISHED_VOCABULARIES

        return self.classes is not None or (
            self.vocabulary is not None
            and self.vocabulary not in PUBLISHED_VOCABULARIES
            and not self.vocabulary.endswith((".npz", ".vocab", ".npy"))
        )

    def check(self) -> None:
        """Refuse options that contradict each other or name files that are not there, before a detector is opened.

        Raises:
            VocabularyError: A file is not there, or a class name is empty or there twice.
        """
        from proxydet.vocabulary.names import no_file, split_names
        from proxydet.vocabulary.sources import check_source
        from proxydet.vocabulary.vocabulary import check_names

        if self.classes is not None and self.vocabulary is not None:
            raise typer.BadParameter("give either -v or --vocabulary")
        if self.vocabulary is not None:
            check_source(self.vocabulary)
        if self.names is not None and self.vocabulary is None:
            raise typer.BadParameter("--names requires a .npy --vocabulary")
        files = [] if self.names is None else [self.names]
        for text in (self.classes, self.background, self.vocabulary):
            if text is not None and _means_file(text):
                files.append(Path(text))
            elif text is not None and text != self.vocabulary and ("," in text or not text.strip()):
                check_names(split_names(text))
        for file in files:
            if not file.exists():
                raise no_file(file)
            confirm_names(file)

    def open(
        self, detector: TrainedClasses, *, base_above: float = 0.9, yes: bool | None
    ) -> Vocabulary:
        """Open the vocabulary that they name; the training's where they name none.

        What is missing, such as CLIP's weights for names without embeddings, is downloaded after a question.

        Args:
            detector: Whose text encoder embeds names: a detector or an index.
            base_above: Cosine with a base class of training above which a class counts as base.
            yes: Do not ask; None: download nothing.

        Raises:
            VocabularyError: It cannot be used.
        """
        from proxydet.vocabulary.sources import open_vocabulary
        from proxydet_cli.commands.download import with_downloads

        if not self.given:
            return detector.vocabulary
        source = self.classes or self.vocabulary

        def opened() -> Vocabulary:
            found = detector.vocabulary
            if self.listed is not None:
                found = detector.resolve(self.listed)
            elif source is not None:
                found = open_vocabulary(
                    source,
                    encoder=lambda: detector.encoder,
                    names=self.names,
                    known=detector.vocabulary,
                )
            return add_background(detector, found, self.background)

        found = opened() if yes is None else with_downloads(opened, yes=yes)
        return detector.with_base(found, base_above)


def add_background(
    detector: TrainedClasses, vocabulary: Vocabulary, background: str | None
) -> Vocabulary:
    """Add what ``--background`` takes: ``training``, a file of a vocabulary, or names; None: nothing.

    Raises:
        VocabularyError: It cannot be used.
    """
    if background is None:
        return vocabulary
    return detector.with_background(vocabulary, read_background(background))


def read_background(background: str) -> str | list[str]:
    """Return what ``--background`` takes as a detector does: ``training``, a file, or a list of names."""
    from proxydet.vocabulary.names import split_names
    from proxydet.vocabulary.sources import TRAINING_CLASSES

    whole = background == TRAINING_CLASSES or _means_file(background)
    return background if whole else split_names(background)


def confirm_names(path: Path) -> None:
    """Ask whether a single line of several class names is meant so; where nobody can answer, reading it logs a warning.

    Raises:
        VocabularyError: It is not.
    """
    from proxydet.errors import VocabularyError
    from proxydet.vocabulary.names import LIST_SUFFIXES, single_line_split
    from proxydet_cli.output import Output

    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return
    if path.suffix and not path.name.lower().endswith(LIST_SUFFIXES):
        return
    if (report := single_line_split(path)) and not Output().agreed("the names", before=report):
        raise VocabularyError(
            f"{path} holds several names on a single line",
            hint="write one name on each line; a line that is one name goes in double quotes",
            path=path,
        )


def _means_file(classes: str) -> bool:
    """Whether ``-v`` names a file, there or not; a class may hold a slash: Monitor/TV."""
    from proxydet.vocabulary.sources import is_vocabulary_file

    path, place = Path(classes), classes.startswith(("/", "./", "../", "~/"))
    inside = len(path.parts) > 1 and path.parent.is_dir() and "," not in classes
    return is_vocabulary_file(classes) or place or inside


# --- A detector --------------------------------------------------------------------------------------------------------

_DEVICE = re.compile(r"auto|(cpu|cuda|mps|xpu|hpu|mtia)(:\d+)?")


def _known_device(device: str) -> str:
    if _DEVICE.fullmatch(device) is None:
        raise typer.BadParameter(
            f"{device!r} is not a device; choose auto, cpu, cuda, or cuda:1, ..."
        )
    return device


_detector = panel("Detector")
BatchSize = Annotated[int, _detector("--batch-size", min=1, help="Images in the network at once.")]
Device = Annotated[
    str,
    _detector(
        "--device",
        callback=_known_device,
        help="cpu, cuda, cuda:1, ...; auto: a GPU where there is one.",
    ),
]


@dataclass(frozen=True, kw_only=True)
class NamedOptions:
    """Options that name a detector."""

    run: Annotated[
        Path | None,
        _detector("--run", metavar="FOLDER", help="Run folder of proxydet train or quickstart."),
    ] = None
    weights: Annotated[
        str | None,
        _detector(
            "--weights",
            metavar="NAME|FILE",
            help="A published model (proxydet-r50, proxydet-r50-inl, proxydet-swinb-inl), OWNER/NAME[@REVISION] on the Hugging "
            "Face hub, or a checkpoint; with --run, one of the run's. [default: the run's last, else proxydet-r50-inl]",
        ),
    ] = None
    config: Annotated[
        str | None,
        _detector(
            "--config",
            metavar="r50|swinb|FILE",
            help="Model of a --weights file, or a run's config.yaml. [default: r50]",
        ),
    ] = None

    def find(self) -> NamedDetector:
        """Find the detector that they name, without loading torch; see `proxydet.models.find_detector`."""
        from proxydet.models import find_detector

        return find_detector(run=self.run, weights=self.weights, config=self.config)


@dataclass(frozen=True, kw_only=True)
class DetectorOptions(NamedOptions):
    """Options that name a detector and where it runs."""

    device: Device = "auto"


def open_detector(
    named: NamedDetector, classes: ClassOptions | None = None, *, device: str, yes: bool
) -> Detector:
    """Open the detector that the options name; what is missing is downloaded after one question.

    Args:
        named: What the options name.
        classes: The classes that it will be asked for; None: those of its training.
        device: What ``--device`` takes.
        yes: Do not ask.

    Raises:
        ProxydetError: It cannot be opened, or what it needs was not downloaded.
    """
    from proxydet.models import trained_classes
    from proxydet_cli.commands.download import with_downloads

    also = fetch_published(named, classes, yes=yes)

    def opened() -> Detector:
        if classes is not None and classes.listed is not None:
            # Names that cannot be embedded are refused before torch is loaded, which takes seconds.
            trained_classes(named).resolve(classes.listed)
        return open_here(named, device=device)

    return with_downloads(opened, also=also, yes=yes)


def open_here(named: NamedDetector, *, device: str) -> Detector:
    """Open a detector in this process, which keeps freed memory from then on if the detector is on the CPU.

    Raises:
        ProxydetError: It cannot be opened.
    """
    from proxydet.detector import open_named
    from proxydet.runtime.processes import keep_freed_memory

    detector = open_named(named, device=device)
    if detector.network.device.type == "cpu":
        keep_freed_memory()
    return detector


def fetch_published(
    named: NamedDetector, classes: ClassOptions | None, *, yes: bool
) -> tuple[str, ...]:
    """Fetch what the published model that the options name lacks, after one question.

    Args:
        named: What the options name.
        classes: The classes that it will be asked for; None: those of its training.
        yes: Do not ask.

    Returns:
        Names of further downloads that the classes need.

    Raises:
        ProxydetError: It was not downloaded.
    """
    from proxydet.models import locate_published
    from proxydet_cli.commands.download import with_downloads

    # Names without embeddings take CLIP: asked for in the same question.
    also: tuple[str, ...] = ()
    if classes is not None and classes.embedded and named.run is None:
        also = ("clip-vit-b32",)
    published = named.published
    if published is not None:
        with_downloads(lambda: locate_published(published), also=also, yes=yes)
    return also


class Precision(str, Enum):
    """Number formats of the network."""

    auto = "auto"
    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


PrecisionOption = Annotated[
    Precision | None,
    _detector(
        "--precision",
        help="Number format of the network: bf16 and fp16 are faster where the device has units for them (proxydet env); "
        "bf16 moves the quickstart's scores by 0.001 on average, by 0.05 at most; fp16 needs a GPU; auto takes the fastest. [default: inference.precision, fp32]",
        show_default=False,
    ),
]


@dataclass(frozen=True, kw_only=True)
class InferenceOptions:
    """Options that change how a detector runs; those that are not given stay as it was trained."""

    tta: Annotated[
        bool,
        _detector(
            "--tta",
            help="Run on each image mirrored too, and in three sizes: more accurate, 6 times slower.",
        ),
    ] = False
    precision: PrecisionOption = None
    rescore: Annotated[
        bool | None,
        _detector(
            "--rescore/--no-rescore",
            help="Score a box by all proposals that agree on it: boxes gain, masks hardly; scores rise. "
            "[default: inference.rescore, no]",
            show_default=False,
        ),
    ] = None
    tiles: Annotated[
        int | None,
        _detector(
            "--tiles",
            metavar="PIXELS",
            min=0,
            help="Run on larger images in overlapping tiles of this side too, for small objects, and merge what is found; 0: not. "
            "[default: inference.tiles, 0]",
            show_default=False,
        ),
    ] = None
    tile_overlap: Annotated[
        float | None,
        _detector(
            "--tile-overlap",
            min=0.0,
            max=0.9,
            help="Share of its side that a tile has in common with the next one. [default: inference.tile_overlap, 0.2]",
            show_default=False,
        ),
    ] = None
    whole_image: Annotated[
        bool | None,
        _detector(
            "--whole-image/--no-whole-image",
            help="With --tiles, run on the whole image too, for large objects. [default: inference.whole_image, yes]",
            show_default=False,
        ),
    ] = None

    def check(self, named: NamedDetector) -> None:
        """Refuse settings that cannot be, before a detector is opened.

        Args:
            named: The detector that they are for.

        Raises:
            ConfigError: A value is out of range.
        """
        from proxydet.config import merge
        from proxydet.models import settings_of

        asked = ("rescore", "tiles", "tile_overlap", "whole_image")
        given = {n: value for n in asked if (value := getattr(self, n)) is not None}
        if not merge(settings_of(named).inference, given, "inference").tiles:
            for name, option in {
                "tile_overlap": "--tile-overlap requires",
                "whole_image": "--whole-image and --no-whole-image require",
            }.items():
                if name in given:
                    raise typer.BadParameter(f"{option} --tiles PIXELS")

    def apply(self, detector: Detector) -> Detector:
        """Return the detector with the settings that they ask for.

        Raises:
            ConfigError: A value is out of range, or the device has no units for this precision, or for that of the run where
                none is asked for.
        """
        asked = detector.with_augmentation() if self.tta else detector
        precision = asked.inference.precision if self.precision is None else self.precision.value
        return asked.with_settings(
            precision=precision,
            rescore=self.rescore,
            tiles=self.tiles,
            tile_overlap=self.tile_overlap,
            whole_image=self.whole_image,
        )
