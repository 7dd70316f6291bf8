"""The report page: one HTML file with every audit, the canaries, their scores and what the audits cost.

It opens from disk without a network: pictures, styles, charts and their program are all inside.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
import vl_convert

from metacanary import figure_style, report_charts, report_data, report_gallery, report_table, tables
from metacanary.canaries import Canaries
from metacanary.table_formats import AUDITORS, NO_VALUE

TEMPLATES = tuple(Path(__file__).with_name(f"report_page.{suffix}") for suffix in ("html", "css", "js"))
CEILED = ("fdp_gaussian",)  # auditors whose bounds are drawn against accounted epsilon beside the chosen one's
_UNITS = ((7200.0, 3600.0, "hours"), (600.0, 60.0, "minutes"), (0.0, 1.0, "seconds"))

Pictures = Mapping[tuple[str, str], tuple[Canaries, Sequence[str]]]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the page says of the experiment, and which audits it shows first.

    Attributes:
      experiment: Its name.
      seed: The config's; those of runs derive from it.
      delta: Where epsilon is bounded.
      significance: Of each bound.
      score, auditor, protocol: Of the audits that charts and the table show first.
      provenance: Of the summary, as `store.provenance` makes it.
    """

    experiment: str
    seed: int
    delta: float
    significance: float
    score: str
    auditor: str
    protocol: str
    provenance: Mapping[str, Any]


def render(frame: pd.DataFrame, scores: pd.DataFrame, pictures: Pictures, costs: pd.DataFrame, facts: Facts) -> str:
    """Writes the page.

    Args:
      frame: summary/epsilon.csv.
      scores: Of `report_data.cell_scores`, of all cells, with the score of `facts`.
      pictures: Canaries and class names by data set and kind.
      costs: Of `job_costs.by_rule`; may be empty.
      facts: What else it says.

    Returns:
      HTML.

    Raises:
      ValueError: If the frame lacks columns, or audits of the wanted score, auditor or protocol.

    Guarantees:
      - Equal arguments give equal bytes: there is no date, path or random name in it.
      - All text from the arguments is escaped.
      - It forbids the browser, by its content security policy, to load anything.
    """
    audits = report_data.every_audit(frame)
    rows = report_table.text_rows(audits)
    chosen = report_table.filters(rows, _defaults(facts))
    looks = figure_style.look(frame["canary"].unique())
    style, program = (path.read_text(encoding="utf-8") for path in TEMPLATES[1:])
    return _template().render(
        facts=facts,
        style=style,
        program=program,
        library=_library(),
        glyphs={kind: report_charts.glyph(look) for kind, look in looks.items()},
        kinds=tables.canary_order(frame["canary"]),
        glance=list(_glance(audits, facts)),
        first=_first(audits, facts),
        columns=report_table.COLUMNS,
        shown_columns=report_table.shown(rows),
        filters=chosen,
        rows=report_table.selected(rows, chosen),
        num_rows=len(rows),
        payload=report_table.payload(rows),
        galleries=list(_galleries(scores, pictures)),
        histograms=list(_histograms(scores, looks, facts)),
        rocs=list(_rocs(scores, looks)),
        fprs=report_data.FPRS,
        accounted=list(_accounted(frame, looks, facts)),
        costs=_costs(costs),
        provenance=facts.provenance,
    )


def _defaults(facts: Facts) -> dict[str, str]:
    """What the table shows first, as its texts have it."""
    protocol = report_table.NOT_A_BOUND if facts.protocol == tables.PAPER else facts.protocol
    return {"score": facts.score, "auditor": facts.auditor, "protocol": protocol}


