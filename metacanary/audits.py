"""From scores and coins to lower bounds on epsilon.

`python -m metacanary.audits FILE --delta DELTA` audits a file of scores. docs/auditing.md says what each number claims,
and what breaks it.
"""

import sys
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

from metacanary import bounds, protocols
from metacanary.auditors import Auditor, select
from metacanary.bounds import steinke, steinke_p_value
from metacanary.bounds_fdp import fdp_epsilon_delta, fdp_gaussian, fdp_gaussian_mu
from metacanary.bounds_product import order_statistic, order_statistic_gaussian, order_statistic_gaussian_mu
from metacanary.bounds_rates import clopper_pearson, credible_rates, gaussian_auroc_mu, gaussian_rates
from metacanary.guesses import Games, Guesses, count_correct, default_grid, make_games
from metacanary.protocols import PROTOCOLS, Finding, Options
from metacanary.scores import auroc

__all__ = [
    "COLUMNS",
    "PROTOCOLS",
    "audit",
    "clopper_pearson",
    "count_correct",
    "credible_rates",
    "default_grid",
    "fdp_epsilon_delta",
    "fdp_gaussian",
    "fdp_gaussian_mu",
    "gaussian_auroc_mu",
    "gaussian_rates",
    "order_statistic",
    "order_statistic_gaussian",
    "order_statistic_gaussian_mu",
    "steinke",
    "steinke_p_value",
]

COLUMNS = (
    "auditor",
    "protocol",
    "assumption",
    "adjacency",
    "epsilon_lower",
    "ceiling",
    "num_canaries",
    "num_guesses",
    "num_guesses_in",
    "num_correct",
    "auroc",
)
POOLED = "pooled"
_IMPOSSIBLE = 1e-6  # probability of coins that are refused
_ENOUGH_COINS = 30  # two runs have these in common with probability 1e-9


