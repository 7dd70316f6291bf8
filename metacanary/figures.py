"""Figures 1 and 2: what the canaries look like, and what they reveal along training.

Functions of arrays and frames that return a `matplotlib.figure.Figure`; pyplot has no part in it.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from metacanary import store, tables
from metacanary.canaries import Canaries

ONE_COLUMN = 3.25  # inches, as TWO_COLUMNS: the text widths of a two-column page
TWO_COLUMNS = 6.75
PNG_DPI = 200

_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same file on every machine
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.title_fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 3,
    "image.interpolation": "nearest",
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.3,
    "lines.markersize": 4,
    "pdf.fonttype": 42,  # TrueType: text stays text, and Type 3 fonts are refused by publishers
    "figure.dpi": 100,
}
_GREY = "0.35"
_HALO: dict[str, Any] = {"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.6}
_DOTS = (0, (1, 1.5))
_HOLLOW: dict[str, Any] = {
    "linestyle": _DOTS,
    "linewidth": 0.8,
    "markerfacecolor": "white",
    "markeredgewidth": 0.8,
    "markersize": 5.2,
}
# Okabe and Ito's colours, ordered so that neighbours differ in lightness too.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
_DASHES: tuple[Any, ...] = ((0, (4, 1.5)), (0, (4, 1.2, 1, 1.2)), "-", (0, (6, 1, 1, 1, 1, 1)), (0, (8, 2)))
_AUDITORS = {"steinke": "Steinke", "fdp_gaussian": "Gaussian f-DP"}

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class _Reference:
    """A horizontal line to compare the bounds with."""

    name: str
    value: float
    dashes: Any


def style() -> Any:
    """Returns a context in which matplotlib has the paper's style, whatever a matplotlibrc says."""
    # A backend that is named here would be loaded; figures with their own canvas need none.
    settings: dict[Any, Any] = {k: v for k, v in matplotlib.rcParamsDefault.items() if "backend" not in k}
    return matplotlib.rc_context(settings | _STYLE)


def _styled(function: Callable[P, R]) -> Callable[P, R]:
    """Runs a function within `style`."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        with style():
            return function(*args, **kwargs)

    return wrapper


def look(kinds: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Gives every canary kind a colour, a marker and a dash pattern.

    Guarantees:
      random, mislabeled and metagradient look the same in every figure; up to 63 kinds all look different.
    """
    others = [kind for kind in tables.canary_order(kinds) if kind not in tables.KINDS]
    return {
        kind: {
            "color": _COLORS[place % len(_COLORS)],
            "marker": _MARKERS[place % len(_MARKERS)],
            "linestyle": _DASHES[place % len(_DASHES)],
        }
        for place, kind in enumerate([*tables.KINDS, *others])
    }


def shown(labels: np.ndarray, ids: np.ndarray, num_shown: int) -> np.ndarray:
    """Chooses the canaries of figure 1 by a rule that knows nothing of their looks.

    Args:
      labels: Given labels [m].
      ids: Canary ids [m].
      num_shown: How many, at most.

    Returns:
      Positions: of each label the canary of lowest id, lowest ids first; when all labels have one, the
      second of each, and so on. Sorted by label, then id.
    """
    by_id = np.argsort(ids, kind="stable")
    turn = pd.Series(labels[by_id]).groupby(labels[by_id]).cumcount().to_numpy()
    chosen = by_id[np.argsort(turn, kind="stable")][:num_shown]
    return chosen[np.lexsort((ids[chosen], labels[chosen]))]


@_styled
def figure1(canaries: Canaries, *, class_names: Sequence[str], num_shown: int = 8) -> Figure:
    """Draws canaries before and after optimisation, and the difference.

    Args:
      canaries: The canaries.
      class_names: Names of the labels.
      num_shown: How many canaries, chosen by `shown`.

    Returns:
      Three rows of pictures, a column per canary under its given label (and that of its source where it
      differs), with its id below. The difference has one symmetric scale for all canaries; of colours, it
      shows the channel that changed most.

    Raises:
      ValueError: For images that have neither 1 nor 3 channels, or num_shown < 1.
    """
    channels = canaries.images.shape[-1]
    if canaries.images.ndim != 4 or channels not in (1, 3):
        raise ValueError(f"canaries.images has shape {canaries.images.shape}, expected [m,h,w,1] or [m,h,w,3]")
    if num_shown < 1:
        raise ValueError(f"num_shown={num_shown}, expected at least 1")
    chosen = shown(canaries.label, canaries.id, num_shown)
    before, after = canaries.source_images[chosen], canaries.images[chosen]
    change = _largest_change(after - before)
    limit = float(np.abs(change).max()) or 1.0
    figure, axes, bar_axis = _picture_grid(len(chosen))
    for column in range(len(chosen)):
        for axis, image in zip(axes[:2, column], (before[column], after[column]), strict=True):
            axis.imshow(image.squeeze(-1) if channels == 1 else image, cmap="gray", vmin=0, vmax=1)
        drawn = axes[2, column].imshow(change[column], cmap="RdBu_r", vmin=-limit, vmax=limit)
    _name_pictures(axes, canaries, chosen, class_names)
    bar = figure.colorbar(drawn, cax=bar_axis, ticks=[-limit, 0, limit])
    bar.ax.set_yticklabels([f"\N{MINUS SIGN}{limit:.2g}", "0", f"+{limit:.2g}"])
    bar.outline.set_linewidth(0.4)
    return figure


