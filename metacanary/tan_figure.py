"""The figure of TAN: accuracy against total noise, a line per batch size, and the search at the small batch."""

from collections.abc import Iterable
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metacanary import figures, tan_table

# Okabe and Ito's colours; the full batch is the last, in black.
_COLORS = ("#E69F00", "#56B4E9", "#009E73", "#0072B2", "#CC79A7", "#D55E00")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_HEIGHT = 3.4  # inches, of a data set
_BESIDE = 1.03  # from a line to the next, so that their bars do not cover each other
_BELOW: dict[str, Any] = {"loc": "upper center", "ncols": 2}


def figure(table: pd.DataFrame) -> Figure:
    """Draws accuracy against total noise, and what was searched.

    Args:
      table: From `tan_table.collect`.

    Returns:
      A row of two panels for each data set. (a) Test accuracy of the reference's settings against the total noise
      1 / eta, a line per batch size, each 3% beside the next, and at the full batch the chosen settings as a star;
      each tick names the epsilon that the full run spends there. (b) Accuracy on validation images against the learning
      rate, a line for each number of copies and of steps, with a ring around what was chosen. Bars are standard
      deviations over runs.

    Raises:
      ValueError: For a table without rows of a stage of `tan_table.STAGES`.
    """
    datasets = list(table["dataset"].unique())
    parts = table.groupby("dataset")["stage"].agg(set)
    missing = {
        name: sorted({*tan_table.STAGES} - found) for name, found in parts.items() if {*tan_table.STAGES} - found
    }
    if table.empty or missing:
        raise ValueError(f"table: got no rows of {missing or 'any stage'}, expected some of each stage")
    with figures.style():
        drawn = Figure(figsize=(figures.TWO_COLUMNS, _HEIGHT * len(datasets)), layout="constrained")
        axes = drawn.subplots(len(datasets), 2, squeeze=False)
        for (left, right), dataset in zip(axes, datasets, strict=True):
            rows, name = table[table["dataset"] == dataset], f", {dataset}" if len(datasets) > 1 else ""
            _against_noise(left, rows, name)
            _searched(right, rows, name)
    return drawn


def _against_noise(axis: Axes, rows: pd.DataFrame, name: str) -> None:
    """Draws panel (a)."""
    scaling, full = rows[rows["stage"] == "scaling"], rows[rows["stage"] == "full"]
    num_sizes = scaling["batch_size"].nunique()
    for place, (batch_size, line, look) in enumerate(_lines(scaling, "batch_size")):
        is_full = batch_size == scaling["batch_size"].max()
        beside = _BESIDE ** (place - (num_sizes - 1) / 2)
        label = f"batch {batch_size:,.0f}{', full' if is_full else ''}"
        _errorbar(axis, beside / line["eta"], line, label=label, **(look | {"color": "black"} if is_full else look))
    star: dict[str, Any] = {"marker": "*", "markersize": 8, "color": "#D55E00", "linestyle": "none"}
    _errorbar(axis, 1 / full["eta"], full, label="chosen, full", zorder=5, **star)
    levels = scaling[scaling["batch_size"] == scaling["batch_size"].max()].sort_values("eta", ascending=False)
    axis.set_xscale("log")
    axis.minorticks_off()
    ticks = zip(1 / levels["eta"], levels["epsilon_full"], strict=True)
    axis.set_xticks(1 / levels["eta"], [f"{noise:.2f}\nε {epsilon:.2g}" for noise, epsilon in ticks])
    axis.set(xlabel="total noise 1/η, and ε of the full run", ylabel="test accuracy")
    axis.set_title(f"(a) test accuracy against total noise{name}")
    axis.legend(bbox_to_anchor=(0.5, -0.26), **_BELOW)


def _searched(axis: Axes, rows: pd.DataFrame, name: str) -> None:
    """Draws panel (b)."""
    search = rows[rows["stage"] == "search"]
    for (copies, steps), line, look in _lines(search, ["multiplicity", "num_steps"]):
        label = f"{copies:g} cop{'y' if copies == 1 else 'ies'}, {steps:g} steps"
        _errorbar(axis, line["learning_rate"], line, label=label, **look)
    best = search[search["chosen"].astype(bool)].iloc[0]
    ring: dict[str, Any] = {"facecolors": "none", "edgecolors": "#D55E00", "linewidths": 1.2, "s": 90, "zorder": 5}
    axis.scatter(best["learning_rate"], best["accuracy_mean"], label="chosen", **ring)
    rates = sorted(search["learning_rate"].unique())
    axis.set_xscale("log")
    axis.minorticks_off()
    axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axis.set(xlabel="learning rate", ylabel="validation accuracy")
    ratio, size = tan_table.compute_saved(rows), best["batch_size"]
    axis.set_title(f"(b) search at batch {size:,.0f}, {ratio:.0f} times fewer gradients{name}")
    axis.legend(bbox_to_anchor=(0.5, -0.2), **_BELOW)


def _lines(rows: pd.DataFrame, by: str | list[str]) -> Iterable[tuple[Any, pd.DataFrame, dict[str, Any]]]:
    """The lines of a panel: what names each, its rows, and its look."""
    for place, (key, line) in enumerate(rows.groupby(by)):
        look = {"color": _COLORS[place % len(_COLORS)], "marker": _MARKERS[place % len(_MARKERS)]}
        yield key, line, look


def _errorbar(axis: Axes, x: pd.Series, rows: pd.DataFrame, **look: Any) -> None:
    """Draws means over runs in the order of x, with their standard deviations as bars."""
    order = x.argsort()
    spread = rows["accuracy_std"].fillna(0.0).iloc[order]
    axis.errorbar(
        x.iloc[order], rows["accuracy_mean"].iloc[order], yerr=spread, elinewidth=0.6, capsize=1.5, capthick=0.6, **look
    )
