"""The detections of an image, as plain numpy, and how to turn them into other libraries' forms.

Dimensions: N detections, H and W the image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from proxydet.errors import InputError, MissingDependencyError

if TYPE_CHECKING:
    from types import ModuleType

    from PIL import Image

    from proxydet.inference.video import Frame
    from proxydet.modeling.postprocess import MaskWindow, Prediction
    from proxydet.visualization.drawing import DrawingStyle

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, eq=False)
class Detection:
    """One detection."""

    label: str
    """Class name."""
    class_id: int
    """Its place in the vocabulary, from 0."""
    score: float
    """From 0 to 1."""
    box_xyxy: tuple[float, float, float, float]
    """Left, top, right, bottom in pixels of the image."""
    track_id: int | None
    """The same for an object in all frames of a video, from 1; None: not tracked, or seen for the first time."""
    _paste: Callable[[], MaskWindow] | None

    @property
    def mask(self) -> Bools | None:
        """(H, W), True where the object is, pasted into the image when asked for; None: without masks."""
        return None if self._paste is None else self._paste().whole()

    @property
    def mask_area(self) -> int | None:
        """Pixels of the mask; None: without masks."""
        return None if self._paste is None else self._paste().area


class Detections:
    """The detections of one image, best first.

    Masks are kept as small grids and pasted into the image when they are first asked for.

    Attributes:
        boxes_xyxy: float32 (N, 4), left, top, right, bottom in pixels of the image.
        scores: float32 (N,), descending.
        class_ids: int64 (N,), places in the vocabulary, from 0.
        labels: Class name of each detection.
        track_ids: int64 (N,), the id of each object's track in a video, from 1, -1 where it has none yet; None: not tracked.
        image_size: Height and width of the image in pixels.
    """

    def __init__(
        self, prediction: Prediction, names: Sequence[str], track_ids: Integers | None = None
    ) -> None:
        """Wrap what the network found.

        Args:
            prediction: Boxes, scores, classes and masks.
            names: The vocabulary's class names.
            track_ids: The id of the track of each, where they are tracked.
        """
        from proxydet.modeling.postprocess import to_host

        on_cpu = prediction.boxes_N4.device.type == "cpu"
        self._prediction = prediction if on_cpu else to_host([prediction])[0]
        self._names = names
        self.boxes_xyxy: Floats = _frozen(self._prediction.boxes_N4.numpy())
        self.scores: Floats = _frozen(self._prediction.scores_N.numpy())
        self.class_ids: Integers = _frozen(self._prediction.classes_N.numpy())
        self.labels = tuple(names[index] for index in self.class_ids.tolist())
        self.image_size = self._prediction.image_size
        self.track_ids = None if track_ids is None else _frozen(track_ids)

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[Detection]:
        ids = [-1] * len(self) if self.track_ids is None else self.track_ids.tolist()
        for index in range(len(self)):
            yield Detection(
                label=self.labels[index],
                class_id=int(self.class_ids[index]),
                score=float(self.scores[index]),
                box_xyxy=_as_tuple(self.boxes_xyxy[index]),
                track_id=None if ids[index] < 0 else ids[index],
                _paste=partial(self._window, index) if self.has_masks else None,
            )

    def __repr__(self) -> str:
        shown = ", ".join(
            f"{label} {score:.2f}"
            for label, score in zip(self.labels[:4], self.scores[:4], strict=True)
        )
        return f"Detections({len(self)}: {shown}{', ...' if len(self) > 4 else ''})"

    @property
    def has_masks(self) -> bool:
        """Whether masks were predicted: not by a detector without a mask head, nor with ``masks=False``."""
        return self._prediction.has_masks

    @cached_property
    def masks(self) -> Bools:
        """Masks in the image, bool (N, H, W), read-only.

        Raises:
            InputError: No masks were predicted.
        """
        from proxydet.modeling.postprocess import masks

        self._require_masks()
        return _frozen(masks(self._prediction).numpy())

    @cached_property
    def rles(self) -> tuple[dict[str, Any], ...]:
        """Masks in COCO's run-length encoding: ``size`` (height, width) and ``counts`` (text).

        Raises:
            InputError: No masks were predicted.
        """
        from proxydet.modeling.postprocess import rles

        self._require_masks()
        return tuple(rles(self._prediction))

    def above(self, score: float) -> Detections:
        """Return the detections whose score is above a threshold."""
        return self.choose(np.flatnonzero(self.scores > score))

    def top(self, count: int) -> Detections:
        """Return the best ``count`` detections."""
        return self.choose(np.arange(min(max(count, 0), len(self))))

    def of(self, *labels: str) -> Detections:
        """Return the detections of some classes."""
        return self.choose(np.flatnonzero([label in labels for label in self.labels]))

    def tracked(self, track_ids: Integers) -> Detections:
        """Return the same detections with the ids of their tracks.

        Args:
            track_ids: int64 (N,), from 1; -1 for those without one.
        """
        return Detections(self._prediction, self._names, track_ids)

    def choose(self, index: npt.NDArray[np.intp]) -> Detections:
        """Return the detections at some places, int (M,), in the order wanted."""
        import torch

        return Detections(
            self._prediction.choose(torch.from_numpy(index.astype(np.int64))),
            self._names,
            None if self.track_ids is None else self.track_ids[index],
        )

    def to_dict(self, *, masks: bool = True) -> dict[str, Any]:
        """Return plain Python values, ready for JSON.

        Args:
            masks: Include masks, as run-length encodings, where there are any.
        """
        with_masks = masks and self.has_masks
        entries: list[dict[str, Any]] = [
            {
                "label": item.label,
                "class_id": item.class_id,
                "score": item.score,
                "box_xyxy": list(item.box_xyxy),
                **({} if self.track_ids is None else {"track_id": item.track_id}),
                **({"mask": self.rles[index]} if with_masks else {}),
            }
            for index, item in enumerate(self)
        ]
        height, width = self.image_size
        return {"width": width, "height": height, "detections": entries}

    def to_coco(
        self, image_id: int | str, category_ids: Sequence[int] | None = None
    ) -> list[dict[str, Any]]:
        """Return rows of a COCO results file.

        Args:
            image_id: Id of the image in the annotation file.
            category_ids: Id of each class of the vocabulary; None: its place, counted from 1.

        Returns:
            For each detection ``image_id``, ``category_id``, ``bbox`` (x, y, width, height), ``score``, and
            ``segmentation`` (run-length encoding) where there are masks.
        """
        x0, y0, x1, y1 = self.boxes_xyxy.astype(np.float64).T
        boxes = np.stack([x0, y0, x1 - x0, y1 - y0], axis=1).tolist()
        ids = range(1, len(self._names) + 1) if category_ids is None else category_ids
        return [
            {
                "image_id": image_id,
                "category_id": ids[class_id],
                "bbox": boxes[index],
                "score": float(self.scores[index]),
                **({"segmentation": self.rles[index]} if self.has_masks else {}),
            }
            for index, class_id in enumerate(self.class_ids.tolist())
        ]

    def to_pandas(self) -> Any:
        """Return a ``pandas.DataFrame`` with label, class_id, score, x0, y0, x1, y1, the track's id and the mask's area in pixels."""
        pandas = _optional("pandas", "a data frame")
        columns: dict[str, Any] = {
            "label": list(self.labels),
            "class_id": self.class_ids,
            "score": self.scores,
            **dict(zip(("x0", "y0", "x1", "y1"), self.boxes_xyxy.T, strict=True)),
        }
        if self.track_ids is not None:
            columns["track_id"] = self.track_ids
        if self.has_masks:
            columns["mask_area"] = self.masks.sum(axis=(1, 2))
        return pandas.DataFrame(columns)

    def to_supervision(self) -> Any:
        """Return a ``supervision.Detections``; the labels are its ``data["class_name"]``."""
        supervision = _optional("supervision", "supervision's detections")
        return supervision.Detections(
            xyxy=self.boxes_xyxy.copy(),
            confidence=self.scores.copy(),
            class_id=self.class_ids.copy(),
            mask=self.masks.copy() if self.has_masks else None,
            tracker_id=None if self.track_ids is None else self.track_ids.copy(),
            data={"class_name": np.array(self.labels, dtype=object)},
        )

    def to_detectron2(self) -> Any:
        """Return a detectron2 ``Instances`` with pred_boxes, scores, pred_classes and, where there are, pred_masks."""
        import proxydet.runtime.d2  # noqa: F401

        import torch
        from detectron2.structures import Boxes, Instances

        instances = Instances(self.image_size)
        instances.pred_boxes = Boxes(torch.from_numpy(self.boxes_xyxy.copy()))
        instances.scores = torch.from_numpy(self.scores.copy())
        instances.pred_classes = torch.from_numpy(self.class_ids.copy())
        if self.has_masks:
            instances.pred_masks = torch.from_numpy(self.masks.copy())
        return instances

    def draw(
        self, image: Image.Image | npt.NDArray[np.uint8], style: DrawingStyle | None = None
    ) -> Image.Image:
        """Draw boxes, masks, labels and scores on a copy of the image; each detection, or track, in a colour of its own.

        Args:
            image: The image that these were found in: PIL, or uint8 (H, W, 3) RGB.
            style: How to draw; the default style where None.

        Raises:
            InputError: The image has another size.
        """
        from PIL import Image

        from proxydet.visualization.drawing import DrawnObject, class_colour, draw_objects

        canvas = image if isinstance(image, Image.Image) else Image.fromarray(image)
        order = style.class_order if style is not None else None
        height, width = self.image_size
        if canvas.size != (width, height):
            raise InputError(
                f"the image is {canvas.width} x {canvas.height} pixels, the detections are of one of {width} x {height}",
                hint="draw on the image that was given to predict(); PIL.ImageOps.exif_transpose turns photographs upright",
            )
        objects = [
            DrawnObject(
                label=item.label if item.track_id is None else f"{item.label} #{item.track_id}",
                box_xyxy=item.box_xyxy,
                colour=class_colour(item.track_id - 1)
                if item.track_id is not None
                else None
                if order is None and self.track_ids is None
                else class_colour((order or {}).get(item.class_id, item.class_id)),
                score=item.score,
                mask_HW=item._paste,
            )
            for item in self
        ]
        return draw_objects(canvas, objects, style)

    def _window(self, index: int) -> MaskWindow:
        """One mask alone, where it lies: all masks of a large image at once can take gigabytes."""
        (window,) = self.choose(np.array([index]))._prediction.windows()
        return window

    def _require_masks(self) -> None:
        if not self.has_masks:
            raise InputError(
                "these detections have no masks",
                hint="a detector that has a mask head predicts them: detector.with_settings(masks=True)",
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class FrameResult:
    """The detections of one frame.

    Attributes:
        frame: The frame: its number, time and pixels.
        found: Its detections.
    """

    frame: Frame
    found: Detections

    @property
    def index(self) -> int:
        """The frame's number in the video, from 0."""
        return self.frame.index

    @property
    def seconds(self) -> float:
        """The frame's time, counted from the first frame."""
        return self.frame.seconds

    def to_dict(self, video: str) -> dict[str, Any]:
        """Return plain Python values, ready for JSON, with the video's name."""
        place = {"file": video, "frame": self.index, "seconds": round(self.seconds, 6)}
        return {**place, **self.found.to_dict()}


def _as_tuple(box_4: Floats) -> tuple[float, float, float, float]:
    left, top, right, bottom = box_4.tolist()
    return left, top, right, bottom


def _frozen(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    array.setflags(write=False)
    return array


def _optional(package: str, gives: str) -> ModuleType:
    try:
        return import_module(package)
    except ImportError as error:
        raise MissingDependencyError(
            f"{gives} needs the package {package}, which is not installed",
            hint=f"run: pip install {package}",
        ) from error
