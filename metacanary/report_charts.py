"""The charts of the report page, as Vega-Lite specifications by Altair.

Each is one view as wide as its container; legends are the page's. Colours, markers and dashes of canary kinds are those
of `figures.look`. Colours of text and axes are left to the page, which has a light and a dark theme.
"""

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

Spec = dict[str, Any]
Looks = Mapping[str, Mapping[str, Any]]

# Paths in a square of side 2 around (0, 0), by matplotlib's names, for Vega and for the page's own legend.
SHAPES = {
    "o": "M-0.9,0A0.9,0.9,0,1,0,0.9,0A0.9,0.9,0,1,0,-0.9,0Z",
    "s": "M-0.8,-0.8H0.8V0.8H-0.8Z",
    "^": "M0,-1L1,0.8H-1Z",
    "D": "M0,-1.1L1.1,0L0,1.1L-1.1,0Z",
    "v": "M0,1L1,-0.8H-1Z",
    "P": "M-0.35,-1H0.35V-0.35H1V0.35H0.35V1H-0.35V0.35H-1V-0.35H-0.35Z",
    "X": "M-1,-0.5L-0.5,-1L0,-0.5L0.5,-1L1,-0.5L0.5,0L1,0.5L0.5,1L0,0.5L-0.5,1L-1,0.5L-0.5,0Z",
    "<": "M-1,0L0.8,-1V1Z",
    ">": "M1,0L-0.8,-1V1Z",
}
_DIGITS = 6  # significant ones of the numbers that are drawn
_TICK = 26  # pixels: the width of a ceiling's mark


def glyph(look: Mapping[str, Any]) -> str:
    """Draws a kind's line and marker as SVG, for legends and tables; it is hidden from screen readers."""
    dashes = " ".join(f"{length:g}" for length in _dashes(look))
    line = f'<path d="M0,6H30" stroke="{_paint(look)}" stroke-width="2" stroke-dasharray="{dashes}" fill="none"/>'
    marker = f'<path d="{SHAPES[look["marker"]]}" transform="translate(15,6) scale(4.2)" fill="{_paint(look)}"/>'
    return f'<svg class="glyph" viewBox="0 0 30 12" width="30" height="12" aria-hidden="true">{line}{marker}</svg>'


def histogram(
    bins: pd.DataFrame, look: Mapping[str, Any], *, score: str, top: float, labels: tuple[str, str], description: str
) -> Spec:
    """Draws the scores of a cell's canaries: bars of those in the training, an outline of those that were not.

    Args:
      bins: Of `report_data.histograms`, one cell.
      look: Of its kind.
      score: Names the axis.
      top: Upper end of the axis of shares.
      labels: What the bars and the outline are, in tooltips.
      description: For those who do not see it.
    """
    rows = bins[["low", "high", "share_in", "share_out", "num_in", "num_out"]]
    # A line that changes at the left edge of a bin needs an end after the last.
    rows = pd.concat([rows, pd.DataFrame({"low": [rows["high"].iloc[-1]], "high": [np.nan], "share_out": [0.0]})])
    x = alt.X("low:Q", bin=alt.BinParams(binned=True), title=score.replace("_", " "), axis=alt.Axis(tickCount=6))
    y: dict[str, Any] = {"scale": alt.Scale(domain=[0, top]), "axis": alt.Axis(format="%", tickCount=4)}
    base = alt.Chart(_rounded(rows))
    inside = alt.datum.high > alt.datum.low
    tooltip = [
        alt.Tooltip("low:Q", title="from", format=".2f"),
        alt.Tooltip("high:Q", title="to", format=".2f"),
        *(
            alt.Tooltip(f"{column}_{side}:Q", title=f"{word} {label}", format=form)
            for side, label in zip(("in", "out"), labels, strict=True)
            for column, word, form in (("share", "share", ".1%"), ("num", "number", ",d"))
        ),
    ]
    bars = base.mark_bar(color=look["color"], style="inside", binSpacing=0.5).encode(
        x=x, x2="high:Q", y=alt.Y("share_in:Q", title="share of canaries", **y)
    )
    outline = base.mark_line(interpolate="step-after", strokeWidth=1.8, style="outline").encode(
        x="low:Q", y=alt.Y("share_out:Q", **y)
    )
    hover = base.mark_bar(opacity=0, binSpacing=0).encode(
        x=x, x2="high:Q", y=alt.Y(datum=top), y2=alt.YDatum(0), tooltip=tooltip
    )
    return _spec(
        [bars.transform_filter(inside), outline, hover.transform_filter(inside)], height=150, description=description
    )


