"""Writing a dataset config for annotations as people have them: format, parts, image folders and class names are found out."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from proxydet.config import parse_toml
from proxydet.data.check import compare_parts
from proxydet.data.images import found_image, images_below
from proxydet.data.records import AnnotationSource
from proxydet.data.sources import FoundData, look
from proxydet.data.store import AnnotationStore, share_positions
from proxydet.errors import ConfigError, DataError, VocabularyError
from proxydet.files import write_text
from proxydet.reporting import SILENT, Progress
from proxydet.vocabulary.encoder import open_encoder
from proxydet.vocabulary.sources import NAME_TABLES, published_vocabulary
from proxydet.vocabulary.vocabulary import Vocabulary, build_vocabulary
from proxydet.wording import counted, first_of, json_text

_LARGEST_SEED = 2**62
"""One that a TOML file can hold, with those that are tried after it."""
_SEEDS = 20
"""Seeds that are tried for a split with every class in both parts."""
_DIMENSION = 512
"""Of embeddings without a text encoder: that of CLIP ViT-B/32."""


@dataclass(frozen=True, kw_only=True)
class PartCount:
    """What a part holds."""

    annotations: str
    """Its annotations, as the config names them."""
    images: int
    objects: int
    masks: int
    """Objects that have a mask."""


@dataclass(frozen=True, kw_only=True)
class InitReport:
    """What was found and written."""

    config: Path
    """The dataset config."""
    format: str
    """Name of the annotations' format."""
    classes: tuple[str, ...]
    """Names of the classes."""
    parts: dict[str, PartCount]
    """By ``train``, ``val`` and ``test``."""
    split: str
    """How the parts came about."""
    embeddings: Path
    """The text embeddings."""
    embedded: str
    """What made them; empty: they are still to be made."""
    notes: tuple[str, ...]
    """What is missing or left out."""
    commands: tuple[str, ...]
    """What to do next."""


def init_dataset(
    path: Path,
    output: Path | None = None,
    *,
    images: Sequence[Path] = (),
    val_share: float = 0.2,
    seed: int = 0,
    encoder: Path | None = None,
    closed: bool = False,
    overwrite: bool = False,
    cache: Path | None = None,
    progress: Progress = SILENT,
) -> InitReport:
    """Write a dataset config, and the text embeddings of its classes where they can be made.

    Args:
        path: A folder or file that `proxydet.data.sources.look` finds annotations in.
        output: The config (.toml); by default named after ``path``, in the working directory.
        images: Folders of the images; found out by default.
        val_share: Share of the images that is kept for validation where the annotations are not split.
        seed: Decides which images these are; where classes would be missing, one of the next seeds is taken.
        encoder: As for `proxydet.vocabulary.encoder.open_encoder`.
        closed: Make embeddings without a text encoder, at right angles to each other: the detector then knows these
            classes and no others.
        overwrite: Replace a config that is there.
        cache: Folder of annotation stores; None means the user's cache folder.
        progress: Where to show long steps.

    Raises:
        ConfigError: the config or the embeddings are there already, the config is not called ``.toml``, or a number is out
            of range.
        DataError: there are no annotations, or they cannot be used.
        VocabularyError: a class name cannot be embedded.
        RuntimeEnvironmentError: the files cannot be written.
    """
    called = re.sub(r"[^\w.-]+", "-", path.resolve().name.split(".")[0]).strip("-.") or "dataset"
    output = output or Path(f"{called}.toml")
    if output.suffix.lower() != ".toml":
        raise ConfigError(
            f"a dataset config is called .toml, not {output.name}",
            hint=f"write to {output.with_suffix('.toml')}",
        )
    embeddings = output.with_suffix(".vocab")
    for target in (output, embeddings):
        if os.path.lexists(target) and not overwrite:
            raise ConfigError(
                f"{target} already exists",
                hint="give another file with --output, or replace it: --overwrite",
                path=target,
            )
    if not 0 <= seed < _LARGEST_SEED:
        raise ConfigError(
            f"the seed is {seed}", hint=f"it is a whole number from 0 to {_LARGEST_SEED - 1}"
        )
    if not 0 < val_share < 1:
        raise ConfigError(
            f"the share for validation is {val_share}",
            hint="it is above 0 and below 1, such as 0.2",
        )
    for folder in images:
        if not folder.is_dir():
            raise DataError(
                f"there is no folder {folder}",
                hint="correct --images, or leave it out",
                path=folder,
            )
    found = look(path, images)
    notes = [f"{place} is of no part (train, val, test): left out" for place in found.left_out]
    notes += [f"{line}: left out" for line in found.damaged]
    notes += [f"not searched: {what}" for what in found.unsearched]
    opened = partial(AnnotationStore.open, cache=cache, progress=progress, warn=False)
    stores = {part: opened(source) for part, source in found.parts.items()}
    for part, store in stores.items():
        store.require_objects()
        notes += [f"{part}: {line}" if part else line for line in store.report.lines()]
    sources = {}
    for part, source in found.parts.items():
        sources[part], gone = _with_used_folders(source, stores[part], path)
        notes += [gone] if gone else []
    folders = list(dict.fromkeys(folder for source in sources.values() for folder in source.roots))
    there = len({image for folder in folders for image in images_below(folder)})
    if (over := there - sum(map(len, stores.values()))) > 0:
        why = "not annotated or left out" if found.left_out else "not annotated"
        notes.append(f"{counted(over, 'image')} in {first_of(folders)} {why}: not used")
    sources, split = _split(sources, stores, val_share, seed, notes)
    listed = (c.name.strip() for store in stores.values() for c in store.categories)
    names = tuple(dict.fromkeys(listed))
    stores = {part: opened(source) for part, source in sources.items()}
    stores["train"].require_trainable()
    roots = {part: source.roots for part, source in sources.items()}
    notes += [f"{text} ({advice})" for _, text, advice in compare_parts(stores, roots)]
    base = output.resolve().parent
    vocabulary, embedded = _embedded(names, encoder, closed=closed, progress=progress)
    text = _config_text(output.stem, names, embeddings, encoder, sources, base, found, split)
    try:
        parse_toml(text, str(output), output)
    except ConfigError as error:
        raise DataError(
            f"{path} has a name that a TOML file cannot hold: {error.message}",
            hint="rename it to letters, digits and dashes",
            path=path,
        ) from error
    if vocabulary is not None:
        vocabulary.save(embeddings)
    write_text(output, text)
    shown, table = shlex.quote(str(output)), shlex.quote(str(embeddings))
    commands = [
        f"proxydet data check {shown}",
        f"proxydet train --recipe small --data {shown} --output {shlex.quote(f'runs/{output.stem}')}",
    ]
    if vocabulary is None:
        build = f"proxydet vocab build {shown} -o {table}"
        commands = ["proxydet download clip-vit-b32", build, *commands]
    return InitReport(
        config=output,
        format=found.format,
        classes=names,
        parts={
            part: PartCount(
                annotations=_relative(sources[part].annotations, base),
                images=len(store),
                objects=store.report.annotations_kept,
                masks=store.report.annotations_kept - store.report.without_mask,
            )
            for part, store in stores.items()
        },
        split=split,
        embeddings=embeddings,
        embedded=embedded,
        notes=tuple(notes),
        commands=tuple(commands),
    )