def audit(
    scores: npt.ArrayLike,
    included: npt.ArrayLike,
    *,
    delta: float,
    significance: float = 0.05,
    pairs: npt.ArrayLike | None = None,
    protocol: str | None = None,
    num_guesses: int | float | Guesses | None = None,
    grid: Sequence[int | float | Guesses] | None = None,
    spending: str = "bonferroni",
    surrogates: tuple[npt.ArrayLike, npt.ArrayLike] | None = None,
    num_splits: int = 25,
    seed: int = 0,
    multi_run: bool = False,
    auditors: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Lower bounds on epsilon from the scores of one game or of several, one row per auditor (and run).

    Args:
      scores: Shape [m], or [R, m] for R runs; finite; higher means more likely to have been inserted.
      included: The same shape, 0 or 1: the coins. Fair and independent, each run's its own; in the paired game one fair
        coin per pair.
      delta: Where epsilon is bounded, in (0, 1).
      significance: Probability of a bound above the true epsilon (one minus confidence), in (0, 0.5).
      pairs: Shape [m], the pair number of each canary, for the paired game; None for independent coins.
      protocol: How the number of guesses is chosen; None for "surrogate" if there are surrogates, else "corrected".
        "fixed": `num_guesses`, declared before looking at the scores. "corrected": the best of `grid`, declared before
        looking, the significance spent over it. "holdout": the best of `grid` on one half of the coins, tested on the
        other. "median": the median of such bounds over `num_splits` splits, each at half the significance. "surrogate":
        the best of `grid` on `surrogates`. "paper": the best on the same scores, uncorrected; no valid bound, but what
        published numbers may have done.
      num_guesses: For "fixed": (IN, OUT), or their sum, half of it IN; a float is a fraction of the coins; None for all
        canaries (pairs).
      grid: For all but "fixed": distinct numbers of guesses. None: `default_grid`; 1 .. m (1,000 of them) for "paper";
        all of `guesses.two_sided_grid` for "surrogate".
      spending: For "corrected": "bonferroni" (equal shares) or "geometric" (1/2, 1/4, ... in the order of the grid).
      surrogates: For "surrogate": scores [S, m'] and coins of runs that are not audited; with `pairs`, m' = m.
      num_splits: For "median", >= 1.
      seed: Of the splits.
      multi_run: Whether each score comes from a training run of its own; then independence is no assumption.
      auditors: Names of `auditors.AUDITORS`; None for all.

    Returns:
      One row per auditor with columns `COLUMNS`. `num_canaries` counts the tested coins: pairs in the paired game, half
      of them under "holdout" and "median". `ceiling` is the largest bound that the protocol could have given, had no
      guess been wrong; `assumption` is that of `Auditor.assumes`, "none" under "paper"; `num_guesses_in` of
      `num_guesses` are IN; rates decide on all canaries, an AUROC makes no guesses (0); `auroc` is NaN if all coins are
      equal. For [R, m] the first column is `run`, 0 .. R-1, and "pooled" for the coins of all runs as one game.

    Raises:
      ValueError: If shapes differ, scores are not finite, coins are not 0 or 1, a pair has not exactly two members with
        exactly one included, a number of guesses exceeds the canaries, or an option does not belong to the protocol.
        Also if the coins cannot be what they should: so many or few in that fair coins give it with a probability below
        1e-6, two runs, or an audited and a surrogate run, with the same 30 or more coins, or with equal scores too.

    Guarantees:
      - But under "paper", each row, under its assumption, exceeds the true epsilon with probability at most
        `significance`; "asymptotic" rows for many canaries, "credible" rows not. (Two rows are not one simultaneous
        statement.)
      - Scores that do not depend on the coins, ties included, give the bound 0 with probability at least
        1 - significance if the order of rows does not depend on the coins either. If it does (members first), tied
        scores still give about chance, not a perfect attack.
      - Depends on the scores through their order only (in the paired game: on that of gaps too). The order of rows
        decides ties, the halves of "holdout" and "median", and in the paired game which member of a pair comes first,
        which rates and AUROC see; no level depends on it.

    References:
      Steinke, Nasr, Jagielski 2023, arXiv 2305.08846, Algorithm 1.
      Mahloujifar, Melis, Chaudhuri 2024, arXiv 2410.22235. Xiang et al. 2025, arXiv 2509.08704.
      Jagielski, Ullman, Oprea 2020, arXiv 2006.07709. Nasr et al. 2023, arXiv 2302.07956.
      Zanella-Beguelin et al. 2022, arXiv 2206.05199. Meinshausen, Meier, Buehlmann 2009, arXiv 0811.2177 ("median").
    """
    bounds.check_delta(delta, zero=False)
    bounds.check_significance(significance)
    games = make_games(scores, included, pairs)
    protocol = protocol or ("corrected" if surrogates is None else "surrogate")
    options = Options(
        delta=delta,
        significance=significance,
        num_guesses=num_guesses,
        grid=grid,
        spending=spending,
        surrogates=None if surrogates is None else make_games(*surrogates, pairs),
        num_splits=num_splits,
        seed=seed,
    )
    protocols.check(protocol, options, games)
    _check_coins(games, options.surrogates)
    chosen = select(auditors)
    values, coins = np.atleast_2d(np.asarray(scores, np.float64)), np.atleast_2d(np.asarray(included)).astype(bool)
    rows = _rows(
        games, chosen, protocol, options, [_auroc(v, c) for v, c in zip(values, coins, strict=True)], multi_run
    )
    if np.ndim(scores) == 1:
        return pd.DataFrame(rows, columns=list(COLUMNS))
    runs = [str(run) for run in range(len(values)) for _ in chosen]
    rows += _rows(games.pooled(), chosen, protocol, options, [_auroc(values.ravel(), coins.ravel())], multi_run)
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    frame.insert(0, "run", runs + [POOLED] * len(chosen))
    return frame


def _rows(
    games: Games,
    chosen: Sequence[Auditor],
    protocol: str,
    options: Options,
    areas: Sequence[float],
    multi_run: bool,
) -> list[dict[str, object]]:
    """A row per run and auditor; an AUROC per run is given."""
    found = [protocols.find(auditor, protocol, options, games) for auditor in chosen]
    return [
        _row(auditor, findings[run], protocol, options.delta, multi_run)
        | {"adjacency": "replace_one" if games.paired else "add_remove", "auroc": area}
        for run, area in enumerate(areas)
        for auditor, findings in zip(chosen, found, strict=True)
    ]


def _row(auditor: Auditor, finding: Finding, protocol: str, delta: float, multi_run: bool) -> dict[str, object]:
    """What an auditor found in a run."""
    made, guessed_in, right = auditor.statistic.counts(finding.numbers, finding.guesses)
    return {
        "auditor": auditor.name,
        "protocol": protocol,
        "assumption": auditor.assumes(protocol, multi_run=multi_run),
        "epsilon_lower": auditor.to_epsilon(finding.parameter, delta),
        "ceiling": auditor.to_epsilon(finding.ceiling, delta),
        "num_canaries": finding.size,
        "num_guesses": made,
        "num_guesses_in": guessed_in,
        "num_correct": right,
    }


def _check_coins(games: Games, surrogates: Games | None) -> None:
    """ValueError if coins are not fair, or shared by runs: mistakes that give large bounds without any leak."""
    if not games.paired:  # of a pair one is in, whatever the coin
        for num_in in games.coins.sum(axis=1):
            chance = stats.binomtest(int(num_in), games.size).pvalue
            if chance < _IMPOSSIBLE:
                raise ValueError(
                    f"included: {num_in} of {games.size} canaries are in, which fair coins give with probability "
                    f"{chance:.1g}; expected a fair coin for each canary, flipped before training"
                )
    if games.size >= _ENOUGH_COINS and len(np.unique(games.coins, axis=0)) < len(games.coins):
        raise ValueError("included: two runs have the same coins, expected each run to flip its own")
    if surrogates is None or surrogates.size != games.size:
        return
    for coins, values in zip(surrogates.coins, surrogates.values, strict=True):
        same = (games.coins == coins).all(axis=1)
        if games.size < _ENOUGH_COINS:
            same &= (games.values == values).all(axis=1)
        if same.any():
            raise ValueError("surrogates: a run has the coins of an audited run, expected runs that are not audited")


def _auroc(values: np.ndarray, coins: np.ndarray) -> float:
    """`scores.auroc`, NaN if all coins are equal."""
    return auroc(values, coins) if 0 < coins.sum() < len(coins) else float("nan")


if __name__ == "__main__":
    from metacanary import audit_file

    sys.exit(audit_file.main())