def roc(points: pd.DataFrame, looks: Looks, *, marks: Sequence[float], num_out: int, description: str) -> Spec:
    """Draws ROC curves of a setting on log axes.

    Args:
      points: Of `report_data.roc_curves`, one setting.
      looks: Of all kinds.
      marks: False positive rates with a line.
      num_out: Canaries that were not in; rates below its inverse are shaded.
      description: For those who do not see it.

    Guarantees:
      Nothing is left out that a log axis has no place for: no false positives stand at its left end, and no true
      positives at its lower end.
    """
    least = min(0.6 / num_out, 0.7 * min(marks))
    drawn = points.assign(drawn_fpr=points["fpr"].clip(lower=least), drawn_tpr=points["tpr"].clip(lower=least))
    axis: dict[str, Any] = {"scale": alt.Scale(type="log", domain=[least, 1], nice=False)}
    ticks = alt.Axis(values=[10.0**power for power in range(int(np.ceil(np.log10(least))), 1)], format="~%")
    x = alt.X("drawn_fpr:Q", title="false positive rate", axis=ticks, **axis)
    y = alt.Y("drawn_tpr:Q", title="true positive rate", axis=ticks, **axis)
    kinds = _kinds(points["canary"], looks)
    chance = _rows(drawn_fpr=[least, 1], drawn_tpr=[least, 1]).mark_line(style="reference").encode(x=x, y=y)
    resolved = alt.Chart(_frame(start=[least], end=[1 / num_out])).mark_rect(style="shade")
    lines = _rows(fpr=list(marks), name=[f"{fpr:.3g}" for fpr in marks]).mark_rule(style="mark")
    base = alt.Chart(_rounded(drawn))
    curves = base.mark_line(interpolate="step-after", strokeWidth=2, strokeCap="butt").encode(
        x=x, y=y, color=_color(kinds, looks), strokeDash=_dash(kinds, looks)
    )
    hover = base.mark_circle(size=80, opacity=0).encode(
        x=x,
        y=y,
        tooltip=[
            alt.Tooltip("canary:N", title="canaries"),
            alt.Tooltip("fpr:Q", title="false positives", format=".3%"),
            alt.Tooltip("tpr:Q", title="true positives", format=".2%"),
        ],
    )
    shade = resolved.encode(x=alt.X("start:Q", **axis), x2="end:Q")
    return _spec([shade, lines.encode(x="fpr:Q"), chance, curves, hover], height=320, description=description)


