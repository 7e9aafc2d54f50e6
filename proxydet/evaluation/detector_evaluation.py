"""From a detector to a report: predict what is not on disk yet, join, score.

Predictions are written as they are made, one file a process. A folder of them holds, while images are being predicted,
``identity.json`` (what makes the predictions) and ``part-RANK.jsonl``, one line an image: ``{"image_id": ...,
"detections": [rows of a results file]}``. When all images are there, the parts are joined to ``predictions.json``, a
results file in LVIS's and COCO's format with the images in ascending order of their ids, whatever order and number of
processes they were made in. Nothing is gathered in memory.

Dimensions: N detections of an image, C classes of the vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias, cast

import msgspec
import numpy as np
import numpy.typing as npt
import torch
import torch.distributed

from proxydet.data.dataset import Dataset, DatasetConfig
from proxydet.data.images import find_image
from proxydet.data.records import Identifier
from proxydet.errors import ConfigError, DataError
from proxydet.evaluation.config import EvaluationConfig
from proxydet.evaluation.evaluate import (
    Evaluation,
    check_protocol,
    run_evaluation,
    scored_types,
    write_records,
)
from proxydet.evaluation.report import Report
from proxydet.evaluation.split import DescribedSplit
from proxydet.files import (
    Lock,
    read_json,
    remove_cut_line,
    report_damage,
    staged,
    write_errors,
    write_json,
)
from proxydet.inference.pipeline import WriteBehind, Writer, run_images
from proxydet.modeling.config import with_later_settings
from proxydet.modeling.postprocess import Prediction, mask_edges, rles, to_host
from proxydet.modeling.weights import weights_digest
from proxydet.reporting import SILENT, Progress
from proxydet.training.distributed import DistInfo, broadcast_value, wait_for_all
from proxydet.vocabulary.vocabulary import Vocabulary

if TYPE_CHECKING:
    from proxydet.detector import Detector
    from proxydet.index.search import RegionIndex
    from proxydet.index.store import Part

logger = logging.getLogger(__name__)

Edges: TypeAlias = Callable[[], npt.NDArray[np.int64]]

_RESUME = "free some space and run the same command again; it continues where it stopped"


class _Line(msgspec.Struct, gc=False):
    image_id: Identifier
    detections: msgspec.Raw


class PredictionFolder:
    """The predictions of one detector on one data set.

    Args:
        path: The folder; made when it is not there.
        identity: What makes the predictions: digests of weights, vocabulary and annotations, and settings. A folder
            that holds predictions of another identity is refused, so that no two detectors' are ever mixed.
        masks: Whether the predictions are needed with masks. Those with masks serve where none are needed; those
            without are removed where masks are needed (while no other process predicts into the folder).
        again: Whether predictions of another identity are removed, to be made again, instead of refused; likewise.

    Attributes:
        masks: Whether the predictions in the folder have masks, those to come too.

    Raises:
        DataError: The folder holds predictions that were made with something else.
    """

    def __init__(
        self, path: Path, identity: Mapping[str, Any], *, masks: bool = False, again: bool = False
    ) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        plain = json.loads(json.dumps(dict(identity)))
        try:
            self.masks = self._check_identity(plain, masks)
        except DataError as error:
            if not again:
                raise
            logger.warning("%s Predicting again.", error.message)
            for stray in (*path.glob("part-*.jsonl"), self.joined):
                stray.unlink(missing_ok=True)
            write_json(path / "identity.json", {**plain, "masks": masks})
            self.masks = masks

    @property
    def joined(self) -> Path:
        """The results file that `join` writes."""
        return self.path / "predictions.json"

    @property
    def complete(self) -> bool:
        """Whether all images were predicted and joined."""
        return self.joined.is_file()

    def _check_identity(self, identity: dict[str, Any], masks: bool) -> bool:
        """Compare or write the identity; return whether the predictions have masks."""
        file = self.path / "identity.json"
        # Looked for before the identity, which every process writes before its first prediction.
        strays = [*self.path.glob("part-*.jsonl"), *self.path.glob("predictions.json")]
        if not file.is_file():
            if strays:
                raise DataError(
                    f"{strays[0]} holds predictions, and no identity.json says of what.",
                    hint="choose another --output folder, or remove this one",
                    path=self.path,
                )
            write_json(file, {**identity, "masks": masks})
            return masks
        theirs = read_json(
            file, hint="choose another --output folder, or remove this one", error=DataError
        )
        inside = theirs.get("inference settings")
        if isinstance(inside, dict):
            if "masks" in inside:  # as version 0.1 wrote it
                theirs["masks"] = inside.pop("masks")
            mine = identity.get("inference settings", {})
            theirs["inference settings"] = with_later_settings(inside, mine)
        with_masks = bool(theirs.pop("masks", masks))
        if theirs == identity:
            if masks and not with_masks:
                if strays:
                    logger.warning("%s: predicting again, with masks this time", self.path)
                for stray in strays:
                    stray.unlink(missing_ok=True)
                write_json(file, {**identity, "masks": True})
            return masks or with_masks
        differing = sorted(
            key for key in {*theirs, *identity} if theirs.get(key) != identity.get(key)
        )
        raise DataError(
            f"{self.path} holds predictions made with other {', '.join(differing)}.",
            hint="choose another --output folder, or remove this one to predict again",
            path=self.path,
        )

    def images_done(self) -> set[Identifier]:
        """Return the images whose predictions are on disk, by any process of this or an earlier try."""
        return {image_id for _, places in self._scan() for image_id in places}

    @contextmanager
    def writer(self, rank: int) -> Iterator[PredictionWriter]:
        """Open this process's file for appending; a line cut off by an earlier stop is removed first.

        Args:
            rank: Number of the process. Two processes must not use the same one at a time.
        """
        path = self.path / f"part-{rank:05}.jsonl"
        remove_cut_line(path)
        with write_errors(path, hint=_RESUME), path.open("ab") as file:
            yield PredictionWriter(file, path)
            file.flush()
            os.fsync(file.fileno())

    def join(self, image_ids: Sequence[Identifier]) -> Path:
        """Join the parts to one results file, and remove them.

        Args:
            image_ids: All images of the data set.

        Returns:
            The results file.

        Raises:
            DataError: Some images were not predicted.
        """
        if self.complete:
            return self.joined
        files: list[Path] = []
        places: dict[Identifier, tuple[int, int, int]] = {}
        for file, found in self._scan():
            for image_id, (start, length) in found.items():
                places.setdefault(image_id, (len(files), start, length))
            files.append(file)
        missing = [image_id for image_id in image_ids if image_id not in places]
        if missing:
            raise DataError(
                f"{self.path}: {len(missing)} of {len(image_ids)} images are not predicted yet.",
                hint="run the same command again; it continues where it stopped",
                path=self.path,
            )
        with (
            staged(self.joined) as temporary,
            write_errors(self.joined, hint=_RESUME),
            temporary.open("wb") as target,
            contextlib.ExitStack() as opened,
        ):
            streams = [opened.enter_context(file.open("rb")) for file in files]
            target.write(b"[")
            separator = b"\n"
            for part, start, length in map(places.__getitem__, sorted(image_ids)):
                streams[part].seek(start)
                if rows := streams[part].read(length)[1:-1]:
                    target.write(separator + rows)
                    separator = b",\n"
            target.write(b"\n]\n")
        for file in files:
            file.unlink(missing_ok=True)
        return self.joined

    def _scan(self) -> Iterator[tuple[Path, dict[Identifier, tuple[int, int]]]]:
        """Yield each part with where each image's detections start and how long they are."""
        decoder = msgspec.json.Decoder(_Line)
        for file in sorted(self.path.glob("part-*.jsonl")):
            found: dict[Identifier, tuple[int, int]] = {}
            start = damaged = 0
            with file.open("rb") as stream:
                for line in stream:
                    if line.endswith(b"\n"):
                        try:
                            row = decoder.decode(line)
                        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
                            damaged += 1
                            start += len(line)
                            continue
                        length = len(row.detections)
                        # The detections are the last thing of a line but its closing brace and end.
                        found[row.image_id] = (start + len(line) - length - 2, length)
                    start += len(line)
            report_damage(file, damaged, then="images that only these held are predicted again")
            yield file, found