@functools.cache
def _library() -> str:
    """The program that draws charts: Vega, Vega-Lite and vega-embed in one."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")


def _template() -> jinja2.Template:
    """The page's template; whatever it is given is escaped unless it says otherwise."""
    loader = jinja2.FileSystemLoader(TEMPLATES[0].parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"fixed": _fixed, "setting": _setting, "embedded": report_charts.embedded}
    environment.filters |= {"words": _words, "power": _power}
    environment.globals |= {"auditor_names": AUDITORS, "infinity": np.inf}
    return environment.get_template(TEMPLATES[0].name)


def _fixed(value: float, digits: int = 2, unit: str = "") -> str:
    """Writes a number."""
    if pd.isna(value):
        return NO_VALUE
    return "∞" if value == np.inf else f"{value:,.{digits}f}{unit}".replace("-", "\N{MINUS SIGN}")


def _power(value: float) -> str:
    """Writes a power of ten as such, another number as it is."""
    exponent = round(np.log10(value)) if value > 0 else 0
    superscripts = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    return f"10{str(exponent).translate(superscripts)}" if value == float(f"1e{exponent}") else f"{value:g}"


def _words(name: str) -> str:
    """Writes a name of the config or of a column as words."""
    return name.replace("_", " ")


def _setting(named: Any) -> str:
    """Names a training and its target epsilon."""
    target = "no DP" if np.isinf(named["epsilon"]) else f"target ε = {named['epsilon']:g}"
    return f"{named['training']}, {target}"


def _named(setting: Any) -> dict[str, Any]:
    """A setting by the names of its columns."""
    return dict(zip(tables.SETTING, setting, strict=True))


def _first(audits: pd.DataFrame, facts: Facts) -> pd.DataFrame:
    """The audits that the page shows first."""
    wanted = (audits["score"] == facts.score) & (audits["auditor"] == facts.auditor)
    found = audits[wanted & (audits["protocol"] == facts.protocol)]
    if found.empty:
        raise ValueError(
            f"frame has no audit with score={facts.score!r}, auditor={facts.auditor!r} and "
            f"protocol={facts.protocol!r}, expected some"
        )
    return found


def _glance(audits: pd.DataFrame, facts: Facts) -> Iterator[dict[str, Any]]:
    """Yields the settings, each with its row of `audits` by canary kind."""
    for setting, rows in _first(audits, facts).groupby(tables.SETTING, sort=False):
        yield _named(setting) | {"cells": {row["canary"]: row for row in rows.to_dict("records")}}


def _galleries(scores: pd.DataFrame, pictures: Pictures) -> Iterator[dict[str, Any]]:
    """Yields the canaries of each data set and kind, by what they leaked in the first training they were audited in."""
    leaks = report_data.leaks(scores)
    for (dataset, kind), (canaries, class_names) in pictures.items():
        own = scores[(scores["dataset"] == dataset) & (scores["canary"] == kind)]
        if own.empty:
            continue
        setting = _named(own.iloc[0][tables.SETTING])
        is_setting = np.logical_and.reduce([leaks[name] == value for name, value in setting.items()])
        largest = float(leaks.loc[is_setting, "leak"].max())
        of_cell = leaks[is_setting & (leaks["canary"] == kind)]
        limits = report_gallery.limits(canaries.images.shape[1:], len(pictures))
        most, least = report_gallery.chosen(of_cell, *limits)
        made = [report_gallery.cards(rows, canaries, class_names, largest) for rows in (most, least)]
        yield setting | {"canary": kind, "most": made[0], "least": made[1], "num_canaries": len(of_cell)}


