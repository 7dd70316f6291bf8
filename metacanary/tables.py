"""Tables 1 and 2: what the audits say at the last step, over runs.

`python -m metacanary.tables RESULTS_DIR` prints the tables of a finished workflow.
"""

import argparse
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from scipy import special

from metacanary import store, table_formats
from metacanary.table_formats import PAPER_COLUMN, SETTING, latex, markdown, note, text, title

COLUMNS = (
    *("dataset", "canary", "training", "epsilon", "accountant", "epsilon_accounted", "epsilon_accounted_rdp"),
    *(
        "epsilon_heuristic",
        "game",
        "step",
        "run",
        "score",
        "auditor",
        "protocol",
        "assumption",
        "adjacency",
        "epsilon_lower",
        "ceiling",
    ),
    *("num_canaries", "num_guesses", "num_guesses_in", "num_correct", "auroc", "test_accuracy"),
)
CELL = [*SETTING, "canary"]
KINDS = ("random", "mislabeled", "metagradient", "clipbkd", "gradient_max", "noise")  # the order of their looks
CONFIDENCE = 0.95  # of the t intervals over runs; the audits have a significance of their own
POOLED = "pooled"
PAPER = "paper"

_SHOWN = ("random", "noise", "mislabeled", "clipbkd", "gradient_max", "metagradient")
_DESCRIPTORS = ["step", "num_canaries", "game", "adjacency", "assumption", "accountant"]


def canary_order(kinds: Iterable[str]) -> list[str]:
    """Sorts canary kinds as they are shown: what is not optimised first, metagradient last, then others by name."""
    rank = {kind: number for number, kind in enumerate(_SHOWN)}
    return sorted(set(kinds), key=lambda kind: (rank.get(kind, len(rank)), kind))


def select(frame: pd.DataFrame, **wanted: Any) -> pd.DataFrame:
    """Takes the rows of summary/epsilon.csv that have the wanted values.

    Args:
      frame: The tidy table, with all of `COLUMNS`.
      **wanted: A value per column; a column whose wanted value is None is left alone. The target epsilon may
        be given as a number or as text ("inf").

    Returns:
      The rows, with `run` as text and `epsilon` as a float.

    Raises:
      ValueError: If columns are missing, if no row has a wanted value, or if an epsilon_lower is missing.
    """
    missing = [name for name in COLUMNS if name not in frame.columns]
    if missing:
        raise ValueError(f"frame lacks the columns {missing}, expected all of summary/epsilon.csv")
    rows = frame.assign(run=frame["run"].astype(str), epsilon=frame["epsilon"].astype(float))
    for name, value in wanted.items():
        if value is None:
            continue
        found = rows[rows[name] == (float(value) if name == "epsilon" else value)]
        if found.empty:
            raise ValueError(
                f"{name}={value!r} is not in frame, expected one of {sorted(rows[name].unique().tolist())}"
            )
        rows = found
    if rows["epsilon_lower"].isna().any():
        raise ValueError("frame has rows without epsilon_lower, expected a bound in every row")
    return rows


def one_per_run(rows: pd.DataFrame, keys: Sequence[str]) -> None:
    """Raises ValueError if a run has several rows, which would count it twice."""
    double = rows[rows.duplicated([*keys, "run"])]
    if len(double):
        example = double.iloc[0][[*keys, "run"]].to_dict()
        raise ValueError(f"frame has several rows for {example}, expected one per run")


def over_runs(rows: pd.DataFrame, keys: Sequence[str], column: str) -> pd.DataFrame:
    """Averages a column over runs.

    Args:
      rows: One row per run and combination of keys.
      keys: What to keep apart.
      column: What to average.

    Returns:
      By keys: mean, and low and high, the 95% interval mean ± t(0.975, n-1) s / sqrt(n) over the n runs, NaN
      for n=1. It is not cut off at zero.
    """
    groups = rows.groupby(list(keys), sort=False)[column]
    mean = groups.mean()
    half = groups.sem() * special.stdtrit(groups.count() - 1, 0.5 + CONFIDENCE / 2)
    return pd.DataFrame({"mean": mean, "low": mean - half, "high": mean + half})