def _with_used_folders(
    source: AnnotationSource, store: AnnotationStore, path: Path
) -> tuple[AnnotationSource, str]:
    """Return a source with the folders in which its images are, and what to say of images that are missing or left over."""
    missing = [store.file_name(row) for row in range(len(store))]
    used: list[Path] = []
    for folder in source.roots:
        absent = [name for name in missing if found_image(name, [folder]) is None]
        if len(absent) < len(missing):
            used.append(folder)
        missing = absent
        if not missing:
            break
    if missing and not used:
        places = first_of([str(folder) for folder in source.roots], 3)
        raise DataError(
            f"none of the {counted(len(store), 'image')} of {source.annotations} is there, e.g. {missing[0]!r}"
            + (f"; looked in {places}" if places else ""),
            hint=f"name their folder: proxydet data init {shlex.quote(str(path))} --images FOLDER",
            path=source.annotations,
        )
    gone = (
        f"{len(missing)} of {len(store)} images of {source.annotations} are missing, e.g. {missing[0]!r}: data check reports "
        "this as an error, and training needs data.unreadable_images=skip, or annotations without them"
        if missing
        else ""
    )
    return replace(source, images=tuple(used)), gone


def _split(
    sources: dict[str, AnnotationSource],
    stores: dict[str, AnnotationStore],
    val_share: float,
    seed: int,
    notes: list[str],
) -> tuple[dict[str, AnnotationSource], str]:
    """Return the parts to write, and how they came about."""
    if len(sources) > 1 and "train" not in sources:
        raise DataError(
            f"there are annotations of {' and '.join(sources)}, and none to train on",
            hint="name the folder that holds train too, or the one annotation file to split: proxydet data init FILE",
        )
    if len(sources) > 1:
        if "val" not in sources:
            sources = {"train": sources["train"], "val": sources["test"]}
            notes.append("there is no part for validation: test is used for it")
        return sources, "as found: " + ", ".join(sources)
    ((part, source),) = sources.items()
    store = stores[part]
    count = len(store)
    if count < 2:
        notes.append("one image: nothing is left for validation")
        return {"train": source}, "not split"
    kept = min(max(1, round(val_share * count)), count - 1)
    names = [store.file_name(row) or str(store.image_ids[row]) for row in range(count)]
    edge = 1 - kept / count
    usable_A = store.trainable(np.ones(len(store.categories), dtype=np.bool_))
    image_A, class_A = store.column("image")[usable_A], store.column("category")[usable_A]
    present = len(np.unique(class_A))

    def covered(number: int) -> int:
        place = share_positions(names, number)
        in_val_I = np.array([place[name] >= edge for name in names])
        both = [len(np.unique(class_A[in_val_I[image_A] == side])) for side in (True, False)]
        return sum(both) if all(both) else 0

    best, reached = seed, covered(seed)
    for number in range(seed + 1, seed + _SEEDS):
        if reached == 2 * present:
            break
        if (more := covered(number)) > reached:
            best, reached = number, more
    if not reached:
        notes.append(
            f"{counted(len(np.unique(image_A)), 'image')} with objects: none can be kept for validation"
        )
        return {"train": source}, "not split"
    if reached < 2 * present:
        notes.append(
            f"{2 * present - reached} of {present} classes are in one of the two parts only: they have too few images"
        )
    shares = {"train": (0.0, edge), "val": (edge, 1.0)}
    held = f"{count - kept} images to train on and {kept} for validation, by seed {best}"
    parts = {name: replace(source, share=share, seed=best) for name, share in shares.items()}
    return parts, f"not split: {held}"


