"""The table of what recipes are worth: test accuracy at each target epsilon, and the seconds of a run.

It reads the runs of the audits, since models with canaries in their training set are what is audited; it needs neither
JAX nor models.
"""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from metacanary import comparison_cost, store, table_formats, tables

COLUMNS = (
    *("dataset", "training", "epsilon", "canary", "change", "num_steps", "sampling_prob", "multiplicity", "num_runs"),
    *("accuracy_mean", "accuracy_low", "accuracy_high", "accuracy_std"),
    *("epsilon_accounted", "epsilon_accounted_rdp", "seconds_per_run"),
)
_KEYS = ["dataset", "training", "epsilon"]
_WORDS = {"dataset", "training", "change"}
_LEGEND = (
    "Accuracy on the test images at the last step: the mean over runs, ± half of its 95% t interval. Each training and "
    "epsilon has draws of its own. Half of the canaries are part of each training set. Seconds are the wall time of a "
    "run, compilation shared among those of a job, in the job's last attempt. Each line says what differs from the "
    "first."
)


def collect(
    frame: pd.DataFrame, trainings: Mapping[str, Mapping[str, Any]], *, canary: str, costs: pd.DataFrame
) -> pd.DataFrame:
    """Averages accuracy over the audited runs of each training and target epsilon.

    Args:
      frame: summary/epsilon.csv.
      trainings: The settings of the trainings in the order of the table: model, options.
      canary: The canary kind whose runs are taken.
      costs: From `comparison_cost.table`, of the jobs of these trainings; seconds not there are missing in the table.

    Returns:
      A row per dataset, training and target epsilon, with the columns `COLUMNS`; docs/output.md says what each means.
      `change` names the settings that differ from the first training's.

    Raises:
      ValueError: For a frame that lacks a training with this canary kind.
    """
    frame = frame.assign(run=frame["run"].astype(str), epsilon=frame["epsilon"].astype(float))
    frame = frame[frame["canary"] == canary]
    missing = [name for name in trainings if name not in set(frame["training"])]
    if missing:
        raise ValueError(f"frame lacks the trainings {missing} with canaries {canary!r}, expected audits of all")
    rows = frame[frame["training"].isin(trainings) & (frame["run"] != tables.POOLED)]
    rows = rows[rows["step"] == rows.groupby(_KEYS)["step"].transform("max")].drop_duplicates([*_KEYS, "run"])
    runs = rows.groupby(_KEYS, sort=False)
    intervals = tables.over_runs(rows, _KEYS, "test_accuracy").add_prefix("accuracy_")
    table = intervals.assign(
        accuracy_std=runs["test_accuracy"].std(),
        num_runs=runs.size(),
        epsilon_accounted=runs["epsilon_accounted"].first(),
        epsilon_accounted_rdp=runs["epsilon_accounted_rdp"].first(),
    ).reset_index()
    options = {name: training["options"] for name, training in trainings.items()}
    table = table.assign(
        canary=canary,
        change=table["training"].map(changes(trainings)),
        num_steps=table["training"].map(lambda name: options[name]["num_steps"]),
        sampling_prob=table["training"].map(lambda name: options[name].get("sampling_prob")),
        multiplicity=table["training"].map(lambda name: _flat(options[name]).get("augmentation.multiplicity", 1)),
    )
    table = table.join(_seconds(costs, canary).rename("seconds_per_run"), on=_KEYS)
    order = {name: place for place, name in enumerate(trainings)}
    table = table.assign(_place=table["training"].map(order))
    table = table.sort_values(["dataset", "_place", "epsilon"], ascending=[True, True, False], ignore_index=True)
    return table[list(COLUMNS)]


