"""Follows objects from frame to frame by ByteTrack (Zhang et al. 2022, arXiv 2110.06864), that of the package ``trackers``.

Here is what it is given (faint detections besides the reported ones, the time of each frame, classes apart or together), and
where tracks end besides: at a cut of the film.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from proxydet.errors import MissingDependencyError

if TYPE_CHECKING:
    from proxydet.data.images import Pixels
    from proxydet.detections import Detections
    from proxydet.modeling.config import InferenceConfig
    from proxydet.vocabulary.vocabulary import Vocabulary

# Detections above this share of the threshold are not reported, but keep the id of an object that fades for a while.
_FAINT = 0.5
# An object may be out of sight for so long, or for so many frames where that is longer, and keeps its id.
_SECONDS, _FRAMES = 1.0, 3
# Frames that have less than this share of their colours in common are of different scenes.
_SAME_SCENE = 0.5
# Of a frame, the colours of about so many pixels a side are counted, in so many steps a channel.
_SAMPLED, _STEPS = 64, 8


def tracking_library() -> ModuleType:
    """Import the package ``trackers``.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        import trackers
    except ImportError as error:
        raise MissingDependencyError(
            f"tracking needs the package trackers, which cannot be imported: {error}",
            hint="run: pip install 'proxydet[track]' (or: pip install trackers)",
        ) from error
    module: ModuleType = trackers
    return module


class Tracker:
    """Gives the detections of one video the ids of their tracks, frame after frame.

    Args:
        vocabulary: What is detected.
        settings: The thresholds of what is reported. With one label a box, an object whose label changes keeps its id; else
            classes are tracked apart.
        rate: Frames a second of the video that are run on.

    Attributes:
        detecting: The settings to detect with: faint detections help to follow, and are not reported.
        vocabulary: The classes to detect with: those given, whose own thresholds are as much lower.

    Raises:
        MissingDependencyError: The package ``trackers`` is not installed.
    """

    def __init__(self, vocabulary: Vocabulary, settings: InferenceConfig, rate: Fraction) -> None:
        self.detecting = replace(settings, score_threshold=_FAINT * settings.score_threshold)
        self._library = tracking_library()
        self._apart = not settings.agnostic_nms
        own_C = vocabulary.threshold
        self.vocabulary = vocabulary
        if not np.isnan(own_C).all():
            self.vocabulary = vocabulary.with_scorers(threshold=_FAINT * own_C)
        self._threshold_C = np.where(np.isnan(own_C), settings.score_threshold, own_C)
        self._rate = float(rate)
        # Of each class, or of all together: its tracker, and our ids of the tracks by the tracker's.
        self._trackers: dict[int, tuple[Any, dict[int, int]]] = {}
        self._last_id = 0
        self._colours: npt.NDArray[np.float64] | None = None

    def update(self, found: Detections, pixels_HW3: Pixels, seconds: float) -> Detections:
        """Return what is reported of the next frame, with ids from 1.

        Args:
            found: What was detected with the settings `detecting` and the classes `vocabulary`.
            pixels_HW3: The frame, uint8 RGB.
            seconds: Its time.
        """
        from supervision import Detections as Given

        colours = _colours(pixels_HW3)
        if self._colours is not None and np.minimum(colours, self._colours).sum() < _SAME_SCENE:
            self._trackers.clear()
        self._colours = colours
        group_N = found.class_ids if self._apart else np.zeros_like(found.class_ids)
        id_N = np.full(len(found), -1)
        reported_N = found.scores > self._threshold_C[found.class_ids]
        for group in sorted({*self._trackers, *group_N.tolist()}):
            if group not in self._trackers:
                self._trackers[group] = (self._new_tracker(), {})
            tracker, ids = self._trackers[group]
            own = np.flatnonzero(group_N == group)
            # Of the scores the library asks only whether they are high, which differs between classes.
            given = Given(
                xyxy=found.boxes_xyxy[own],
                confidence=reported_N[own].astype(np.float32),
                data={"place": own},
            )
            tracked = tracker.update(given, timestamp=seconds)
            places = tracked.data.get("place", ())
            for place, theirs in zip(places, tracked.tracker_id.tolist(), strict=True):
                if theirs >= 0:
                    if theirs not in ids:
                        self._last_id += 1
                        ids[theirs] = self._last_id
                    id_N[place] = ids[theirs]
            if not tracker.tracks:
                del self._trackers[group]
        return found.tracked(id_N).choose(np.flatnonzero(reported_N))

    def _new_tracker(self) -> Any:
        # The library counts its memory in frames of which 30 are a second, at whatever rate.
        memory = max(_SECONDS, _FRAMES / self._rate) * 30
        return self._library.ByteTrackTracker(
            lost_track_buffer=round(memory),
            frame_rate=self._rate,
            track_activation_threshold=0.0,
            minimum_consecutive_frames=1,
            high_conf_det_threshold=0.5,
        )


def _colours(pixels_HW3: Pixels) -> npt.NDArray[np.float64]:
    """Return which share of a frame has each colour."""
    step = max(min(pixels_HW3.shape[:2]) // _SAMPLED, 1)
    steps_N3 = pixels_HW3[::step, ::step].reshape(-1, 3).astype(np.int64) * _STEPS // 256
    colour_N = steps_N3 @ [_STEPS * _STEPS, _STEPS, 1]
    shares: npt.NDArray[np.float64] = np.bincount(colour_N, minlength=_STEPS**3) / len(colour_N)
    return shares