class PredictionWriter(Writer):
    """Appends the detections of images to a file, each image in one write: made into text by threads, written in order.

    A result is the image's id, and a function that returns the rows of a results file.
    """

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._file = file
        self._path = path

    def prepare(self, result: tuple[Identifier, Callable[[], list[dict[str, Any]]]]) -> bytes:
        """Return the line of an image."""
        image_id, rows = result
        return msgspec.json.encode({"image_id": image_id, "detections": rows()}) + b"\n"

    def add(self, result: Any, prepared: bytes) -> None:  # noqa: ARG002
        """Append an image; it counts as done when its line is whole.

        Raises:
            DiskFullError: There is no room; what was written before stays good.
        """
        with write_errors(self._path, hint=_RESUME):
            self._file.write(prepared)
            self._file.flush()

    def finish(self) -> list[Path]:
        """Nothing is left to write."""
        return []


def result_rows(
    prediction: Prediction,
    image_id: Identifier,
    category_id_C: Sequence[Identifier | None],
    edges: Edges | None = None,
) -> list[dict[str, Any]]:
    """Return the rows of a results file for what was found in an image.

    Boxes are turned to x, y, width, height in single precision, as detectron2 does before it scores them.

    Args:
        prediction: What was found.
        image_id: The image's id in the annotation file.
        category_id_C: The category id of each class of the vocabulary; detections of classes without one are left out.
        edges: The `mask_edges` of the prediction, where it is pasted already.
    """
    boxes_N4 = prediction.boxes_N4.cpu().numpy().astype(np.float32, copy=True)
    boxes_N4[:, 2:] -= boxes_N4[:, :2]
    masks = rles(prediction, edges) if prediction.has_masks else None
    rows: list[dict[str, Any]] = []
    columns = zip(
        boxes_N4.tolist(),
        prediction.scores_N.tolist(),
        prediction.classes_N.tolist(),
        strict=True,
    )
    for index, (box, score, class_row) in enumerate(columns):
        category_id = category_id_C[class_row]
        if category_id is None:
            continue
        row = {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}
        if masks is not None:
            row["segmentation"] = masks[index]
        rows.append(row)
    return rows


