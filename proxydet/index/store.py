"""An index on disk: boxes, proposal scores and region embeddings of many images, in parts that are opened by memory map.

An index is a folder::

    index.json                  what made it, and its parts with sizes and SHA-256; replaced whole at each commit
    vocabulary.npz              the classes of the detector's training
    text_encoder.json           its text encoder, where that is not CLIP
    parts/SHA256.safetensors    regions of some images; never changed once written

What index.json names is in the index; a part that was written and not named yet, as before a power cut, is removed by the
next writer. *Exact* indexes hold float32 embeddings of all steps and branches and of all regions: what is found in them is
what the detector finds. *Compact* ones hold the best few regions by their proposal scores, the mean of the steps as int8 with an offset and a scale
for each dimension of a part, and boxes to 1/65535 of the image.

Dimensions: B images of a part, N their regions, D embedding, K stored embeddings of a region.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from proxydet._version import __version__
from proxydet.config import from_mapping, to_mapping
from proxydet.errors import ConfigError, DataError, DiskFullError, InputError
from proxydet.files import Lock, read_json, sha256, staged, sweep, write_errors, write_json
from proxydet.inference.sources import SourceImage
from proxydet.modeling.config import InferenceConfig
from proxydet.modeling.roi_heads import RegionEmbeddings
from proxydet.modeling.weights import weights_digest
from proxydet.vocabulary.compositional import CompositionalEncoder
from proxydet.vocabulary.vocabulary import Vocabulary

if TYPE_CHECKING:
    from proxydet.detector import Detector

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
# Values, ascending, and the place of each: the number of the part in the upper 32 bits, the row in the lower ones.
_Table = tuple[Integers, Integers]

COMPACT_REGIONS = 30
"""Regions that a compact index keeps of an image, where nothing else is asked for."""

_FORMAT = "proxydet region index 1"
_NAME = "index.json"
_PART_BYTES = 128 * 2**20
_PART_IMAGES = 4096
_VERIFY = (
    "proxydet index verify reports what is damaged; index its images again, or put the file back"
)


# --- What is kept ------------------------------------------------------------------------------------------------------


class IndexedDetector(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The detector that an index was made with: what a search needs of it.

    Two indexes can be merged, and images added to one, where all of this is equal.
    """

    weights: str
    """SHA-256 of its weights."""
    vocabulary: str
    """SHA-256 of the classes of its training."""
    dimension: int
    """D."""
    classifiers: tuple[tuple[float, float], ...]
    """Temperature and bias of each stored embedding's classifier."""
    mixup: bool
    """Whether the last one is that of the mixup branch."""
    sides: tuple[int, int]
    """The shortest and the longest side, in pixels, that images were scaled to."""
    most_regions: int | None
    """Regions kept of an image of a compact index; None: an exact index."""
    settings: dict[str, Any]
    """Fusion weights, NMS and number format: its `InferenceConfig`."""

    @classmethod
    def of(cls, detector: Detector, *, most_regions: int | None) -> IndexedDetector:
        """Describe a detector.

        Args:
            detector: The detector.
            most_regions: Regions kept of an image of a compact index; None: an exact index.

        Raises:
            ConfigError: It runs with tiles, rescoring or test-time augmentation, or ``most_regions`` is below 1.
        """
        if detector.inference.augmented or detector.inference.tiles:
            raise ConfigError(
                "an index holds the regions of one view of an image",
                hint="leave out test-time augmentation and tiles: --tta, or inference.flip, inference.scales and inference.tiles of the run",
            )
        if detector.inference.rescore:
            raise ConfigError(
                "an index scores each region alone, and rescoring needs all regions of an image",
                hint="leave out --rescore, or inference.rescore of the run",
            )
        if most_regions is not None and most_regions < 1:
            raise ConfigError(
                f"a compact index keeps {most_regions} regions of an image; it must be at least 1"
            )
        network = detector.network
        classifiers = tuple(
            (float(own.temperature), 0.0 if own.cls_bias is None else float(own.cls_bias))
            for own in network.classifiers()
        )
        mixup = network.roi_heads.mixup is not None
        if most_regions is not None:
            steps = classifiers[: len(classifiers) - mixup]
            mean = (steps[0][0], sum(bias for _, bias in steps) / len(steps))
            classifiers = (mean, *classifiers[len(steps) :])
        return cls(
            weights=weights_digest(network),
            vocabulary=detector.vocabulary.digest,
            dimension=network.config.classifier.embedding_dim,
            classifiers=classifiers,
            mixup=mixup,
            sides=detector.sides,
            most_regions=most_regions,
            settings={**to_mapping(detector.inference), "masks": False},
        )

    @property
    def inference(self) -> InferenceConfig:
        """Thresholds, fusion weights and limits of the detector."""
        return from_mapping(InferenceConfig, self.settings, "inference")

    def require_equal(self, other: IndexedDetector, path: Path) -> None:
        """Refuse what another detector made.

        Args:
            other: Of what is to be added.
            path: The index, for the message.

        Raises:
            DataError: They differ.
        """
        # Settings that came after an index count as their defaults.
        mine, theirs = (
            {**msgspec.to_builtins(detector), "settings": detector.inference}
            for detector in (self, other)
        )
        differing = [key for key in mine if mine[key] != theirs[key]]
        if differing:
            names = {"most_regions": "--compact or --regions", "settings": "inference settings"}
            shown = ", ".join(names.get(key, key) for key in differing)
            raise DataError(
                f"{path} was made with other {shown}",
                hint="use the detector and the mode that made it (proxydet index info), or write another index with -o",
                path=path,
            )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ImageRegions:
    """The regions of one image.

    Attributes:
        path: Absolute path of the image, or its name in an archive.
        file: Bytes of the file and when it, or its tar, was last changed, in nanoseconds; a number below 0 changes with
            the tag that a store gives in place of a time; 0: not known.
        digest: SHA-256 of the file.
        sizes: Height and width as the network saw it, and of the original.
        boxes_N4: float32 xyxy, pixels of the image as the network saw it.
        proposals_N: float32, scores of the proposal network in [0, 1].
        embeddings: K times float32 (N, D).
        tar: Of a member of a tar: the bytes of ``path`` that name the tar, and where the image begins in it.
    """

    path: str
    file: tuple[int, int]
    digest: bytes
    sizes: tuple[int, int, int, int]
    boxes_N4: Floats
    proposals_N: Floats
    embeddings: tuple[Floats, ...]
    tar: tuple[int, int] = (0, 0)

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        return self.boxes_N4.nbytes + sum(values.nbytes for values in self.embeddings)


