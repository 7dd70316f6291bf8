"""What the report page shows, as frames: every audit, scores of canaries with what they tell, and bounds by epsilon.

A *setting* is a data set, training and target epsilon, a *cell* a setting and canary kind. All is of the last step,
but for `by_accounted`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from metacanary import scores as score_functions
from metacanary import tables
from metacanary.score_table import Population, of_role, with_reference_scores

AUDIT = ["score", "auditor", "protocol"]
CELL = tables.CELL
FPRS = (0.001, 0.01)
# A score of which the histogram is drawn in another's place: a monotone function of it that does not pile up at 0.
DRAWN_AS = {"negative_loss": "logit_margin"}


def every_audit(frame: pd.DataFrame) -> pd.DataFrame:
    """Summarises every audit of the last step: `tables.summarise` for each score, auditor and protocol.

    Args:
      frame: summary/epsilon.csv.

    Returns:
      The columns of `tables.summarise`, and num_canaries_pooled, the coins of all runs, and by_run, the list of the
      bounds of single runs. A row per cell and audit that was made; those of a cell stand together.

    Raises:
      ValueError: As `tables.summarise`.
    """
    rows = _last_step(tables.select(frame))
    # Each audit's rows alone: `summarise` looks through all that it is given.
    groups = rows.groupby(AUDIT, sort=False)
    found = pd.concat(
        [tables.summarise(of, score=audit[0], auditor=audit[1], protocol=audit[2]) for audit, of in map(_pair, groups)]
    )
    found = _ordered(found)
    keys = [*CELL, *AUDIT]
    pooled = rows["run"] == tables.POOLED
    coins = rows[pooled].set_index(keys)["num_canaries"].rename("num_canaries_pooled")
    by_run = rows[~pooled].groupby(keys, sort=False)["epsilon_lower"].agg(list).rename("by_run")
    table = found[found["num_runs"] > 0].join(coins, on=keys).join(by_run, on=keys)
    return table.reset_index(drop=True)


def cell_scores(
    scores: pd.DataFrame,
    runs: pd.DataFrame,
    score: str,
    *,
    cell: Mapping[str, str | float],
    population: Population = (),
    **options: float,
) -> pd.DataFrame:
    """Takes one score of the audited runs of a cell at the last step.

    Args:
      scores: Columns run, step, canary_id, included, score, value, of all blocks.
      runs: Columns run, role, step, of all blocks.
      score: Its name; one that needs reference runs is made here, as the audits make it.
      cell: dataset, canary, training, epsilon.
      population: For rmia.
      **options: Of `score_table.with_reference_scores`.

    Returns:
      Columns of `cell`, run, canary_id, included (bool), value (of the score) and drawn (of `DRAWN_AS`).

    Raises:
      ValueError: If the score is not there, or as `score_table.with_reference_scores`.
    """
    at_end, of_end = (frame[frame["step"] == runs["step"].max()] for frame in (scores, runs))
    found = with_reference_scores(at_end, of_end, [score], population=population, **options)
    found = found[found["run"].isin(of_role(runs, "audited"))]
    if score not in (known := set(found["score"])):
        raise ValueError(f"score={score!r} is not in scores, expected one of {sorted(known)}")
    keys = ["run", "canary_id", "included"]
    values = found[found["score"] == score].set_index(keys)["value"]
    drawn = found[found["score"] == DRAWN_AS.get(score, score)].set_index(keys)["value"]
    table = pd.DataFrame({"value": values, "drawn": drawn}).reset_index()
    described = {**cell, "epsilon": float(cell["epsilon"]), "included": table["included"].astype(bool)}
    return table.assign(**described)


def histograms(scores: pd.DataFrame, num_bins: int = 40) -> pd.DataFrame:
    """Counts canaries by score, those that were in the training apart from those that were not.

    Args:
      scores: From `cell_scores`, of all cells.
      num_bins: Bins of equal width, from the least to the largest score of a setting, the same for all its kinds.

    Returns:
      A row per cell and bin: low, high; num_in, num_out canaries of all runs; share_in, share_out of them.
    """
    rows = []
    for setting, of_setting in scores.groupby(tables.SETTING, sort=False):
        edges = np.histogram_bin_edges(of_setting["drawn"], num_bins)
        for canary in tables.canary_order(of_setting["canary"]):
            of_cell = of_setting[of_setting["canary"] == canary]
            counted = {
                side: np.histogram(of_cell["drawn"][of_cell["included"] == included], edges)[0]
                for side, included in (("in", True), ("out", False))
            }
            bins = {"low": edges[:-1], "high": edges[1:]}
            bins |= {f"num_{side}": counts for side, counts in counted.items()}
            bins |= {f"share_{side}": counts / counts.sum() for side, counts in counted.items()}
            named = dict(zip(CELL, (*_key(setting), canary), strict=True))
            rows.append(pd.DataFrame(bins).assign(**named))
    return pd.concat(rows, ignore_index=True)


def roc_curves(scores: pd.DataFrame, num_points: int = 150) -> pd.DataFrame:
    """Takes points of the ROC curve of each cell, the canaries of all runs at once.

    Args:
      scores: From `cell_scores`, of all cells.
      num_points: About how many, at most; they are evenly spaced on a log axis.

    Returns:
      A row per cell and number of false positives: fpr, and tpr, the largest of a threshold with no more of them.
      The first has none, the second has one, the last has all.
    """
    rows = []
    for named, of_cell in _cells(scores):
        false_positive, true_positive = score_functions.roc(of_cell["value"], of_cell["included"])
        num_out = int((~of_cell["included"]).sum())
        wanted = np.unique(np.append(0, np.geomspace(1, num_out, num_points).round().astype(int)))
        reached = np.searchsorted(np.rint(false_positive * num_out), wanted, side="right") - 1
        rows.append(pd.DataFrame({"fpr": wanted / num_out, "tpr": true_positive[reached]}).assign(**named))
    return pd.concat(rows, ignore_index=True)


def rates(scores: pd.DataFrame) -> pd.DataFrame:
    """Says what a threshold on the score achieves, the canaries of all runs at once.

    Args:
      scores: From `cell_scores`, of all cells.

    Returns:
      A row per cell: num_runs, num_in, num_out, auroc, tpr_at_0.001 and tpr_at_0.01: the largest true positive rate
      whose false positive rate is at most that, without interpolation.
    """
    rows = []
    for named, of_cell in _cells(scores):
        values, included = of_cell["value"], of_cell["included"]
        of_fpr = {f"tpr_at_{fpr}": score_functions.tpr_at_fpr(values, included, fpr) for fpr in FPRS}
        counts = {"num_in": int(included.sum()), "num_out": int((~included).sum())}
        auroc = score_functions.auroc(values, included)
        rows.append({**named, "num_runs": of_cell["run"].nunique(), **counts, "auroc": auroc, **of_fpr})
    return pd.DataFrame(rows)


def leaks(scores: pd.DataFrame) -> pd.DataFrame:
    """Says of each canary what its inclusion changed.

    Args:
      scores: From `cell_scores`, of all cells.

    Returns:
      A row per cell and canary_id: mean_in and mean_out, the mean score over the runs with and without the canary,
      num_in and num_out, how many these are, and leak = mean_in - mean_out, missing if there is only one sort of run.
      The largest leak of a cell stands first, equal ones by id, missing ones last.
    """
    keys = [*CELL, "canary_id"]
    of_side = {
        side: scores[scores["included"] == included].groupby(keys, sort=False)["value"].agg(["mean", "size"])
        for side, included in (("in", True), ("out", False))
    }
    renamed = [side.set_axis([f"mean_{name}", f"num_{name}"], axis=1) for name, side in of_side.items()]
    table = renamed[0].join(renamed[1], how="outer").reset_index()
    table = table.fillna({"num_in": 0, "num_out": 0}).astype({"num_in": int, "num_out": int})
    table["leak"] = table["mean_in"] - table["mean_out"]
    return table.sort_values([*CELL, "leak", "canary_id"], ascending=[True] * 4 + [False, True], ignore_index=True)


def by_accounted(frame: pd.DataFrame, *, auditor: str, protocol: str, score: str) -> pd.DataFrame:
    """Puts the bounds beside the epsilon that was accounted for the steps taken so far.

    Args:
      frame: summary/epsilon.csv.
      auditor: One of `auditors.NAMES`.
      protocol: One of `audits.PROTOCOLS`.
      score: The membership score.

    Returns:
      A row per cell and step; of trainings without privacy, the last step alone: epsilon_accounted, mean with low and
      high (95% t interval over runs), num_runs, pooled, ceiling, ceiling_pooled.

    Raises:
      ValueError: As `tables.select`, or if a run has several rows at a step.
    """
    rows = tables.select(frame, auditor=auditor, protocol=protocol, score=score)
    keys = [*CELL, "step"]
    tables.one_per_run(rows, keys)
    is_last = rows["step"] == rows.groupby(CELL)["step"].transform("max")
    rows = rows[np.isfinite(rows["epsilon_accounted"]) | is_last]
    pooled = rows["run"] == tables.POOLED
    table = tables.over_runs(rows[~pooled], keys, "epsilon_lower").join(
        rows[~pooled]
        .groupby(keys)
        .agg(num_runs=("run", "size"), ceiling=("ceiling", "max"), epsilon_accounted=("epsilon_accounted", "first"))
    )
    at_once = rows[pooled].set_index(keys)[["epsilon_lower", "ceiling"]]
    return table.join(at_once.set_axis(["pooled", "ceiling_pooled"], axis=1)).reset_index()


def _last_step(rows: pd.DataFrame) -> pd.DataFrame:
    """Takes the rows of the last step of each cell."""
    return rows[rows["step"] == rows.groupby(CELL)["step"].transform("max")]


def _cells(scores: pd.DataFrame) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """Yields the name and the rows of each cell, in the order of settings, and of kinds as they are shown."""
    for setting, of_setting in scores.groupby(tables.SETTING, sort=False):
        for canary in tables.canary_order(of_setting["canary"]):
            yield (
                dict(zip(CELL, (*_key(setting), canary), strict=True)),
                of_setting[of_setting["canary"] == canary],
            )


def _ordered(table: pd.DataFrame) -> pd.DataFrame:
    """Sorts by cell as `tables.summarise` does; rows of a cell keep their order."""
    shown: dict[str, Sequence[Any]] = {name: list(table[name].unique()) for name in ("dataset", "training")}
    shown["canary"] = tables.canary_order(table["canary"])

    def rank(column: pd.Series) -> pd.Series:
        return (
            -column if column.name == "epsilon" else column.map({v: n for n, v in enumerate(shown[str(column.name)])})
        )

    return table.sort_values(CELL, key=rank, kind="stable")


def _pair(group: tuple[Any, pd.DataFrame]) -> tuple[tuple[Any, ...], pd.DataFrame]:
    """A group with its key as a tuple, which pandas types as a label of any sort."""
    return tuple(group[0]), group[1]


def _key(group: Any) -> tuple[Any, ...]:
    """Names a group of several columns; pandas types it as a label of any sort."""
    return tuple(group)
