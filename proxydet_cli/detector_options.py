"""Options that choose a detector and its classes, alike in every command that uses one."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from proxydet.detector import Detector
    from proxydet.vocabulary.vocabulary import Vocabulary

Classes = Annotated[
    str | None,
    typer.Option(
        "--classes",
        "-v",
        metavar="NAMES",
        help="Classes to detect: 'cup, plate, \"knife, fork\"', or a file as for --vocabulary.",
    ),
]
VocabularySource = Annotated[
    str | None,
    typer.Option(
        "--vocabulary",
        metavar="NAME|FILE",
        help="Instead of -v: lvis, coco, objects365, openimages, a file of names (.txt, .json, .yaml, a COCO annotation "
        "file), of proxydet vocab build (.npz, .vocab), or of embeddings (.npy, with --names).",
    ),
]
NamesFile = Annotated[
    Path | None, typer.Option("--names", metavar="FILE", help="Class names of a .npy --vocabulary.")
]
Run = Annotated[
    Path | None,
    typer.Option("--run", metavar="FOLDER", help="Run folder of proxydet train or quickstart."),
]
Weights = Annotated[
    str | None,
    typer.Option(
        "--weights",
        metavar="NAME|FILE",
        help="A published model (proxydet-r50, proxydet-r50-inl, proxydet-swinb-inl) or a checkpoint; with --run, "
        "one of the run's. [default: the run's last, else proxydet-r50-inl]",
    ),
]
Sizes = Annotated[
    str | None,
    typer.Option(
        "--config",
        metavar="r50|swinb|FILE",
        help="Model of a --weights file, or a run's config.yaml. [default: r50]",
    ),
]
Device = Annotated[
    str, typer.Option("--device", help="cpu, cuda, cuda:1, ...; auto: a GPU where there is one.")
]


class Precision(str, Enum):
    """Number formats of the backbone."""

    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


Augment = Annotated[
    bool,
    typer.Option(
        "--tta",
        help="Run on each image mirrored too, and in three sizes: more accurate, 6 times slower.",
    ),
]
PrecisionOption = Annotated[
    Precision,
    typer.Option("--precision", help="Number format of the backbone; fp16 and bf16 need a GPU."),
]
BaseAbove = Annotated[
    float,
    typer.Option(
        "--base-above",
        min=-1.0,
        max=1.0,
        help="Cosine with a base class of training above which a class counts as base.",
    ),
]


def tuned(detector: Detector, *, tta: bool, precision: Precision) -> Detector:
    """Return the detector with the settings that the options ask for.

    Raises:
        ConfigError: The device cannot compute in this precision.
    """
    asked = detector.with_augmentation() if tta else detector
    asked.network.check_precision(precision.value)
    return asked.with_settings(precision=precision.value)


def check_choice(classes: str | None, vocabulary: str | None, names: Path | None) -> None:
    """Refuse options that contradict each other, before anything is opened."""
    if classes is not None and vocabulary is not None:
        raise typer.BadParameter("give either -v or --vocabulary")
    if names is not None and vocabulary is None:
        raise typer.BadParameter("--names belongs to a .npy --vocabulary")


def chosen_vocabulary(
    detector: Detector,
    classes: str | None,
    source: str | None,
    names: Path | None,
    base_above: float = 0.9,
) -> Vocabulary:
    """Open the vocabulary that the options name; the training's where they name none.

    Args:
        detector: Whose text encoder embeds names.
        classes: Names as ``-v`` takes them.
        source: What ``--vocabulary`` takes.
        names: File of the names of a ``.npy`` table.
        base_above: Cosine with a base class of training above which a class counts as base.

    Raises:
        VocabularyError: It cannot be used.
    """
    from proxydet.vocabulary.names import split_names
    from proxydet.vocabulary.sources import is_vocabulary_file, open_vocabulary

    if classes is not None and is_vocabulary_file(classes) and Path(classes).is_file():
        classes, source = None, classes
    if classes is not None:
        return detector.with_base(detector.resolve(split_names(classes)), base_above)
    if source is None:
        return detector.vocabulary
    opened = open_vocabulary(
        source, encoder=lambda: detector.encoder, names=names, known=detector.vocabulary
    )
    return detector.with_base(opened, base_above)
