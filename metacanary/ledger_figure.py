"""The figure of the ledger of epsilon: claims as rungs from accountants down to canary kinds, and what lies between."""

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from metacanary import figure_style, ledger, table_formats, tables
from metacanary.figure_style import GREY, TWO_COLUMNS

_RUNG = 0.3  # inches
_FRAME = 1.75  # of titles, axis and legend
_TOP_RUNGS = (ledger.RDP, ledger.PLD, ledger.HEURISTIC, ledger.ALL_ITERATES, ledger.LAST_ITERATE)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
# Okabe and Ito's colours.
_COLORS = {
    ledger.ACCOUNTING: "#56B4E9",
    ledger.ESTIMATOR: "#E69F00",
    ledger.HIDDEN: "#009E73",
    ledger.BLACK_BOX: "#D55E00",
    ledger.CANARY: "#CC79A7",
}
_MEANINGS = {ledger.BLACK_BOX: "black box (threat model, canary, score)", ledger.CANARY: "canary (kind against kind)"}


@figure_style.styled
def figure(table: pd.DataFrame) -> Figure:
    """Draws the ledger.

    Args:
      table: From `ledger.collect`.

    Returns:
      A panel for each dataset, training and target epsilon, two beside each other. Rungs from above: accountants, the
      heuristic, Dirac canaries, then canary kinds in the order of the first panel, with a marker for each score. Means
      with 95% intervals; hollow, the bounds of all runs at once; a tick at the ceiling of one run, named where it is
      beyond the panel. A bar leads from the best mean of a rung to what its gap is measured from, in the colour of the
      gap's owner.

    Raises:
      ValueError: For a table without rows.
    """
    if table.empty:
        raise ValueError("table: got no rows, expected some")
    cells = [rows for _, rows in table.groupby(tables.SETTING, sort=False)]
    columns = min(2, len(cells))
    lines = -(-len(cells) // columns)
    kinds = list(dict.fromkeys(kind for rows in cells for kind in _black_box(rows)["canary"]))
    scores = sorted(set(pd.concat(map(_black_box, cells))["score"]))
    rungs = [*_TOP_RUNGS, *kinds]
    size = (TWO_COLUMNS, lines * (_RUNG * len(rungs) + 0.5) + _FRAME - 0.5)
    drawn = Figure(figsize=size, layout="constrained")
    axes = drawn.subplots(lines, columns, squeeze=False, sharey=True)
    for axis, rows in zip(axes.flat, cells, strict=False):
        _draw(axis, rows, rungs, scores)
    for axis in axes.flat[len(cells) :]:
        axis.set_axis_off()
    _legend(drawn, table, scores)
    return drawn


def _black_box(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of canary kinds."""
    return rows[~rows["claim"].isin(_TOP_RUNGS)]


def _draw(axis: Axes, rows: pd.DataFrame, rungs: list[str], scores: list[str]) -> None:
    """Draws one cell."""
    by_claim = rows.set_index("claim")
    limit = 1.04 * max(rows[["epsilon_mean", "epsilon_high", "epsilon_pooled"]].max())
    for place, rung in enumerate(rungs):
        own = rows[rows["claim"] == rung] if rung in _TOP_RUNGS else rows[rows["canary"] == rung]
        if own.empty:
            continue
        _bar(axis, place, own.iloc[0], by_claim)
        for _, row in own.iterrows():
            offset = _offset(scores.index(row["score"]), len(scores)) if rung not in _TOP_RUNGS else 0.0
            marker = "d" if rung in _TOP_RUNGS else _MARKERS[scores.index(row["score"]) % len(_MARKERS)]
            _point(axis, place + offset, row, marker)
        ceiling = own["ceiling"].max()
        if ceiling <= limit:
            axis.plot([ceiling, ceiling], [place - 0.36, place + 0.36], color=GREY, linewidth=0.9)
    if (highest := rows["ceiling"].max()) > limit:
        text = f"ceiling of one run: {highest:.2f} →"
        figure_style.remark(axis, text, at=(1, 0), offset=(-2, 3), system="axes fraction")
    axis.set_yticks(range(len(rungs)), rungs)
    axis.set(ylim=(len(rungs) - 0.4, -0.6), xlim=(-0.03 * limit, limit), xlabel="ε", title=_name(rows))
    axis.axhline(2.5, color=GREY, linewidth=0.5, linestyle=figure_style.DOTS)
    axis.axhline(4.5, color=GREY, linewidth=0.5, linestyle=figure_style.DOTS)
    axis.tick_params(axis="y", length=0)


def _bar(axis: Axes, place: float, row: pd.Series, by_claim: pd.DataFrame) -> None:
    """Draws the gap of a rung's best row."""
    if pd.isna(row["compared_with"]):
        return
    start = row["epsilon_mean"]
    width = by_claim.loc[row["compared_with"], "epsilon_mean"] - start
    axis.barh(place, width, left=start, height=0.72, color=_COLORS[row["owner"]], alpha=0.3, linewidth=0, zorder=1)


def _point(axis: Axes, place: float, row: pd.Series, marker: str) -> None:
    """Draws a mean with its interval, and hollow the bound of all runs if the row is one."""
    if pd.notna(row["epsilon_low"]):
        half = row["epsilon_high"] - row["epsilon_mean"]
        axis.errorbar([row["epsilon_mean"]], [place], xerr=half, fmt="none", ecolor="black", elinewidth=0.8, zorder=2)
    look: dict[str, Any] = {"linestyle": "none", "marker": marker, "color": "black"}
    axis.plot([row["epsilon_mean"]], [place], markersize=3.6, markeredgewidth=0, zorder=3, **look)
    if pd.notna(row["auditor"]):
        hollow: dict[str, Any] = {"markersize": 4.4, "markerfacecolor": "white", "markeredgewidth": 0.7}
        axis.plot([row["epsilon_pooled"]], [place], zorder=2.5, **hollow, **look)


def _offset(place: int, number: int) -> float:
    """Where a score's marker stands within its rung."""
    return 0.56 * ((place + 0.5) / number - 0.5)


def _name(rows: pd.DataFrame) -> str:
    """Names a cell."""
    first = rows.iloc[0]
    return f"{first['dataset']}, {first['training']}, target ε = {first['epsilon']:g}"


def _legend(drawn: Figure, table: pd.DataFrame, scores: list[str]) -> None:
    """Explains colours, markers, and what all panels share."""
    owners = [owner for owner in _COLORS if owner in set(table["owner"])]
    handles: list[Any] = [Patch(color=_COLORS[o], alpha=0.3, linewidth=0, label=_MEANINGS.get(o, o)) for o in owners]
    black: dict[str, Any] = {"linestyle": "none", "color": "black", "markersize": 4}
    for number, score in enumerate(scores):
        handles.append(Line2D([], [], marker=_MARKERS[number % len(_MARKERS)], label=score, **black))
    handles.append(Line2D([], [], marker="o", markerfacecolor="white", label="all runs pooled", **black))
    handles.append(Line2D([], [], marker="|", color=GREY, linestyle="none", markersize=7, label="ceiling of one run"))
    first = table[table["auditor"].notna()].iloc[0]
    auditor = table_formats.AUDITORS.get(first["auditor"], first["auditor"])
    title = "means over runs, lines: 95% t intervals; coloured bars: gap to a rung above, by owner\n"
    title += f"{auditor}, {first['protocol']} protocol"
    legend = drawn.legend(handles=handles, loc="outside lower center", ncols=3, title=title)
    legend.get_title().set_multialignment("center")
