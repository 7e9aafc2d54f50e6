"""Finding the class of each tar of an image-label source."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from proxydet.data.advice import how_to_get
from proxydet.data.annotation_json import CategoryEntry
from proxydet.data.classes import class_rows, nearest
from proxydet.data.description import ImageLabelSpec
from proxydet.data.imagenet_lvis import synset_of_wnid
from proxydet.data.images import require_distinct_files
from proxydet.data.labelled_images import FolderImages, LabelledImages, TarImages
from proxydet.data.store import AnnotationStore
from proxydet.data.tar_index import TarIndex
from proxydet.errors import DataError
from proxydet.reporting import SILENT, Progress
from proxydet.vocabulary.vocabulary import Vocabulary
from proxydet.wording import counted

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TarClasses:
    """Which tar belongs to which class.

    Attributes:
        class_of_tar: Row of the vocabulary for each tar file name that belongs to a class.
        without_class: Tars that belong to no class of the vocabulary; they are not used.
        missing: Keys of ``map`` without a tar, and WordNet ids of ImageNet-LVIS whose class has no tar at all.
    """

    class_of_tar: dict[str, int]
    without_class: tuple[str, ...]
    missing: tuple[str, ...]


def match_tars(
    spec: ImageLabelSpec, vocabulary: Vocabulary, categories: Sequence[CategoryEntry]
) -> TarClasses:
    """Find the class of each tar by its name.

    ``<key>.tar`` belongs to the class that ``map`` gives for the key; else to the category whose ``wnid``, ``synset`` or
    ``name`` is the key; else, where the key is a WordNet id of ImageNet-LVIS, to the category with its synset.

    Args:
        spec: The table ``[image_labels]``.
        vocabulary: The classes.
        categories: Categories of the training annotations.

    Raises:
        DataError: the folder is not there or holds no tar of any class, or ``map`` names an unknown class.
    """
    if spec.tars is None or not spec.tars.is_dir():
        raise DataError(
            f"there is no folder of tars {spec.tars}",
            hint="check 'tars' under [image_labels] in the data description; it is relative to its folder",
            path=spec.tars,
        )
    row_of_name = {name: row for row, name in enumerate(vocabulary.names)}
    row_of_key = _rows_of_keys(spec, row_of_name, categories)
    tars = sorted(path.name for path in spec.tars.glob("*.tar"))
    found = {tar: row_of_key[Path(tar).stem] for tar in tars if Path(tar).stem in row_of_key}
    if not tars:
        got = how_to_get(spec.tars / "n02691156.tar")
        raise DataError(
            f"there are no tars in {spec.tars}",
            hint=got or "put one tar for each class there, named by its class",
            path=spec.tars,
        )
    if not found:
        raise DataError(
            f"none of the {counted(len(tars), 'tar')} in {spec.tars} belongs to a class of the vocabulary",
            hint="say which by [image_labels] map = { key = 'class name' }; the key is the tar's name without .tar",
            path=spec.tars,
        )
    missing = set(spec.map) - {Path(tar).stem for tar in tars}
    if any(Path(tar).stem in synset_of_wnid() for tar in found):
        known = synset_of_wnid().keys() & row_of_key.keys()
        missing |= {wnid for wnid in known if row_of_key[wnid] not in found.values()}
    return TarClasses(
        class_of_tar=found,
        without_class=tuple(tar for tar in tars if tar not in found),
        missing=tuple(sorted(missing)),
    )


def open_label_images(
    spec: ImageLabelSpec,
    vocabulary: Vocabulary,
    categories: Sequence[CategoryEntry],
    *,
    cache: Path | None = None,
    progress: Progress = SILENT,
) -> LabelledImages:
    """Open the image-label data of a description, after indexing it where that was not done before.

    Raises:
        DataError: it is not there, or none of it belongs to a class of the vocabulary.
    """
    if spec.annotations is not None:
        store = AnnotationStore.open(spec.annotations, cache=cache, progress=progress)
        require_distinct_files(store, spec.roots)
        return FolderImages(store, spec.roots, class_rows(store, vocabulary))
    matched = match_tars(spec, vocabulary, categories)
    folder = spec.tars or Path()
    if matched.without_class:
        _logger.info(
            "%s: %s to no class",
            folder,
            counted(len(matched.without_class), "tar belongs", "tars belong"),
        )
    if matched.missing:
        _logger.warning(
            "%s: %s missing, e.g. %s.tar",
            folder,
            counted(len(matched.missing), "tar is", "tars are"),
            matched.missing[0],
        )
    index = TarIndex.open(folder, list(matched.class_of_tar), cache=cache, progress=progress)
    return TarImages(index, tuple(matched.class_of_tar[tar] for tar in index.tars))


def _rows_of_keys(
    spec: ImageLabelSpec, row_of_name: dict[str, int], categories: Sequence[CategoryEntry]
) -> dict[str, int]:
    """Return the vocabulary row of each key; what is put in first gives way to what comes later."""
    known = [c for c in categories if c.name.strip() in row_of_name]
    row_of_synset = {c.synset: row_of_name[c.name.strip()] for c in known if c.synset}
    row_of_key = {
        wnid: row_of_synset[synset]
        for wnid, synset in synset_of_wnid().items()
        if synset in row_of_synset
    }
    row_of_key.update(row_of_name)
    row_of_key.update(row_of_synset)
    row_of_key.update({c.wnid: row_of_name[c.name.strip()] for c in known if c.wnid})
    for key, name in spec.map.items():
        if name.strip() not in row_of_name:
            raise DataError(
                f"[image_labels] map: {key!r} is given the class {name!r}, which is not in the vocabulary."
                + nearest(name, list(row_of_name)),
                hint="spell the class as the vocabulary does",
            )
        row_of_key[key] = row_of_name[name.strip()]
    return row_of_key
