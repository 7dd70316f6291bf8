"""The figure of model variants: their metasmoothness against what metagradient descent then reached with each."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pandas as pd
import scipy.stats
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

from metacanary import figures

_COLOR = "#0072B2"
_GREY = "0.35"
_FONT_SIZE = 6.5
_MARKER = 4.5  # points
_GAPS = (4, 8, 13, 19, 26, 34, 43, 53, 64, 76, 90)  # points between a point and its label, tried in this order
_NUM_ANGLES = 24
_LEADER = 8  # points; a label that is no nearer gets a line to its point


def figure(table: pd.DataFrame) -> Figure:
    """Draws what descent reached against metasmoothness, a labelled point per variant.

    Args:
      table: From `metasmoothness_table.collect`.

    Returns:
      Two panels over the mean metasmoothness, its standard deviation over directions as a bar: (a) the reduction of
      the objective, (b) the gain of AUROC. Titles name Spearman's rank correlation if there are three variants.

    Raises:
      ValueError: For a table without rows or with a missing value.

    Guarantees:
      Labels overlap neither each other nor a point, as long as there is room for them.
    """
    needed = ["metasmoothness_mean", "objective_reduction", "auroc_gain"]
    if table.empty or table[needed].isna().any(axis=None):
        raise ValueError(f"table has {len(table)} rows, expected at least one, and a value in all of {needed}")
    with figures.style():
        drawn = Figure(figsize=(figures.TWO_COLUMNS, 3.4))
        FigureCanvasAgg(drawn)
        # Fixed margins: labels are placed by where things are, which a layout engine would only settle later.
        drawn.subplots_adjust(left=0.1, right=0.99, bottom=0.13, top=0.87, wspace=0.3)
        left, right = drawn.subplots(1, 2)
        objective = "objective" if table["objective"].nunique() > 1 else table["objective"].iloc[0].replace("_", " ")
        _panel(left, table, "objective_reduction", f"(a) reduction of the objective ({objective})")
        _panel(right, table, "auroc_gain", "(b) gain of the canaries' AUROC")
    return drawn


def _panel(axis: Axes, table: pd.DataFrame, column: str, title: str) -> None:
    """Draws one panel."""
    x, y = table["metasmoothness_mean"].to_numpy(), table[column].to_numpy()
    spread = table["metasmoothness_std"].fillna(0.0).to_numpy()
    axis.errorbar(x, y, xerr=spread, fmt="o", color=_COLOR, markersize=_MARKER, elinewidth=0.6, ecolor="0.6")
    axis.set(xlabel="metasmoothness", ylabel=column.replace("auroc", "AUROC").replace("_", " "))
    axis.set_title(title + _correlation(x, y))
    axis.locator_params(nbins=6)
    axis.margins(x=0.12, y=0.12)
    axis.autoscale_view()
    if axis.get_ylim()[0] < 0 < axis.get_ylim()[1]:
        axis.axhline(0.0, color=_GREY, linewidth=0.8, linestyle=(0, (1, 1.5)), zorder=1)
    axis.set_xlim(axis.get_xlim())
    axis.set_ylim(axis.get_ylim())
    several = table["dataset"].nunique() > 1
    names = zip(table["canary"], table["dataset"], strict=True)
    _label(axis, x, y, spread, [f"{canary}, {dataset}" if several else canary for canary, dataset in names])


def _correlation(x: np.ndarray, y: np.ndarray) -> str:
    """Names the rank correlation where there is one."""
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return ""
    return f"\nrank correlation {scipy.stats.spearmanr(x, y).statistic:.2f}, {len(x)} variants"


def _label(axis: Axes, x: np.ndarray, y: np.ndarray, spread: np.ndarray, names: Sequence[str]) -> None:
    """Writes each name beside its point, at the best place that is left; works in pixels."""
    pixel = axis.figure.dpi / 72
    at = axis.transData.transform(np.column_stack([x, y]))
    ends = [axis.transData.transform([(u - s, v), (u + s, v)]).ravel() for u, v, s in zip(x, y, spread, strict=True)]
    frame = np.array(axis.get_window_extent().extents)
    zero = axis.transData.transform((0.0, 0.0))[1]  # where a line may be
    # What no label may cover, and what it should not.
    hard = _around(at, np.full(2, _MARKER * pixel))
    soft = np.array([*ends, [frame[0], zero, frame[2], zero]]) + pixel * np.array([0, -1, 0, 1])
    for number in np.argsort(x, kind="stable"):
        size = _size(axis, names[number])
        gaps, centres = _places(at[number], size, pixel)
        boxes, lines = _around(centres, size), _leaders(at[number], centres, size, gaps, pixel)
        cost = gaps + 100 * (_overlap(boxes, hard) + _outside(boxes, frame)) + 0.15 * _overlap(boxes, soft)
        cost += 5 * _overlap(lines.reshape(-1, 4), hard).reshape(len(gaps), -1).sum(axis=1)
        best = int(np.argmin(np.round(cost, 6)))  # the nearest of equals
        hard, soft = np.vstack([hard, boxes[best]]), np.vstack([soft, lines[best]])
        _write(axis, names[number], at[number], centres[best], gaps[best] > _LEADER, pixel)


def _size(axis: Axes, text: str) -> np.ndarray:
    """Width and height of a label, with a little air."""
    renderer = cast(FigureCanvasAgg, axis.figure.canvas).get_renderer()
    font = FontProperties(family="DejaVu Sans", size=_FONT_SIZE)
    width, height, _ = renderer.get_text_width_height_descent(text, font, False)
    return np.array([width + 2, height + 2])


def _places(at: np.ndarray, size: np.ndarray, pixel: float) -> tuple[np.ndarray, np.ndarray]:
    """Where a label may stand, the nearest places first: gaps to the point [n] in points, and centres [n, 2]."""
    gaps = np.repeat(np.array(_GAPS, float), _NUM_ANGLES)
    angles = np.tile(2 * np.pi * np.arange(_NUM_ANGLES) / _NUM_ANGLES, len(_GAPS))
    directions = np.column_stack([np.cos(angles), np.sin(angles)])
    return gaps, at + directions * ((_MARKER / 2 + gaps[:, None]) * pixel + size / 2)


def _leaders(at: np.ndarray, centres: np.ndarray, size: np.ndarray, gaps: np.ndarray, pixel: float) -> np.ndarray:
    """Small boxes along the line from a point to each place [n, 12, 4]; empty ones where there is no line."""
    way = centres - at
    length = np.maximum(np.linalg.norm(way, axis=1), 1e-9)[:, None]
    inside = (size / 2 / np.maximum(np.abs(way), 1e-9)).min(axis=1)[:, None]  # the part of the way within the label
    fractions = np.linspace((_MARKER + 1) * pixel / length[:, 0], np.maximum(1 - inside[:, 0], 0), 12).T
    dots = at + fractions[..., None] * way[:, None, :]
    return _around(dots, np.where(gaps > _LEADER, pixel, 0.0)[:, None, None])


def _write(axis: Axes, text: str, at: np.ndarray, centre: np.ndarray, leader: bool, pixel: float) -> None:
    """Writes a label around a centre, with a line to its point if it stands far off."""
    (x, y), (right, up) = axis.transData.inverted().transform(at), (centre - at) / pixel
    line = {"arrowstyle": "-", "linewidth": 0.4, "color": _GREY, "shrinkA": 0, "shrinkB": _MARKER / 2}
    words: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": _FONT_SIZE, "color": _GREY}
    axis.annotate(text, (x, y), (right, up), textcoords="offset points", arrowprops=line if leader else None, **words)


def _around(centres: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Boxes [..., 4] of a size around centres [..., 2]: left, bottom, right, top."""
    return np.concatenate([centres - size / 2, centres + size / 2], axis=-1)


def _overlap(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The area [n] that each of the boxes [n, 4] shares with the others [m, 4]."""
    low = np.maximum(boxes[:, None, :2], others[:, :2])
    high = np.minimum(boxes[:, None, 2:], others[:, 2:])
    return np.maximum(high - low, 0.0).prod(axis=-1).sum(axis=1)


def _outside(boxes: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """The area [n] of each box that sticks out of a frame."""
    return (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) - _overlap(boxes, frame[None])
