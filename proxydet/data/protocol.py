"""By which protocol a data set's annotations are to be scored: a rule, or the user's word; never a guess in silence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NoReturn, TypeAlias, get_args

from proxydet.data.store import AnnotationStore
from proxydet.errors import DataError
from proxydet.wording import first_of

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
    if positive and len(lacking) < len(store.categories) and negative < images:
        _almost(store, "neg_category_ids", "lvis", store.without_list("neg_category_ids"))
    if images and positive == images and lacking:
        return "openimages"
    if negative == 0 and positive == 0:
        return "coco"
    if positive and positive < images and negative < images:
        _almost(store, "pos_category_ids", "openimages", store.without_list("pos_category_ids"))
    if negative < images:
        _almost(store, "neg_category_ids", "lvis", store.without_list("neg_category_ids"))
    if lacking:
        raise DataError(
            f"{store.source_name}: every image has neg_category_ids (LVIS's federated annotations), but "
            f"{len(lacking)} of {len(store.categories)} categories have no frequency r, c or f ({first_of(lacking)})",
            hint="add 'frequency' (or 'image_count') to them, or choose how to score with --protocol coco or "
            "--protocol lvis (evaluation.protocol in a configuration)",
        )
    return "lvis"


def _almost(
    store: AnnotationStore, field: str, protocol: Protocol, ids: Sequence[object]
) -> NoReturn:
    raise DataError(
        f"{store.source_name}: {len(ids)} of {len(store)} images lack {field} while others have it "
        f"(image ids {first_of(ids)})",
        hint=f"give every image the list (empty where nothing is verified), or choose how to score with --protocol "
        f"{protocol} or --protocol coco",
    )
