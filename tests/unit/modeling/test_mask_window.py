"""Masks as windows of their images."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from proxydet.modeling.postprocess import MaskWindow


@st.composite
def windows(draw):
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
    shape = (draw(st.integers(0, height - top)), draw(st.integers(0, width - left)))
    inside = draw(arrays.arrays(np.bool_, shape))
    return MaskWindow(top=top, left=left, inside_hw=inside, size=(height, width))


@given(windows())
def test_a_window_has_the_area_of_the_whole_mask(window):
    assert window.area == window.whole().sum()


@pytest.mark.parametrize("value", [False, True])
def test_a_window_of_the_whole_image(value):
    window = MaskWindow(top=0, left=0, inside_hw=np.full((4, 3), value), size=(4, 3))
    assert (window.whole() == value).all()
