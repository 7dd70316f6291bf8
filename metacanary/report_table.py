"""The report page's table of all audits: its columns, its rows as text, and what they can be filtered by."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from metacanary import table_formats, tables

Row = list[Any]
MAX_SINGLE_RUNS = 50_000  # bounds of single runs that the page holds; with more of them it names the CSV alone
NOT_A_BOUND = "paper (not a bound)"


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of the table.

    Attributes:
      key: Names it in links and for styles.
      title: Its header.
      hint: What it is, in a few words.
      number: Whether it is sorted by the number that its text begins with.
    """

    key: str
    title: str
    hint: str
    number: bool = True


@dataclass(frozen=True, kw_only=True)
class Filter:
    """A choice among the values of a column; `default` is shown first, an empty one shows all."""

    key: str
    label: str
    values: list[str]
    default: str


COLUMNS = (
    Column(key="canary", title="Canaries", hint="kind of canary", number=False),
    Column(key="dataset", title="Data set", hint="name and size of the subset", number=False),
    Column(key="training", title="Training", hint="recipe of the config", number=False),
    Column(key="epsilon", title="Target ε", hint="∞: without privacy"),
    Column(key="auditor", title="Auditor", hint="which lower bound", number=False),
    Column(key="protocol", title="Protocol", hint="how the number of guesses was chosen", number=False),
    Column(key="pooled", title="ε of all runs", hint="one bound from the coins of all runs at once"),
    Column(key="mean", title="ε, mean", hint="over runs, ± half of the 95% t interval over runs"),
    Column(key="ceiling", title="Ceiling (of all)", hint="of a run, and of all: the bound if all guesses were right"),
    Column(key="auroc", title="AUROC", hint="mean over runs, ± half of its interval; 0.5 is chance"),
    Column(key="assumption", title="Assumes", hint="what the bound needs beyond fair coins", number=False),
    Column(key="accounted", title="Accounted (by RDP)", hint="the accountant's upper bound on ε"),
    Column(key="median", title="ε, median", hint="over runs"),
    Column(key="coins", title="Coins (of all)", hint="n: canaries of a run, and of all; pairs in the paired game"),
    Column(key="runs", title="Runs", hint="number of runs; opens the bounds of single ones"),
    Column(key="accuracy", title="Test accuracy", hint="of the audited models"),
    Column(key="score", title="Score", hint="membership score", number=False),
)
FILTERS = {
    "dataset": "Data set",
    "canary": "Canaries",
    "training": "Training",
    "epsilon": "Target ε",
    "auditor": "Auditor",
    "protocol": "Protocol",
    "score": "Score",
}
SINGLE_RUNS = len(COLUMNS)  # the place in a row of the bounds of its single runs, as one text


def text_rows(audits: pd.DataFrame) -> list[Row]:
    """Writes every audit as it is shown.

    Args:
      audits: From `report_data.every_audit`.

    Returns:
      For each audit the texts of `COLUMNS`, and last its bounds of single runs, empty if there are more than
      MAX_SINGLE_RUNS of them in all. Numbers read as in the published tables.
    """
    printed = table_formats.printed(audits)
    texts: dict[str, Iterable[Any]] = {
        "canary": audits["canary"],
        "dataset": audits["dataset"],
        "training": audits["training"],
        "epsilon": printed["target\nε"],
        "auditor": audits["auditor"],
        "protocol": audits["protocol"].replace({tables.PAPER: NOT_A_BOUND}),
        "score": audits["score"],
        "assumption": audits["assumption"],
        "pooled": printed["ε\npooled"],
        "mean": printed["ε\nmean"],
        "median": printed["ε\nmedian"],
        "ceiling": printed["ceiling\n(pooled)"],
        "coins": [_coins(*row) for row in audits[["num_canaries", "num_canaries_pooled"]].to_numpy()],
        "runs": printed["runs"],
        "auroc": printed["AUROC\nmean"],
        "accounted": printed["accounted ε\n(by RDP)"],
        "accuracy": printed["test\naccuracy"],
    }
    columns = [[str(text) for text in texts[column.key]] for column in COLUMNS]
    few = audits["num_runs"].sum() <= MAX_SINGLE_RUNS
    singles = [", ".join(f"{bound:.2f}" for bound in bounds) if few else "" for bounds in audits["by_run"]]
    return [list(row) for row in zip(*columns, singles, strict=True)]


def filters(rows: Sequence[Row], defaults: Mapping[str, str]) -> list[Filter]:
    """Lists the filters whose column has several values.

    Args:
      rows: From `text_rows`.
      defaults: By column, what is shown first; one that no row has shows all.
    """
    found = []
    for key, label in FILTERS.items():
        values = list(dict.fromkeys(row[_place(key)] for row in rows))
        default = defaults.get(key, "")
        found.append(Filter(key=key, label=label, values=values, default=default if default in values else ""))
    return [each for each in found if len(each.values) > 1]


def selected(rows: Sequence[Row], chosen: Sequence[Filter]) -> list[Row]:
    """Takes the rows that the filters' defaults leave."""
    return [row for row in rows if all(each.default in ("", row[_place(each.key)]) for each in chosen)]


def shown(rows: Sequence[Row]) -> list[int]:
    """Places of the columns that are shown: all but a data set or score that is the same everywhere."""
    idle = {key for key in ("dataset", "score") if len({row[_place(key)] for row in rows}) == 1}
    return [place for place, column in enumerate(COLUMNS) if column.key not in idle]


def payload(rows: Sequence[Row]) -> str:
    """Writes all rows as JSON for a script element: each distinct text once, and rows as places among them."""
    texts = list(dict.fromkeys(text for row in rows for text in row))
    place = {text: number for number, text in enumerate(texts)}
    data = {"texts": texts, "rows": [[place[text] for text in row] for row in rows]}
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _place(key: str) -> int:
    """The place of a column in a row."""
    return next(place for place, column in enumerate(COLUMNS) if column.key == key)


def _coins(single: float, pooled: float) -> str:
    """Writes the coins of a run and, in brackets, those of all."""
    return f"{single:.0f}" if np.isnan(pooled) else f"{single:.0f} ({pooled:.0f})"
