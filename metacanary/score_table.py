"""The scores of all runs of a cell as one table: the roles of runs, and the scores that need reference models."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from metacanary import reference_scores

ROLES = ("audited", "surrogate", "reference")
"""What a run is for: audited; with coins of its own, for choices before an audit; without canaries, to compare with."""

Population = Sequence[Mapping[str, np.ndarray]]  # of all blocks, from `block_scores.population_block`


def of_role(runs: pd.DataFrame, role: str) -> set[int]:
    """Numbers of the runs of a role; `runs` has columns run, role."""
    return set(runs.loc[runs["role"] == role, "run"])


def with_reference_scores(
    scores: pd.DataFrame,
    runs: pd.DataFrame,
    names: Sequence[str],
    *,
    population: Population = (),
    gamma: float = 1.0,
    offline_a: float = 0.3,
) -> pd.DataFrame:
    """Adds the scores that compare a run with the reference runs at the same step, and drops the rows of the latter.

    Args:
      scores: Columns run, step, canary_id, included, score, value, of all blocks (`block_scores.score_block`);
        negative_loss and logit_margin among the scores, each of the same canaries in every run and step.
      runs: Columns run, role, step, of all blocks (`block_scores.run_table`).
      names: Scores; those of `reference_scores` are added.
      population: For rmia: log-probabilities under all runs and steps.
      gamma: Of `reference_scores.rmia`.
      offline_a: Of `reference_scores.rmia`.

    Returns:
      Columns as `scores`, of audited and surrogate runs alone.

    Raises:
      ValueError: If there are too few reference runs, or the population lacks a run or step.

    Guarantees:
      Values do not depend on the coins.
    """
    added, references = [name for name in names if name in reference_scores.MIN_REFERENCES], of_role(runs, "reference")
    for name in added:
        if len(references) < (least := reference_scores.MIN_REFERENCES[name]):
            raise ValueError(f"runs has {len(references)} reference runs, expected at least {least} for {name}")
    ordered = scores.sort_values(["run", "canary_id"])
    is_reference = ordered["run"].isin(references)
    frames = [ordered[~is_reference]]
    for step in sorted(runs["step"].unique()) if added else ():
        own, others = (rows[rows["step"] == step] for rows in (ordered[~is_reference], ordered[is_reference]))
        for name in added:
            if name == "rmia":
                values = _rmia(own, others, population, gamma=gamma, offline_a=offline_a)
            elif name == "offline_lira":
                values = reference_scores.offline_lira(*(_by_run(rows, "logit_margin") for rows in (own, others)))
            else:
                losses = (_by_run(rows, "negative_loss") for rows in (own, others))
                values = reference_scores.relative_to_reference(*losses)
            frames.append(own[own["score"] == "negative_loss"].assign(score=name, value=values.ravel()))
    return pd.concat(frames, ignore_index=True)


def _rmia(own: pd.DataFrame, others: pd.DataFrame, population: Population, **options: float) -> np.ndarray:
    """RMIA [K, m] of K runs at a step; `others` are the reference runs."""
    losses, reference = (_by_run(rows, "negative_loss") for rows in (own, others))
    of_own, of_reference = (_of_population(rows, population) for rows in (own, others))
    by_run = zip(losses, of_own, strict=True)
    return np.array([reference_scores.rmia(*of_run, reference, of_reference, **options) for of_run in by_run])


def _by_run(ordered: pd.DataFrame, score: str) -> np.ndarray:
    """Values [K, m] of a score at one step, from rows that are ordered by run and canary."""
    rows = ordered[ordered["score"] == score]
    return rows["value"].to_numpy().reshape(rows["run"].nunique(), -1)


def _of_population(rows: pd.DataFrame, population: Population) -> np.ndarray:
    """Log-probabilities [K, z] of the population under the runs of these rows, which are all of one step."""
    runs, step = sorted(rows["run"].unique()), rows["step"].iloc[0]
    found = {
        run: log_probability[0]
        for block in population
        for run, log_probability in zip(block["run"], block["log_probability"][:, block["step"] == step], strict=True)
        if len(log_probability)
    }
    if missing := [int(run) for run in runs if run not in found]:
        raise ValueError(f"population lacks runs {missing} at step {step}, expected all runs and steps for rmia")
    return np.array([found[run] for run in runs])