def summarise(frame: pd.DataFrame, *, auditor: str, protocol: str, score: str) -> pd.DataFrame:
    """Summarises the audits of the last step of every cell over its runs.

    Args:
      frame: summary/epsilon.csv.
      auditor: One of `auditors.NAMES`.
      protocol: One of `audits.PROTOCOLS`.
      score: The membership score.

    Returns:
      One row per dataset, training, target epsilon and canary kind: num_runs; epsilon_mean, epsilon_low,
      epsilon_high, epsilon_median over runs; epsilon_pooled; ceiling, ceiling_pooled; epsilon_accounted,
      epsilon_accounted_rdp, epsilon_heuristic; auroc_mean, auroc_low, auroc_high; test_accuracy; step,
      num_canaries, game, adjacency, assumption, accountant; auditor, protocol, score. docs/output.md says what each
      means.

    Raises:
      ValueError: If columns, or rows of the auditor, protocol or score, are missing, or if a run has several
        rows.

    Guarantees:
      Every canary kind of the frame has a row in every setting of the frame; one without runs has num_runs 0
      and no values. Settings stand in the order of the frame, the larger epsilon first; kinds as in
      `canary_order`.
    """
    rows = select(frame, auditor=auditor, protocol=protocol, score=score)
    rows = rows[rows["step"] == rows.groupby(CELL)["step"].transform("max")]
    one_per_run(rows, CELL)
    pooled = rows["run"] == POOLED
    summary = _runs(rows[~pooled]).join(_pooled(rows[pooled]), how="outer")
    summary = summary.reindex(_cells(frame)).reset_index()
    summary["num_runs"] = summary["num_runs"].fillna(0).astype(int)
    return summary.assign(auditor=auditor, protocol=protocol, score=score)


def table1(frame: pd.DataFrame, *, protocol: str = "corrected", score: str = "negative_loss") -> pd.DataFrame:
    """Makes Table 1, the bounds of the auditor of Steinke et al.

    Args:
      frame: summary/epsilon.csv.
      protocol: A valid protocol, not "paper".
      score: The membership score.

    Returns:
      `summarise` for this protocol, and beside it the mean of the paper protocol as
      epsilon_mean_paper_not_a_bound (NaN where there is none).

    Raises:
      ValueError: As `summarise`, and for the protocol "paper".

    References:
      Steinke, Nasr, Jagielski 2023, arXiv 2305.08846.
    """
    return _beside_paper(frame, "steinke", protocol, score)


def table2(frame: pd.DataFrame, *, protocol: str = "corrected", score: str = "negative_loss") -> pd.DataFrame:
    """Makes Table 2, the same as `table1` with the f-DP auditor, which assumes a Gaussian trade-off curve.

    References:
      Mahloujifar, Melis, Chaudhuri 2024, arXiv 2410.22235.
    """
    return _beside_paper(frame, "fdp_gaussian", protocol, score)


def bounds(frame: pd.DataFrame, *, protocol: str = "corrected", score: str = "negative_loss") -> pd.DataFrame:
    """Puts all lower bounds side by side: what each assumes, how high it can reach, and what it found.

    Args:
      frame: summary/epsilon.csv.
      protocol: A valid protocol, not "paper".
      score: The membership score.

    Returns:
      `summarise` for every auditor of the frame, in its order; rows of a setting and canary kind stand together.

    Raises:
      ValueError: As `summarise`, and for the protocol "paper".
    """
    _require_valid(protocol)
    names = list(frame["auditor"].unique())
    found = [summarise(frame, auditor=name, protocol=protocol, score=score) for name in names]
    # All have the same rows in the same order: the first of each, then the second of each, ...
    return pd.concat(found).sort_index(kind="stable").reset_index(drop=True)


def with_objectives(table: pd.DataFrame, objectives: Mapping[str, str]) -> pd.DataFrame:
    """Says of each row what its canaries were optimised for.

    Args:
      table: From `table1` or `table2`.
      objectives: The objective's name by canary kind; kinds that are not optimised have none.

    Returns:
      The table with a last column `objective`, missing where there is none.
    """
    return table.assign(objective=[objectives.get(kind, float("nan")) for kind in table["canary"]])


