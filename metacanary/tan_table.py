"""The table of what was trained at which total noise: the search at a small batch, its prediction, and the full run.

It joins the runs of `tan_runs`; it needs neither JAX nor models.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from metacanary import store, table_formats

STAGES = ("search", "prediction", "full", "scaling")
_SETTINGS = (
    *("batch_size", "multiplicity", "num_steps", "learning_rate", "sampling_prob", "noise_multiplier"),
    *("eta", "epsilon_approximate", "epsilon_full", "epsilon_spent", "num_gradients"),
)
_SEARCHED = ("learning_rate", "multiplicity", "num_steps")
_WORDS = {"dataset", "stage"}
COLUMNS = (
    *("dataset", "stage", "chosen", "images"),
    *_SETTINGS,
    *("num_runs", "accuracy_mean", "accuracy_std", "seconds_per_run"),
)
_LEGEND = (
    "Runs without canaries at the total noise 1/η (Sander et al. 2022), where η is q√(T/2) over the noise multiplier. "
    "Small batches have the full run's noise multiplier over batch size, and are not private: ε spent is what they "
    "spend themselves (RDP), ε full what the full run spends that they stand for. search: accuracy on training images "
    "held out, by which settings are chosen. prediction and full: the chosen settings at both batches, on test images "
    "and other seeds. scaling: the reference's settings on test images. Accuracy is a mean over runs, ± their standard "
    "deviation, which is no interval."
)


def collect(trials: Sequence[Mapping[str, str]], runs: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Joins the runs of all trials.

    Args:
      trials: Of each trial its dataset and its stage, one of `STAGES`.
      runs: Of each trial its rows, with the columns of `tan_runs.COLUMNS`.

    Returns:
      One row per trial in the order given, with the columns `COLUMNS`; docs/output.md says what each means. Chosen is
      the setting of the search that the full run has. A standard deviation of one run is missing.

    Raises:
      ValueError: For lists of different lengths, or an unknown stage.
    """
    if len(trials) != len(runs):
        raise ValueError(f"runs: got those of {len(runs)} trials, expected those of {len(trials)}")
    unknown = {trial["stage"] for trial in trials} - {*STAGES}
    if unknown:
        raise ValueError(f"stage: got {sorted(unknown)}, expected some of {STAGES}")
    table = pd.DataFrame([_row(*pair) for pair in zip(trials, runs, strict=True)], columns=list(COLUMNS))
    for _, full in table[table["stage"] == "full"].iterrows():
        found = (table["stage"] == "search") & (table[["dataset", *_SEARCHED]] == full[["dataset", *_SEARCHED]]).all(
            axis=1
        )
        table.loc[found, "chosen"] = True
    return table


def _row(trial: Mapping[str, str], runs: pd.DataFrame) -> dict[str, Any]:
    """One trial."""
    seconds = runs["seconds_per_step"].mean() * runs["num_steps"].iloc[0]
    return {
        **{name: trial[name] for name in ("dataset", "stage")},
        "chosen": False,
        "images": "validation" if trial["stage"] == "search" else "test",
        **{name: runs[name].iloc[0] for name in _SETTINGS},
        "num_runs": len(runs),
        "accuracy_mean": runs["accuracy"].mean(),
        "accuracy_std": runs["accuracy"].std(),
        "seconds_per_run": seconds,
    }


def findings(table: pd.DataFrame) -> list[str]:
    """Says of each data set what was chosen, what was predicted, what came out, and what the search cost.

    Args:
      table: From `collect`.

    Returns:
      A sentence or two for each data set that has rows of the stages search, prediction and full.
    """
    return [
        _finding(name, rows) for name, rows in table.groupby("dataset", sort=False) if {*STAGES[:3]} <= {*rows["stage"]}
    ]


def compute_saved(rows: pd.DataFrame) -> float:
    """How many times more gradients the same search would have taken at the full batch, of one data set."""
    search, full = rows[rows["stage"] == "search"], rows[rows["stage"] == "full"].iloc[0]
    spent = search["num_gradients"] * search["num_runs"]
    return float((spent * full["batch_size"] / search["batch_size"]).sum() / spent.sum())


