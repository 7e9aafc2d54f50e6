"""Plots: what the numbers become, and that they can stand on a page."""

import itertools
import math
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from proxydet.visualization.plots import (
    bar_plot,
    loss_plot,
    paired_plot,
    precision_recall_plot,
    running_mean,
    save_figure,
    svg_of,
)


def test_running_mean_skips_what_is_not_finite():
    means = running_mean([2.0, math.nan, 4.0, 6.0], 2)
    np.testing.assert_allclose(means, [2, 2, 4, 5])
    assert math.isnan(running_mean([math.nan], 3)[0])


def test_every_loss_gets_a_panel():
    curves = {f"loss_{k}": [(float(i), 1.0 / (i + 1)) for i in range(30)] for k in range(6)}
    figure = loss_plot(curves)
    assert [axes.get_title() for axes in figure.axes] == list(curves)
    np.testing.assert_allclose(
        figure.axes[2].lines[0].get_ydata(), [1 / (i + 1) for i in range(30)]
    )


@pytest.mark.parametrize("curve", [[], [(0.0, math.nan)], [(0.0, 0.0)], [(5.0, 2.0)]])
def test_short_curves_are_plotted(curve):
    assert "<svg" in svg_of(loss_plot({"loss": curve}))


def test_one_evaluation_is_seen_even_if_it_is_zero():
    """A run that was evaluated once, at its end, and found nothing."""
    (axes,) = loss_plot({"AP": [(20.0, 0.0)]}).axes
    assert axes.lines[1].get_marker() == "o"
    assert axes.get_ylim() == (0.0, 1.0)
    (long,) = loss_plot({"AP": [(float(i), 1.0) for i in range(100)]}).axes
    assert long.lines[1].get_marker() == "None"
    (steep,) = loss_plot({"loss": [(float(i), 10.0**-i) for i in range(5)]}).axes
    assert steep.get_ylim()[1] > 1.0, "of few values none is cut off"


def test_long_names_are_broken_and_iterations_are_whole():
    (axes,) = loss_plot({"segm/AP50 novel, without image labels": [(2.0, 1.0), (4.0, 2.0)]}).axes
    assert axes.get_title() == "segm/AP50 novel, without\nimage labels"
    assert all(tick == int(tick) for tick in axes.get_xticks())


def test_no_curves_make_an_empty_figure():
    assert "<svg" in svg_of(loss_plot({}))


def test_bars_have_the_heights_of_the_values():
    figure = bar_plot(
        {"base": {"boxes": 60.0, "masks": 50.0}, "novel": {"boxes": 30.0, "masks": math.nan}}
    )
    (axes,) = figure.axes
    heights = [bar.get_height() for bar in axes.patches]
    np.testing.assert_allclose(heights, [60, 30, 50, math.nan])
    texts = [text.get_text() for text in axes.texts]
    assert texts.count("n/a") == 1
    assert {"60.0", "30.0", "50.0"} <= set(texts)


def test_precision_of_nothing_leaves_a_gap():
    figure = precision_recall_plot({"novel": ([0.0, 0.5, 1.0], [1.0, 0.5, -1.0])})
    drawn = figure.axes[0].lines[0].get_ydata()
    assert math.isnan(drawn[2])
    assert drawn[1] == 0.5


def test_pairs_are_joined_and_their_mean_shown():
    figure = paired_plot({"AP": [(1.0, 3.0), (3.0, 5.0)]}, ("without", "with"))
    lines = [tuple(line.get_ydata()) for line in figure.axes[0].lines]
    assert lines == [(1.0, 3.0), (3.0, 5.0), (2.0, 4.0)]


def test_svg_takes_its_ink_from_the_page():
    first = svg_of(loss_plot({"a": [(0.0, 1.0), (1.0, 2.0)]}))
    assert "currentColor" in first
    assert "#2b2d31" not in first


def test_svg_is_the_same_each_time():
    assert svg_of(bar_plot({"a": {"x": 1.0}})) == svg_of(bar_plot({"a": {"x": 1.0}}))


def test_names_are_text_and_not_mathematics():
    text = svg_of(bar_plot({"$x^2$ <b>&": {"boxes": 1.0}}))
    assert "<b>" not in text
    assert "$x^2$" in "".join(ET.fromstring(text).itertext())


def test_figures_are_written_as_pictures(tmp_path):
    save_figure(bar_plot({"a": {"x": 1.0}}), tmp_path / "bars.png")
    with Image.open(tmp_path / "bars.png") as picture:
        assert picture.width > 200


def test_labels_below_bars_stay_apart():
    names = ["wrong class", "badly placed", "both", "duplicate", "background", "missed"]
    figure = bar_plot({name: {"AP50": 3.0} for name in names}, label="AP50 lost")
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    spans = [label.get_window_extent(renderer) for label in figure.axes[0].get_xticklabels()]
    # A page's font may be wider than the one that the plot was laid out with.
    gap = 0.1 * figure.dpi
    assert all(left.x1 + gap < right.x0 for left, right in itertools.pairwise(spans))