@_styled
def figure2(
    frame: pd.DataFrame,
    *,
    score: str,
    auditor: str,
    protocol: str,
    random_line: bool = True,
    dataset: str | None = None,
    training: str | None = None,
    epsilon: float | str | None = None,
    significance: float = 0.05,
) -> Figure:
    """Draws the empirical epsilon and the AUROC along training, a line per canary kind.

    Args:
      frame: summary/epsilon.csv.
      score: The membership score.
      auditor: One of `auditors.NAMES`.
      protocol: One of `audits.PROTOCOLS`.
      random_line: Whether to draw the line of a guesser that knows nothing, AUROC 1/2.
      dataset: Which rows to take; None if there is but one, as the two that follow.
      training: The training recipe.
      epsilon: The target epsilon.
      significance: Of the audits that made the frame, for the title.

    Returns:
      Lines are means over runs, bands their 95% t intervals (none for one run); hollow markers on dots are
      the bound of all runs at once. Ceilings, and the accounted epsilon by step if it is finite, are lines where
      that leaves the data readable, and are named at the upper edge otherwise.

    Raises:
      ValueError: If columns or wanted rows are missing, if more than one dataset, training or target epsilon
        is left, or if a run has several rows at a step.
    """
    wanted = {"dataset": dataset, "training": training, "epsilon": epsilon}
    rows = tables.select(frame, **wanted, score=score, auditor=auditor, protocol=protocol)
    for name in wanted:
        if rows[name].nunique() > 1:
            raise ValueError(
                f"frame has {name} {sorted(rows[name].unique().tolist())}, expected one: name it by {name}="
            )
    tables.one_per_run(rows, ["canary", "step"])
    figure = Figure(figsize=(TWO_COLUMNS, 2.75), layout="constrained")
    left, right = figure.subplots(1, 2)
    _along_steps(left, rows, "epsilon_lower")
    _pooled_along_steps(left, rows)
    _references(left, rows)
    _along_steps(right, rows, "auroc")
    if random_line:
        right.axhline(0.5, color=_GREY, linewidth=0.9, linestyle=_DOTS, zorder=1, label="chance")
        _remark(right, "chance", at=(1, 0.5), offset=(0, 2), system=right.get_yaxis_transform())
    right.set_ylim(*_auroc_limits(right))
    claim = "not a bound" if protocol == tables.PAPER else f"{1 - significance:.0%} lower bound"
    by_whom = f"{_AUDITORS.get(auditor, auditor)} auditor, {protocol} protocol"
    left.set(title=f"(a) empirical ε, {claim}\n{by_whom}", ylabel="empirical ε")
    right.set(title=f"(b) membership AUROC\nscore: {score.replace('_', ' ')}", ylabel="AUROC")
    for axis in (left, right):
        axis.set_xlabel("training step")
        _step_axis(axis, np.unique(rows["step"]))
    handles = list(_legend(rows))
    widest = max(len(str(handle.get_label())) for handle in handles)
    ncols = max(1, min(4, 122 // (widest + 8)))  # what fits the width of the page
    figure.legend(handles=handles, loc="outside lower center", ncols=ncols, title=_cell_name(rows))
    return figure


@_styled
def save(figure: Figure, *paths: store.PathLike) -> None:
    """Writes a figure to files, atomically, each in the format of its suffix: .pdf, or .png at 200 dpi.

    Raises:
      ValueError: For another suffix.

    Guarantees:
      A figure that is made again from the same data gives the same bytes, in whatever order it is saved: they
      hold no date and no path.
    """
    formats = {".pdf": {"CreationDate": None, "Creator": "metacanary"}, ".png": {"Software": "metacanary"}}
    for path in map(Path, paths):
        if path.suffix not in formats:
            raise ValueError(f"path={str(path)!r} has suffix {path.suffix!r}, expected .pdf or .png")
    _freeze_layout(figure)
    for path in map(Path, paths):
        with store.atomic(path) as file:
            figure.savefig(file, format=path.suffix[1:], dpi=PNG_DPI, metadata=formats[path.suffix])


def _freeze_layout(figure: Figure) -> None:
    """Lays a figure out once, so that a second file does not start from the layout of the first."""
    if figure.get_layout_engine() is not None:
        FigureCanvasAgg(figure)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")


def _largest_change(change: np.ndarray) -> np.ndarray:
    """Takes of each pixel [m,h,w,c] the channel that changed most, with its sign."""
    largest = np.abs(change).argmax(axis=-1, keepdims=True)
    return np.take_along_axis(change, largest, axis=-1)[..., 0]


def _picture_grid(num_columns: int) -> tuple[Figure, np.ndarray, Axes]:
    """Makes a figure with three rows of square axes and, right of the last row, one for a colour bar."""
    left, right, bottom, top, gap = 0.22, 0.6, 0.17, 0.3, 0.04  # inches
    side = min(1.0, (TWO_COLUMNS - left - right + gap) / num_columns - gap)
    width = left + num_columns * (side + gap) - gap + right
    height = bottom + 3 * (side + gap) - gap + top
    figure = Figure(figsize=(width, height))

    def add(x: float, y: float, w: float) -> Axes:
        return figure.add_axes((x / width, y / height, w / width, side / height))

    heights = [bottom + row * (side + gap) for row in (2, 1, 0)]
    axes = [[add(left + column * (side + gap), y, side) for column in range(num_columns)] for y in heights]
    for axis in itertools.chain(*axes):
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set(visible=True, linewidth=0.4, color="0.7")
    return figure, np.array(axes, dtype=object), add(width - right + 0.08, bottom, 0.08)


def _name_pictures(axes: np.ndarray, canaries: Canaries, chosen: np.ndarray, class_names: Sequence[str]) -> None:
    """Names rows, and over each canary its given label and that of its source if it is another."""
    given = [class_names[label] for label in canaries.label[chosen]]
    source = [class_names[label] for label in canaries.source_labels[chosen]]
    below = ["" if name == old else f"was {old}" for name, old in zip(given, source, strict=True)]
    width = 72 * axes[0, 0].get_position().width * axes[0, 0].figure.get_figwidth()
    # A letter is about 0.58 of its height wide: names may fill their column, not run into the next.
    size = min(7.0, width / (0.58 * max(map(len, given + below))))
    stacks = zip(below, given, strict=True) if any(below) else ((name,) for name in given)
    for column, names in enumerate(stacks):
        for line, name in enumerate(names):
            offset, system = (0, 4 + 1.25 * size * line), "axes fraction"
            axes[0, column].annotate(name, (0.5, 1), offset, system, "offset points", ha="center", fontsize=size)
        axes[2, column].set_xlabel(f"#{canaries.id[chosen[column]]}", fontsize=size, color=_GREY, labelpad=2)
    for axis, name in zip(axes[:, 0], ("before", "after", "difference"), strict=True):
        axis.set_ylabel(name, labelpad=2)


def _remark(axis: Axes, text: str, *, at: tuple[float, float], offset: tuple[float, float], system: Any) -> None:
    """Writes small grey words at a place, by an offset in points, on a pale ground."""
    side = "right" if at[0] == 1 else "left"
    words: dict[str, Any] = {"ha": side, "va": "bottom", "fontsize": 6.5, "color": _GREY, "bbox": _HALO}
    axis.annotate(text, at, offset, system, "offset points", **words)


def _along_steps(axis: Axes, rows: pd.DataFrame, column: str) -> None:
    """Draws the mean over runs and its interval, by canary kind."""
    single = rows[rows["run"] != tables.POOLED]
    means = tables.over_runs(single, ["canary", "step"], column).sort_index()
    looks = look(rows["canary"].unique())
    for kind in tables.canary_order(single["canary"]):
        mean = means.loc[kind]
        axis.plot(mean.index, mean["mean"], label=kind, markeredgewidth=0, **looks[kind])
        if len(mean) == 1 and mean["low"].notna().any():  # a band over one step would have no width
            axis.vlines(mean.index, mean["low"], mean["high"], color=looks[kind]["color"], alpha=0.5)
        elif mean["low"].notna().any():
            band = {"color": looks[kind]["color"], "alpha": 0.18, "linewidth": 0}
            axis.fill_between(mean.index, mean["low"], mean["high"], **band)


def _pooled_along_steps(axis: Axes, rows: pd.DataFrame) -> None:
    """Draws the bound of all runs at once, by canary kind."""
    looks = look(rows["canary"].unique())
    pooled = rows[rows["run"] == tables.POOLED].sort_values("step")
    for kind in tables.canary_order(pooled["canary"]):
        line = pooled[pooled["canary"] == kind]
        # Below the means, and larger: where the two coincide, a ring is left of it.
        dotted = looks[kind] | _HOLLOW | {"zorder": 1.9}
        axis.plot(line["step"], line["epsilon_lower"], label=f"{kind}, pooled", **dotted)


def _references(axis: Axes, rows: pd.DataFrame) -> None:
    """Draws the reference lines that leave the data readable, and names the others at the upper edge."""
    top = max(axis.dataLim.y1, 0.1)
    lines = list(_ceilings(rows))
    near = [line for line in lines if line.value <= 2 * top]
    for line in near:
        axis.axhline(line.value, color=_GREY, linewidth=0.9, linestyle=line.dashes, zorder=1, label=line.name)
        _remark(axis, line.name, at=(0, line.value), offset=(2, 2), system=axis.get_yaxis_transform())
    far = [line.name for line in lines if line.value > 2 * top]
    highest = max([top, *(line.value for line in near), *_draw_accounted(axis, rows, 2 * top, far)])
    for number, name in enumerate(far):
        _remark(axis, f"↑ {name}", at=(0, 1), offset=(2, -8 - 9 * number), system="axes fraction")
    axis.set_ylim(-0.022 * highest, 1.1 * highest * (1 + 0.09 * len(far)))


def _draw_accounted(axis: Axes, rows: pd.DataFrame, limit: float, far: list[str]) -> list[float]:
    """Draws the accounted epsilon by step; returns its values up to the limit, names it in `far` if there are others.

    It is one curve for all canary kinds of a training; should their noise differ, the largest is drawn.
    """
    accounted = rows.groupby("step")["epsilon_accounted"].max()
    if not np.isfinite(accounted).all():
        return []
    first, last = f"{accounted.min():.2f}", f"{accounted.max():.2f}"
    name = f"accounted ε {last}" if first == last else f"accounted ε by step, {first} to {last}"
    shown_values = accounted[accounted <= limit].to_list()
    if shown_values:
        axis.plot(accounted.index, accounted, color=_GREY, linewidth=0.9, zorder=1, label=name)
    if len(shown_values) < len(accounted):
        far.append(name)
    else:
        _remark(axis, name, at=(1, shown_values[-1]), offset=(0, 2), system=axis.get_yaxis_transform())
    return shown_values


def _ceilings(rows: pd.DataFrame) -> Iterator[_Reference]:
    """Lists the ceilings, each distinct value once."""
    pooled = rows["run"] == tables.POOLED
    which = (" (one run)", " (pooled)") if pooled.any() else ("", "")
    for values, name, dashes in (
        (rows["ceiling"][~pooled], f"ceiling {{:.2f}}{which[0]}", (0, (5, 2))),
        (rows["ceiling"][pooled], f"ceiling {{:.2f}}{which[1]}", _DOTS),
    ):
        for value in np.unique(values.round(2)):
            if np.isfinite(value):
                yield _Reference(name=name.format(value), value=value, dashes=dashes)


def _auroc_limits(axis: Axes) -> tuple[float, float]:
    """Shows the data and chance with a margin, and nothing that no AUROC can be."""
    low, high = min(axis.dataLim.y0, 0.5), max(axis.dataLim.y1, 0.52)
    margin = 0.06 * (high - low)
    return max(low - margin, -0.02), min(high + margin, 1.02)


def _step_axis(axis: Axes, steps: np.ndarray) -> None:
    """Scales the steps so that the snapshots stand most evenly, and ticks them if they are few."""
    if len(steps) > 2 and steps[0] > 0 and _unevenness(np.log(steps)) < _unevenness(steps):
        axis.set_xscale("log")
        axis.minorticks_off()
    if len(steps) <= 7 or axis.get_xscale() == "log":
        axis.set_xticks(steps[:: -(-len(steps) // 7)])
    axis.xaxis.set_major_formatter("{x:,.0f}")


def _unevenness(values: np.ndarray) -> float:
    """Measures how much gaps differ: their standard deviation by their mean."""
    gaps = np.diff(values)
    return float(gaps.std() / gaps.mean())


def _legend(rows: pd.DataFrame) -> Iterator[Line2D]:
    """Makes the entries of the legend: kinds with their number of runs, then what a hollow marker is."""
    single = rows[rows["run"] != tables.POOLED]
    runs = single.groupby("canary")["run"].nunique()
    for kind, appearance in look(rows["canary"].unique()).items():
        if kind in runs.index:
            plural = "" if runs[kind] == 1 else "s"
            yield Line2D([], [], label=f"{kind} ({runs[kind]} run{plural})", markeredgewidth=0, **appearance)
    if len(single) < len(rows):
        yield Line2D([], [], color="black", label="all runs pooled", marker="o", **_HOLLOW)


def _cell_name(rows: pd.DataFrame) -> str:
    """Names what was trained."""
    first = rows.iloc[0]
    target = "no DP" if np.isinf(first["epsilon"]) else f"target ε = {first['epsilon']:g}"
    return f"{first['dataset']}, {first['training']}, {target}, {first['game']} game"
