"""Opens the detector and the classes that the options of a command name; what is missing is downloaded after a question."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from proxydet.detector import Detector
    from proxydet.models import NamedDetector
    from proxydet.vocabulary.sources import TrainedClasses
    from proxydet.vocabulary.vocabulary import Vocabulary
    from proxydet_cli.options import Precision


def open_detector(
    named: NamedDetector, classes: str | None, vocabulary: str | None, *, device: str, yes: bool
) -> Detector:
    """Open the detector that the options name; what is missing is downloaded after one question.

    Args:
        named: What the options name.
        classes: What ``-v`` takes.
        vocabulary: What ``--vocabulary`` takes.
        device: What ``--device`` takes.
        yes: Do not ask.

    Raises:
        ProxydetError: It cannot be opened, or what it needs was not downloaded.
    """
    from proxydet_cli.commands.download import with_downloads

    also = fetch_published(named, classes, vocabulary, yes=yes)  # before torch is loaded
    return with_downloads(lambda: open_here(named, device=device), also=also, yes=yes)


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
    named: NamedDetector, classes: str | None, vocabulary: str | None, *, yes: bool
) -> tuple[str, ...]:
    """Fetch what the published model that the options name lacks, after one question.

    Args:
        named: What the options name.
        classes: What ``-v`` takes.
        vocabulary: What ``--vocabulary`` takes.
        yes: Do not ask.

    Returns:
        Names of further downloads that the classes need.

    Raises:
        ProxydetError: It was not downloaded.
    """
    from proxydet.models import locate_published
    from proxydet.vocabulary.sources import PUBLISHED_VOCABULARIES
    from proxydet_cli.commands.download import with_downloads

    # Words without embeddings take CLIP: asked for in the same question.
    words = classes is not None or (
        vocabulary is not None
        and vocabulary not in PUBLISHED_VOCABULARIES
        and not vocabulary.endswith((".npz", ".vocab", ".npy"))
    )
    also = ("clip-vit-b32",) if words and named.run is None else ()
    published = named.published
    if published is not None:
        with_downloads(lambda: locate_published(published), also=also, yes=yes)
    return also


def tuned(
    detector: Detector,
    *,
    tta: bool,
    precision: Precision | None,
    **changes: bool | float | None,
) -> Detector:
    """Return the detector with the settings that the options ask for.

    Args:
        detector: As it was opened.
        tta: What ``--tta`` takes.
        precision: What ``--precision`` takes.
        **changes: Values of other options, by the name of the inference setting that each replaces; None: it is not given.

    Raises:
        ConfigError: A value is out of range, or the device has no units for this precision, or for that of the run where none
            is asked for.
    """
    asked = detector.with_augmentation() if tta else detector
    wanted = asked.inference.precision if precision is None else precision.value
    return asked.with_settings(precision=wanted, **changes)


def check_choice(
    classes: str | None, vocabulary: str | None, names: Path | None, background: str | None = None
) -> None:
    """Refuse options that contradict each other or name files that are not there, before a detector is opened.

    Raises:
        VocabularyError: A file is not there, or a class name is empty or there twice.
    """
    from proxydet.errors import VocabularyError
    from proxydet.vocabulary.names import split_names
    from proxydet.vocabulary.sources import check_source, is_vocabulary_file
    from proxydet.vocabulary.vocabulary import check_names

    if classes is not None and vocabulary is not None:
        raise typer.BadParameter("give either -v or --vocabulary")
    if vocabulary is not None:
        check_source(vocabulary)
    if names is not None and vocabulary is None:
        raise typer.BadParameter("--names belongs to a .npy --vocabulary")
    named = vocabulary if vocabulary and is_vocabulary_file(vocabulary) else None
    if names is None and named is not None and named.endswith(".npy"):
        named = None  # `open_vocabulary` says what else is needed
    lists = [text for text in (classes, background) if text is not None]
    for file in (named, names, *(text for text in lists if _means_file(text))):
        if file is not None and not Path(file).exists():
            raise VocabularyError(
                f"there is no file {file}", hint="check the spelling of its path", path=Path(file)
            )
        if file is not None:
            confirm_names(Path(file))
    for text in lists:
        if not _means_file(text) and ("," in text or not text.strip()):
            check_names(split_names(text))


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


def chosen_vocabulary(
    detector: TrainedClasses,
    classes: str | None,
    source: str | None,
    names: Path | None,
    base_above: float = 0.9,
    *,
    background: str | None = None,
    yes: bool | None,
) -> Vocabulary:
    """Open the vocabulary that the options name; the training's where they name none.

    What is missing, such as CLIP's weights for names without embeddings, is downloaded after a question.

    Args:
        detector: Whose text encoder embeds names: a detector or an index.
        classes: Names as ``-v`` takes them.
        source: What ``--vocabulary`` takes.
        names: File of the names of a ``.npy`` table.
        base_above: Cosine with a base class of training above which a class counts as base.
        background: What ``--background`` takes.
        yes: Do not ask; None: download nothing.

    Raises:
        VocabularyError: It cannot be used.
    """
    from proxydet.vocabulary.names import split_names
    from proxydet.vocabulary.sources import open_vocabulary
    from proxydet_cli.commands.download import with_downloads

    if classes is not None and _means_file(classes):
        classes, source = None, classes
    if classes is None and source is None and background is None:
        return detector.vocabulary
    chosen = split_names(classes) if classes is not None else None

    def opened() -> Vocabulary:
        found = detector.vocabulary
        if chosen is not None:
            found = detector.resolve(chosen)
        elif source is not None:
            found = open_vocabulary(
                source, encoder=lambda: detector.encoder, names=names, known=detector.vocabulary
            )
        return found if background is None else add_background(detector, found, background)

    found = opened() if yes is None else with_downloads(opened, yes=yes)
    return detector.with_base(found, base_above)


def add_background(detector: TrainedClasses, vocabulary: Vocabulary, background: str) -> Vocabulary:
    """Add what ``--background`` takes: ``training``, a file of a vocabulary, or names.

    Raises:
        VocabularyError: It cannot be used.
    """
    return detector.with_background(vocabulary, _read_background(background))


def background_classes(detector: TrainedClasses, background: str) -> Vocabulary:
    """Return the classes that ``--background`` names.

    Raises:
        VocabularyError: It cannot be used.
    """
    return detector.background_of(_read_background(background))


def _read_background(background: str) -> str | list[str]:
    from proxydet.vocabulary.names import split_names
    from proxydet.vocabulary.sources import TRAINING_CLASSES

    whole = background == TRAINING_CLASSES or _means_file(background)
    return background if whole else split_names(background)