def _embedded(
    names: tuple[str, ...], encoder: Path | None, *, closed: bool, progress: Progress
) -> tuple[Vocabulary | None, str]:
    """Return the classes with embeddings and what made these; None where nothing is there to make them."""
    if closed:
        # Fixed directions, at right angles where there are no more of them than dimensions.
        count = max(len(names), _DIMENSION)
        drawn = np.random.default_rng(0).standard_normal((count, _DIMENSION))
        if count == _DIMENSION:
            drawn = np.linalg.qr(drawn)[0]
        rows_CD = drawn[: len(names)] / np.linalg.norm(drawn[: len(names)], axis=1, keepdims=True)
        return Vocabulary.from_arrays(names, rows_CD.astype(np.float32)), "without a text encoder"
    try:
        opened = open_encoder(encoder, progress=progress)
    except VocabularyError:
        if encoder is not None:
            raise
    else:
        return build_vocabulary(names, opened), str(encoder or "CLIP ViT-B/32")
    rows: dict[str, npt.NDArray[np.float32]] = {}
    used = []
    for published in NAME_TABLES:
        try:
            known = published_vocabulary(published)
        except VocabularyError:
            continue
        more = {
            name: row
            for name, row in zip(known.names, known.embeddings, strict=True)
            if name in names and name not in rows
        }
        used += [published] if more else []
        rows |= more
    if len(rows) < len(names):
        return None, ""
    table = np.stack([rows[name] for name in names])
    return Vocabulary.from_arrays(names, table), f"the published embeddings of {', '.join(used)}"


def _relative(path: Path, base: Path) -> str:
    """Return a path as a config in ``base`` names it."""
    try:
        return Path(os.path.relpath(path.resolve(), base)).as_posix()
    except ValueError:  # on another drive
        return path.resolve().as_posix()


def _config_text(
    name: str,
    names: tuple[str, ...],
    embeddings: Path,
    encoder: Path | None,
    sources: dict[str, AnnotationSource],
    base: Path,
    found: FoundData,
    split: str,
) -> str:
    listed = ", ".join(json_text(class_name) for class_name in names)
    lines = [f"# {found.format}; {split}", f"name = {json_text(name)}", "", "[vocabulary]"]
    lines += [f"embeddings = {json_text(embeddings.name)}"]
    lines += [f"encoder = {json_text(_relative(encoder, base))}"] if encoder else []
    lines += [f"names = [{listed}]"]
    for part, source in sources.items():
        roots = [json_text(_relative(folder, base)) for folder in source.roots]
        lines += ["", f"[{part}]"]
        lines += [f"annotations = {json_text(_relative(source.annotations, base))}"]
        lines += [f"images = {roots[0] if len(roots) == 1 else '[' + ', '.join(roots) + ']'}"]
        lines += [f"part = {json_text(source.part)}"] if source.part else []
        if source.share is not None:
            low, high = source.share
            lines += [f"share = [{low!r}, {high!r}]", f"seed = {source.seed}"]
    return "\n".join([*lines, ""])
