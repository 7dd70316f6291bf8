"""The figure of test accuracy against the target epsilon, a line per recipe."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from metacanary import figures

# Okabe and Ito's colours.
_COLORS = ("#000000", "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7")
# Of another number than the colours, with no divisor in common, so that 63 trainings differ.
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
_DASHES = ("--", "-.", ":")
_HEIGHT = 2.9  # inches
_APART = 1.025  # from a line to the next, so that their bars do not cover each other


def figure(table: pd.DataFrame) -> Figure:
    """Draws mean accuracy and its 95% interval against the target epsilon.

    Args:
      table: From `accuracy_table.collect`.

    Returns:
      A panel per dataset: a line for each training with finite targets, each a little beside the next; a training
      without privacy is a horizontal line with its interval as a band. Up to 63 trainings with and 21 without privacy
      all look different.

    Raises:
      ValueError: For a table without rows.
    """
    if table.empty:
        raise ValueError("table: got no rows, expected some")
    with figures.style():
        datasets = list(table["dataset"].unique())
        width = figures.TWO_COLUMNS if len(datasets) > 1 else 1.35 * figures.ONE_COLUMN
        drawn = Figure(figsize=(width, _HEIGHT), layout="constrained")
        for axis, dataset in zip(drawn.subplots(1, len(datasets), squeeze=False)[0], datasets, strict=True):
            rows = table[table["dataset"] == dataset]
            names = list(rows["training"].unique())
            for place, name in enumerate(names):
                line = rows[rows["training"] == name].sort_values("epsilon")
                look: dict[str, Any] = {"color": _COLORS[place % len(_COLORS)], "label": name}
                private, other = line[np.isfinite(line["epsilon"])], line[np.isinf(line["epsilon"])]
                beside = _APART ** (place - (len(names) - 1) / 2)
                if len(private):
                    half = (private["accuracy_high"] - private["accuracy_mean"]).fillna(0.0)
                    marker = {"marker": _MARKERS[place % len(_MARKERS)], "elinewidth": 0.6, "capsize": 1.5}
                    axis.errorbar(private["epsilon"] * beside, private["accuracy_mean"], yerr=half, **marker, **look)
                for _, one in other.iterrows():
                    dashes = _DASHES[place // len(_COLORS) % len(_DASHES)]
                    axis.axhline(one["accuracy_mean"], linestyle=dashes, linewidth=0.9, **look)
                    if np.isfinite(one["accuracy_low"]):
                        band = {"color": look["color"], "alpha": 0.12, "linewidth": 0}
                        axis.axhspan(one["accuracy_low"], one["accuracy_high"], **band)
            ticks = sorted(rows.loc[np.isfinite(rows["epsilon"]), "epsilon"].unique())
            axis.set_xscale("log")
            axis.minorticks_off()
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.set(xlabel="target ε", ylabel="test accuracy", title=dataset)
        drawn.legend(*axis.get_legend_handles_labels(), loc="outside right center")
    return drawn