def image_regions(found: RegionEmbeddings, index: int, detector: IndexedDetector) -> dict[str, Any]:
    """Return what an index of a detector keeps of one image's regions: boxes, proposal scores and embeddings.

    Args:
        found: Regions of a batch, as `Detector.embed` returns them, on the CPU.
        index: The image's place in the batch.
        detector: Says whether the index is compact.

    Returns:
        Those arguments of `ImageRegions`.
    """
    valid_R = found.valid_BR[index]
    boxes_N4, proposals_N = (
        found.boxes_BR4[index][valid_R],
        found.proposal_scores_BR[index][valid_R],
    )
    steps = [values[index][valid_R] for values in found.detection]
    mixup = [] if found.mixup_BRD is None else [found.mixup_BRD[index][valid_R]]
    if detector.most_regions is not None:
        # Leaving out regions that overlap better ones costs more precision than it saves bytes.
        kept = proposals_N.argsort(descending=True, stable=True)[: detector.most_regions]
        boxes_N4, proposals_N = boxes_N4[kept], proposals_N[kept]
        steps = [torch.stack(steps)[:, kept].mean(dim=0)]
        mixup = [values[kept] for values in mixup]
    return {
        "boxes_N4": boxes_N4.numpy(),
        "proposals_N": proposals_N.numpy(),
        "embeddings": tuple(values.numpy() for values in (*steps, *mixup)),
    }


# --- Parts -------------------------------------------------------------------------------------------------------------


class PartRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What index.json says of a part."""

    sha256: str
    bytes: int
    images: int
    """B, those that were dropped among them."""
    regions: int
    """N, likewise."""
    dropped: tuple[int, ...] = ()
    """Images that are not in the index any more: removed, or replaced by what another part holds of them."""


@dataclasses.dataclass(frozen=True)
class StoredClassifier:
    """The classifier of one stored embedding of a part: logits of what is stored, for classes given by columns of text.

    Attributes:
        temperature: Factor from cosine to logit.
        bias: Added to the logits.
        scale_D: Of int8 embeddings: what they are multiplied by; None: they are stored as they are.
        offset_D: What is added to them then.
    """

    temperature: float
    bias: float
    scale_D: Tensor | None = None
    offset_D: Tensor | None = None

    def logits(self, embeddings_ND: Tensor, text_DK: Tensor) -> Tensor:
        """Return the logits (N, K)."""
        text_DK = self.temperature * text_DK
        if self.scale_D is None or self.offset_D is None:
            return (embeddings_ND @ text_DK).add_(self.bias)
        logits_NK = embeddings_ND.float() @ (self.scale_D[:, None] * text_DK)
        return logits_NK.add_(self.offset_D @ text_DK + self.bias)


class Part:
    """A part of an index, opened by memory map when it is first read.

    Args:
        path: The file.
        record: What index.json says of it.
        detector: Whose regions these are.
    """

    def __init__(self, path: Path, record: PartRecord, detector: IndexedDetector) -> None:
        self.path = path
        self.record = record
        self._detector = detector

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Its tensors; values lie in the file until they are read.

        Raises:
            DataError: The file is absent, or changed since it was written.
        """
        from safetensors import SafetensorError, safe_open

        try:
            size = self.path.stat().st_size
            if size != self.record.bytes:
                raise ValueError(f"it has {size} bytes, not {self.record.bytes}")
            with safe_open(self.path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 not a mapping
            images, regions = self.record.images, self.record.regions
            ends_B = tensors["ends"]
            shapes = {"ends": (images,), "path_ends": (images,), "files": (images, 2)}
            shapes |= {"digests": (images, 32), "sizes": (images, 4)}
            shapes |= {"boxes": (regions, 4), "proposals": (regions,)}
            if "tars" in tensors:
                shapes["tars"] = (images, 2)
            for index in range(len(self._detector.classifiers)):
                shapes[f"embeddings_{index}"] = (regions, self._detector.dimension)
            wrong = [name for name, shape in shapes.items() if tensors[name].shape != shape]
            if wrong:
                raise ValueError(f"its {wrong[0]} have the shape {tuple(tensors[wrong[0]].shape)}")
            for ends, last in ((ends_B, regions), (tensors["path_ends"], len(tensors["paths"]))):
                if images and (
                    int(ends[-1]) != last or bool((ends.diff() < 0).any()) or ends[0] < 0
                ):
                    raise ValueError("its images overlap")
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise DataError(
                f"{self.path} is not the part that the index lists: {reason}",
                hint=_VERIFY,
                path=self.path,
            ) from error
        return tensors

    @cached_property
    def starts_B(self) -> Integers:
        """The first region of each image, and behind the last image the number of regions: int64 (B + 1,)."""
        return np.concatenate([[0], self.tensors["ends"].numpy()]).astype(np.int64)

    @cached_property
    def kept_B(self) -> npt.NDArray[np.bool_]:
        """Whether each image is in the index."""
        kept_B = np.ones(self.record.images, dtype=np.bool_)
        kept_B[list(self.record.dropped)] = False
        return kept_B

    @cached_property
    def classifiers(self) -> list[StoredClassifier]:
        """The classifier of each stored embedding."""
        return [
            StoredClassifier(
                temperature,
                bias,
                self.tensors.get(f"scale_{index}"),
                self.tensors.get(f"offset_{index}"),
            )
            for index, (temperature, bias) in enumerate(self._detector.classifiers)
        ]

    def keys(self) -> Integers:
        """Return keys of the paths of all images: int64 (B,)."""
        text, ends = self.tensors["paths"].numpy().tobytes(), self.tensors["path_ends"].tolist()
        starts = [0, *ends[:-1]]
        keys = [_key(text[start:end]) for start, end in zip(starts, ends, strict=False)]
        return np.array(keys, np.int64)

    def path_of(self, row: int) -> str:
        """Return the path of an image."""
        return self._encoded_path(row).decode("utf-8", "surrogateescape")

    def _encoded_path(self, row: int) -> bytes:
        ends_B = self.tensors["path_ends"]
        start = int(ends_B[row - 1]) if row else 0
        return self.tensors["paths"][start : int(ends_B[row])].numpy().tobytes()

    def source_of(self, row: int) -> SourceImage:
        """Return an image as what can be read: a file, an object of a store, or a member of a tar in either."""
        length, offset = self._tar_of(row)
        if length <= 0:
            return SourceImage(self.path_of(row))
        size, changed = self.tensors["files"][row].tolist()
        tar = self._encoded_path(row)[:length].decode("utf-8", "surrogateescape")
        stamp = str(changed) if changed > 0 else ""
        return SourceImage(self.path_of(row), max(size, 0), stamp, tar, offset)

    def _tar_of(self, row: int) -> tuple[int, int]:
        if "tars" not in self.tensors:
            return 0, 0
        length, offset = self.tensors["tars"][row].tolist()
        return length, offset

    def embeddings(self, regions: slice | Tensor) -> RegionEmbeddings:
        """Return some regions as one image's, or for places (B, R) as a batch's, embeddings as they are stored."""
        pick = slice(None) if isinstance(regions, Tensor) else None  # a batch, or one image
        stored = [
            self.tensors[f"embeddings_{index}"][regions][pick]
            for index in range(len(self._detector.classifiers))
        ]
        proposals_BR = self.tensors["proposals"][regions][pick].float()
        return RegionEmbeddings(
            detection=tuple(stored[: len(stored) - self._detector.mixup]),
            mixup_BRD=stored[-1] if self._detector.mixup else None,
            mixup_boxes_BR4=None,
            boxes_BR4=proposals_BR.new_zeros(*proposals_BR.shape, 4),
            proposal_scores_BR=proposals_BR,
            valid_BR=torch.ones_like(proposals_BR, dtype=torch.bool),
        )

    def boxes(self, regions: Tensor, rows: Tensor) -> Tensor:
        """Return boxes of regions (...), in the pixels of their images (rows) as the network saw them: (..., 4)."""
        boxes = self.tensors["boxes"][regions]
        if boxes.dtype == torch.float32:
            return boxes
        sides_2 = self.tensors["sizes"][rows][..., [1, 0, 1, 0]].float()
        return (boxes.float() + 32768) / 65535 * sides_2

    def image(self, row: int) -> ImageRegions:
        """Return an image with its regions, embeddings as the detector made them (of a compact index: rounded)."""
        places = slice(int(self.starts_B[row]), int(self.starts_B[row + 1]))
        regions = torch.arange(places.start, places.stop)
        embeddings = []
        for index, classifier in enumerate(self.classifiers):
            values_ND = self.tensors[f"embeddings_{index}"][places]
            if classifier.scale_D is not None and classifier.offset_D is not None:
                values_ND = values_ND * classifier.scale_D + classifier.offset_D
            embeddings.append(values_ND.numpy())
        size, changed = self.tensors["files"][row].tolist()
        height, width, original_height, original_width = self.tensors["sizes"][row].tolist()
        return ImageRegions(
            path=self.path_of(row),
            file=(size, changed),
            digest=self.tensors["digests"][row].numpy().tobytes(),
            sizes=(height, width, original_height, original_width),
            boxes_N4=self.boxes(regions, torch.full_like(regions, row)).numpy(),
            proposals_N=self.tensors["proposals"][places].float().numpy(),
            embeddings=tuple(embeddings),
            tar=self._tar_of(row),
        )

    def subset(self, kept_B: npt.NDArray[np.bool_]) -> dict[str, Tensor]:
        """Return the tensors of a part that holds only some of the images, values as they are."""
        tensors = dict(self.tensors)
        lengths_B = np.diff(self.starts_B)
        paths = [
            self.path_of(row).encode("utf-8", "surrogateescape")
            for row in np.flatnonzero(kept_B).tolist()
        ]
        images, regions = torch.from_numpy(kept_B), torch.from_numpy(np.repeat(kept_B, lengths_B))
        for name in ("files", "digests", "sizes", "tars"):
            if name in tensors:
                tensors[name] = tensors[name][images]
        for name in tensors:
            if name in ("boxes", "proposals") or name.startswith("embeddings_"):
                tensors[name] = tensors[name][regions]
        tensors["ends"] = torch.from_numpy(np.cumsum(lengths_B[kept_B]))
        return {**tensors, **_joined_paths(paths)}


def _joined_paths(paths: Sequence[bytes]) -> dict[str, Tensor]:
    ends_B = np.cumsum([len(path) for path in paths], dtype=np.int64)
    text = np.frombuffer(b"".join(paths), dtype=np.uint8).copy()
    return {"paths": torch.from_numpy(text), "path_ends": torch.from_numpy(ends_B)}


def part_of(images: Sequence[ImageRegions], *, compact: bool) -> dict[str, Tensor]:
    """Return the tensors of a part.

    Args:
        images: At least one.
        compact: Whether embeddings are rounded to int8, proposal scores to float16 and boxes to 16 bits.
    """
    sizes_B4 = np.array([image.sizes for image in images], dtype=np.int32)
    counts_B = np.array([len(image.proposals_N) for image in images], dtype=np.int64)
    boxes_N4 = np.concatenate([image.boxes_N4 for image in images]).astype(np.float32)
    proposals_N = np.concatenate([image.proposals_N for image in images]).astype(np.float32)
    digests_B32 = np.frombuffer(b"".join(image.digest for image in images), np.uint8)
    arrays: dict[str, npt.NDArray[Any]] = {
        "files": np.array([image.file for image in images], dtype=np.int64),
        "digests": digests_B32.reshape(-1, 32).copy(),
        "sizes": sizes_B4,
        "ends": np.cumsum(counts_B),
        "boxes": boxes_N4,
        "proposals": proposals_N,
    }
    if any(image.tar[0] for image in images):
        arrays["tars"] = np.array([image.tar for image in images], dtype=np.int64)
    if compact:
        sides_N4 = np.repeat(sizes_B4[:, [1, 0, 1, 0]], counts_B, axis=0)
        fractions_N4 = np.clip(boxes_N4 / sides_N4, 0, 1)
        arrays["boxes"] = (np.rint(fractions_N4 * 65535) - 32768).astype(np.int16)
        arrays["proposals"] = proposals_N.astype(np.float16)
    for index, columns in enumerate(zip(*(image.embeddings for image in images), strict=True)):
        values_ND = np.concatenate(columns).astype(np.float32)
        if compact:
            low_D, high_D = values_ND.min(axis=0, initial=1), values_ND.max(axis=0, initial=-1)
            offset_D = (low_D + high_D) / 2
            scale_D = np.maximum(high_D - low_D, 1e-6) / 254
            values_ND = np.rint((values_ND - offset_D) / scale_D).clip(-127, 127).astype(np.int8)
            arrays |= {f"scale_{index}": scale_D, f"offset_{index}": offset_D}
        arrays[f"embeddings_{index}"] = values_ND
    paths = [image.path.encode("utf-8", "surrogateescape") for image in images]
    return {
        **{name: torch.from_numpy(values) for name, values in arrays.items()},
        **_joined_paths(paths),
    }


def write_part(folder: Path, tensors: Mapping[str, Tensor]) -> PartRecord:
    """Write a part under the name of its SHA-256, whole or not at all; any process may, and `IndexWriter.commit` names it.

    Args:
        folder: The index.
        tensors: As `part_of` returns them.

    Raises:
        DiskFullError: There is no room.
        RuntimeEnvironmentError: It cannot be written.
    """
    from safetensors.torch import save

    content = save({name: values.contiguous() for name, values in tensors.items()})
    digest = hashlib.sha256(content).hexdigest()
    target = folder / "parts" / f"{digest}.safetensors"
    with staged(target) as temporary, write_errors(target):
        temporary.write_bytes(content)
    return PartRecord(
        sha256=digest,
        bytes=len(content),
        images=len(tensors["sizes"]),
        regions=len(tensors["proposals"]),
    )


# --- The whole ---------------------------------------------------------------------------------------------------------


class _Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    format: str
    version: str
    detector: IndexedDetector
    parts: tuple[PartRecord, ...]
    sha256: str = ""

    def digest(self) -> str:
        content = {**msgspec.to_builtins(self), "sha256": ""}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class StoredIndex:
    """An index on disk, as it was when it was opened.

    Attributes:
        path: Its folder.
        detector: What made it.
        parts: Its parts.
    """

    def __init__(self, path: Path | str) -> None:
        """Open an index; parts are opened when they are read.

        Raises:
            DataError: There is none, or it is damaged or of another version.
        """
        self.path = Path(path)
        file = self.path / _NAME
        if not file.is_file():
            raise DataError(
                f"{self.path} is not an index: there is no {file}"
                if self.path.exists()
                else f"there is no index {self.path}",
                hint="make one with: proxydet index FOLDER -o photos.index",
                path=self.path,
            )
        content = read_json(file, what="index", hint=_VERIFY, error=DataError)
        if content.get("format") != _FORMAT:
            raise DataError(
                f"{file} is of the format {str(content.get('format'))[:80]!r}, not {_FORMAT!r}",
                hint="read it with the version of proxydet that wrote it, or index the images again",
                path=file,
            )
        try:
            manifest = msgspec.convert(content, _Manifest)
            # What was not changed by anybody is equal to what is read of it.
            if manifest.digest() != manifest.sha256:
                raise ValueError("SHA-256 mismatch: it changed after it was written")
            _ = manifest.detector.inference
        except (msgspec.ValidationError, ValueError, ConfigError) as error:
            raise DataError(f"{file} is damaged: {error}", hint=_VERIFY, path=file) from error
        self.detector = manifest.detector
        self.parts = [
            Part(self._part_path(record), record, self.detector) for record in manifest.parts
        ]

    def _part_path(self, record: PartRecord) -> Path:
        return self.path / "parts" / f"{record.sha256}.safetensors"

    @property
    def images(self) -> int:
        """Images in the index."""
        return sum(part.record.images - len(part.record.dropped) for part in self.parts)

    @property
    def regions(self) -> int:
        """Regions in the parts, those of dropped images among them."""
        return sum(part.record.regions for part in self.parts)

    @property
    def bytes(self) -> int:
        """Bytes of its parts."""
        return sum(part.record.bytes for part in self.parts)

    def rows(self) -> Iterator[tuple[Part, int]]:
        """Yield the part and the row of each image."""
        for part in self.parts:
            for row in np.flatnonzero(part.kept_B).tolist():
                yield part, row

    def find(self, path: str) -> tuple[Part, int] | None:
        """Return the part and the row of an image, by the path that it was indexed under; None: it is not in the index."""
        key = _key(path.encode("utf-8", "surrogateescape"))
        for table in self._keys:
            for part, row in self.looked_up(table, key):
                if part.kept_B[row] and part.path_of(row) == path:
                    return part, row
        return None

    @cached_property
    def _keys(self) -> list[_Table]:
        return _with_keys([], self.parts, 0)

    def sizes(self) -> _Table:
        """Return the bytes of the images' files, for `looked_up`."""
        tables = [
            (part.tensors["files"][:, 0].numpy()[rows], (number << 32) + rows)
            for number, part in enumerate(self.parts)
            for rows in [np.flatnonzero(part.kept_B)]
        ]
        return _sorted_table(tables)

    def looked_up(self, table: _Table, value: int) -> Iterator[tuple[Part, int]]:
        """Yield the part and the row of each image that has a value in a table."""
        values, places = table
        for place in places[slice(*np.searchsorted(values, [value, value + 1]))].tolist():
            yield self.parts[place >> 32], place & 0xFFFFFFFF

    def continued(self) -> StoredIndex:
        """Open the index again after parts were added or images dropped; what was read of its parts stays."""
        now = StoredIndex(self.path)
        opened = {part.record.sha256: part for part in self.parts}
        for part in now.parts:
            if before := opened.get(part.record.sha256):
                kept = {k: v for k, v in before.__dict__.items() if k not in ("record", "kept_B")}
                part.__dict__.update(kept)
        if "_keys" in self.__dict__:
            now.__dict__["_keys"] = _with_keys(self._keys, now.parts, len(self.parts))
        return now

    def verify(
        self, *, images: bool = False, progress: Callable[[int], object] | None = None
    ) -> list[str]:
        """Read everything, and return what is wrong, in sentences.

        Args:
            images: Whether the image files are compared too: whether they are there, and as large and as old as when they
                were indexed.
            progress: Called with the bytes read of parts.
        """
        wrong = []
        try:
            _check_words(self.path, self.detector)
        except InputError as error:
            wrong.append(error.message)
        for part in self.parts:
            try:
                digest = sha256(part.path, progress)
            except OSError as error:
                wrong.append(f"{part.path}: {error.strerror or error}")
                continue
            try:
                if digest != part.record.sha256:
                    raise DataError(
                        f"{part.path}: SHA-256 mismatch: it changed after it was written",
                        hint=_VERIFY,
                    )
                finite = [values.isfinite().all() for values in part.tensors.values()]
                if not all(map(bool, finite)):
                    raise DataError(f"{part.path} holds values that are not finite", hint=_VERIFY)
            except DataError as error:
                wrong.append(error.message)
                continue
            for row in np.flatnonzero(part.kept_B).tolist() if images else ():
                path = part.path_of(row)
                state = file_state(path)
                if is_gone(path):
                    wrong.append(f"{path}: there is no such file any more")
                elif state and state != tuple(part.tensors["files"][row].tolist()):
                    wrong.append(f"{path}: changed since it was indexed")
        wrong += [
            f"{tree}: SHA-256 mismatch: it changed after it was written; build it again with: proxydet index approximate"
            for tree in self.path.glob("approximate-*.faiss")
            if not tree.stem.endswith(sha256(tree)[:16])
        ]
        named = {part.path.name for part in self.parts}
        strays = [file for file in (self.path / "parts").glob("*") if file.name not in named]
        wrong += [
            f"{file}: not in the index; the next proxydet index removes it" for file in strays
        ]
        return wrong


def _key(path: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(path, digest_size=7).digest(), "little")


def _sorted_table(tables: Sequence[_Table]) -> _Table:
    if not tables:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    values, places = (np.concatenate(columns) for columns in zip(*tables, strict=True))
    order = np.argsort(values, kind="stable")
    return values[order], places[order]


def _with_keys(tables: list[_Table], parts: Sequence[Part], first: int) -> list[_Table]:
    """Add the keys of the parts from ``first`` on to sorted tables, each more than twice as long as the next."""
    tables = list(tables)
    for number, part in enumerate(parts[first:], first):
        places = (number << 32) + np.arange(part.record.images, dtype=np.int64)
        tables.append(_sorted_table([(part.keys(), places)]))
        while len(tables) > 1 and len(tables[-2][0]) <= 2 * len(tables[-1][0]):
            tables[-2:] = [_sorted_table(tables[-2:])]
    return tables


def file_state(path: str | Path) -> tuple[int, int] | None:
    """Return the bytes of a file and when it was last changed, in nanoseconds; None: there is none."""
    try:
        status = os.stat(path)  # noqa: PTH116
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns


def is_gone(path: str) -> bool:
    """Whether an image of an index is not there any more; of what is in a store that is not known, of a tar's member the tar counts."""
    places = () if "://" in path else (Path(path), *Path(path).parents)
    return bool(places) and not places[0].exists() and not any(place.is_file() for place in places)


def read_words(path: Path) -> tuple[Vocabulary, CompositionalEncoder | None]:
    """Return the classes of the training that an index keeps, and its text encoder; None: CLIP.

    Raises:
        VocabularyError: A file is absent or damaged.
    """
    encoder = path / "text_encoder.json"
    own = CompositionalEncoder.load(encoder) if encoder.is_file() else None
    return Vocabulary.load(path / "vocabulary.npz"), own


def _check_words(path: Path, detector: IndexedDetector) -> None:
    vocabulary, _ = read_words(path)
    if vocabulary.digest != detector.vocabulary:
        raise DataError(
            f"{path / 'vocabulary.npz'}: SHA-256 mismatch: it changed after it was written",
            hint=_VERIFY,
            path=path,
        )


class IndexWriter:
    """Adds images to an index and removes them; one at a time. Use it in a ``with`` statement.

    What was added is in the index after `commit`, which comes by itself after every part and at the end, after an error or
    Ctrl-C too. What a killed writer had not committed is not in the index, and is added by the next one.

    Args:
        path: The folder of the index; made where it is not there.
        detector: What makes the regions; None: that of the index, which must be there.
        words: The classes of the training and the text encoder of a new index.

    Attributes:
        images: Images in the index, those that are not committed yet among them.

    Raises:
        DataError: The index is of another detector or damaged, or the folder holds something else.
        LockedError: Another process writes to it.
    """

    def __init__(
        self,
        path: Path,
        detector: IndexedDetector | None = None,
        words: tuple[Vocabulary, CompositionalEncoder | None] | None = None,
    ) -> None:
        self.path = path
        self._waiting: dict[str, ImageRegions] = {}
        self._waiting_bytes = 0
        self._added: dict[str, tuple[int, int]] = {}
        self._lock = Lock(path / "writer.lock", subject=f"the index {path}")
        if not (path / _NAME).is_file():
            if detector is None or words is None:
                StoredIndex(path)  # raises
            # A writer that was killed at its beginning leaves some of these.
            own = {
                "vocabulary.npz",
                "text_encoder.json",
                "parts",
                "writer.lock",
                "writer.lock.owner",
            }
            there = {file.name for file in path.iterdir()} if path.is_dir() else set()
            if {name for name in there if not name.startswith(".")} - own or path.is_file():
                raise DataError(
                    f"{path} is not empty and not an index",
                    hint="choose another place with -o, or remove it",
                    path=path,
                )
        self._lock.acquire(wait=False)
        try:
            fresh = not (path / _NAME).is_file()
            if fresh and detector is not None and words is not None:
                vocabulary, encoder = words
                vocabulary.save(path / "vocabulary.npz")
                if encoder is not None:
                    encoder.save(path / "text_encoder.json")
                self._write(detector, ())
            self._index = StoredIndex(path)
            if detector is not None:
                self._index.detector.require_equal(detector, path)
            sweep(path, sole_writer=True)
            sweep(path / "parts", sole_writer=True)
            self._remove_strays()
        except BaseException:
            self._lock.release()
            raise
        self._dropped: dict[str, set[int]] = {}

    @property
    def detector(self) -> IndexedDetector:
        """What makes the regions."""
        return self._index.detector

    @property
    def images(self) -> int:
        """Images in the index when it is committed."""
        return self._index.images + len(self._waiting) - sum(map(len, self._dropped.values()))

    def __enter__(self) -> IndexWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if not isinstance(error, DiskFullError):
                self.commit()
            if error is None:
                self._compact()
        finally:
            self._lock.release()

    def state(self, path: str) -> tuple[int, int] | None:
        """Return bytes and time of change of an image when it was indexed; None: it is not in the index."""
        if path in self._added:
            return self._added[path]
        found = self._index.find(path)
        if found is None or found[1] in self._dropped.get(found[0].record.sha256, ()):
            return None
        size, changed = found[0].tensors["files"][found[1]].tolist()
        return size, changed

    def digest(self, path: str) -> bytes | None:
        """Return the SHA-256 of an image when it was indexed; None: it is not in the index."""
        if path in self._waiting:
            return self._waiting[path].digest
        if self.state(path) is None or (found := self._index.find(path)) is None:
            return None
        return found[0].tensors["digests"][found[1]].numpy().tobytes()

    @cached_property
    def _sizes(self) -> _Table:
        return self._index.sizes()

    def add_copy(self, path: str, file: tuple[int, int]) -> bool:
        """Add an image whose content is in the index under another path, without running the network on it.

        Where there is no file under the other path any more, the image was moved: the other path is removed.

        Args:
            path: The image.
            file: Its bytes and time of change.

        Returns:
            Whether it was added.
        """
        digest: bytes | None = None
        for part, row in self._index.looked_up(self._sizes, file[0]):
            if digest is None:
                try:
                    digest = bytes.fromhex(sha256(Path(path)))
                except OSError:
                    return False
            if part.tensors["digests"][row].numpy().tobytes() != digest:
                continue
            old = part.path_of(row)
            self.add(dataclasses.replace(part.image(row), path=path, file=file, tar=(0, 0)))
            if is_gone(old):
                self.remove([old])
            return True
        return False

    def add(self, image: ImageRegions) -> None:
        """Add an image; one that is there under its path is replaced.

        Raises:
            DiskFullError: There is no room for a part.
        """
        self.remove([image.path])
        self._waiting[image.path] = image
        self._waiting_bytes += image.nbytes
        self._added[image.path] = image.file
        if len(self._waiting) >= _PART_IMAGES or self._waiting_bytes >= _PART_BYTES:
            self.commit()

    def remove(self, paths: Iterable[str]) -> int:
        """Remove images, and return how many were there."""
        count = 0
        for path in paths:
            if (image := self._waiting.pop(path, None)) is not None:
                self._waiting_bytes -= image.nbytes
                count += 1
            found = self._index.find(path)
            if found is not None:
                dropped = self._dropped.setdefault(found[0].record.sha256, set())
                count += found[1] not in dropped
                dropped.add(found[1])
            self._added.pop(path, None)
        return count

    def merge(self, other: StoredIndex) -> tuple[int, int]:
        """Add the images of another index; of an image in both the one that was changed last is kept.

        Where that is not known, as of what is in a store, the other index's is kept.

        Returns:
            How many were added, and how many were there already.

        Raises:
            DataError: Another detector made it, or it is damaged.
        """
        self.detector.require_equal(other.detector, self.path)
        added = there = 0
        for part in other.parts:
            kept_B = part.kept_B.copy()
            for row in np.flatnonzero(kept_B).tolist():
                state = self.state(path := part.path_of(row))
                changed = int(part.tensors["files"][row, 1])
                if state is None:
                    older = False
                elif min(changed, state[1]) > 0:
                    older = changed <= state[1]
                else:
                    older = part.tensors["digests"][row].numpy().tobytes() == self.digest(path)
                if older:
                    kept_B[row] = False
                    there += 1
                elif state is not None:
                    self.remove([path])
            if kept_B.any():
                added += int(kept_B.sum())
                self.commit([write_part(self.path, part.subset(kept_B))])
        return added, there

    def commit(self, parts: Sequence[PartRecord] = ()) -> None:
        """Write what was added as a part, and put it into the index together with what was removed.

        Args:
            parts: Parts that `write_part` wrote, of images that are not in the index.

        Raises:
            DiskFullError: There is no room; what was committed before stays good.
        """
        written = list(parts)
        if self._waiting:
            tensors = part_of(
                list(self._waiting.values()), compact=self.detector.most_regions is not None
            )
            written.append(write_part(self.path, tensors))
        if not written and not self._dropped:
            return
        fresh = {record.sha256: record for record in written}
        records = []
        for part in self._index.parts:  # a part stays in its place
            record, gone = part.record, self._dropped.get(part.record.sha256, set())
            dropped = tuple(sorted({*record.dropped, *gone}))
            again = fresh.pop(record.sha256, None)  # all its images were dropped, and added again
            records.append(again or msgspec.structs.replace(record, dropped=dropped))
        records += fresh.values()
        self._write(self.detector, records)
        self._index = self._index.continued()
        self._waiting.clear()
        self._waiting_bytes = 0
        self._dropped.clear()
        self._added.clear()

    def _write(self, detector: IndexedDetector, parts: Iterable[PartRecord]) -> None:
        manifest = _Manifest(
            format=_FORMAT, version=__version__, detector=detector, parts=tuple(parts)
        )
        manifest = msgspec.structs.replace(manifest, sha256=manifest.digest())
        self._lock.check()
        write_json(self.path / _NAME, msgspec.to_builtins(manifest))

    def _compact(self) -> None:
        """Write parts that hold dropped images again without them."""
        if not any(part.record.dropped for part in self._index.parts):
            return
        records = []
        for part in self._index.parts:
            if not part.record.dropped:
                records.append(part.record)
            elif part.kept_B.any():
                records.append(write_part(self.path, part.subset(part.kept_B)))
        self._write(self.detector, records)
        self._index = StoredIndex(self.path)
        self._remove_strays()

    def _remove_strays(self) -> None:
        self._lock.check()
        named = {part.path.name for part in self._index.parts}
        for file in (self.path / "parts").glob("*.safetensors"):
            if file.name not in named:
                file.unlink(missing_ok=True)
