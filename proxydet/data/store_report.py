"""What became of the records of an annotation file on their way into the store."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

_MOST_EXAMPLES = 5


class StoreReport(msgspec.Struct, kw_only=True):
    """Counts of what was read, kept, dropped and mended.

    It always holds that ``images_in == images_kept + sum(images_dropped.values())``, and the same for annotations.

    Attributes:
        images_in: Image records in the file.
        images_kept: Images in the store.
        images_dropped: Number of images dropped, by reason.
        annotations_in: Annotation records in the file.
        annotations_kept: Annotations in the store.
        annotations_dropped: Number of annotations dropped, by reason.
        repaired: Number of things mended, by what was done.
        without_mask: Annotations kept that have a box and no mask.
        examples: The first few ids (or positions in the file) for each reason.
    """

    images_in: int = 0
    images_kept: int = 0
    images_dropped: dict[str, int] = {}
    annotations_in: int = 0
    annotations_kept: int = 0
    annotations_dropped: dict[str, int] = {}
    repaired: dict[str, int] = {}
    without_mask: int = 0
    examples: dict[str, list[str]] = {}

    def drop_image(self, reason: str, which: str) -> None:
        """Count one image that is left out."""
        _count(self.images_dropped, reason, 1)
        self._example(reason, [which])

    def drop_annotations(self, reason: str, which: Iterable[object]) -> None:
        """Count annotations that are left out."""
        names = [str(item) for item in which]
        _count(self.annotations_dropped, reason, len(names))
        self._example(reason, names)

    def repair(self, what: str, which: Iterable[object]) -> None:
        """Count things that were mended."""
        names = [str(item) for item in which]
        _count(self.repaired, what, len(names))
        self._example(what, names)

    @property
    def clean(self) -> bool:
        """Whether nothing was dropped or mended."""
        return not (self.images_dropped or self.annotations_dropped or self.repaired)

    def lines(self) -> list[str]:
        """Return one line of text for each kind of loss or repair, empty when there was none."""
        groups = (
            ("images dropped", self.images_dropped),
            ("annotations dropped", self.annotations_dropped),
            ("repaired", self.repaired),
        )
        return [
            f"{title}: {count} {reason} (e.g. {', '.join(self.examples[reason])})"
            for title, counts in groups
            for reason, count in sorted(counts.items())
        ]

    def _example(self, reason: str, names: list[str]) -> None:
        if names:
            shown = self.examples.setdefault(reason, [])
            shown.extend(names[: _MOST_EXAMPLES - len(shown)])


def _count(counts: dict[str, int], reason: str, number: int) -> None:
    if number:
        counts[reason] = counts.get(reason, 0) + number
