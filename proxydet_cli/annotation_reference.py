"""Writes the table of what happens to deviating annotations: ``python -m proxydet_cli.annotation_reference FILE``."""

from __future__ import annotations

import sys
from pathlib import Path

from proxydet.data.deviations import DEVIATIONS

_INTRODUCTION = """# Annotation files

Written by `make docs` from the table that the readers follow. `proxydet data check PATH` counts by it; training, evaluation
and statistics read what it leaves.

| format | named by |
|---|---|
| COCO, LVIS, OpenImages (as `data prepare openimages` writes it) | the JSON file, plain or gzipped |
| Pascal VOC | the data set's folder, a folder of XML files, one XML file, or a list in `ImageSets/Main` |

Annotations are read once into a store in the cache folder (`PROXYDET_CACHE`), named by the digest of their content. Masks
are optional: objects without one train boxes, and neither help nor harm when masks are scored. Pascal VOC's corners are
pixel numbers from 1, both inclusive, unless a corner of the data set is 0; `difficult` objects are marked to be ignored. An
image's name may lack its ending, in any format: it is found when the image is opened, and refused where several files fit.

How a data set is scored is printed with every result, and chosen with `--protocol`; by default a file whose images all have
`neg_category_ids` and whose categories all have a `frequency` is scored by LVIS's protocol, one whose images all have
`pos_category_ids` by OpenImages', one with none of these lists by COCO's. Anything between is refused.

Every deviation has one fate. **Mended**: used, with the value in the last column. **Dropped**: left out. **Refused**: nothing
is read, exit code 3. **Noted**: used as written, and reported.

Results files (`proxydet eval --results`) are read by the same rules: what is written here of a file, of ids, boxes and masks of
annotations holds for detections, and a warning counts what was mended and dropped. Beyond that, unknown images and categories and
boxes that reach out of their image are refused: [how to evaluate](../how-to/evaluate.md#when-results-are-refused)."""


def annotation_page() -> str:
    """Describe every deviation, as one Markdown page."""
    parts = [_INTRODUCTION]
    for of in ("file", "category", "image", "annotation", "polygon", "detection"):
        rows = [
            f"## {of.capitalize()}",
            "",
            "| field | deviation | fate | then |",
            "|---|---|---|---|",
        ]
        rows += [
            f"| {row.field} | {row.what} | {row.fate} | {row.then} |"
            for row in DEVIATIONS.values()
            if row.of == of
        ]
        parts.append("\n".join(rows))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(annotation_page(), encoding="utf-8")
