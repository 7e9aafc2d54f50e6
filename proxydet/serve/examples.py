"""Example images for the page: photographs in the package for the published models, a run's own validation images for a run.

The photographs are those of scikit-image, scaled down: ``coffee`` (Rachel Michetti, CC0), ``chelsea`` (Stefan van der Walt, CC0),
``rocket`` (SpaceX, public domain).
"""

from __future__ import annotations

import io
import logging
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np

from proxydet.errors import ProxydetError

logger = logging.getLogger(__name__)

_PHOTOGRAPHS = {
    "coffee": "cup, saucer, spoon, table",
    "cat": "cat, eye, ear",
    "rocket": "rocket, tower, cloud",
}
_MOST = 4
_LONGEST_SIDE = 1024
# Annotation files up to this are read for their images.
_LARGEST_READ = 64 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Example:
    """An image that the page offers."""

    name: str
    """What it is called."""
    data: bytes
    """A JPEG file."""
    words: str
    """Classes to look for, as they are typed; empty: the server's default ones."""


def packaged_examples() -> tuple[Example, ...]:
    """Return the photographs of the package, each with the names of what they show."""
    folder = files("proxydet.serve.assets")
    return tuple(
        Example(name=name, data=folder.joinpath(f"{name}.jpg").read_bytes(), words=words)
        for name, words in _PHOTOGRAPHS.items()
    )


def run_examples(run: Path) -> tuple[Example, ...]:
    """Return some validation images of a run's data, those with most classes first; none where they are not on this machine.

    Args:
        run: The run folder.
    """
    # They take half a second to import, and the page does not wait for them.
    from proxydet.data.dataset import DatasetConfig
    from proxydet.data.images import open_annotated_image
    from proxydet.data.store import AnnotationStore
    from proxydet.models import configuration_of

    try:
        path = configuration_of(run)["data"]["description"]
        split = DatasetConfig.from_toml(path).split("val")
        if split.annotations.is_file() and split.annotations.stat().st_size > _LARGEST_READ:
            return ()
        store = AnnotationStore.open(split, warn=False)
        # Of a few images, drawn by a fixed seed, those with the most classes.
        rows = np.random.default_rng(0).permutation(len(store))[: 8 * _MOST]
        records = [store.record(int(row)) for row in rows]
        records.sort(key=lambda record: -len(set(record.categories_A.tolist())))
        examples = []
        for record in records[:_MOST]:
            image = open_annotated_image(record, split.roots, None).convert("RGB")
            image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
            stream = io.BytesIO()
            image.save(stream, "JPEG", quality=90)
            name = Path(record.file_name).name
            examples.append(Example(name=name, data=stream.getvalue(), words=""))
    except (ProxydetError, KeyError, TypeError, OSError) as error:
        logger.info("the page has no example images: %s", error)
        return ()
    return tuple(examples)
