"""The audits of a bundle, made again from its scores."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from metacanary import summary
from metacanary.bundle_layout import Cell
from metacanary.score_table import Population

TOLERANCE = 1e-9
"""Of floats, relative: other processors and versions of SciPy may round the last digits differently."""


def settings(cell: Cell) -> summary.Settings:
    """Takes the settings of a cell's audits, which a file holds that anyone may have written.

    Args:
      cell: The cell.

    Returns:
      The settings.

    Raises:
      ValueError: If one is missing, unknown, or of another type than the audits take.
    """
    try:
        found = summary.Settings(**cell.audit)
    except TypeError as error:
        raise ValueError(
            f"audit of {cell.path}: got {dict(cell.audit)}, expected settings of audits: {error}"
        ) from None
    for name, value in cell.audit.items():
        if not _fits(name, value):
            raise ValueError(f"audit.{name} of {cell.path}: got {value!r}, expected a setting of audits")
    return found


def count(runs: pd.DataFrame, cell: Cell) -> int:
    """How often `recompute` calls `on_audit`."""
    chosen = settings(cell)
    return runs["step"].nunique() * len(chosen.scores) * len(chosen.protocols)


def recompute(
    scores: pd.DataFrame,
    runs: pd.DataFrame,
    population: Population,
    cell: Cell,
    *,
    on_audit: Callable[[], object] | None = None,
) -> pd.DataFrame:
    """Audits a cell as its audits were made.

    Args:
      scores: Of the cell, as `summary.epsilon_table` takes them.
      runs: As there.
      population: As there.
      cell: The cell, with the settings of its audits.
      on_audit: Called after each step, score and protocol.

    Returns:
      As `summary.epsilon_table`.
    """
    options: dict[str, Any] = {"population": population, "on_audit": on_audit}
    return summary.epsilon_table(scores, runs, settings(cell), cell=cell.names, **options)


def compare(audits: pd.DataFrame, recomputed: pd.DataFrame, cell: Cell) -> float:
    """Compares two tables of audits of a cell.

    Args:
      audits: What is claimed.
      recomputed: From `recompute`.
      cell: The cell.

    Returns:
      The largest relative difference of floats, at most `TOLERANCE`; often 0.

    Raises:
      ValueError: If rows, or anything in a row, differ by more.
    """
    claimed, found = (_as_read(table) for table in (audits, recomputed))
    if len(claimed) != len(found):
        raise ValueError(f"audits of {cell.path}: got {len(claimed)} rows, expected {len(found)} from the scores")
    largest = 0.0
    for name in summary.COLUMNS:
        one, other = claimed[name].to_numpy(), found[name].to_numpy()
        if claimed[name].dtype.kind == "f" and found[name].dtype.kind == "f":
            difference = _relative(one, other)
            equal = difference <= TOLERANCE
            largest = max(largest, float(difference[equal].max(initial=0.0)))
        else:
            equal = (one == other) | (pd.isna(one) & pd.isna(other))
        if not equal.all():
            row = int(np.argmin(equal))
            where = claimed.loc[row, list(summary.KEYS)].to_dict()
            raise ValueError(f"audits: {name} is {one[row]} at {where}, expected {other[row]} from the scores")
    return largest


def _fits(name: str, value: Any) -> bool:
    """Whether a setting of audits has its type."""
    if value is None:
        return name in ("grid", "sampling_prob")
    if name in ("game", "accountant"):
        return isinstance(value, str)
    kind: Any = str if name in ("scores", "auditors", "protocols") else int | float
    if name in ("scores", "auditors", "protocols", "grid"):
        return isinstance(value, list | tuple) and all(isinstance(each, kind) for each in value)
    return isinstance(value, kind)


def _relative(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Relative differences of floats; 0 where they are equal or both missing, infinite where only one is."""
    same = (one == other) | (np.isnan(one) & np.isnan(other))
    with np.errstate(invalid="ignore", divide="ignore"):
        difference = np.abs(one - other) / np.maximum(np.abs(one), np.abs(other))
    return np.where(same, 0.0, np.where(np.isnan(difference), np.inf, difference))


def _as_read(table: pd.DataFrame) -> pd.DataFrame:
    """A table as it is after CSV, so that types are those of its values."""
    text = table.to_csv(index=False)
    return pd.read_csv(io.StringIO(text), keep_default_na=False, na_values=[""], dtype={"run": str, "epsilon": float})
