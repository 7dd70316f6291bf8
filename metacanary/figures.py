"""Figures 1 and 2: what the canaries look like, and what they reveal along training.

Functions of arrays and frames that return a `matplotlib.figure.Figure`; pyplot has no part in it.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from metacanary import tables
from metacanary.canaries import Canaries
from metacanary.figure_style import (
    DOTS,
    GREY,
    HOLLOW,
    ONE_COLUMN,
    PNG_DPI,
    TWO_COLUMNS,
    look,
    point,
    remark,
    save,
    style,
    styled,
)

__all__ = ["ONE_COLUMN", "PNG_DPI", "TWO_COLUMNS", "figure1", "figure2", "look", "save", "shown", "style", "styled"]

_AUDITORS = {"steinke": "Steinke", "fdp_gaussian": "Gaussian f-DP"}


@dataclass(frozen=True, kw_only=True)
class _Reference:
    """A horizontal line to compare the bounds with."""

    name: str
    value: float
    dashes: Any


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


@styled
def figure1(canaries: Canaries, *, class_names: Sequence[str], num_shown: int = 10) -> Figure:
    """Draws canaries before and after optimisation, and the difference.

    Args:
      canaries: The canaries.
      class_names: Names of the labels.
      num_shown: How many canaries, chosen by `shown`.

    Returns:
      Three rows of pictures, a column per canary under its given label (and what its source was where that
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


@styled
def figure2(
    frame: pd.DataFrame,
    *,
    score: str,
    auditor: str,
    protocol: str,
    random_line: bool = True,
    dataset: str | None = None,
    training: str | Sequence[str] | None = None,
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
      training: The training recipe, or several of them, each a row of panels.
      epsilon: The target epsilon.
      significance: Of the audits that made the frame, for the title.

    Returns:
      Lines are means over runs, bands their 95% t intervals (none for one run); hollow markers on dots are
      the bound of all runs at once. A training with one step has a column for each kind, and intervals as bars.
      Ceilings, and the accounted epsilon by step if it is finite, are lines where that leaves the data readable, and
      are named at the upper edge otherwise.

    Raises:
      ValueError: If columns or wanted rows are missing, if more than one dataset, training or target epsilon
        is left that was not named, or if a run has several rows at a step.
    """
    named = [training] if training is None or isinstance(training, str) else list(training)
    chosen = {"dataset": dataset, "epsilon": epsilon, "score": score, "auditor": auditor, "protocol": protocol}
    parts = [tables.select(frame, **chosen, training=name) for name in named]
    rows = pd.concat(parts)
    for name in ("dataset", "epsilon", *([] if len(named) > 1 else ["training"])):
        if rows[name].nunique() > 1:
            raise ValueError(
                f"frame has {name} {sorted(rows[name].unique().tolist())}, expected one: name it by {name}="
            )
    figure = Figure(figsize=(TWO_COLUMNS, 2.75 + 2.2 * (len(parts) - 1)), layout="constrained")
    axes = figure.subplots(len(parts), 2, squeeze=False)
    claim = "not a bound" if protocol == tables.PAPER else f"{1 - significance:.0%} lower bound"
    by_whom = f"{_AUDITORS.get(auditor, auditor)} auditor, {protocol} protocol"
    scored = f"score: {score.replace('_', ' ')}"
    for number, (pair, part) in enumerate(zip(axes, parts, strict=True)):
        tables.one_per_run(part, ["canary", "step"])
        _draw_bounds(pair[0], part)
        _draw_aurocs(pair[1], part, random_line=random_line)
        second = [by_whom, scored] if len(parts) == 1 else [part["training"].iloc[0]] * 2
        for place, (axis, what) in enumerate(zip(pair, (f"empirical ε, {claim}", "membership AUROC"), strict=True)):
            axis.set_title(f"({'abcdefghijklmnopqrstuvwxyz'[2 * number + place]}) {what}\n{second[place]}")
    handles = list(_legend(rows))
    widest = max(len(str(handle.get_label())) for handle in handles)
    ncols = max(1, min(4, 122 // (widest + 8)))  # what fits the width of the page
    title = _cell_name(rows) if len(parts) == 1 else f"{_setting_name(rows)}\n{by_whom}, {scored}"
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=ncols, title=title)
    legend.get_title().set_multialignment("center")
    return figure


def _draw_bounds(axis: Axes, rows: pd.DataFrame) -> None:
    """Draws the bounds of a training."""
    _along_steps(axis, rows, "epsilon_lower")
    _pooled_along_steps(axis, rows)
    _references(axis, rows)
    axis.set_ylabel("empirical ε")
    _name_steps(axis, rows)


def _draw_aurocs(axis: Axes, rows: pd.DataFrame, *, random_line: bool) -> None:
    """Draws the AUROC of a training."""
    _along_steps(axis, rows, "auroc")
    if random_line:
        axis.axhline(0.5, color=GREY, linewidth=0.9, linestyle=DOTS, zorder=1, label="chance")
        remark(axis, "chance", at=(1.01, 0.5), offset=(0, -3), system=axis.get_yaxis_transform())
    axis.set_ylim(*_auroc_limits(axis))
    axis.set_ylabel("AUROC")
    _name_steps(axis, rows)


def _largest_change(change: np.ndarray) -> np.ndarray:
    """Takes of each pixel [m,h,w,c] the channel that changed most, with its sign."""
    largest = np.abs(change).argmax(axis=-1, keepdims=True)
    return np.take_along_axis(change, largest, axis=-1)[..., 0]


def _picture_grid(num_columns: int) -> tuple[Figure, np.ndarray, Axes]:
    """Makes a figure with three rows of square axes and, right of the last row, one for a colour bar."""
    left, right, bottom, top, gap = 0.34, 0.62, 0.17, 0.3, 0.04  # inches
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
    below = ["" if name == old else old for name, old in zip(given, source, strict=True)]
    width = 72 * axes[0, 0].get_position().width * axes[0, 0].figure.get_figwidth()
    # A letter is about 0.58 of its height wide: names may fill their column, not run into the next.
    size = min(7.0, width / (0.58 * max(map(len, given + below))))
    lines = {"was": below, "label": given} if any(below) else {"": given}
    for line, (heading, names) in enumerate(lines.items()):
        height: dict[str, Any] = {"xytext": (0, 4 + 9 * line), "textcoords": "offset points", "va": "bottom"}
        for column, name in enumerate(names):
            axes[0, column].annotate(name, (0.5, 1), xycoords="axes fraction", ha="center", fontsize=size, **height)
        height["xytext"] = (-4, 4 + 9 * line)
        axes[0, 0].annotate(heading, (0, 1), xycoords="axes fraction", ha="right", fontsize=7, color=GREY, **height)
    for column, place in enumerate(chosen):
        axes[2, column].set_xlabel(f"#{canaries.id[place]}", fontsize=min(size, 6.5), color=GREY, labelpad=2)
    for axis, name in zip(axes[:, 0], ("before", "after", "difference"), strict=True):
        axis.set_ylabel(name, labelpad=2)


def _along_steps(axis: Axes, rows: pd.DataFrame, column: str) -> None:
    """Draws the mean over runs and its interval, by canary kind."""
    single = rows[rows["run"] != tables.POOLED]
    means = tables.over_runs(single, ["canary", "step"], column).sort_index()
    looks = look(rows["canary"].unique())
    for place, kind in enumerate(_kinds(rows)):
        if kind not in means.index:
            continue
        mean = means.loc[kind]
        if _has_one_step(rows):
            point(axis, place, mean.iloc[0], label=kind, **looks[kind])
            continue
        axis.plot(mean.index, mean["mean"], label=kind, markeredgewidth=0, **looks[kind])
        if mean["low"].notna().any():
            band = {"color": looks[kind]["color"], "alpha": 0.18, "linewidth": 0}
            axis.fill_between(mean.index, mean["low"], mean["high"], **band)


def _pooled_along_steps(axis: Axes, rows: pd.DataFrame) -> None:
    """Draws the bound of all runs at once, by canary kind; of one step, beside the mean."""
    looks = look(rows["canary"].unique())
    pooled = rows[rows["run"] == tables.POOLED].sort_values("step")
    for place, kind in enumerate(_kinds(rows)):
        line = pooled[pooled["canary"] == kind]
        # Below the means, and larger: where the two coincide, a ring is left of it.
        dotted = looks[kind] | HOLLOW | {"zorder": 1.9}
        if len(line):
            x = [place + 0.22] if _has_one_step(rows) else line["step"]
            axis.plot(x, line["epsilon_lower"], label=f"{kind}, pooled", **dotted)


def _kinds(rows: pd.DataFrame) -> list[str]:
    """The canary kinds in the order in which they are shown."""
    return tables.canary_order(rows["canary"])


def _has_one_step(rows: pd.DataFrame) -> bool:
    """Tells whether there is nothing to draw along."""
    return rows["step"].nunique() == 1


def _references(axis: Axes, rows: pd.DataFrame) -> None:
    """Draws the reference lines that leave the data readable, and names the others at the upper edge."""
    top = max(axis.dataLim.y1, 0.1)
    lines = list(_ceilings(rows))
    near = [line for line in lines if line.value <= 2 * top]
    for line in near:
        axis.axhline(line.value, color=GREY, linewidth=0.9, linestyle=line.dashes, zorder=1, label=line.name)
        remark(axis, line.name, at=(0, line.value), offset=(2, 2), system=axis.get_yaxis_transform())
    far = [line.name if np.isinf(line.value) else f"↑ {line.name}" for line in lines if line.value > 2 * top]
    highest = max([top, *(line.value for line in near), *_draw_accounted(axis, rows, 2 * top, far)])
    for number, name in enumerate(far):
        remark(axis, name, at=(0, 1), offset=(2, -8 - 9 * number), system="axes fraction")
    below = 0.06 if _has_one_step(rows) else 0.022  # whole markers, where they say more than lines
    spec = axis.get_subplotspec()
    num_rows = spec.get_gridspec().nrows if spec else 1  # of panels: the more, the taller a word is beside its panel
    axis.set_ylim(-below * highest, (1 + 0.1 * num_rows) * highest * (1 + 0.09 * num_rows * len(far)))


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
    if shown_values and _has_one_step(rows):
        axis.axhline(shown_values[0], color=GREY, linewidth=0.9, zorder=1, label=name)
    elif shown_values:
        axis.plot(accounted.index, accounted, color=GREY, linewidth=0.9, zorder=1, label=name)
    if len(shown_values) < len(accounted):
        far.append(f"↑ {name}")
    else:
        remark(axis, name, at=(1, shown_values[-1]), offset=(0, 2), system=axis.get_yaxis_transform())
    return shown_values


def _ceilings(rows: pd.DataFrame) -> Iterator[_Reference]:
    """Lists the ceilings; where kinds have several, a range that is named and not drawn."""
    pooled = rows["run"] == tables.POOLED
    which = (" (one run)", " (pooled)") if pooled.any() else ("", "")
    for values, name, dashes in (
        (rows["ceiling"][~pooled], f"ceiling {{:.2f}}{which[0]}", (0, (5, 2))),
        (rows["ceiling"][pooled], f"ceiling {{:.2f}}{which[1]}", DOTS),
    ):
        distinct = [value for value in np.unique(values.round(2)) if np.isfinite(value)]
        if len(distinct) == 1:
            yield _Reference(name=name.format(distinct[0]), value=distinct[0], dashes=dashes)
        elif distinct:
            span = f"{distinct[0]:.2f} to {name.format(distinct[-1]).removeprefix('ceiling ')}"
            yield _Reference(name=f"ceiling {span}", value=np.inf, dashes=dashes)


def _auroc_limits(axis: Axes) -> tuple[float, float]:
    """Shows the data and chance with a margin, and nothing that no AUROC can be."""
    low, high = min(axis.dataLim.y0, 0.5), max(axis.dataLim.y1, 0.52)
    margin = 0.06 * (high - low)
    return max(low - margin, -0.02), min(high + margin, 1.02)


def _name_steps(axis: Axes, rows: pd.DataFrame) -> None:
    """Scales and names the axis of training steps; of one step, names the kinds that stand there instead."""
    steps = np.unique(rows["step"])
    if not _has_one_step(rows):
        axis.set_xlabel("training step")
        _step_axis(axis, steps)
        return
    kinds = _kinds(rows)
    fit = max(map(len, kinds)) * 0.58 * 7 < 190 / len(kinds)  # points, of a panel that is 2.6 inches wide
    slanted: dict[str, Any] = {} if fit else {"rotation": 25, "ha": "right", "rotation_mode": "anchor"}
    axis.set_xticks(range(len(kinds)), kinds, **slanted)
    axis.set_xlim(-0.6, len(kinds) - 0.4)
    axis.set_xlabel(f"canaries, after {steps[0]:,} training steps")


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
    runs = single.groupby(["training", "canary"])["run"].nunique().groupby("canary").agg(["min", "max"])
    looks = look(rows["canary"].unique())
    for kind in _kinds(single):
        fewest, most = runs.loc[kind]
        count = f"{most}" if fewest == most else f"{fewest} to {most}"
        label = f"{kind} ({count} run{'' if most == 1 else 's'})"
        yield Line2D([], [], label=label, markeredgewidth=0, **looks[kind])
    if len(single) < len(rows):
        yield Line2D([], [], color="black", label="all runs pooled", marker="o", **HOLLOW)


def _cell_name(rows: pd.DataFrame) -> str:
    """Names what was trained."""
    first = rows.iloc[0]
    return f"{first['dataset']}, {first['training']}, {_target(first)}, {first['game']} game"


def _setting_name(rows: pd.DataFrame) -> str:
    """Names what several trainings share."""
    games = " and ".join(rows["game"].unique())
    return f"{rows['dataset'].iloc[0]}, {_target(rows.iloc[0])}, {games} game"


def _target(row: pd.Series) -> str:
    """Names the target epsilon of a row."""
    return "no DP" if np.isinf(row["epsilon"]) else f"target ε = {row['epsilon']:g}"
