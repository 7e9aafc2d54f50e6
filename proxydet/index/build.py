"""Makes and extends indexes: a job (`proxydet.inference.sharded`) embeds the regions of images that are new or changed.

The job is in the folder ``adding`` of the index. Its plan leaves out what is in the index as it is; its parts become parts
of the index (`proxydet.index.store`) when it ends. What a killed one has finished is taken by the next.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from proxydet.config import to_mapping
from proxydet.errors import (
    ConfigError,
    DataError,
    DiskFullError,
    JobInterruptedError,
    LockedError,
    VocabularyError,
)
from proxydet.files import read_errors, sha256
from proxydet.index.store import (
    ADDING,
    Arrays,
    IndexedDetector,
    IndexWriter,
    StoredIndex,
    check_place,
    packed_part,
    paths_of,
)
from proxydet.inference.sharded import (
    LARGEST_PART,
    MANIFEST,
    Job,
    OpenWork,
    Row,
    RunOptions,
    Shard,
    load_job,
    open_job,
    remove_job,
    remove_remains,
    require_idle,
    run_job,
)
from proxydet.inference.sources import SourceImage, Unreadable, file_state
from proxydet.reporting import SILENT, Progress
from proxydet.vocabulary.compositional import CompositionalEncoder

if TYPE_CHECKING:
    from proxydet.detector import Detector, ScaledImage
    from proxydet.modeling.roi_heads import RegionEmbeddings
    from proxydet.models import NamedDetector

logger = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]

_PART_BYTES = 128 * 2**20
# Of an image of an exact index: proposals that detectors keep.
_MOST_REGIONS = 256


# --- The regions of images ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
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
        embeddings: Each stored embedding of the regions: float32 (N, D).
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


def image_regions(found: RegionEmbeddings, index: int, detector: IndexedDetector) -> dict[str, Any]:
    """Return what an index of a detector keeps of one image's regions: boxes, proposal scores and embeddings.

    Args:
        found: Regions of a batch, as `Detector.embed` returns them, on the CPU.
        index: The image's place in the batch.
        detector: Says whether the index is compact.

    Returns:
        Those arguments of `ImageRegions`.
    """
    valid_R = found.valid_BR[index].numpy()
    boxes_N4 = found.boxes_BR4[index].numpy()[valid_R]
    proposals_N = found.proposal_scores_BR[index].numpy()[valid_R]
    steps = [values[index].float().numpy()[valid_R] for values in found.detection]
    mixup = [] if found.mixup_BRD is None else [found.mixup_BRD[index].float().numpy()[valid_R]]
    if detector.most_regions is not None:
        # Leaving out regions that overlap better ones costs more precision than it saves bytes.
        kept = np.argsort(-proposals_N, kind="stable")[: detector.most_regions]
        boxes_N4, proposals_N = boxes_N4[kept], proposals_N[kept]
        steps = [np.stack(steps)[:, kept].mean(axis=0)]
        mixup = [values[kept] for values in mixup]
    return {"boxes_N4": boxes_N4, "proposals_N": proposals_N, "embeddings": (*steps, *mixup)}


def part_of(images: Sequence[ImageRegions], detector: IndexedDetector) -> Arrays:
    """Return the arrays of a part; of a compact index embeddings are rounded to int8, proposal scores to float16, boxes to 16 bits."""
    compact = detector.most_regions is not None

    def joined(values: Iterable[Floats], *shape: int) -> Floats:
        return np.concatenate([np.zeros((0, *shape), np.float32), *values], dtype=np.float32)

    sizes_B4 = np.array([image.sizes for image in images], dtype=np.int32).reshape(-1, 4)
    counts_B = np.array([len(image.proposals_N) for image in images], dtype=np.int64)
    boxes_N4 = joined((image.boxes_N4 for image in images), 4)
    proposals_N = joined(image.proposals_N for image in images)
    digests = b"".join(image.digest for image in images)
    arrays: Arrays = {
        "files": np.array([image.file for image in images], dtype=np.int64).reshape(-1, 2),
        "digests": np.frombuffer(digests, np.uint8).reshape(-1, 32),
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
    for number in range(len(detector.classifiers)):
        values_ND = joined((image.embeddings[number] for image in images), detector.dimension)
        if compact:
            low_D, high_D = values_ND.min(axis=0, initial=1), values_ND.max(axis=0, initial=-1)
            offset_D = (low_D + high_D) / 2
            scale_D = np.maximum(high_D - low_D, 1e-6) / 254
            values_ND = np.rint((values_ND - offset_D) / scale_D).clip(-127, 127).astype(np.int8)
            arrays |= {f"scale_{number}": scale_D, f"offset_{number}": offset_D}
        arrays[f"embeddings_{number}"] = values_ND
    return arrays | paths_of(image.path for image in images)


# --- What the job does -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class IndexParts:
    """Parts of an index as the results of a job; what could not be read is noted in them."""

    detector: IndexedDetector
    name = "index"
    suffix = ".safetensors"

    def write(self, target: Path, rows: Iterable[Row]) -> int:
        """Write a part, and return how many images are in it."""
        unreadable = {}
        images: dict[str, ImageRegions] = {}  # what is named twice, by other paths, is there once
        for row in rows:
            if row.error is not None:
                unreadable[row.image.name] = row.error
            elif row.content is not None:
                images[row.content.path] = row.content
        arrays = part_of([*images.values()], self.detector)
        target.write_bytes(packed_part(arrays, unreadable=json.dumps(unreadable)))
        return len(images)


@dataclass(frozen=True, kw_only=True)
class IndexWork:
    """Embeds regions: the `ImageWork` of ``proxydet index``; the content of a row is an `ImageRegions`, None where the index has it.

    Attributes:
        detector: Embeds them.
        path: The index.
        indexed: What describes the detector there.
    """

    detector: Detector
    path: Path
    indexed: IndexedDetector
    large = False

    @cached_property
    def _stored(self) -> StoredIndex:
        return StoredIndex(self.path)

    def read(self, image: SourceImage, root: str) -> tuple[dict[str, Any], ScaledImage] | None:
        """Read and scale an image; None: it has no time of change, and its content is that in the index."""
        path, file, tar = _identified(image, root)
        encoded, pixels = image.decoded(root)
        if isinstance(encoded, Path):
            with read_errors(encoded, error=DataError):
                digest = bytes.fromhex(sha256(encoded))
        else:
            digest = hashlib.sha256(encoded).digest()
            if file is None and (found := self._stored.find(path)) is not None:
                part, row = found
                if part.digest_of(row) == digest:
                    return None
        scaled = self.detector.scaled(pixels)
        height, width = scaled.views[0].image.shape[1:]
        sizes = (int(height), int(width), *scaled.size)
        return {
            "path": path,
            "file": file or (0, 0),
            "digest": digest,
            "sizes": sizes,
            "tar": tar,
        }, scaled

    def shape(self, read: tuple[dict[str, Any], ScaledImage] | None) -> tuple[int, ...]:
        """Return the size that the network sees."""
        return () if read is None else tuple(read[1].views[0].image.shape)

    def run(
        self, batch: list[tuple[dict[str, Any], ScaledImage] | None]
    ) -> list[ImageRegions | None]:
        """Embed the regions of a batch.

        Raises:
            NumericsError: The network gave values that are not finite.
        """
        from proxydet.detector import require_finite

        new = [read for read in batch if read is not None]
        if not new:
            return [None] * len(batch)
        found = self.detector.embed([scaled for _, scaled in new]).cpu()
        require_finite([*found.detection, found.boxes_BR4])
        made = iter(
            ImageRegions(**named, **image_regions(found, place, self.indexed))
            for place, (named, _) in enumerate(new)
        )
        return [None if read is None else next(made) for read in batch]


@dataclass(frozen=True, kw_only=True)
class OpenIndexing:
    """Opens an `IndexWork` in each worker process.

    Attributes:
        named: As of `proxydet.inference.rows.OpenDetection`, as are ``device`` and ``gpus``.
        precision: Number format of the network; None: that of the run.
        path: The index.
    """

    named: NamedDetector
    device: str
    gpus: int
    precision: str | None
    path: Path

    def __call__(self, number: int) -> IndexWork:
        """Open it in the worker of that number.

        Raises:
            DataError: The index is of another detector.
        """
        from proxydet.detector import open_named
        from proxydet.runtime.processes import keep_freed_memory

        device = f"cuda:{number % self.gpus}" if self.gpus else self.device
        detector = open_named(self.named, device=device)
        if detector.network.device.type == "cpu":
            keep_freed_memory()
        precision = self.precision or detector.inference.precision
        detector = detector.with_settings(precision=precision)
        indexed = StoredIndex(self.path).detector
        indexed.require_equal(describe(detector, indexed.most_regions), self.path)
        return IndexWork(detector=detector, path=self.path, indexed=indexed)


def _identified(
    image: SourceImage, root: str, *, planned: bool = False
) -> tuple[str, tuple[int, int] | None, tuple[int, int]]:
    """Return how an image is named in an index, its bytes and time of change, and its place in a tar as `ImageRegions.tar` has it.

    Where a store gives a tag in place of a time, the time is a negative number that changes with the tag.

    Args:
        image: The image.
        root: The folder that relative paths start from.
        planned: Of a file, take what was found when it was listed, not what is there now.
    """
    place = image.tar or image.name
    path = place if "://" in place else os.path.abspath(os.path.join(root, place))  # noqa: PTH100, PTH118 links stay
    if image.is_file:
        if planned and image.stamp and image.size is not None:
            return path, (image.size, int(image.stamp)), (0, 0)
        return path, file_state(path), (0, 0)
    tar = (len(os.fsencode(path)), image.offset) if image.tar else (0, 0)
    path += image.name[len(place) :]
    if not image.stamp:
        return path, None, tar
    changed = int(image.stamp) if image.stamp.isdigit() and "://" not in place else None
    if changed is None:
        digest = hashlib.blake2b(image.stamp.encode(), digest_size=7).digest()
        changed = -1 - int.from_bytes(digest, "little")
    return path, (image.size or 0, changed), tar


# --- Indexes -----------------------------------------------------------------------------------------------------------


def describe(detector: Detector, most_regions: int | None) -> IndexedDetector:
    """Describe a detector as an index does.

    Args:
        detector: The detector.
        most_regions: Regions kept of an image of a compact index; None: an exact index.

    Raises:
        ConfigError: It runs with tiles, rescoring or test-time augmentation, or ``most_regions`` is below 1.
    """
    from proxydet.detector import require_one_view
    from proxydet.modeling.weights import weights_digest

    require_one_view(detector.inference)
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
    return IndexedDetector(
        weights=weights_digest(network),
        vocabulary=detector.vocabulary.digest,
        dimension=network.config.classifier.embedding_dim,
        classifiers=classifiers,
        mixup=mixup,
        sides=detector.sides,
        most_regions=most_regions,
        settings={**to_mapping(detector.inference), "masks": False},
    )


def open_index(
    detector: Detector, path: Path, *, most_regions: int | None = None, request: str = ""
) -> IndexWork:
    """Make an index, where there is none, and return the work that embeds images for it in this process.

    Args:
        detector: Embeds the regions.
        path: The folder of the index.
        most_regions: Regions kept of an image of a compact index; None: an exact index.
        request: What named the detector and its settings; `StoredIndex.request` of a new index.

    Raises:
        ConfigError: The detector runs with test-time augmentation, tiles or rescoring.
        DataError: The index is of another detector or damaged, or the folder holds something else.
    """
    indexed = describe(detector, most_regions)
    if not check_place(path):
        try:
            encoder = detector.encoder
        except VocabularyError:  # CLIP, which is not here
            own = None
        else:
            own = encoder if isinstance(encoder, CompositionalEncoder) else None
        with IndexWriter(path, indexed, (detector.vocabulary, own), request=request, wait=True):
            pass
    StoredIndex(path).detector.require_equal(indexed, path)
    return IndexWork(detector=detector, path=path, indexed=indexed)


def open_addition(
    path: Path,
    sources: Sequence[str],
    *,
    shard: Shard | None = None,
    stdin: Path | None = None,
    progress: Progress = SILENT,
) -> Job:
    """Plan to embed the images that are new or changed; of several shards the first plans, and the others continue its plan.

    An image that is in the index and has not changed (bytes and time of change; where a store gives neither, its content, when
    it is read) is left out; one whose content is there under another path is copied there. Both are counted in `Job.counts`.

    Args:
        path: The index, which is there.
        sources: As for `proxydet.inference.sharded.open_job`, as are ``stdin`` and ``progress``.
        shard: Which shard will run.
        stdin: The list that came on stdin.
        progress: Where planning is shown.

    Raises:
        InputError: The index is damaged, no images were found, or shards of other sources are not finished.
        LockedError: A process adds images.
    """
    if shard is None or shard.count == 1:
        finish_addition(path)
    elif (path / ADDING).exists() and not (path / ADDING / MANIFEST).exists():
        with IndexWriter(path, wait=True):
            remove_remains(path / ADDING)
    detector = StoredIndex(path).detector
    root = os.getcwd()  # noqa: PTH109

    def choose(images: Iterator[SourceImage], counts: Counter[str]) -> Iterator[SourceImage]:
        stored = StoredIndex(path)
        with tempfile.TemporaryFile("w+", encoding="ascii") as moved:  # of millions of files
            for image in images:
                name, file, _ = _identified(image, root, planned=True)
                found = stored.find(name)
                if found is not None and file is not None and found[0].state_of(found[1]) == file:
                    counts["unchanged"] += 1
                elif (
                    found is None
                    and file is not None
                    and image.is_file
                    and (place := stored.find_copy(name, file[0])) is not None
                ):
                    moved.write(json.dumps([place, name, file]) + "\n")
                    counts["copied"] += 1
                else:
                    yield image
            if counts["copied"]:
                moved.seek(0)
                with IndexWriter(path, wait=True) as writer:
                    copies = map(json.loads, moved)
                    writer.copy((*stored.at(place), name, file) for place, name, file in copies)

    parts = IndexParts(detector)

    def planned() -> Job:
        return open_job(
            path / ADDING,
            sources,
            identity={"detector": detector.weights},
            parts=parts,
            largest=largest_part(detector),
            stdin=stdin,
            choose=choose,
            # One that comes when the others have ended plans what could not be read: nothing that it should leave behind.
            shard=None if shard is None or shard.count == 1 else shard,
            hint=f"run it to its end first; or add these images without --shard, which takes what it has finished into {path}",
            progress=progress,
        )

    try:
        return planned()
    except ConfigError:
        # What such a shard leaves behind all the same, a plan of which nothing could be read, makes room for another.
        with IndexWriter(path, wait=True):
            records = load_job(path / ADDING, parts).finished().values()
            if records and not any(record.objects for record in records):
                remove_job(path / ADDING)
        return planned()


def largest_part(detector: IndexedDetector) -> int:
    """Return how many images a part of an index takes at most."""
    bytes_each = (detector.most_regions or _MOST_REGIONS) * (
        4 * detector.dimension * len(detector.classifiers) + 20
    )
    return max(min(_PART_BYTES // bytes_each, LARGEST_PART), 1)


def finish_addition(path: Path, job: Job | None = None) -> None:
    """Make parts of the index of what the job has finished that adds images, and remove the job.

    Args:
        path: The index.
        job: The one that this process has run; one that another began meanwhile stays. None: the one that is there, which no
            process runs.

    Raises:
        LockedError: A process runs it.
        DataError: A part of the index is damaged; the job stays, as it does after the next two.
        DiskFullError: There is no room.
        RuntimeEnvironmentError: A file cannot be read or written.
    """
    folder = path / ADDING
    if job is None:
        require_idle(folder)
    if not folder.exists():
        return
    with IndexWriter(path, wait=True) as writer:
        if job is None:
            remove_remains(folder)
        if not (folder / MANIFEST).exists():  # another process was first
            return
        there = None
        try:
            there = load_job(folder, IndexParts(writer.index.detector))
        except DataError as error:
            if isinstance(error.__cause__, OSError):
                raise
            if job is None:
                logger.warning("%s; its images are embedded again", error.message)
        if job is not None and there is not None and there.digest != job.digest:
            return
        if (taken := job or there) is not None:
            writer.take(taken)
        (folder / MANIFEST).unlink()
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True, kw_only=True)
class IndexSummary:
    """What was done with images."""

    added: int
    """Images whose regions were embedded and added; those that had changed replaced what was there."""
    copied: int
    """Images whose content was in the index under another path; where that was gone, they were moved."""
    unchanged: int
    """Images that were in the index as they are."""
    images: int
    """Images in the index."""
    unreadable: tuple[Unreadable, ...]
    unfinished: int = 0
    """Parts of other shards that are not done yet; the images of all shards are in the index when there are none."""


def run_addition(
    path: Path,
    job: Job,
    open_work: OpenWork,
    *,
    options: RunOptions | None = None,
    shard: Shard | None = None,
    engine: str = "processes",
    progress: Progress = SILENT,
) -> IndexSummary:
    """Embed the images that were planned, and put them into the index.

    Arguments are as of `proxydet.inference.sharded.run_job`; ``job`` is what `open_addition` returned.

    Raises:
        ProxydetError: As of `run_job`; what was finished before is in the index.
    """
    alone = shard is None or shard.count == 1
    try:
        done = run_job(
            job,
            open_work,
            options=options,
            shard=shard,
            engine=engine,
            task="indexing",
            progress=progress,
        )
    except (LockedError, DiskFullError):
        raise
    except BaseException as error:
        if alone:
            finish_addition(path, job)
        if isinstance(error, JobInterruptedError):
            raise JobInterruptedError(
                f"stopped; {path} has {StoredIndex(path).images} images"
                + ("" if alone else ", and what this shard has finished is kept"),
                signal_number=error.signal_number,
                hint="run the same command again to continue",
            ) from error
        raise
    unreadable = tuple(_unreadable(job, shard or Shard()))
    unfinished = done.unfinished if (job.folder / MANIFEST).exists() else 0
    if job.digest and not unfinished:
        finish_addition(path, job)
    return IndexSummary(
        added=done.objects,
        copied=job.counts["copied"],
        unchanged=job.counts["unchanged"] + done.images - done.errors - done.objects,
        images=StoredIndex(path).images,
        unreadable=unreadable,
        unfinished=unfinished,
    )


def _unreadable(job: Job, shard: Shard) -> Iterator[Unreadable]:
    from safetensors import SafetensorError, safe_open

    for part, record in sorted(job.finished().items()):
        if record.errors and part % shard.count == shard.index:
            with (
                contextlib.suppress(OSError, SafetensorError),
                safe_open(job.file(part), "numpy") as file,
            ):
                for name, reason in json.loads(file.metadata()["unreadable"]).items():
                    yield Unreadable(file=name, reason=reason)


def index_images(
    detector: Detector,
    sources: Iterable[Path | str],
    path: Path | str,
    *,
    most_regions: int | None = None,
    batch_size: int = 4,
    progress: Progress = SILENT,
) -> IndexSummary:
    """Add images to an index, which is made where it is not there; the same call continues what was stopped.

    Images that are in the index and have not changed are left alone (`open_addition`). One that cannot be read is counted
    and left out.

    Args:
        detector: Embeds the regions.
        sources: Files, folders, patterns, tars, URLs, ``@FILE``: as `proxydet.inference.sources.stream_images` takes them.
        path: The folder of the index.
        most_regions: Regions kept of an image of a compact index; None: an exact index.
        batch_size: Images in the network at once.
        progress: Where progress is shown.

    Raises:
        InputError: The sources hold no images, the index is of another detector or damaged, or the folder holds something else.
        NumericsError: The network gave values that are not finite.
        DiskFullError: There is no room; what was finished is kept.
        JobInterruptedError: Ctrl-C; what was finished is in the index.
    """
    path = Path(path)
    work = open_index(detector, path, most_regions=most_regions)
    job = open_addition(path, [str(source) for source in sources], progress=progress)
    return run_addition(
        path, job, lambda _: work, options=RunOptions(batch_size=batch_size), progress=progress
    )