def accounted(rows: pd.DataFrame, looks: Looks, *, description: str) -> Spec:
    """Draws audited against accounted epsilon, with the line on which they are equal.

    Args:
      rows: Of `report_data.by_accounted`, of one data set; trainings without privacy stand at the right.
      looks: Of all kinds.
      description: For those who do not see it.

    Returns:
      Filled markers with bars are means over runs with their intervals, hollow ones the bound of all runs at once;
      ticks are ceilings. Kinds of one training and epsilon stand beside each other.
    """
    finite = rows["epsilon_accounted"][np.isfinite(rows["epsilon_accounted"])]
    right = float(finite.max()) if len(finite) else 1.0
    without = 1.32 * right
    spread = _side_by_side(rows, width=0.045 * without)
    drawn = rows.assign(
        x=rows["epsilon_accounted"].where(np.isfinite(rows["epsilon_accounted"]), without) + spread,
        accounted=[f"{value:.2f}" if np.isfinite(value) else "∞, no DP" for value in rows["epsilon_accounted"]],
    )
    least = min(0.0, float(drawn["low"].min())) if drawn["low"].notna().any() else 0.0
    top = 1.06 * max(right if len(finite) else 0.0, float(drawn[["ceiling_pooled", "ceiling", "high"]].max().max()))
    axis = alt.Axis(
        values=[*_ticks(right if len(finite) else 0.0), without],
        labelExpr=f"datum.value > {1.1 * right} ? '∞ (no DP)' : datum.label",
    )
    x = alt.X("x:Q", title="accounted ε", scale=alt.Scale(domain=[0, 1.12 * without], nice=False), axis=axis)
    y_scale = alt.Scale(domain=[least, top], nice=False)
    kinds = _kinds(rows["canary"], looks)
    color, shape = _color(kinds, looks), _shape(kinds, looks)
    base = alt.Chart(_rounded(drawn.drop(columns=["epsilon", "epsilon_accounted"])))
    named = [("mean", "mean over runs"), ("low", "interval from"), ("high", "to"), ("pooled", "all runs at once")]
    named += [("ceiling", "ceiling of a run"), ("ceiling_pooled", "ceiling of all")]
    tooltip = [
        *(alt.Tooltip(f"{name}:N", title=title) for name, title in (("canary", "canaries"), ("training", "training"))),
        *(
            alt.Tooltip("step:Q"),
            alt.Tooltip("num_runs:Q", title="runs"),
            alt.Tooltip("accounted:N", title="accounted"),
        ),
        *(alt.Tooltip(f"{name}:Q", title=title, format=".2f") for name, title in named),
    ]

    def y(column: str) -> alt.Y:
        return alt.Y(f"{column}:Q", title="audited ε, lower bound", scale=y_scale)

    ceiling: dict[str, Any] = {"style": "ceiling", "orient": "horizontal", "size": _TICK, "opacity": 1}
    layers: list[Any] = []
    if len(finite):
        diagonal = _rows(x=[0, right * 1.08], y=[0, right * 1.08])
        layers.append(diagonal.mark_line(style="reference", clip=True).encode(x=x, y=y("y")))
    layers += [
        base.mark_tick(thickness=1, **ceiling).encode(x=x, y=y("ceiling")),
        base.mark_tick(thickness=3, **ceiling).encode(x=x, y=y("ceiling_pooled")),
        base.mark_rule(strokeWidth=1.6).encode(x=x, y=y("low"), y2="high:Q", color=color),
        base.mark_point(filled=True, size=100, opacity=1).encode(
            x=x, y=y("mean"), color=color, shape=shape, tooltip=tooltip
        ),
        base.mark_point(filled=False, size=130, strokeWidth=1.6, opacity=1).encode(
            x=x, y=y("pooled"), color=color, shape=shape, tooltip=tooltip
        ),
    ]
    return _spec(layers, height=340, description=description)


def cost(rows: pd.DataFrame, *, column: str, title: str, tooltip: Mapping[str, str], description: str) -> Spec:
    """Draws what the jobs of each rule took, as bars.

    Args:
      rows: Of `job_costs.by_rule`.
      column: What is drawn.
      title: Of the axis, with the unit.
      tooltip: Names of columns, and how each is called.
      description: For those who do not see it.
    """
    order = rows.sort_values([column, "rule"], ascending=[False, True])["rule"].tolist()
    named = [alt.Tooltip(f"{name}:Q", title=called, format=",.4~r") for name, called in tooltip.items()]
    bars = alt.Chart(_rounded(rows)).mark_bar(style="cost", height=alt.RelativeBandSize(band=0.7))
    encoded = bars.encode(
        x=alt.X(f"{column}:Q", title=title, axis=alt.Axis(tickCount=5)),
        y=alt.Y("rule:N", title=None, sort=order, axis=alt.Axis(labelLimit=220, ticks=False, domain=False)),
        tooltip=["rule:N", *named],
    )
    return _spec([encoded], height=24 * len(rows) + 10, description=description)