def _histograms(scores: pd.DataFrame, looks: report_charts.Looks, facts: Facts) -> Iterator[dict[str, Any]]:
    """Yields the settings, each with a chart for each kind on the same axes."""
    drawn = report_data.DRAWN_AS.get(facts.score, facts.score)
    quartiles = scores.groupby([*tables.CELL, "included"])["drawn"].describe().to_dict("index")
    for setting, bins in report_data.histograms(scores).groupby(tables.SETTING, sort=False):
        top = 1.05 * float(bins[["share_in", "share_out"]].max().max())
        charts = []
        for kind in tables.canary_order(bins["canary"]):
            sides = {side: quartiles[*setting, kind, side == "in"] for side in ("in", "out")}
            description = (
                f"Histogram of the {_words(drawn)} of {kind} canaries, {_setting(_named(setting))}. Median when in "
                f"{sides['in']['50%']:.2f}, when out {sides['out']['50%']:.2f}."
            )
            options: dict[str, Any] = {"score": drawn, "top": top, "labels": ("in", "out"), "description": description}
            spec = report_charts.histogram(bins[bins["canary"] == kind], looks[kind], **options)
            charts.append({"canary": kind, "spec": spec, "sides": sides})
        yield _named(setting) | {"charts": charts, "drawn": drawn}


def _rocs(scores: pd.DataFrame, looks: report_charts.Looks) -> Iterator[dict[str, Any]]:
    """Yields the settings, each with its chart and its table of rates."""
    rates = report_data.rates(scores)
    for setting, points in report_data.roc_curves(scores).groupby(tables.SETTING, sort=False):
        named = _named(setting)
        rows = rates[np.logical_and.reduce([rates[name] == value for name, value in named.items()])]
        num_out = int(rows["num_out"].max())
        description = f"ROC curves on log axes, {_setting(named)}: " + "; ".join(
            f"{row.canary}: AUROC {row.auroc:.3f}, {row[-2]:.1%} true positives at 0.1% false positives, "
            f"{row[-1]:.1%} at 1%"
            for row in rows.itertuples()
        )
        spec = report_charts.roc(points, looks, marks=report_data.FPRS, num_out=num_out, description=description)
        yield named | {"spec": spec, "rates": rows.to_dict("records")}


def _accounted(frame: pd.DataFrame, looks: report_charts.Looks, facts: Facts) -> Iterator[dict[str, Any]]:
    """Yields a chart per auditor, data set and private training, those without privacy beside each of them."""
    present = set(frame["auditor"])
    for auditor in dict.fromkeys([facts.auditor, *(name for name in CEILED if name in present)]):
        rows = report_data.by_accounted(frame, auditor=auditor, protocol=facts.protocol, score=facts.score)
        for dataset, of_dataset in rows.groupby("dataset", sort=False):
            private = of_dataset[np.isfinite(of_dataset["epsilon_accounted"])]
            for training in dict.fromkeys(private["training"]) or [None]:
                without = np.isinf(of_dataset["epsilon_accounted"])
                drawn = of_dataset[(of_dataset["training"] == training) | without]
                at = "none of them private" if training is None else f"training {training}"
                description = f"Audited against accounted epsilon, data set {dataset}, {at}, auditor {auditor}."
                yield {
                    "auditor": auditor,
                    "dataset": dataset,
                    "training": training,
                    "spec": report_charts.accounted(drawn, looks, description=description),
                    "rows": drawn.to_dict("records"),
                }


def _costs(costs: pd.DataFrame) -> dict[str, Any] | None:
    """The chart and the rows of the cost, if it was measured."""
    if costs.empty:
        return None
    most = float(costs["seconds"].max())
    divisor, unit = next((divisor, unit) for least, divisor, unit in _UNITS if most >= least)
    drawn = costs.assign(total=costs["seconds"] / divisor, longest=costs["seconds_longest"] / divisor)
    tooltip = {"jobs": "jobs", "total": f"{unit}, all jobs", "longest": f"{unit}, longest job", "memory_mb": "MB"}
    time, memory = (
        report_charts.cost(drawn, column=column, title=title, tooltip=tooltip, description=f"{title}, by rule.")
        for column, title in (("total", f"{unit} of all jobs together"), ("memory_mb", "MB, largest job"))
    )
    rows = costs.sort_values(["seconds", "rule"], ascending=[False, True]).to_dict("records")
    return {"time": time, "memory": memory, "rows": rows, "total": float(costs["seconds"].sum())}
