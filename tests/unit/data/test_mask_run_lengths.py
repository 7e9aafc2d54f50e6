import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco_mask

from proxydet.data.run_lengths import parse_counts, to_mask


@given(hnp.arrays(np.bool_, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_compressed_text_of_pycocotools_is_read(mask: np.ndarray) -> None:
    encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    runs = parse_counts(encoded["counts"].decode(), mask.shape)
    assert runs is not None
    np.testing.assert_array_equal(to_mask(runs, *mask.shape), mask)


def test_large_masks_with_long_runs_are_read() -> None:
    mask = np.zeros((700, 900), dtype=np.uint8, order="F")
    mask[100:650, 3:800] = 1
    mask[::7, ::11] = 0
    encoded = coco_mask.encode(mask)
    runs = parse_counts(encoded["counts"].decode(), mask.shape)
    assert runs is not None
    np.testing.assert_array_equal(to_mask(runs, *mask.shape), mask == 1)


@pytest.mark.parametrize(
    "counts", [[1, 2], [5, -1], [3, 3, 3], [], "", "0", "zz", "\x01", "é", "o" * 40, [2**40]]
)
def test_damaged_run_lengths_are_refused(counts: list[int] | str) -> None:
    assert parse_counts(counts, (2, 2)) is None


@given(st.text(max_size=20))
def test_any_text_is_refused_or_fits(text: str) -> None:
    runs = parse_counts(text, (3, 4))
    assert runs is None or (runs.sum() == 12 and to_mask(runs, 3, 4).shape == (3, 4))