def evaluate(
    detector: Detector,
    data: Dataset | DatasetConfig | Path | str,
    *,
    split: str = "val",
    output: Path | None = None,
    config: EvaluationConfig | None = None,
    again: bool = False,
    progress: Progress = SILENT,
) -> Report | None:
    """Evaluate a detector on a data set.

    Predictions go to ``output`` as they are made; a stopped evaluation, started again with the same folder,
    continues where it stopped. In a distributed run (torch.distributed is initialised) each process predicts its share, and the
    main one scores. The report is the same for any number of processes and any order of images.

    Args:
        detector: Finds objects.
        data: The data set, its config, or its TOML file.
        split: ``"train"`` or ``"val"``.
        output: Where predictions are kept, with the records of what they were made from; None keeps predictions in a
            folder that is removed at the end (one process only).
        config: How to score.
        again: Whether another detector's predictions in the folder are removed, and all are made again.
        progress: Where progress is shown.

    Returns:
        The report; None in processes other than the main one.

    Raises:
        DataError: Annotations or images cannot be used; or the folder holds another detector's predictions, without ``again``.
        LockedError: Another evaluation is using the folder.
        VocabularyError: The classes' embeddings do not fit the detector.
        DiskFullError: There is no room for the predictions.
    """
    config = config or EvaluationConfig()
    opened = DescribedSplit.open(data, split, protocol=config.protocol, progress=progress)
    evaluation = evaluate_split(
        detector, opened, output, records=output, config=config, again=again, progress=progress
    )
    return None if evaluation is None else evaluation.report


