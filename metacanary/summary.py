"""The tidy table of all audits: one row per cell, step, run, score, auditor and protocol.

A cell is one dataset, canary kind, training and target epsilon. All tables and figures read this table.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import pandas as pd

from metacanary import accounting, auditors, audits, heuristics, reference_scores
from metacanary.score_table import ROLES, Population, of_role, with_reference_scores

COLUMNS = (
    *("dataset", "canary", "training", "epsilon", "accountant", "epsilon_accounted", "epsilon_accounted_rdp"),
    *("epsilon_heuristic", "game", "step", "run", "score", *audits.COLUMNS, "test_accuracy"),
)
KEYS = ("dataset", "canary", "training", "epsilon", "step", "run", "score", "auditor", "protocol")
POOLED = audits.POOLED
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
      auditors: Names of `auditors.AUDITORS`.
      protocols: Of `audits.PROTOCOLS`; "surrogate" is left out where there are no surrogate runs.
      accountant: "pld" or "rdp", for `epsilon_accounted`.
      sampling_prob: Of DP-SGD; None for training without privacy.
      rmia_gamma: Of `reference_scores.rmia`.
      rmia_offline_a: Of `reference_scores.rmia`.
    """

    scores: Sequence[str]
    game: str
    delta: float
    significance: float = 0.05
    guess_fraction: float = 1.0
    grid: Sequence[float] | None = None
    auditors: Sequence[str] = auditors.NAMES
    protocols: Sequence[str] = ("fixed", "corrected", "surrogate", "paper")
    accountant: str = "pld"
    sampling_prob: float | None = None
    rmia_gamma: float = 1.0
    rmia_offline_a: float = 0.3

    def __post_init__(self) -> None:
        if self.game not in _ADJACENCY:
            raise ValueError(f"game is {self.game!r}, expected one of {', '.join(_ADJACENCY)}")
        for fraction in (self.guess_fraction, *(self.grid or ())):
            if not 0 < fraction <= 1:
                raise ValueError(f"guess_fraction and grid hold {fraction}, expected fractions in (0, 1]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Snapshot:
    """All games of one step and score: scores and coins [runs, m], by canary id, so that pairs stand side by side."""

    step: int
    score: str
    runs: list[int]
    audited: tuple[np.ndarray, np.ndarray]
    surrogates: tuple[np.ndarray, np.ndarray] | None


def epsilon_table(
    scores: pd.DataFrame,
    runs: pd.DataFrame,
    settings: Settings,
    *,
    cell: Mapping[str, str | float],
    population: Population = (),
    on_audit: Callable[[], object] | None = None,
) -> pd.DataFrame:
    """Audits all audited runs of a cell, each alone and all pooled.

    Args:
      scores: Columns run, step, canary_id, included, score, value, of all blocks (`block_scores.score_block`), of the
        wanted scores that need no reference models, and of negative_loss and logit_margin.
      runs: Columns run, role, step, test_accuracy, noise_multiplier (`block_scores.run_table`), of all blocks.
      settings: How to audit.
      cell: dataset, canary, training, epsilon (the target).
      population: Of all blocks, for rmia (`block_scores.population_block`).
      on_audit: Called after each step, score and protocol, to show progress.

    Returns:
      Columns `COLUMNS`, a row per step, run, score, protocol and auditor. `run` is a number or "pooled": the coins of
      all audited runs as one game. Accounted epsilons are those of the row's step and of the adjacency of its game;
      `epsilon_accounted_rdp` is missing in the paired game, which RDP accounting does not know.

    Raises:
      ValueError: If a score is missing, a run or canary comes twice, runs differ in their canaries, scores and runs
        are not of the same runs and steps, no run is audited, or reference models or the population are missing.

    Guarantees:
      The order of rows of `scores` and `runs` makes no difference.
    """
    _check_scores(scores, settings)
    _check_same_runs(scores, runs)
    _check_roles(runs)
    options = {"gamma": settings.rmia_gamma, "offline_a": settings.rmia_offline_a}
    scores = with_reference_scores(scores, runs, settings.scores, population=population, **options)
    rows = []
    for snapshot in _snapshots(scores, runs, settings.scores):
        for protocol in settings.protocols:
            if protocol != "surrogate" or snapshot.surrogates is not None:
                rows.append(_audited(snapshot, protocol, settings))
            if on_audit:
                on_audit()
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


def _snapshots(scores: pd.DataFrame, runs: pd.DataFrame, names: Sequence[str]) -> Iterator[_Snapshot]:
    """Yields the games of each step and score."""
    ordered = scores[scores["score"].isin(names)].sort_values(["run", "canary_id"])
    audited, surrogates = (of_role(runs, role) for role in ("audited", "surrogate"))
    for key, rows in ordered.groupby(["step", "score"], sort=True):
        step, score = cast(tuple[int, str], key)
        yield _Snapshot(
            step=step,
            score=score,
            runs=sorted(audited),
            audited=_games(rows, audited),
            surrogates=_games(rows, surrogates) if surrogates else None,
        )


def _games(rows: pd.DataFrame, runs: Collection[int]) -> tuple[np.ndarray, np.ndarray]:
    """Scores and coins [runs, m] of ordered rows."""
    chosen = rows[rows["run"].isin(runs)]
    values, included = (chosen[name].to_numpy().reshape(len(runs), -1) for name in ("value", "included"))
    return values, included


def _audited(snapshot: _Snapshot, protocol: str, settings: Settings) -> pd.DataFrame:
    """Audits each run of a snapshot under a protocol, and all of them as one game: coins of runs are independent."""
    values, included = snapshot.audited
    own: dict[str, dict[str, Any]] = {
        "fixed": {"num_guesses": float(settings.guess_fraction)},
        "surrogate": {"surrogates": snapshot.surrogates},
        "corrected": {"grid": None if settings.grid is None else list(map(float, settings.grid))},
    }
    table = audits.audit(
        values,
        included,
        delta=settings.delta,
        significance=settings.significance,
        pairs=np.arange(values.shape[1]) // 2 if settings.game == "paired" else None,
        protocol=protocol,
        auditors=settings.auditors,
        **own.get(protocol, {}),
    )
    numbers = {str(place): str(run) for place, run in enumerate(snapshot.runs)} | {POOLED: POOLED}
    return table.assign(run=table["run"].map(numbers), step=snapshot.step, score=snapshot.score)


def _by_step(runs: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """Lists accuracy and accounted epsilons by step and audited run; "pooled" has the mean accuracy of these runs."""
    noises = runs["noise_multiplier"].unique()
    if len(noises) != 1:
        raise ValueError(f"runs have the noise multipliers {noises.tolist()}, expected one for all runs of a cell")
    runs = runs[runs["role"] == "audited"].drop(columns="role")
    pooled = runs.groupby("step", as_index=False)["test_accuracy"].mean()
    pooled = pooled.assign(run=POOLED, noise_multiplier=noises[0])
    table = pd.concat([runs.assign(run=runs["run"].astype(str)), pooled], ignore_index=True)
    claims: dict[str, Callable[[float, int, Settings], float]] = {
        "epsilon_accounted": functools.partial(_accounted, accountant=settings.accountant),
        "epsilon_accounted_rdp": functools.partial(_accounted, accountant="rdp"),
        "epsilon_heuristic": _heuristic,
    }
    for name, claim in claims.items():
        steps = {step: claim(float(noises[0]), int(step), settings) for step in table["step"].unique()}
        table[name] = table["step"].map(steps)
    return table.drop(columns="noise_multiplier")


def _accounted(noise_multiplier: float, step: int, settings: Settings, *, accountant: str) -> float:
    """Accounts for the steps so far."""
    if settings.sampling_prob is None:
        return math.inf
    if accountant == "rdp" and settings.game == "paired":
        return math.nan
    return accounting.epsilon(**_mechanism(noise_multiplier, step, settings), accountant=accountant)


def _heuristic(noise_multiplier: float, step: int, settings: Settings) -> float:
    """What the last iterate alone would cost if losses were linear."""
    if settings.sampling_prob is None:
        return math.inf
    return heuristics.last_iterate_epsilon(**_mechanism(noise_multiplier, step, settings))


def _mechanism(noise_multiplier: float, step: int, settings: Settings) -> dict[str, Any]:
    """DP-SGD so far, as `accounting` and `heuristics` take it."""
    return {
        "noise_multiplier": noise_multiplier,
        "sampling_prob": settings.sampling_prob,
        "num_steps": step,
        "delta": settings.delta,
        "adjacency": _ADJACENCY[settings.game],
    }


def _check_scores(scores: pd.DataFrame, settings: Settings) -> None:
    """Checks that every wanted score is there once for the same canaries, or pairs, in every run and step."""
    derived = {*settings.scores} & {*reference_scores.MIN_REFERENCES}
    needed = {*settings.scores} - derived | ({"negative_loss", "logit_margin"} if derived else set())
    missing = sorted(needed - {*scores["score"]})
    if missing:
        raise ValueError(f"scores lacks {missing}, it has {sorted(set(scores['score']))}")
    if scores.duplicated(["run", "step", "score", "canary_id"]).any():
        raise ValueError("scores has a canary twice in a run, expected each canary once per run, step and score")
    sets = scores.groupby(["run", "step", "score"])["canary_id"].agg(frozenset)
    if sets.nunique() != 1:
        raise ValueError("scores has other canaries in one run than in another, expected the same in all")
    if settings.game == "paired" and (odd := [i for i in sets.iloc[0] if i ^ 1 not in sets.iloc[0]]):
        raise ValueError(
            f"scores has canaries {sorted(odd)} without the other of the pair, expected pairs (2i, 2i + 1)"
        )


def _check_roles(runs: pd.DataFrame) -> None:
    """Checks that roles are known, one to a run, and that there is a run to audit."""
    found = {*runs["role"]}
    if not {"audited"} <= found <= {*ROLES}:
        raise ValueError(f"runs has the roles {sorted(found)}, expected audited and perhaps {', '.join(ROLES[1:])}")
    if (runs.groupby("run")["role"].nunique() > 1).any():
        raise ValueError("runs has a run of two roles, expected one role for each run")


def _check_same_runs(scores: pd.DataFrame, runs: pd.DataFrame) -> None:
    """Checks that scores and runs speak of the same runs and steps."""
    if runs.duplicated(["run", "step"]).any():
        raise ValueError("runs has a run twice, expected each run and step once")
    scored = {*scores[["run", "step"]].itertuples(index=False, name=None)}
    listed = {*runs[["run", "step"]].itertuples(index=False, name=None)}
    if scored != listed:
        raise ValueError(f"scores and runs differ in (run, step) {sorted(scored ^ listed)[:3]}, expected the same")
