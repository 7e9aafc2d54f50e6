"""Pictures of what a detector gets right and wrong: the best and the worst categories."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from hotcoco import mask as coco_mask
from numpy.typing import NDArray
from PIL import Image

from proxydet.data.formats.records import Identifier
from proxydet.data.images import Pixels
from proxydet.evaluation.analysis import right_and_wrong
from proxydet.evaluation.evaluate import Evaluation
from proxydet.evaluation.report import CategoryScore
from proxydet.evaluation.scoring import Scored
from proxydet.visualization.drawing import DrawnObject, draw_objects
from proxydet.visualization.report import Picture

_AROUND = 2.5
"""Sides of a picture of an error, as a multiple of what is to be seen."""
_LEAST_CLOSE_UP = 200
"""The least sides of such a picture, in pixels."""

ImageReader = Callable[[Identifier], Pixels]


@dataclass(frozen=True, kw_only=True)
class Example:
    """Something worth looking at.

    Attributes:
        kind: ``found``: a right detection; ``false``: a wrong one; ``missed``: an annotation that nothing found.
        image: Number of the image.
        detection: Number of the detection among all; -1 for what was missed.
        annotation: Number of the annotation; -1 for wrong detections.
    """

    kind: Literal["found", "false", "missed"]
    image: int
    detection: int = -1
    annotation: int = -1


def extreme_categories(
    scores: tuple[CategoryScore, ...], number: int, least_annotations: int = 3
) -> tuple[list[int], list[int]]:
    """Return the positions of the best and of the worst categories, no category being in both.

    Args:
        scores: All categories.
        number: How many of each.
        least_annotations: Categories with fewer are passed over, unless too few are left: their AP says little.
    """
    measured = [index for index, score in enumerate(scores) if score.ap is not None]
    weighty = [index for index in measured if scores[index].annotations >= least_annotations]
    chosen = weighty if len(weighty) >= 2 * number else measured
    ordered = sorted(chosen, key=lambda index: (scores[index].ap or 0.0, scores[index].name))
    worst = ordered[: min(number, len(ordered) // 2)]
    best = ordered[len(worst) :][::-1][:number]
    return best, worst


def best_examples(scored: Scored, category: int, number: int) -> list[Example]:
    """Return a category's right detections with the highest scores, from different images."""
    right_S, _ = right_and_wrong(scored.matches)
    matches = scored.matches
    annotation_S = np.full(len(matches.selection), -1, dtype=np.int64)
    annotation_S[matches.near_N] = matches.annotation_N
    return [
        Example(
            kind="found",
            image=int(matches.selection.image_S[index]),
            detection=int(matches.selection.detection_S[index]),
            annotation=int(annotation_S[index]),
        )
        for index in _top_of_images(scored, right_S, category, number)
    ]


def worst_examples(scored: Scored, category: int, number: int) -> list[Example]:
    """Return a category's errors: its wrong detections with the highest scores, and annotations that were missed."""
    _, wrong_S = right_and_wrong(scored.matches)
    matches = scored.matches
    false = [
        Example(
            kind="false",
            image=int(matches.selection.image_S[index]),
            detection=int(matches.selection.detection_S[index]),
        )
        for index in _top_of_images(scored, wrong_S, category, number)
    ]
    found = matches.annotation_N[matches.state_NAT[:, 0, 0] > 0]
    missed_G = (
        (matches.ann_category_G == category)
        & matches.counts_GA[:, 0]
        & ~np.isin(matches.ann_index_G, found)
    )
    missed = [
        Example(
            kind="missed",
            image=int(matches.ann_image_G[index]),
            annotation=int(matches.ann_index_G[index]),
        )
        for index in np.flatnonzero(missed_G)
    ]
    # Half of each kind where there is enough of both.
    half = max(number - len(missed), (number + 1) // 2)
    return [*false[:half], *missed][:number]


def draw_example(
    evaluation: Evaluation, example: Example, category: int, read: ImageReader
) -> Picture:
    """Draw an example: the detection with its score, and the category's annotations.

    Args:
        evaluation: Annotations and detections.
        example: What to show.
        category: Number of the category.
        read: Reads an image by its id.

    Raises:
        DataError: The image cannot be read.
    """
    truth, results = evaluation.truth, evaluation.results
    name = truth.category_names[category]
    image_id = truth.image_ids[example.image]
    objects = []
    if example.detection >= 0:
        mask = results.mask_D[example.detection]
        objects.append(
            DrawnObject(
                label=name,
                box_xyxy=_corners(results.box_D4[example.detection]),
                score=float(results.score_D[example.detection]),
                mask_HW=_mask(results.masks[mask]) if mask >= 0 else None,
            )
        )
    annotated = (truth.ann_image_A == example.image) & (truth.ann_category_A == category)
    objects += [
        DrawnObject(label=f"{name} (annotated)", box_xyxy=_corners(truth.ann_box_A4[index]))
        for index in np.flatnonzero(annotated)
        if example.annotation < 0 or index == example.annotation
    ]
    picture = draw_objects(*_close_up(Image.fromarray(read(image_id)), objects))
    return Picture(image=picture, caption=f"{name}: {_KINDS[example.kind]}, image {image_id}")


def _close_up(
    image: Image.Image, objects: list[DrawnObject]
) -> tuple[Image.Image, list[DrawnObject]]:
    """Cut out what is to be seen with as much around it, and move the objects along; large objects keep the image."""
    boxes_N4 = np.array([item.box_xyxy for item in objects])
    low_2, high_2 = boxes_N4[:, :2].min(axis=0), boxes_N4[:, 2:].max(axis=0)
    reach = max(float((high_2 - low_2).max()) * _AROUND, _LEAST_CLOSE_UP) / 2
    size_2 = np.array(image.size)
    middle_2 = (low_2 + high_2) / 2
    start_2 = np.floor(np.clip(middle_2 - reach, 0, size_2 - 1)).astype(int)
    end_2 = np.ceil(np.clip(middle_2 + reach, start_2 + 1, size_2)).astype(int)
    (left, top), (right, bottom) = start_2.tolist(), end_2.tolist()
    moved = [
        replace(
            item,
            box_xyxy=_moved(item.box_xyxy, left, top),
            mask_HW=None
            if item.mask_HW is None
            else np.asarray(item.mask_HW)[top:bottom, left:right],
        )
        for item in objects
    ]
    return image.crop((left, top, right, bottom)), moved


def _moved(
    box: tuple[float, float, float, float], left: int, top: int
) -> tuple[float, float, float, float]:
    return (box[0] - left, box[1] - top, box[2] - left, box[3] - top)


_KINDS = {"found": "found", "false": "false detection", "missed": "missed"}


def _top_of_images(
    scored: Scored, chosen_S: NDArray[np.bool_], category: int, number: int
) -> list[int]:
    """Return the chosen detections of a category with the highest scores, at most one an image."""
    selection = scored.matches.selection
    listed = np.flatnonzero(chosen_S & (selection.category_S == category))
    listed = listed[np.argsort(-selection.score_S[listed], kind="stable")]
    _, first = np.unique(selection.image_S[listed], return_index=True)
    return [int(index) for index in listed[np.sort(first)][:number]]


def _corners(box_4: NDArray[np.float64]) -> tuple[float, float, float, float]:
    x, y, width, height = (float(side) for side in box_4)
    return (x, y, x + width, y + height)


def _mask(rle: dict[str, object]) -> NDArray[np.bool_]:
    decoded: NDArray[np.bool_] = np.asarray(coco_mask.decode(rle)).astype(bool)
    return decoded