def evaluate_split(
    detector: Detector,
    split: DescribedSplit,
    output: Path | None = None,
    *,
    vocabulary: Vocabulary | None = None,
    records: Path | None = None,
    config: EvaluationConfig | None = None,
    again: bool = False,
    progress: Progress = SILENT,
) -> Evaluation | None:
    """Do as `evaluate` on a split that is open, and keep what the report was made from.

    Bias, scale and background of the classes count; their thresholds do not, so that average precision sees all detections:
    `proxydet.evaluation.analysis.operating_point` measures what they do.

    Args:
        detector: Finds objects.
        split: The images, their annotations and classes.
        output: Where predictions are kept, as for `evaluate`.
        vocabulary: What to detect instead of the classes of the split, such as these with background, marked base as it is;
            categories are found in it by name, and those that are not there are not detected.
        records: Where ``manifest.json`` and ``environment.json`` are written; None writes none.
        config: How to score.
        again: As for `evaluate`.
        progress: Where progress is shown.
    """
    config = config or EvaluationConfig()
    check_protocol(config, split.truth)
    info = current_process()
    predicted = detector.inference.masks
    kinds, masks_left_out = scored_types(config, split.truth, predicted=predicted)
    masks = "segm" in kinds
    if predicted and masks_left_out is not None:
        logger.warning(
            "%s: masks are neither predicted nor scored: %s", split.truth.name, masks_left_out
        )
    # Each process measured for itself what "auto" means on its device: the main one's choice counts.
    precision = cast("Any", broadcast_value(detector.inference.precision, info))
    settings = dataclasses.replace(detector.inference, masks=masks, precision=precision)
    if config.fixed:
        settings = dataclasses.replace(settings, max_detections=config.fixed_per_image)
    if vocabulary is None:
        vocabulary = fusion_vocabulary(split.data.vocabulary, detector.vocabulary)
        _require_categories(split, vocabulary)
    classes = vocabulary.with_scorers(threshold=None)
    with _folder(output) as path, held(path):
        # What makes the predictions; masks are on top: those that have them serve where none are needed.
        chosen: dict[str, Any] = {
            "image sides": list(detector.sides),
            "inference settings": dataclasses.asdict(settings),
        }
        del chosen["inference settings"]["masks"]
        inputs = {
            "weights": weights_digest(detector.network),
            "vocabulary": classes.digest,
            "annotations": split.store.digest(),
        }
        identity = {**inputs, **chosen}
        if info.is_main:
            # Before the others look: predictions that are not wanted now are removed here.
            PredictionFolder(path, identity, masks=masks, again=again)
        wait_for_all(info)
        folder = PredictionFolder(path, identity, masks=masks)
        settings = dataclasses.replace(settings, masks=folder.masks)
        if records is not None and info.is_main:
            chosen |= {"masks": folder.masks}
            chosen |= {"dataset": split.data.config.name, "split": split.name}
            write_records(records, config, inputs, chosen, processes=info.world_size)
        if not folder.complete:
            ids, category_id_C = split.store.image_ids, _category_ids(split, classes)
            done = folder.images_done()
            mine = range(info.rank, len(ids), info.world_size)
            todo = [index for index in mine if ids[index] not in done]
            _ = split.roots  # refused before anything is predicted

            def read(index: int) -> Any:
                return detector.scaled(split.read(index), settings)

            def detect(batch: list[Any]) -> list[tuple[Prediction, Edges | None]]:
                found = detector.predict_images(batch, classes, settings)
                if not found or found[0].scores_N.device.type == "cpu":
                    return [(prediction, None) for prediction in found]
                # A GPU pastes masks faster than this machine's threads, which encode them, behind the network.
                edges = [mask_edges(each) if each.has_masks else None for each in found]
                return list(zip(to_host(found), edges, strict=True))

            size = config.batch_size
            with (
                folder.writer(info.rank) as writer,
                progress.task(
                    "predicting", total=len(mine), unit="images", done=len(mine) - len(todo)
                ) as shown,
                WriteBehind([writer], size) as behind,
                contextlib.closing(run_images(todo, read, detect, batch_size=size)) as results,
            ):
                try:
                    for index, made in results:
                        if isinstance(made, DataError):
                            raise made
                        _, (prediction, edges) = made
                        rows = partial(result_rows, prediction, ids[index], category_id_C, edges)
                        behind.add((ids[index], rows), f"image {ids[index]}")
                        shown.advance()
                finally:
                    behind.finish()  # after an error or Ctrl-C too: what was found is not predicted again
        wait_for_all(info)
        if not info.is_main:
            return None
        return run_evaluation(
            folder.join(split.store.image_ids), split.truth,
            config=config, groups=split.groups, progress=progress, predicted=predicted,
        )  # fmt: skip