def write(table: pd.DataFrame, *paths: store.PathLike, provenance: Mapping[str, Any]) -> None:
    """Writes a table from `table1` or `table2` to files as `table_formats.write` does."""
    table_formats.write(table, *paths, provenance=provenance, markdown=markdown, latex=latex)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the tables of a results folder and names its figures and report; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m metacanary.tables", description=main.__doc__)
    parser.add_argument("results_dir", type=Path, help="folder of one experiment, such as results/digits")
    results_dir = parser.parse_args(arguments).results_dir
    paths = [results_dir / "tables" / f"{name}.csv" for name in ("table1", "table2")]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        print(f"No results in {results_dir}: {' and '.join(missing)} not found.", file=sys.stderr)
        print(
            f"Run the workflow first: `make demo`, or `snakemake --cores 2 --configfile FILE` with the FILE in config/ "
            f"whose results_dir is {results_dir}.",
            file=sys.stderr,
        )
        return 1
    for table in map(store.read_csv, paths):
        print(textwrap.fill(f"{title(table)}. {note(table)}", 110), text(table), sep="\n\n")
    made = [path for name in ("figures/*.p[dn][fg]", "tables/*", "*.html") for path in results_dir.glob(name)]
    print(*sorted(str(path) for path in made if path.suffix != ".json"), sep="\n")
    return 0


def _runs(rows: pd.DataFrame) -> pd.DataFrame:
    """Summarises the rows of single runs by cell."""
    epsilon = over_runs(rows, CELL, "epsilon_lower").add_prefix("epsilon_")
    auroc = over_runs(rows, CELL, "auroc").add_prefix("auroc_")
    rest = rows.groupby(CELL, sort=False).agg(
        num_runs=("run", "size"),
        epsilon_median=("epsilon_lower", "median"),
        ceiling=("ceiling", "max"),
        epsilon_accounted=("epsilon_accounted", "first"),
        epsilon_accounted_rdp=("epsilon_accounted_rdp", "first"),
        epsilon_heuristic=("epsilon_heuristic", "first"),
        test_accuracy=("test_accuracy", "mean"),
        **{name: (name, "first") for name in _DESCRIPTORS},
    )
    leading = ["epsilon_mean", "epsilon_low", "epsilon_high"]
    return rest[["num_runs"]].join(epsilon[leading]).join(rest.drop(columns="num_runs")).join(auroc)


def _pooled(rows: pd.DataFrame) -> pd.DataFrame:
    """Takes the bound of all runs at once, by cell."""
    pooled = rows.set_index(CELL)[["epsilon_lower", "ceiling"]]
    return pooled.set_axis(["epsilon_pooled", "ceiling_pooled"], axis=1)


def _cells(frame: pd.DataFrame) -> pd.MultiIndex:
    """Lists every setting with every canary kind, in the order of the table."""
    settings = frame[SETTING].astype({"epsilon": float}).drop_duplicates()
    first = {name: {value: place for place, value in enumerate(frame[name].unique())} for name in SETTING[:2]}
    ordered = sorted(
        settings.itertuples(index=False),
        key=lambda s: (first["dataset"][s[0]], first["training"][s[1]], -s[2]),
    )
    return pd.MultiIndex.from_tuples(
        [(*setting, canary) for setting in ordered for canary in canary_order(frame["canary"])], names=CELL
    )


def _require_valid(protocol: str) -> None:
    """Raises ValueError for the protocol that gives no bounds."""
    if protocol == PAPER:
        raise ValueError(f"protocol={protocol!r} is no bound, expected a valid protocol")


def _beside_paper(frame: pd.DataFrame, auditor: str, protocol: str, score: str) -> pd.DataFrame:
    """Puts the mean of the paper protocol beside the summary of a valid one."""
    _require_valid(protocol)
    table = summarise(frame, auditor=auditor, protocol=protocol, score=score)
    paper = pd.Series(float("nan"), index=table.index)
    if ((frame["auditor"] == auditor) & (frame["protocol"] == PAPER) & (frame["score"] == score)).any():
        paper = summarise(frame, auditor=auditor, protocol=PAPER, score=score)["epsilon_mean"]
    table.insert(list(table.columns).index("epsilon_median") + 1, PAPER_COLUMN, paper)
    return table


if __name__ == "__main__":
    sys.exit(main())