def _spec(layers: Sequence[Any], *, height: int, description: str) -> Spec:
    """Puts layers into one view; the schema's address is left out, as the page asks for nothing outside itself."""
    chart = alt.layer(*layers) if len(layers) > 1 else layers[0]
    with alt.data_transformers.disable_max_rows():
        spec = chart.properties(width="container", height=height, description=description).to_dict()
    # Altair's own theme would stand between the chart and the page's.
    return {name: value for name, value in spec.items() if name not in ("$schema", "config")}


def embedded(spec: Spec) -> str:
    """Writes a specification so that it may stand in an HTML script element."""
    text = json.dumps(spec, separators=(",", ":"), ensure_ascii=False, sort_keys=True, allow_nan=False)
    return text.replace("<", "\\u003c")


def _frame(**columns: Sequence[Any]) -> pd.DataFrame:
    """A small table of its own for a reference line."""
    return pd.DataFrame(columns)


def _rows(**columns: Sequence[Any]) -> alt.Chart:
    """A chart of such a table."""
    return alt.Chart(_frame(**columns))


def _rounded(rows: pd.DataFrame) -> pd.DataFrame:
    """Keeps the digits that can be seen, so that the page stays small."""
    numbers = rows.select_dtypes("float")
    rounded = numbers.map(lambda value: float(f"{value:.{_DIGITS}g}"))
    return rows.assign(**{str(name): rounded[name] for name in numbers})


def _kinds(found: pd.Series, looks: Looks) -> list[str]:
    """Lists the kinds that are drawn, in the order of their looks."""
    present = set(found)
    return [kind for kind in looks if kind in present]


def _color(kinds: Sequence[str], looks: Looks) -> alt.Color:
    scale = alt.Scale(domain=list(kinds), range=[looks[kind]["color"] for kind in kinds])
    return alt.Color("canary:N", scale=scale, legend=None)


def _shape(kinds: Sequence[str], looks: Looks) -> alt.Shape:
    scale = alt.Scale(domain=list(kinds), range=[SHAPES[looks[kind]["marker"]] for kind in kinds])
    return alt.Shape("canary:N", scale=scale, legend=None)


def _dash(kinds: Sequence[str], looks: Looks) -> alt.StrokeDash:
    scale = alt.Scale(domain=list(kinds), range=[_dashes(looks[kind]) for kind in kinds])
    return alt.StrokeDash("canary:N", scale=scale, legend=None)


def _dashes(look: Mapping[str, Any]) -> list[float]:
    """Turns matplotlib's dash pattern, in widths of the line, into pixels of a line two wide."""
    pattern = look["linestyle"]
    return [1.0, 0.0] if isinstance(pattern, str) else [2.0 * length for length in pattern[1]]


def _paint(look: Mapping[str, Any]) -> str:
    """A colour that shows on both themes: black is the colour of the text."""
    return "currentColor" if look["color"] == "#000000" else html.escape(str(look["color"]))


def _side_by_side(rows: pd.DataFrame, *, width: float) -> np.ndarray:
    """Shifts [rows] that set the cells of one accounted epsilon apart, around it."""
    series = list(dict.fromkeys(zip(rows["training"], rows["canary"], strict=True)))
    order = np.array([series.index(key) for key in zip(rows["training"], rows["canary"], strict=True)])
    at = rows["epsilon_accounted"].round(6).to_numpy()
    shifts = np.empty(len(rows))
    for value in np.unique(at):
        here = np.flatnonzero(at == value)
        rank = np.argsort(np.argsort(order[here], kind="stable"), kind="stable")
        shifts[here] = (rank - (len(here) - 1) / 2) * width
    return shifts


def _ticks(right: float) -> list[float]:
    """Places about five round ticks from 0 on."""
    if right <= 0:
        return []
    steps = 10.0 ** np.floor(np.log10(right / 5)) * np.array([1, 2, 5, 10])
    step = float(steps[np.searchsorted(steps, right / 5)])
    return [round(step * place, 10) for place in range(int(1.05 * right / step) + 1)]