def evaluate_index(
    index: RegionIndex,
    split: DescribedSplit,
    *,
    vocabulary: Vocabulary | None = None,
    config: EvaluationConfig | None = None,
    progress: Progress = SILENT,
) -> Evaluation:
    """Score the classes of a split on an index of its images, whose files are not read: what `evaluate_split` does without the network.

    Args:
        index: Holds the regions of the split's images.
        split: The images, their annotations and classes.
        vocabulary: What to look for instead of the classes of the split: other embeddings of them, perhaps with background.
        config: How to score; boxes only.
        progress: Where progress is shown.

    Raises:
        DataError: Images of the split are not in the index, or a category of it is not in the vocabulary.
    """
    config = config or EvaluationConfig()
    check_protocol(config, split.truth)
    chosen = split.data.vocabulary if vocabulary is None else vocabulary
    vocabulary = fusion_vocabulary(chosen, index.vocabulary)
    _require_categories(split, vocabulary)
    vocabulary = vocabulary.with_scorers(threshold=None)
    settings = index.inference
    if config.fixed:
        settings = dataclasses.replace(settings, max_detections=config.fixed_per_image)
    category_id_C = _category_ids(split, vocabulary)
    roots, ids = split.roots, split.store.image_ids
    places: list[tuple[Part, int]] = []
    missing: list[str] = []
    for row in range(len(ids)):
        name = split.store.file_name(row)
        candidates = [root / name for root in roots]
        with contextlib.suppress(DataError):  # by another name, where the images are here
            candidates.append(find_image(name, roots))
        named = (index.stored.find(os.path.abspath(path)) for path in candidates)  # noqa: PTH100
        found = next(filter(None, named), None)
        if found is None:
            missing.append(name)
        else:
            places.append(found)
    if missing:
        raise DataError(
            f"{len(missing)} of {len(ids)} images of the data set are not in {index.stored.path}, such as {missing[0]}",
            hint="index them first: proxydet index FOLDER -o PHOTOS.index",
            path=index.stored.path,
        )
    rows: list[dict[str, Any]] = []
    with progress.task("searching", total=len(ids), unit="images") as task:
        for image_id, (part, row) in zip(ids, places, strict=True):
            prediction = index.detect(part, row, vocabulary, settings)
            rows += result_rows(prediction, image_id, category_id_C)
            task.advance()
    return run_evaluation(
        rows, split.truth,
        config=config, groups=split.groups, progress=progress, predicted=False,
    )  # fmt: skip


def _category_ids(split: DescribedSplit, vocabulary: Vocabulary) -> list[Identifier | None]:
    """Return the category id of each class of a vocabulary; None: the split does not annotate it."""
    id_of = {category.name.strip(): category.id for category in split.store.categories}
    return [id_of.get(name) for name in vocabulary.names]


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Keep other evaluations out of a folder of predictions; nothing is done where this process holds it already.

    In a distributed run the main process holds it for all.

    Raises:
        LockedError: Another evaluation holds the folder; the message says which, and since when.
    """
    lock = Lock(
        path / "evaluation.lock",
        subject=f"the folder of predictions {path}",
        hint="wait for it to end, or stop it; or choose another folder: --output",
    )
    owner = lock.owner()
    here = owner is not None and owner.is_here and not owner.has_ended and owner.pid == os.getpid()
    if here or not current_process().is_main:
        yield
        return
    made = not path.exists()
    lock.acquire(wait=False)
    try:
        yield
    finally:
        lock.release()
        if made:
            with contextlib.suppress(OSError):
                path.rmdir()  # an evaluation that was refused leaves no empty folder


@contextlib.contextmanager
def _folder(output: Path | None) -> Iterator[Path]:
    if output is not None:
        yield output
        return
    if current_process().world_size > 1:
        raise ConfigError("Several processes need one folder to put their predictions in.")
    with tempfile.TemporaryDirectory(prefix="proxydet-eval-") as folder:
        yield Path(folder)


def _require_categories(split: DescribedSplit, vocabulary: Vocabulary) -> None:
    reported = vocabulary.reported
    split.store.class_rows(reported, vocabulary.names[len(reported) :])


def fusion_vocabulary(vocabulary: Vocabulary, trained: Vocabulary) -> Vocabulary:
    """Return the classes to look for, marked base where the detector's fusion of scores shall treat them so.

    The classes that it was trained on, where they come first, keep the marks they had in training; of others those are base whose
    text embedding has a cosine above 0.9 with one of a base class of training, as published, or
    that have its name.

    Args:
        vocabulary: What is looked for.
        trained: What the detector was trained on.
    """
    count = len(trained)
    marked = vocabulary.base_as(trained)
    same = vocabulary.names[:count] == trained.names
    if not same or not np.array_equal(vocabulary.embeddings[:count], trained.embeddings):
        return marked
    marked = marked.with_base(np.concatenate([trained.base, marked.base[count:]]))
    return trained if marked == trained else marked


def current_process() -> DistInfo:
    """Return this process among those of a distributed run; the only one outside of such a run."""
    device = torch.device("cpu")  # the detector says where it computes
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return DistInfo(device=device)
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return DistInfo(rank=rank, world_size=world_size, device=device)
