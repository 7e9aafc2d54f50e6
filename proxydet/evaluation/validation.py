"""Checks of detections against the data set that they claim to be of.

A results file can hold millions of detections: every check looks at whole columns, counts the offenders, and keeps the
first few for the message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from proxydet.data.formats.records import Identifier
from proxydet.data.masks import measure
from proxydet.errors import DataError
from proxydet.evaluation.ground_truth import GroundTruth
from proxydet.evaluation.results import Results

_SHOWN = 5
_DIGITS = 20
_TOLERANCE_PIXELS = 1.0

_HINTS = {
    "name images that the data set does not have": "give the results' own annotation file with --data",
    "name categories that the data set does not have": "category_id is the id of the annotation file, not a row number",
    "have a score that is not finite": "the detector diverged, or divided by zero: look at these images' outputs",
    "have a box with a side that is negative or not finite": "a box is x, y, width, height in pixels",
    "have a box that reaches out of their image": (
        "boxes are x, y, width, height in pixels of the original image; clip them, or accept them as they are with "
        "--allow-outside"
    ),
    "have neither a box nor a mask": "each detection needs a bbox, a segmentation, or both",
    "have a mask that is not of their image's size": "masks must be of the original image's height and width",
    "have a damaged mask": "segmentation must be a run-length mask of the COCO tools or a list of polygons",
}


@dataclass
class Problems:
    """What is wrong with detections, found part by part and told at the end.

    Attributes:
        truth: The data set.
        path: The results file; None for values.
        allow_outside: Whether boxes may reach out of their image.
    """

    truth: GroundTruth
    path: Path | None
    allow_outside: bool = False
    _counts: dict[str, int] = field(default_factory=dict)
    _examples: dict[str, list[str]] = field(default_factory=dict)
    _misspelled: set[str] = field(default_factory=set)

    @property
    def found(self) -> bool:
        """Whether anything is wrong so far."""
        return bool(self._counts)

    def add(self, kind: str, wrong: NDArray[Any], describe: Callable[[int], str]) -> None:
        """Note offenders.

        Args:
            kind: What they do, one of the kinds that have a hint.
            wrong: Their positions.
            describe: Position to text for the message.
        """
        if not len(wrong):
            return
        self._counts[kind] = self._counts.get(kind, 0) + len(wrong)
        examples = self._examples.setdefault(kind, [])
        examples.extend(describe(int(index)) for index in wrong[: _SHOWN - len(examples)])

    def check_names(
        self, key: str, names: Sequence[Identifier], number_D: NDArray[np.int64], first: int
    ) -> None:
        """Note images or categories that the data set does not have.

        Args:
            key: ``image_id`` or ``category_id``.
            names: What the detections name.
            number_D: The number of each in the data set; -1 where it is not there.
            first: Number of the first of these detections.
        """
        plural, known = {
            "image_id": ("images", self.truth.image_index),
            "category_id": ("categories", self.truth.category_index),
        }[key]
        kind = f"name {plural} that the data set does not have"
        wrong = np.flatnonzero(number_D < 0)
        self.add(kind, wrong, lambda index: f"detection {first + index}: {key} {names[index]!r}")
        if len(wrong) and _other_spelling(names[wrong[0]]) in known:
            self._misspelled.add(kind)

    def check_boxes(
        self, image_D: NDArray[np.int64], box_D4: NDArray[np.float64], first: int
    ) -> None:
        """Note boxes with impossible sides, and those that reach out of their image by more than a pixel."""
        valid_D = np.isfinite(box_D4).all(axis=1) & (box_D4[:, 2:] >= 0).all(axis=1)

        def describe(index: int) -> str:
            sides = ", ".join(f"{side:g}" for side in box_D4[index])
            return f"detection {first + index}: [{sides}]{self._image(int(image_D[index]))}"

        kind = "have a box with a side that is negative or not finite"
        self.add(kind, np.flatnonzero(~valid_D), describe)
        if self.allow_outside:
            return
        sizes_D2 = self.truth.image_sizes_I2[image_D][:, ::-1]
        far_D = (box_D4[:, :2] + box_D4[:, 2:] > sizes_D2 + _TOLERANCE_PIXELS).any(axis=1)
        near_D = (box_D4[:, :2] < -_TOLERANCE_PIXELS).any(axis=1)
        outside_D = valid_D & (image_D >= 0) & (far_D | near_D)
        kind = "have a box that reaches out of their image"
        self.add(kind, np.flatnonzero(outside_D), describe)

    def check_masks(
        self,
        masks: list[dict[str, Any]],
        image_M: NDArray[np.int64],
        mask_D: NDArray[np.int64],
        first: int,
    ) -> NDArray[np.float64]:
        """Note masks of another size than their image's and masks whose runs do not fill it; return all areas.

        Args:
            masks: Distinct masks.
            image_M: The image of each.
            mask_D: Which mask each detection has; -1 without.
            first: Number of the first of these detections.
        """
        sizes_M2 = np.array([mask["size"] for mask in masks], dtype=np.int64).reshape(-1, 2)
        wrong_M = (sizes_M2 != self.truth.image_sizes_I2[image_M]).any(axis=1)
        area_M, sound_M = measure(masks)

        def of_size(index: int) -> str:
            mask = mask_D[index]
            height, width = sizes_M2[mask]
            return f"detection {first + index}: {height} x {width}{self._image(int(image_M[mask]))}"

        def of_image(index: int) -> str:
            image_id = self.truth.image_ids[image_M[mask_D[index]]]
            return f"detection {first + index} in image {image_id!r}"

        with_mask = np.flatnonzero(mask_D >= 0)
        for kind, bad_M, describe in (
            ("have a mask that is not of their image's size", wrong_M, of_size),
            ("have a damaged mask", ~sound_M & ~wrong_M, of_image),
        ):
            self.add(kind, with_mask[bad_M[mask_D[with_mask]]], describe)
        return area_M

    def _image(self, index: int) -> str:
        if index < 0:
            return ""
        height, width = self.truth.image_sizes_I2[index]
        return f" in image {self.truth.image_ids[index]!r} of {height} x {width}"

    def raise_if_any(self, detections: int) -> None:
        """Raise for the first kind of problem found, naming the others.

        Args:
            detections: How many were looked at.

        Raises:
            DataError: There is a problem.
        """
        found = [kind for kind in _HINTS if kind in self._counts]
        if not found:
            return
        kind = found[0]
        count = self._counts[kind]
        where = str(self.path) if self.path is not None else "The detections given"
        shown = "; ".join(self._examples[kind]) + ("; ..." if count > _SHOWN else "")
        message = f"{where}: {count} of {detections} detections {kind} ({shown})."
        for other in found[1:]:
            message += f" Also, {self._counts[other]} {other}."
        hint = _HINTS[kind]
        if kind in self._misspelled:
            hint = "the same ids are there as numbers or as text: write them as the annotation file does"
        elif kind.startswith("name") and count > detections / 2:
            message += f" These look like results of another data set than {self.truth.name}."
            hint = "evaluate with the annotation file of the data set that the detector ran on"
        raise DataError(message, hint=hint, path=self.path)


def _other_spelling(name: Identifier) -> Identifier | None:
    """Return a number's text, or a text's number; None where it has none."""
    if isinstance(name, int):
        return str(name)
    return int(name) if name.isascii() and name.isdigit() and len(name) < _DIGITS else None


def check_duplicates(results: Results, truth: GroundTruth) -> None:
    """Check that no image's detections are there twice, as when two processes' files were joined carelessly.

    Raises:
        DataError: Every detection of some image occurs more than once, to the last digit.
    """
    key_D = _fingerprint(results)
    order = np.argsort(key_D, kind="stable")
    same = key_D[order][1:] == key_D[order][:-1]
    repeated_D = np.zeros(len(key_D), dtype=bool)
    repeated_D[order[1:][same]] = True
    repeated_D[order[:-1][same]] = True
    total_I = np.bincount(results.image_D, minlength=len(truth.image_ids))
    repeated_I = np.bincount(results.image_D[repeated_D], minlength=len(truth.image_ids))
    twice = np.flatnonzero((total_I > 0) & (total_I == repeated_I))
    if not len(twice):
        return
    where = str(results.path) if results.path is not None else "The detections given"
    shown = ", ".join(repr(truth.image_ids[index]) for index in twice[:_SHOWN])
    raise DataError(
        f"{where}: every detection of {len(twice)} images is there more than once "
        f"(images {shown}{', ...' if len(twice) > _SHOWN else ''}).",
        hint="the files of several processes were probably joined twice: join each once",
        path=results.path,
    )


def _fingerprint(results: Results) -> NDArray[np.uint64]:
    """One number a detection; equal for equal detections, and for others only by a chance of 2^-64."""
    key_D: NDArray[np.uint64] = results.image_D.astype(np.uint64)
    key_D *= np.uint64(0x9E3779B97F4A7C15)
    columns = [results.category_D.astype(np.float64), results.score_D, *results.box_D4.T]
    for column in columns:
        bits_D = np.ascontiguousarray(column + 0.0).view(np.uint64)
        key_D = (key_D ^ bits_D) * np.uint64(0xC2B2AE3D27D4EB4F)
        key_D ^= key_D >> np.uint64(29)
    return key_D
