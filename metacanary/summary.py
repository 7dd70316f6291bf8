"""The tidy table of all audits: one row per cell, step, run, score, auditor and protocol.

A cell is one dataset, canary kind, training and target epsilon. All tables and figures read this table.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import cast

import numpy as np
import pandas as pd

from metacanary import accounting, audits

COLUMNS = (
    *("dataset", "canary", "training", "epsilon", "accountant", "epsilon_accounted", "epsilon_accounted_rdp"),
    *("game", "step", "run", "score", *audits.COLUMNS, "test_accuracy"),
)
KEYS = ("dataset", "canary", "training", "epsilon", "step", "run", "score", "auditor", "protocol")
POOLED = "pooled"
_ADJACENCY = {"independent": "add_remove", "paired": "replace_one"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is audited of a cell, and how; all of it declared before scores are seen.

    Attributes:
      scores: Names of the membership scores.
      game: "independent" or "paired" (canaries 2i and 2i+1 are pair i).
      delta: Where epsilon is bounded.
      significance: Probability of a bound above the true epsilon (one minus confidence).
      guess_fraction: Guesses of the protocol "fixed", as a fraction of the canaries (pairs), in (0, 1].
      grid: Fractions that the protocol "corrected" chooses from; None for `audits.default_grid`.
      accountant: "pld" or "rdp", for `epsilon_accounted`.
      sampling_prob: Of DP-SGD; None for training without privacy.
    """

    scores: Sequence[str]
    game: str
    delta: float
    significance: float = 0.05
    guess_fraction: float = 1.0
    grid: Sequence[float] | None = None
    accountant: str = "pld"
    sampling_prob: float | None = None

    def __post_init__(self) -> None:
        if self.game not in _ADJACENCY:
            raise ValueError(f"game is {self.game!r}, expected one of {', '.join(_ADJACENCY)}")
        for fraction in (self.guess_fraction, *(self.grid or ())):
            if not 0 < fraction <= 1:
                raise ValueError(f"guess_fraction and grid hold {fraction}, expected fractions in (0, 1]")


