"""Figures of comparisons: bounds and AUROC by start, by number of canaries, from model to model, by cost."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from metacanary import comparison_table, figure_style, table_formats, tables
from metacanary.figure_style import DOTS, GREY, HOLLOW, TWO_COLUMNS

_ROW = 2.0  # inches, of two panels
_LEGEND = 0.9
_X_LABELS = {"start": "start", "num_canaries": "number of canaries", "cost": "minutes of optimisation"}
_QUANTITIES = {"epsilon": "empirical ε", "auroc": "AUROC"}


@figure_style.styled
def figure(table: pd.DataFrame) -> Figure:
    """Draws a comparison.

    Args:
      table: From `comparison_table.collect`.

    Returns:
      By model: a matrix of mean ε and one of mean AUROC for each data set, canary kinds as rows and trainings as
      columns, with a frame where both have the same model, a broken one where not the same recipe. Otherwise a row of
      two panels for each data set, training and target epsilon, ε and AUROC: means over runs, their 95% t intervals as
      bars, and hollow markers for the bound of all runs at once; ceilings of single runs as a line where that leaves
      the data readable, named at the upper edge otherwise.

    Raises:
      ValueError: For a table without rows, or of more than one comparison.
    """
    if table["by"].nunique() != 1:
        raise ValueError(f"table: got {len(table)} rows of {table['by'].nunique()} comparisons, expected those of one")
    return _matrices(table) if table["by"].iloc[0] == "model" else _panels(table)


def _panels(table: pd.DataFrame) -> Figure:
    """Draws a row of two panels for each cell."""
    cells = [rows for _, rows in table.groupby(tables.SETTING, sort=False)]
    drawn = Figure(figsize=(TWO_COLUMNS, _ROW * len(cells) + _LEGEND), layout="constrained")
    axes = drawn.subplots(len(cells), 2, squeeze=False)
    looks = _looks(table)
    for pair, rows in zip(axes, cells, strict=True):
        places = _places(rows)
        for axis, quantity in zip(pair, _QUANTITIES, strict=True):
            for key, line in rows.groupby(_line_key(rows), sort=False):
                _draw_line(axis, places.loc[line.index], line, quantity, looks[str(key)])
            axis.set(title=_cell_name(rows), ylabel=_QUANTITIES[quantity])
            _name_places(axis, rows, places)
        _ceiling(pair[0], rows, places)
        pair[1].axhline(0.5, color=GREY, linewidth=0.9, linestyle=DOTS, zorder=1)
        low, high = pair[1].get_ylim()
        pair[1].set_ylim(max(low, -0.02), min(high, 1.02))  # intervals may go on to what no AUROC can be
        if table["by"].iloc[0] == "cost":
            _name_audit(pair[0], rows)
    handles = [Line2D([], [], label=name, markeredgewidth=0, **look) for name, look in looks.items()]
    handles.append(Line2D([], [], color="black", marker="o", label="all runs pooled", **HOLLOW))
    ncols = max(1, min(len(handles), 122 // (max(len(str(handle.get_label())) for handle in handles) + 8)))
    legend = drawn.legend(handles=handles, loc="outside lower center", ncols=ncols, title=_shared(table))
    legend.get_title().set_multialignment("center")
    return drawn


def _line_key(rows: pd.DataFrame) -> str:
    """The column that tells lines apart: costs have a look for each kind."""
    return "canary" if rows["by"].iloc[0] == "cost" else "line"


def _looks(table: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """The look of each line, families as canary kinds of their name; points of different kinds are not joined."""
    names = list(table[_line_key(table)].unique())
    looks = {name: figure_style.look(names)[name] for name in names}
    joined = table["by"].iloc[0] == "num_canaries"
    return looks if joined else {name: look | {"linestyle": "none"} for name, look in looks.items()}


def _places(rows: pd.DataFrame) -> pd.Series:
    """Where each row stands: at its start, lines side by side, at its number, or at its cost in minutes."""
    if rows["by"].iloc[0] == "num_canaries":
        return rows["value"].astype(float)
    if rows["by"].iloc[0] == "cost":
        return rows["optimization_seconds"] / 60
    values, lines = list(rows["value"].unique()), list(rows["line"].unique())
    beside = 0.36 * (np.arange(len(lines)) - (len(lines) - 1) / 2)
    placed = [values.index(v) + beside[lines.index(k)] for v, k in zip(rows["value"], rows["line"], strict=True)]
    return pd.Series(placed, rows.index)


def _draw_line(axis: Axes, places: pd.Series, line: pd.DataFrame, quantity: str, look: dict[str, Any]) -> None:
    """Draws means with intervals, joined if the line is, and the bounds of all runs beside them."""
    if look["linestyle"] != "none":
        axis.plot(places, line[f"{quantity}_mean"], **look | {"marker": "none"})
    for x, (_, row) in zip(places, line.iterrows(), strict=True):
        mean = row[[f"{quantity}_{name}" for name in ("mean", "low", "high")]].set_axis(["mean", "low", "high"])
        figure_style.point(axis, x, mean.astype(float), **look)
    if quantity == "epsilon":
        hollow = look | HOLLOW | {"zorder": 1.9}
        if look["linestyle"] == "none":
            hollow |= {"linestyle": "none"}
        beside = 0.1 if line["by"].iloc[0] == "start" else 0.0
        axis.plot(places + beside, line["epsilon_pooled"], **hollow)


def _name_places(axis: Axes, rows: pd.DataFrame, places: pd.Series) -> None:
    """Scales and ticks the axis."""
    by = rows["by"].iloc[0]
    axis.set_xlabel(_X_LABELS[by])
    if by == "start":
        values = list(rows["value"].unique())
        axis.set_xticks(range(len(values)), values)
        axis.set_xlim(-0.6, len(values) - 0.4)
    elif by == "num_canaries":
        axis.set_xscale("log")
        axis.minorticks_off()
        ticks = sorted(places.unique())
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    else:
        axis.margins(x=0.08)


def _ceiling(axis: Axes, rows: pd.DataFrame, places: pd.Series) -> None:
    """Draws or names the ceiling of one run, a line over the numbers of canaries if it depends on them."""
    top = max(axis.dataLim.y1, 0.1)
    ceilings = pd.Series(rows["ceiling"].to_numpy(), places).groupby(level=0).max()
    low, high = ceilings.min(), ceilings.max()
    varies = high - low > 0.005
    name = f"ceiling of one run, {low:.2f} to {high:.2f}" if varies else f"ceiling of one run, {high:.2f}"
    near, limit = bool(low <= 2 * top), 2 * top
    if near and varies:
        axis.plot(ceilings.index, ceilings, color=GREY, linewidth=0.9, linestyle=(0, (5, 2)), zorder=1, label=name)
    elif near:
        axis.axhline(high, color=GREY, linewidth=0.9, linestyle=(0, (5, 2)), zorder=1, label=name)
    highest = max(top, min(high, limit) if near else 0.0)
    axis.set_ylim(-0.06 * highest, 1.22 * highest)
    text = name if high <= limit else f"↑ {name}"
    figure_style.remark(axis, text, at=(0, 1), offset=(2, -8), system="axes fraction")


def _name_audit(axis: Axes, rows: pd.DataFrame) -> None:
    """Names what the audits cost, beside which optimisation is seen."""
    minutes = rows["audit_seconds"] / 60
    text = f"audit of a kind: {minutes.mean():.1f} minutes"
    figure_style.remark(axis, text, at=(0, 1), offset=(2, -17), system="axes fraction")


def _matrices(table: pd.DataFrame) -> Figure:
    """Draws a matrix of each quantity for each data set."""
    datasets = list(table["dataset"].unique())
    num_kinds = table["canary"].nunique()
    height = 2 * len(datasets) * (0.32 * num_kinds + 0.4) + 0.9
    drawn = Figure(figsize=(TWO_COLUMNS, height), layout="constrained")
    axes = drawn.subplots(2 * len(datasets), 1, squeeze=False)[:, 0]
    columns = comparison_table.column_names(table)
    for number, axis in enumerate(axes):
        dataset, quantity = datasets[number // 2], list(_QUANTITIES)[number % 2]
        rows = table[table["dataset"] == dataset]
        name = f", {dataset}" if len(datasets) > 1 else ""
        axis.set_title(f"({'abcdefghijklmnopqrstuvwxyz'[number]}) {_QUANTITIES[quantity]}, mean over runs{name}")
        _matrix(drawn, axis, rows, quantity)
        axis.set_xticks(range(len(columns)), columns if number % 2 else [""] * len(columns))
    axes[-1].set_xlabel(
        f"audited training and model; framed: the metamodel's own, solid: and its recipe\n{_shared(table)}"
    )
    return drawn


def _matrix(drawn: Figure, axis: Axes, rows: pd.DataFrame, quantity: str) -> None:
    """Draws one matrix with its numbers."""
    kinds = list(rows["canary"].unique())
    values = np.array([rows.loc[rows["canary"] == kind, f"{quantity}_mean"] for kind in kinds])
    lowest = 0.5 if quantity == "auroc" else 0.0
    image = axis.imshow(values, aspect="auto", cmap="cividis", vmin=lowest, vmax=max(values.max(), lowest + 0.01))
    for row, kind in enumerate(kinds):
        own = rows.loc[rows["canary"] == kind, ["own_model", "own_recipe"]].astype(bool).to_numpy()
        for column, value in enumerate(values[row]):
            dark = value < np.mean(image.get_clim())
            text = f"{value:.2f}" if quantity == "epsilon" else f"{value:.3f}"
            axis.text(column, row, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
            is_model, is_recipe = own[column]
            if is_model:
                box: dict[str, Any] = {"fill": False, "edgecolor": "#D55E00", "linewidth": 1.6, "zorder": 3}
                box |= {} if is_recipe else {"linestyle": (0, (4, 2))}
                axis.add_patch(Rectangle((column - 0.47, row - 0.44), 0.94, 0.88, **box))
    through = comparison_table.row_names(rows)
    names = [kind if pd.isna(through[kind]) else f"{kind}\n{through[kind]}" for kind in kinds]
    axis.set_yticks(range(len(kinds)), names)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    drawn.colorbar(image, ax=axis, pad=0.01, fraction=0.03).outline.set_visible(False)


def _cell_name(rows: pd.DataFrame) -> str:
    """Names the training of a row of panels."""
    first = rows.iloc[0]
    return f"{first['training']}, {'no DP' if np.isinf(first['epsilon']) else f'target ε = {first.epsilon:g}'}"


def _shared(table: pd.DataFrame) -> str:
    """Names what all rows share."""
    first, runs = table.iloc[0], sorted(table["num_runs"].unique())
    count = f"{runs[0]} runs each" if len(runs) == 1 else f"{runs[0]} to {runs[-1]} runs each"
    auditor = table_formats.AUDITORS.get(first["auditor"], first["auditor"])
    datasets = " and ".join(table["dataset"].unique())
    return f"{datasets}, {count}; {auditor}, {first['protocol']} protocol"
