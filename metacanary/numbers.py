"""Numbers in documents that come from published results, by marks that Markdown does not show.

    SGD alone gives an AUROC of <!--= digits/table1 auroc± training=sgd canary=random -->…<!--/-->.

A mark names a file below docs/results (`digits/table1`: CSV or JSON, also compressed), what to take of it, which
rows, and perhaps how to write it. CONTRIBUTING.md has the grammar.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from metacanary import store, tables
from metacanary.table_formats import words

MARK = re.compile(r"<!--= ([^<>]+?) -->(.*?)<!--/-->", re.DOTALL)
UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0, "MiB": 1.0, "GiB": 1024.0}  # of seconds, and of MiB
SUMMARY = "epsilon"
# Of the summary, where a mark does not say: AUROCs are the same under all of them.
DEFAULTS = {"score": "negative_loss", "auditor": "steinke", "protocol": "corrected"}
_FILE = re.compile(r"\w+/\w+")
_QUANTITY = re.compile(r"(max|min|mean)\(([\w.]+)\)|([\w.]+)(±?)")
# Digits, factor and unit by what a column's name begins with.
_FORMATS = {
    "auroc": (3, 1.0, ""),
    "epsilon": (2, 1.0, ""),
    "ceiling": (2, 1.0, ""),
    "test_accuracy": (1, 100.0, "%"),
    "accuracy": (1, 100.0, "%"),
}
_AGGREGATES: dict[str, Callable[[pd.Series], float]] = {
    "max": lambda values: float(values.max()),
    "min": lambda values: float(values.min()),
    "mean": lambda values: float(values.mean()),
}


def fill(text: str, results: Path) -> str:
    """Renews the numbers of a document.

    Args:
      text: Markdown.
      results: The folder of published results.

    Returns:
      The text with what stands between each pair of marks made anew.

    Raises:
      ValueError: For a mark that names no file, no column or not exactly one row.
    """
    return MARK.sub(lambda match: f"<!--= {match[1]} -->{number(match[1], results)}<!--/-->", text)


def number(query: str, results: Path) -> str:
    """Writes the number that a mark names.

    Args:
      query: `FILE QUANTITY [COLUMN=VALUE ...] [minus=KIND] [digits=N] [unit=UNIT]`. QUANTITY is a column, or for JSON a
        key with dots and nothing else; `COLUMN±` is a mean with half of its 95% interval over runs; max(COLUMN),
        min(...), mean(...) of all rows that match. In the file epsilon, the tidy summary, rows are runs at the last
        step and a column is their mean; with `minus` that of the differences to another canary kind, run by run.
        Kinds joined by + (`canary=a+b minus=c+d`) are averaged within each run first; the interval is over runs, of
        these very canaries.
      results: The folder of published results.

    Raises:
      ValueError: As `fill`, and for max, min or mean of the summary or of JSON, with ±, or of no rows.
    """
    file, _, rest = query.partition(" ")
    quantity, *pairs = rest.split() or [""]
    match = _QUANTITY.fullmatch(quantity)
    if not _FILE.fullmatch(file) or match is None or any("=" not in pair for pair in pairs):
        raise ValueError(
            f"mark: got {query!r}, expected FILE QUANTITY [COLUMN=VALUE ...], "
            "with a QUANTITY like auroc, auroc± or max(auroc)"
        )
    wanted = dict(pair.split("=", 1) for pair in pairs)
    style = {name: wanted.pop(name) for name in ("digits", "unit") if name in wanted}
    aggregate, name, interval = match[1], match[2] or match[3], match[4]
    try:
        values = _values(results / file, name, wanted, aggregate=aggregate, interval=bool(interval))
    except ValueError as error:
        raise ValueError(f"mark: {query!r}: {error}") from None
    return " ± ".join(_written(value, name, **style) for value in values)


def _values(path: Path, name: str, wanted: dict[str, str], *, aggregate: str | None, interval: bool) -> list[float]:
    """Takes a number from a file, or a mean and half of its interval."""
    if path.with_suffix(".json").exists():
        if aggregate or interval or wanted:
            raise ValueError("JSON has no rows, expected a key alone")
        return [float(_entry(store.read_json(path.with_suffix(".json")), name))]
    found = [path.with_suffix(suffix) for suffix in (".csv", ".csv.gz") if path.with_suffix(suffix).exists()]
    if not found:
        raise ValueError(f"there is no {path}.csv, .csv.gz or .json")
    table = pd.read_csv(found[0])
    if path.name == SUMMARY:
        if aggregate:
            raise ValueError(f"the file {SUMMARY} is averaged over runs, expected {name} or {name}±")
        mean, high = _over_runs(table, name, wanted)
        return [mean, high - mean] if interval else [mean]
    rows = _chosen(table, wanted)
    if aggregate is not None:
        if rows.empty:
            raise ValueError("0 rows match, expected some")
        return [_AGGREGATES[aggregate](_column(rows, name))]
    if len(rows) != 1:
        raise ValueError(f"{len(rows)} rows match, expected one")
    if interval:
        mean, high = (float(_column(rows, f"{name}_{end}").iloc[0]) for end in ("mean", "high"))
        return [mean, high - mean]
    return [float(_column(rows, name).iloc[0])]


def _entry(found: Any, name: str) -> Any:
    """Follows a key with dots into JSON."""
    for key in name.split("."):
        if not isinstance(found, dict) or key not in found:
            raise ValueError(f"there is no key {name}")
        found = found[key]
    return found


def _over_runs(table: pd.DataFrame, name: str, wanted: dict[str, str]) -> tuple[float, float]:
    """Averages a column over the runs of the last step; returns the mean and the upper end of its interval."""
    wanted = {**DEFAULTS, **wanted}
    other = wanted.pop("minus", None)
    values = _by_run(table, name, wanted)
    if other is not None:
        values = values - _by_run(table, name, wanted | {"canary": other})
    if values.isna().any():
        raise ValueError("kinds of different runs, expected the same ones")
    row = tables.over_runs(pd.DataFrame({"all": 0, name: values}), ["all"], name).iloc[0]
    return float(row["mean"]), float(row["high"])


def _by_run(table: pd.DataFrame, name: str, wanted: dict[str, str]) -> pd.Series:
    """Takes a column by run, at the last step: of one cell, or its mean over those of several canary kinds."""
    if "+" not in wanted.get("canary", ""):
        return _of_cell(table, name, wanted)
    kinds = wanted["canary"].split("+")
    each = [_of_cell(table, name, wanted | {"canary": kind}) for kind in kinds]
    return pd.concat(each, axis="columns").mean(axis="columns", skipna=False)


def _of_cell(table: pd.DataFrame, name: str, wanted: dict[str, str]) -> pd.Series:
    """Takes a column of one cell by run, at the last step."""
    rows = _chosen(table[table["run"].astype(str) != tables.POOLED], wanted)
    rows = rows[rows["step"] == rows["step"].max()]
    if rows.empty or rows["run"].duplicated().any():
        raise ValueError(f"{len(rows)} rows match, expected one for each run")
    return _column(rows.set_index("run"), name)


def _chosen(table: pd.DataFrame, wanted: dict[str, str]) -> pd.DataFrame:
    """Takes the rows with the wanted values; numbers are compared as numbers."""
    for name, value in wanted.items():
        column = _column(table, name)
        same = column == float(value) if pd.api.types.is_numeric_dtype(column) else column.astype(str) == value
        table = table[same]
    return table


def _column(table: pd.DataFrame, name: str) -> pd.Series:
    """Takes a column."""
    if name not in table:
        raise ValueError(f"there is no column {name}")
    return table[name]


def _written(value: float, name: str, *, digits: str | None = None, unit: str | None = None) -> str:
    """Writes a number as its column is written everywhere, or as a mark asks."""
    places, factor, suffix = next((form for key, form in _FORMATS.items() if name.startswith(key)), (None, 1.0, ""))
    if unit is not None:
        if unit not in UNITS:
            raise ValueError(f"unit: got {unit!r}, expected one of {', '.join(UNITS)}")
        factor, suffix = 1 / UNITS[unit], f" {unit}"
    if digits is not None:
        places = int(digits)
    return f"{words(value * factor) if places is None else f'{value * factor:.{places}f}'}{suffix}"
