"""Predictions on disk: written as they are made, one file a process, joined by reading.

A folder holds, while images are being predicted, ``identity.json`` (what makes the predictions) and
``part-RANK.jsonl``, one line an image: ``{"image_id": ..., "detections": [rows of a results file]}``. When all images
are there, the parts are joined to ``predictions.json``, a results file in LVIS's and COCO's format with the images in
ascending order of their ids, whatever order and number of processes they were made in. Nothing is gathered in memory.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import msgspec

from proxydet.data.formats.records import Identifier
from proxydet.errors import DataError
from proxydet.files import read_json, remove_cut_line, staged, write_errors, write_json

logger = logging.getLogger(__name__)

_RESUME = "free some space and run the same command again; it continues where it stopped"


class _Line(msgspec.Struct, gc=False):
    image_id: Identifier
    detections: msgspec.Raw


@dataclass(frozen=True)
class _Place:
    """Where the detections of an image are: file number, first byte, length."""

    part: int
    start: int
    length: int


class PredictionFolder:
    """The predictions of one detector on one data set.

    Args:
        path: The folder; made when it is not there.
        identity: What makes the predictions: digests of weights, vocabulary and annotations, and settings. A folder
            that holds predictions of another identity is refused, so that no two detectors' are ever mixed.
        masks: Whether the predictions are needed with masks. Those with masks serve where none are needed; those
            without are removed where masks are needed (while no other process predicts into the folder).

    Attributes:
        masks: Whether the predictions in the folder have masks, those to come too.

    Raises:
        DataError: The folder holds predictions that were made with something else.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], *, masks: bool = False) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self.masks = self._check_identity(json.loads(json.dumps(dict(identity))), masks)

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
        if isinstance(inside, dict) and "masks" in inside:  # as version 0.1 wrote it
            theirs["masks"] = inside.pop("masks")
        with_masks = bool(theirs.pop("masks", masks))
        if theirs == identity:
            if masks and not with_masks:
                if strays:
                    logger.warning("%s: predicting again, with masks this time", self.path)
                for stray in strays:
                    stray.unlink()
                write_json(file, {**identity, "masks": True})
            return masks or with_masks
        differing = sorted(
            key for key in {*theirs, *identity} if theirs.get(key) != identity.get(key)
        )
        raise DataError(
            f"{self.path} holds predictions made with other {', '.join(differing)}.",
            hint="choose another --output folder, or remove this one to predict anew",
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
        places: dict[Identifier, _Place] = {}
        for file, found in self._scan():
            for image_id, (start, length) in found.items():
                places.setdefault(image_id, _Place(len(files), start, length))
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
        ):
            _write_joined(target, files, [places[image_id] for image_id in sorted(image_ids)])
        for file in files:
            file.unlink()
        return self.joined

    def _scan(self) -> Iterator[tuple[Path, dict[Identifier, tuple[int, int]]]]:
        """Yield each part with where each image's detections start and how long they are."""
        decoder = msgspec.json.Decoder(_Line)
        for file in sorted(self.path.glob("part-*.jsonl")):
            found: dict[Identifier, tuple[int, int]] = {}
            start = 0
            with file.open("rb") as stream:
                for line in stream:
                    if line.endswith(b"\n"):
                        row = _decode_line(decoder, line, file)
                        length = len(row.detections)
                        # The detections are the last thing of a line but its closing brace and end.
                        found[row.image_id] = (start + len(line) - length - 2, length)
                    start += len(line)
            yield file, found


class PredictionWriter:
    """Appends the detections of images to a file, each image in one write."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._file = file
        self._path = path

    def write(self, image_id: Identifier, detections: list[dict[str, Any]]) -> None:
        """Append an image; it counts as done when its line is whole.

        Args:
            image_id: Its id in the annotation file.
            detections: Rows of a results file.

        Raises:
            DiskFullError: There is no room; what was written before stays good.
        """
        text = msgspec.json.encode({"image_id": image_id, "detections": detections})
        with write_errors(self._path, hint=_RESUME):
            self._file.write(text + b"\n")
            self._file.flush()


def _decode_line(decoder: msgspec.json.Decoder[_Line], line: bytes, file: Path) -> _Line:
    try:
        return decoder.decode(line)
    except msgspec.MsgspecError as error:
        raise DataError(
            f"{file} is damaged: {error}.",
            hint="remove the folder's parts to predict anew",
            path=file,
        ) from error


def _write_joined(target: IO[bytes], files: list[Path], places: list[_Place]) -> None:
    streams = [file.open("rb") for file in files]
    try:
        target.write(b"[")
        separator = b"\n"
        for place in places:
            stream = streams[place.part]
            stream.seek(place.start)
            rows = stream.read(place.length)[1:-1]
            if rows:
                target.write(separator + rows)
                separator = b",\n"
        target.write(b"\n]\n")
    finally:
        for stream in streams:
            stream.close()
