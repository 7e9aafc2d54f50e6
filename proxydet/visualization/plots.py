"""Plots of training and evaluation, by matplotlib without a display.

Each function returns a figure; `save_figure` writes it to a file, `svg_of` gives it as text that takes its ink from
the page it stands on (for HTML with a light and a dark scheme).
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from proxydet.files import staged, write_errors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = Sequence[tuple[float, float]]
"""Points (x, y) in the order of x."""

PALETTE = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#0ea5b7", "#b08900", "#ec4899")
"""Middle tones that stand out from white and from near-black."""

_REFERENCE = "#808080"
# Curves of up to this many points show them.
_FEW_POINTS = 20
# Characters that a panel of `loss_plot` is wide.
_TITLE_WIDTH = 24

# Replaced by "currentColor" in SVG text; drawn as it is in other formats.
_INK = "#2b2d31"
_SETTINGS = {
    "font.family": "sans-serif",
    "font.size": 9.0,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "grid.color": "#88888855",
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "svg.fonttype": "none",
    # Ids in SVG text are digests of what they name: equal in every run, different for different shapes.
    "svg.hashsalt": "proxydet",
    # Class names may hold dollar signs.
    "text.parse_math": False,
}


def loss_plot(
    curves: Mapping[str, Curve],
    *,
    columns: int = 4,
    reference: Mapping[str, Curve] | None = None,
) -> Figure:
    """Plot each loss in a panel of its own: every value thinly, the running mean boldly.

    Args:
        curves: For each loss its (iteration, value) points; values that are not finite leave a gap.
        columns: Panels a row.
        reference: Losses of another training, plotted in grey where they have the same name.
    """
    with _style():
        columns = max(1, min(columns, len(curves)))
        rows = max(1, math.ceil(len(curves) / columns))
        figure = _figure(2.35 * columns, 1.75 * rows)
        for index, (name, curve) in enumerate(curves.items()):
            axes = figure.add_subplot(rows, columns, index + 1)
            _draw_curve(axes, name, curve, PALETTE[index % len(PALETTE)])
            if reference and name in reference:
                bottom, top = axes.get_ylim()
                _draw_curve(axes, name, reference[name], _REFERENCE)
                for line in axes.lines[2:]:
                    line.set_zorder(1.5)  # below the run's
                axes.set_ylim(min(bottom, axes.get_ylim()[0]), max(top, axes.get_ylim()[1]))
        if reference is not None:
            figure.suptitle("in colour this run, in grey the reference", fontsize=9)
        if curves:
            figure.supxlabel("iteration", fontsize=_SETTINGS["font.size"])
    return figure


def bar_plot(
    groups: Mapping[str, Mapping[str, float]],
    *,
    label: str = "AP",
    errors: Mapping[str, Mapping[str, float]] | None = None,
) -> Figure:
    """Plot bars in groups, such as AP of all, base and novel classes, of boxes and masks.

    Args:
        groups: For each group on the x axis, the value of each series; NaN: nothing to measure, no bar.
        label: What the bars measure.
        errors: Half lengths of error bars, in the form of ``groups``.
    """
    series = list(dict.fromkeys(name for values in groups.values() for name in values))
    with _style():
        labels = [textwrap.fill(name, 10, break_long_words=False) for name in groups]
        longest = max((len(line) for label in labels for line in label.split("\n")), default=0)
        # Wide enough for the bars and for the labels below them, whatever the page's font.
        group = max(0.55 * max(len(series), 1), 0.095 * longest + 0.15)
        figure = _figure(max(3.2, group * len(groups) + 1.6), 2.7)
        axes = figure.add_subplot()
        width = 0.8 / max(len(series), 1)
        for index, name in enumerate(series):
            heights = [values.get(name, math.nan) for values in groups.values()]
            at = np.arange(len(groups)) + (index - (len(series) - 1) / 2) * width
            # An empty whisker would say that a value without an interval is certain.
            spread = [(errors or {}).get(group, {}).get(name) or math.nan for group in groups]
            bars = axes.bar(
                at,
                heights,
                width * 0.92,
                yerr=spread if errors else None,
                capsize=3,
                label=name,
                ecolor=_INK,
                color=PALETTE[index % len(PALETTE)],
            )
            texts = [f"{height:.1f}" if math.isfinite(height) else "" for height in heights]
            axes.bar_label(bars, texts, fontsize=8, padding=2)
            for x in at[~np.isfinite(heights)]:
                axes.text(x, 0, "n/a", ha="center", va="bottom", fontsize=8)
        axes.set_xlim(-0.6, len(groups) - 0.4)
        axes.set_xticks(range(len(groups)), labels)
        axes.set_ylabel(label)
        axes.grid(visible=False, axis="x")
        if len(series) > 1:
            figure.legend(loc="outside lower center", ncols=len(series))
    return figure


def precision_recall_plot(
    curves: Mapping[str, tuple[npt.ArrayLike, npt.ArrayLike]],
) -> Figure:
    """Plot precision over recall.

    Args:
        curves: For each name its recalls and precisions, both 0 to 1 and equally long; negative
            precisions (nothing to measure, in COCO's convention) leave a gap.
    """
    with _style():
        figure = _figure(6.2, 3.0)
        axes = figure.add_subplot()
        for index, (name, (recalls, precisions)) in enumerate(curves.items()):
            heights = np.array(precisions, np.float64)
            heights[heights < 0] = math.nan
            axes.plot(np.asarray(recalls), heights, label=name, color=PALETTE[index % len(PALETTE)])
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
        if curves:
            figure.legend(loc="outside right upper")
    return figure


def paired_plot(
    pairs: Mapping[str, Sequence[tuple[float, float]]], names: tuple[str, str], *, label: str = "AP"
) -> Figure:
    """Plot paired results, such as AP of the same seeds with and without mixup, as lines that join the pairs.

    Args:
        pairs: For each measure, one (first, second) pair a seed.
        names: What the first and the second are.
        label: What is measured.
    """
    with _style():
        figure = _figure(max(3.0, 1.7 * len(pairs) + 0.8), 2.6)
        for index, (measure, values) in enumerate(pairs.items()):
            axes = figure.add_subplot(1, len(pairs), index + 1)
            for pair in values:
                axes.plot(
                    (0, 1),
                    pair,
                    color=PALETTE[index % len(PALETTE)],
                    marker="o",
                    markersize=4,
                    linewidth=1,
                    alpha=0.75,
                )
            means = np.mean(np.asarray(values, np.float64), axis=0)
            axes.plot((0, 1), means, color=_INK, linewidth=2.2)
            axes.set_xticks((0, 1), names)
            axes.set_xlim(-0.3, 1.3)
            axes.set_title(measure)
            if index == 0:
                axes.set_ylabel(label)
    return figure


def long_tail_plot(groups: Mapping[str, Sequence[int]], *, title: str = "") -> Figure:
    """Plot how often classes occur, most frequent first, on a logarithmic scale.

    Args:
        groups: For each group of classes, such as base and novel, the count of each class; a count of 0 has no mark.
        title: What was counted.
    """
    ranked = sorted(((c, name) for name, counts in groups.items() for c in counts), reverse=True)
    with _style():
        figure = _figure(5.4, 2.6)
        axes = figure.add_subplot()
        for index, name in enumerate(groups):
            points = [(rank, c) for rank, (c, of) in enumerate(ranked, 1) if of == name and c]
            if points:
                colour = PALETTE[index % len(PALETTE)]
                axes.plot(*zip(*points, strict=True), ".", color=colour, label=name, markersize=5)
        axes.set_yscale("log")
        axes.set_ylim(0.8, max(10.0, 1.5 * (ranked[0][0] if ranked else 0)))
        # Plain numbers: the settings switch matplotlib's own way of writing powers off.
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.set(title=title, xlabel="class, by frequency", ylabel="images")
        if axes.lines:
            axes.legend()
    return figure


def running_mean(values: npt.ArrayLike, window: int) -> npt.NDArray[np.float64]:
    """Mean of the finite values among the last ``window`` ones at each place; NaN where there is none."""
    given = np.asarray(values, np.float64)
    finite = np.isfinite(given)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, given, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    first = np.maximum(np.arange(len(given)) + 1 - window, 0)
    last = np.arange(len(given)) + 1
    held = counts[last] - counts[first]
    with np.errstate(invalid="ignore"):
        means: npt.NDArray[np.float64] = (sums[last] - sums[first]) / np.where(
            held > 0, held, np.nan
        )
    return means


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure; the file's ending decides the format (png, svg, pdf)."""
    with _style(), staged(path) as temporary, write_errors(path):
        figure.savefig(temporary, dpi=160, format=path.suffix[1:])


def svg_of(figure: Figure) -> str:
    """Give a figure as an ``<svg>`` element for a page: transparent, its ink the page's text colour."""
    buffer = io.StringIO()
    with _style():
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(_INK, "currentColor")


def _draw_curve(axes: Axes, name: str, curve: Curve, colour: str) -> None:
    from matplotlib.ticker import MaxNLocator

    points = np.asarray(curve, np.float64).reshape(-1, 2)
    window = max(1, len(points) // 25)
    axes.plot(points[:, 0], points[:, 1], color=colour, linewidth=0.6, alpha=0.35)
    means = running_mean(points[:, 1], window)
    few = len(points) <= _FEW_POINTS
    # A line through one point is none: a run may have been evaluated once. Points on the axis are drawn in full.
    shown: dict[str, Any] = {"marker": "o", "markersize": 3, "clip_on": False} if few else {}
    axes.plot(points[:, 0], means, color=colour, linewidth=1.6, **shown)
    finite = means[np.isfinite(means)]
    if len(finite):
        # The first of many values, which are very large, would flatten the rest.
        top = float(np.quantile(finite, 1.0 if few else 0.98)) * 1.15
        bottom = min(0.0, float(finite.min()))
        axes.set_ylim(bottom, top if top > bottom else bottom + 1.0)
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))
    axes.set_title(textwrap.fill(name, _TITLE_WIDTH, break_long_words=False))


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib as mpl

    settings: dict[Any, Any] = dict(_SETTINGS)
    with mpl.rc_context(settings):
        yield