def run_table(arrays: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Lists the runs of a block, a row per run and snapshot.

    Args:
      arrays: A block of K runs with S snapshots: run [K], step [S], test_accuracy [K, S], noise_multiplier [K].

    Returns:
      Columns run, step, test_accuracy, noise_multiplier.
    """
    num_runs, num_steps = np.shape(arrays["test_accuracy"])
    return pd.DataFrame(
        {
            "run": np.repeat(arrays["run"], num_steps),
            "step": np.tile(arrays["step"], num_runs),
            "test_accuracy": np.ravel(arrays["test_accuracy"]),
            "noise_multiplier": np.repeat(arrays["noise_multiplier"], num_steps),
        }
    )


def epsilon_table(
    scores: pd.DataFrame,
    runs: pd.DataFrame,
    settings: Settings,
    *,
    cell: Mapping[str, str | float],
    on_game: Callable[[], object] | None = None,
) -> pd.DataFrame:
    """Audits all runs of a cell, each alone and all pooled.

    Args:
      scores: Columns run, step, canary_id, included, score, value, of all blocks (`scores.score_block`).
      runs: Columns run, step, test_accuracy, noise_multiplier (`run_table`), of all blocks.
      settings: How to audit.
      cell: dataset, canary, training, epsilon (the target).
      on_game: Called after each game, to show progress; there is one per step, score and run, and one of all runs.

    Returns:
      Columns `COLUMNS`, a row per step, run, score, protocol and auditor. `run` is a number or "pooled": the coins of
      all runs as one game. Accounted epsilons are those of the row's step and of the adjacency of its game;
      `epsilon_accounted_rdp` is missing in the paired game, which RDP accounting does not know.

    Raises:
      ValueError: If a score is missing, a run or canary comes twice, runs differ in their canaries, or scores and runs
        are not of the same runs and steps.

    Guarantees:
      The order of rows of `scores` and `runs` makes no difference.
    """
    _check_scores(scores, settings.scores)
    _check_same_runs(scores, runs)
    wanted = scores[scores["score"].isin(settings.scores)]
    rows = []
    for step, score, run, game in _games(wanted):
        rows.append(_audited(game, settings).assign(step=step, run=run, score=score))
        if on_game:
            on_game()
    table = pd.concat(rows, ignore_index=True).assign(**cell, game=settings.game, accountant=settings.accountant)
    table = table.merge(_by_step(runs, settings), on=["step", "run"], validate="many_to_one")
    return table[list(COLUMNS)]


def collect(frames: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Puts the tables of all cells one below the other.

    Args:
      frames: From `epsilon_table`.

    Returns:
      One table with `COLUMNS`.

    Raises:
      ValueError: If there is no frame, one has other columns, or two rows are of the same cell, step, run, score,
        auditor and protocol.
    """
    frames = list(frames)
    if not frames:
        raise ValueError("frames is empty, expected at least one table")
    for number, frame in enumerate(frames):
        if list(frame.columns) != list(COLUMNS):
            odd = sorted(set(frame.columns) ^ set(COLUMNS))
            raise ValueError(f"frames[{number}] has other columns ({odd}), expected those of summary.COLUMNS")
    table = pd.concat([frame.assign(run=frame["run"].astype(str)) for frame in frames], ignore_index=True)
    double = table[table.duplicated(list(KEYS))]
    if len(double):
        raise ValueError(f"frames hold {double.iloc[0][list(KEYS)].to_dict()} twice, expected each row once")
    return table


def _games(scores: pd.DataFrame) -> Iterator[tuple[int, str, str, pd.DataFrame]]:
    """Yields (step, score, run, game) for each run and for all runs as one game: coins of runs are independent."""
    ordered = scores.sort_values(["run", "canary_id"])
    for key, snapshot in ordered.groupby(["step", "score"], sort=True):
        step, score = cast(tuple[int, str], key)
        for run, game in snapshot.groupby("run", sort=True):
            yield step, score, str(run), game
        yield step, score, POOLED, snapshot


def _audited(game: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """Audits one game under every protocol."""
    pairs = None
    if settings.game == "paired":
        pairs = game.groupby(["run", game["canary_id"] // 2]).ngroup().to_numpy()
    total = len(game) if pairs is None else len(game) // 2
    audit = functools.partial(
        audits.audit,
        game["value"],
        game["included"],
        delta=settings.delta,
        significance=settings.significance,
        pairs=pairs,
    )
    fixed = audit(protocol="fixed", num_guesses=_guesses([settings.guess_fraction], total)[0])
    grid = None if settings.grid is None else _guesses(settings.grid, total)
    return pd.concat([fixed, audit(protocol="corrected", grid=grid), audit(protocol="paper")], ignore_index=True)


def _guesses(fractions: Sequence[float], total: int) -> list[int]:
    """Turns fractions of the canaries into distinct numbers of guesses, at least 1 each."""
    return sorted({max(1, round(fraction * total)) for fraction in fractions}, reverse=True)


def _by_step(runs: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """Lists accuracy and accounted epsilons by step and run; "pooled" has the mean accuracy of the runs."""
    noises = runs["noise_multiplier"].unique()
    if len(noises) != 1:
        raise ValueError(f"runs have the noise multipliers {noises.tolist()}, expected one for all runs of a cell")
    pooled = runs.groupby("step", as_index=False)["test_accuracy"].mean()
    pooled = pooled.assign(run=POOLED, noise_multiplier=noises[0])
    table = pd.concat([runs.assign(run=runs["run"].astype(str)), pooled], ignore_index=True)
    for name, accountant in (("epsilon_accounted", settings.accountant), ("epsilon_accounted_rdp", "rdp")):
        table[name] = [
            _accounted(noise, step, accountant, settings)
            for noise, step in zip(table["noise_multiplier"], table["step"], strict=True)
        ]
    return table.drop(columns="noise_multiplier")


def _accounted(noise_multiplier: float, step: int, accountant: str, settings: Settings) -> float:
    """Accounts for the steps so far."""
    adjacency = _ADJACENCY[settings.game]
    if settings.sampling_prob is None:
        return math.inf
    if accountant == "rdp" and adjacency == "replace_one":
        return math.nan
    return accounting.epsilon(
        noise_multiplier=float(noise_multiplier),
        sampling_prob=settings.sampling_prob,
        num_steps=int(step),
        delta=settings.delta,
        accountant=accountant,
        adjacency=adjacency,
    )


def _check_scores(scores: pd.DataFrame, wanted: Sequence[str]) -> None:
    """Checks that every wanted score is there once for the same canaries in every run and step."""
    missing = sorted({*wanted} - {*scores["score"]})
    if missing:
        raise ValueError(f"scores lacks {missing}, it has {sorted(set(scores['score']))}")
    if scores.duplicated(["run", "step", "score", "canary_id"]).any():
        raise ValueError("scores has a canary twice in a run, expected each canary once per run, step and score")
    sets = scores.groupby(["run", "step", "score"])["canary_id"].agg(frozenset)
    if sets.nunique() != 1:
        raise ValueError("scores has other canaries in one run than in another, expected the same in all")


def _check_same_runs(scores: pd.DataFrame, runs: pd.DataFrame) -> None:
    """Checks that scores and runs speak of the same runs and steps."""
    if runs.duplicated(["run", "step"]).any():
        raise ValueError("runs has a run twice, expected each run and step once")
    scored = {*scores[["run", "step"]].itertuples(index=False, name=None)}
    listed = {*runs[["run", "step"]].itertuples(index=False, name=None)}
    if scored != listed:
        raise ValueError(f"scores and runs differ in (run, step) {sorted(scored ^ listed)[:3]}, expected the same")