def changes(trainings: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Says of each training which settings of model and options differ from the first one's, "" of the first.

    Of one that is private where the first is not, or the other way round, it says that alone.
    """
    settings = {name: _flat({"model": t["model"], **t["options"]}) for name, t in trainings.items()}
    first = next(iter(settings.values()))
    found = {}
    for name, own in settings.items():
        if ("sampling_prob" in own) != ("sampling_prob" in first):
            found[name] = "DP-SGD" if "sampling_prob" in own else "SGD without privacy"
            continue
        differing = [key for key in sorted({*first, *own}) if first.get(key) != own.get(key)]
        found[name] = ", ".join(f"{_short(key)} {_text(own.get(key))}" for key in differing)
    return found


def printed(table: pd.DataFrame) -> pd.DataFrame:
    """Turns the table into the text of its cells: a line per training, a column per target epsilon."""
    several = table["dataset"].nunique() > 1
    epsilons = sorted(table["epsilon"].unique(), reverse=True)
    lines = []
    for (dataset, training), rows in table.groupby(["dataset", "training"], sort=False):
        by_epsilon = rows.set_index("epsilon")
        cells = {"dataset": dataset} if several else {}
        cells |= {"training": training, "change": rows["change"].iloc[0] or table_formats.NO_VALUE}
        for epsilon in epsilons:
            name = "no\nprivacy" if epsilon == float("inf") else f"ε {epsilon:g}"
            cells[name] = _percent(by_epsilon.loc[epsilon]) if epsilon in by_epsilon.index else table_formats.NO_VALUE
        mean = rows["seconds_per_run"].mean()
        cells["seconds\nper run"] = table_formats.NO_VALUE if pd.isna(mean) else f"{mean:.3g}"
        lines.append(cells)
    return pd.DataFrame(lines, dtype=object)


def note(table: pd.DataFrame) -> str:
    """Says what all rows share, and how to read the numbers."""
    runs = sorted(table["num_runs"].unique())
    words = f"{runs[0]} runs" if len(runs) == 1 else f"{runs[0]} to {runs[-1]} runs"
    canaries = f"canaries {table['canary'].iloc[0]}, "
    datasets = f"dataset {table['dataset'].iloc[0]}, " if table["dataset"].nunique() == 1 else ""
    return f"{datasets}{canaries}{words} of each. {_LEGEND} {table_formats.NO_VALUE}: no value."


def markdown(table: pd.DataFrame) -> str:
    """Writes the table as an aligned Markdown table under its note."""
    return table_formats.markdown_table(f"**Accuracy.** {note(table)}", printed(table), _WORDS)


def latex(table: pd.DataFrame) -> str:
    """Writes the table as `table_formats.latex_table` does."""
    return table_formats.latex_table(printed(table), _WORDS, caption=note(table), label="tab:accuracy")


def write(table: pd.DataFrame, *paths: store.PathLike, provenance: Mapping[str, Any]) -> None:
    """Writes the table to files as `table_formats.write` does, in these forms."""
    table_formats.write(table, *paths, provenance=provenance, markdown=markdown, latex=latex)


def _seconds(costs: pd.DataFrame, canary: str) -> pd.Series:
    """Seconds of a run by `_KEYS`, of the jobs that trained."""
    jobs = costs[(costs["stage"] == comparison_cost.TRAINING) & (costs["canary"] == canary)]
    sums = jobs.assign(epsilon=jobs["epsilon"].astype(float)).groupby(_KEYS)[["seconds", "num_trainings"]].sum()
    return sums["seconds"] / sums["num_trainings"]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _short(key: str) -> str:
    """A dotted name without its group, unless the last word alone would say nothing."""
    group, _, last = key.rpartition(".")
    words = last if last not in ("name", "enabled") else group or last
    return words.rpartition(".")[2].replace("_", " ")


def _text(value: Any) -> str:
    """Writes a setting."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list | tuple):
        return "-".join(map(_text, value))
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _percent(row: pd.Series) -> str:
    """Writes an accuracy with half of its interval."""
    mean, half = 100 * row["accuracy_mean"], 100 * (row["accuracy_high"] - row["accuracy_mean"])
    return f"{mean:.1f}%" if pd.isna(half) else f"{mean:.1f} ± {half:.1f}%"