def _finding(name: Any, rows: pd.DataFrame) -> str:
    """What came out of one data set."""
    small, full = (rows[rows["stage"] == stage].iloc[0] for stage in ("prediction", "full"))
    seconds = full["seconds_per_run"] / small["seconds_per_run"]
    measured = "" if pd.isna(seconds) else f"; one run of the chosen setting {seconds:.1f} times fewer seconds"
    searched = int((rows["stage"] == "search").sum())
    return (
        f"{name}: of {searched} settings searched at batch {_count(small['batch_size'])}, learning rate "
        f"{full['learning_rate']:g}, multiplicity {full['multiplicity']:g} and {full['num_steps']:g} steps were chosen."
        f" At equal total noise the full run would spend ε {small['epsilon_full']:.2f} (η² + 2η√log(1/δ): "
        f"{small['epsilon_approximate']:.2f}); calibrated to ε {full['epsilon_full']:.2f}, at batch "
        f"{_count(full['batch_size'])}, it reached {_percent(full)}, where the simulation had predicted "
        f"{_percent(small)}. The search took {compute_saved(rows):.1f} times fewer gradients than at the full batch"
        f"{measured}."
    )


def printed(table: pd.DataFrame) -> pd.DataFrame:
    """Turns the table into the text of its cells."""
    several = table["dataset"].nunique() > 1
    stages = [
        f"{stage}, chosen" if chosen else stage for stage, chosen in zip(table["stage"], table["chosen"], strict=True)
    ]
    cells = {"dataset": list(table["dataset"])} if several else {}
    cells |= {
        "stage": stages,
        "batch": [*map(_count, table["batch_size"])],
        "copies": [f"{value:g}" for value in table["multiplicity"]],
        "steps": [f"{value:g}" for value in table["num_steps"]],
        "learning\nrate": [f"{value:g}" for value in table["learning_rate"]],
        "noise\nmultiplier": [f"{value:.3g}" for value in table["noise_multiplier"]],
        "1/η": [f"{1 / value:.2f}" for value in table["eta"]],
        "ε\nfull": [_epsilon(value) for value in table["epsilon_full"]],
        "ε\nspent": [_epsilon(value) for value in table["epsilon_spent"]],
        "runs": [f"{value:g}" for value in table["num_runs"]],
        "accuracy": [_percent(row) for _, row in table.iterrows()],
        "gradients\nper run": [f"{value:,.0f}" for value in table["num_gradients"]],
        "seconds\nper run": [table_formats.NO_VALUE if pd.isna(v) else f"{v:.3g}" for v in table["seconds_per_run"]],
    }
    return pd.DataFrame(cells, dtype=object)


def note(table: pd.DataFrame) -> str:
    """Says what came out, and how to read the numbers."""
    return " ".join([*findings(table), _LEGEND])


def markdown(table: pd.DataFrame) -> str:
    """Writes the table as an aligned Markdown table under its note."""
    return table_formats.markdown_table(f"**Total noise.** {note(table)}", printed(table), _WORDS)


def latex(table: pd.DataFrame) -> str:
    """Writes the table as `table_formats.latex_table` does; its stages are set apart."""
    groups = table[["dataset", "stage"]].to_numpy().tolist()
    return table_formats.latex_table(printed(table), _WORDS, caption=note(table), label="tab:tan", groups=groups)


def write(table: pd.DataFrame, *paths: store.PathLike, provenance: Mapping[str, Any]) -> None:
    """Writes the table to files as `table_formats.write` does, in these forms."""
    table_formats.write(table, *paths, provenance=provenance, markdown=markdown, latex=latex)


def _count(value: float) -> str:
    """Writes an expected batch, rounded to whole images."""
    return f"{value:,.0f}"


def _epsilon(value: float) -> str:
    """Writes an epsilon, those that promise nothing without decimals."""
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def _percent(row: pd.Series) -> str:
    """Writes the accuracy of a row."""
    mean, std = 100 * row["accuracy_mean"], 100 * row["accuracy_std"]
    return f"{mean:.1f}%" if np.isnan(std) else f"{mean:.1f} ± {std:.1f}%"
