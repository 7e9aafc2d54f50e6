"""By which protocol a data set's annotations are to be scored: a rule, or the user's word; never a guess in silence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from proxydet.errors import DataError
from proxydet.wording import first_of

if TYPE_CHECKING:
    from proxydet.data.store import AnnotationStore

Protocol: TypeAlias = Literal["lvis", "coco", "openimages"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)
PROTOCOL_NAMES = {
    "lvis": "LVIS (federated annotations)",
    "coco": "COCO (exhaustive annotations)",
    "openimages": "OpenImages (verified image labels)",
}
FREQUENCIES = ("r", "c", "f")


def protocol_of(store: AnnotationStore) -> Protocol:
    """Return the protocol that a data set's annotations ask for.

    OpenImages: every image has ``pos_category_ids``, and the categories have no LVIS frequencies. LVIS: every image has
    ``neg_category_ids`` and every category a ``frequency``. COCO: neither an image nor a category has any of these,
    or the categories alone have a frequency.

    Raises:
        DataError: the annotations are almost of a federated protocol; the message names what is missing.
    """
    images = len(store)
    negative, positive = (store.label_lists[f"{kind}_category_ids"] for kind in ("neg", "pos"))
    lacking = [c.name for c in store.categories if c.frequency not in FREQUENCIES]
    short = ""
    if positive and len(lacking) < len(store.categories) and negative < images:
        short = "neg"
    elif images and positive == images and lacking and len(lacking) == len(store.categories):
        return "openimages"
    elif negative == 0 and positive == 0:
        return "coco"
    elif negative < images:
        short = "pos" if 0 < positive < images else "neg"
    if short:
        ids = store.without_list(f"{short}_category_ids")
        raise DataError(
            f"{store.source_name}: {len(ids)} of {images} images lack {short}_category_ids while others have it "
            f"(image ids {first_of(ids)})",
            hint="give every image the list (empty where nothing is verified), or choose how to score with --protocol "
            f"{'lvis' if short == 'neg' else 'openimages'} or --protocol coco",
        )
    if lacking:
        raise DataError(
            f"{store.source_name}: every image has neg_category_ids (LVIS's federated annotations), but "
            f"{len(lacking)} of {len(store.categories)} categories have no frequency r, c or f ({first_of(lacking)})",
            hint="add 'frequency' (or 'image_count') to them, or choose how to score with --protocol coco, "
            f"{'--protocol openimages ' if positive == images else ''}or --protocol lvis (evaluation.protocol in a "
            "configuration)",
        )
    return "lvis"
