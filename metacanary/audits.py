"""From scores and coins to lower bounds on epsilon: guesses, protocols, auditors.

docs/auditing.md says what each number claims, and what breaks it.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import special

from metacanary import accounting, bounds
from metacanary.bounds import fdp_gaussian, fdp_gaussian_mu, steinke, steinke_p_value
from metacanary.scores import auroc

__all__ = [
    "AUDITORS",
    "COLUMNS",
    "PROTOCOLS",
    "Auditor",
    "audit",
    "count_correct",
    "default_grid",
    "fdp_gaussian",
    "fdp_gaussian_mu",
    "steinke",
    "steinke_p_value",
]

PROTOCOLS = ("fixed", "corrected", "paper")
COLUMNS = (
    "auditor",
    "protocol",
    "assumption",
    "adjacency",
    "epsilon_lower",
    "ceiling",
    "num_canaries",
    "num_guesses",
    "num_correct",
    "auroc",
)
_SMALLEST_GUESSES = 10  # fewer right guesses reject little: 10 of 10 bound epsilon by 1.05 at level 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class Auditor:
    """A way to turn a count of right guesses into a lower bound.

    Attributes:
      name: As in the results table.
      assumption: What must hold of the mechanism: "worst_case" (nothing) or "family" (its curve is Gaussian).
      root: (num_canaries, num_guesses, num_correct, delta, significance, floor) -> the largest rejected
        parameter, or the floor.
      to_epsilon: (parameter, delta) -> epsilon.
    """

    name: str
    assumption: str
    root: Callable[[int, int, int, float, float, float], float]
    to_epsilon: Callable[[float, float], float]


AUDITORS = (
    Auditor(
        name="steinke",
        assumption="worst_case",
        root=bounds.steinke_root,
        to_epsilon=lambda epsilon, delta: epsilon,
    ),
    Auditor(
        name="fdp_gaussian",
        assumption="family",
        root=lambda m, r, v, delta, level, floor: bounds.fdp_gaussian_root(m, r, v, level, floor),
        to_epsilon=accounting.gaussian_epsilon,
    ),
)


def audit(
    scores: npt.ArrayLike,
    included: npt.ArrayLike,
    *,
    delta: float,
    significance: float = 0.05,
    pairs: npt.ArrayLike | None = None,
    protocol: str = "corrected",
    num_guesses: int | None = None,
    grid: Sequence[int] | None = None,
) -> pd.DataFrame:
    """Lower bounds on epsilon from the scores of one game, one row per auditor.

    Runs may be pooled: concatenate their scores and coins (and give each run its own pair numbers).

    Args:
      scores: Shape [m], finite; higher means more likely to have been inserted.
      included: Shape [m], 0 or 1: the coins. Fair and independent; in the paired game one fair coin per pair.
      delta: Where epsilon is bounded, in (0, 1).
      significance: Probability of a bound above the true epsilon (one minus confidence), in (0, 0.5).
      pairs: Shape [m], the pair number of each canary, for the paired game; None for independent coins.
      protocol: How the number of guesses is chosen. "fixed": `num_guesses`, declared before looking at the
        scores. "corrected": the best of `grid`, declared before looking, each at level
        significance / len(grid). "paper": the best on the same scores, uncorrected; no valid bound, but what
        published numbers may have done.
      num_guesses: For "fixed"; None for all canaries (pairs).
      grid: For "corrected": distinct numbers of guesses; None for `default_grid`. For "paper" the same, but
        None for all of 1 .. m.

    Returns:
      One row per auditor with columns `COLUMNS`. `num_canaries` counts pairs in the paired game; `ceiling` is
      the bound for guesses that are all right; `assumption` is "none" under "paper"; `auroc` is NaN if all
      coins are equal.

    Raises:
      ValueError: If shapes differ, scores are not finite, coins are not 0 or 1, a pair has not exactly two
        members with exactly one included, a number of guesses exceeds the canaries, or an option does not
        belong to the protocol.

    Guarantees:
      - Under "fixed" and "corrected" each row, under its assumption, exceeds the true epsilon with
        probability at most `significance`. (The rows of two auditors are not one simultaneous statement.)
      - Scores that do not depend on the coins, ties included, give the bound 0 with probability at least
        1 - significance if the order of rows does not depend on the coins either. If it does (members first),
        tied scores still give about chance, not a perfect attack.
      - Depends on the scores through their order only (in the paired game: on that of gaps too).

    References:
      Steinke, Nasr, Jagielski 2023, arXiv 2305.08846, Algorithm 1.
      Mahloujifar, Melis, Chaudhuri 2024, arXiv 2410.22235.
    """
    _check_levels(delta, significance)
    values, coins = _check_game(scores, included)
    correct = _correct_by_guesses(values, coins, _check_pairs(pairs, coins))
    guesses, level = _plan(protocol, len(correct) - 1, significance, num_guesses, grid)
    shared = {
        "protocol": protocol,
        "adjacency": "add_remove" if pairs is None else "replace_one",
        "num_canaries": len(correct) - 1,
        "auroc": _auroc(values, coins),
    }
    rows = [shared | _bound(auditor, correct, guesses, delta, level) for auditor in AUDITORS]
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    return frame.assign(assumption="none") if protocol == "paper" else frame


def default_grid(num_canaries: int) -> tuple[int, ...]:
    """Numbers of guesses tried by "corrected": m, m/2, m/4, ... (rounded up) while at least 10.

    Args:
      num_canaries: Canaries, or pairs in the paired game (m), >= 1.

    Returns:
      Distinct numbers of guesses, largest first. They depend on m only and so cannot be fitted to the scores.

    Raises:
      ValueError: If num_canaries < 1.
    """
    if num_canaries < 1:
        raise ValueError(f"num_canaries is {num_canaries}, expected an integer >= 1")
    grid = [num_canaries]
    while (half := -(-num_canaries // 2 ** len(grid))) >= _SMALLEST_GUESSES:
        grid.append(half)
    return tuple(grid)


def count_correct(
    scores: npt.ArrayLike, included: npt.ArrayLike, num_guesses: int, *, pairs: npt.ArrayLike | None = None
) -> int:
    """How many of `num_guesses` guesses are right.

    Independent coins: the num_guesses // 2 highest scores are guessed IN, as many of the lowest (one more if
    odd) OUT. Pairs: in the num_guesses pairs with the largest gap of scores the member with the higher score
    is guessed IN. Ties are broken by a fixed pseudo-random order of positions, so that nothing leaks from how
    canaries are ordered.

    Args:
      scores: Shape [m], finite; higher means more likely to have been inserted.
      included: Shape [m], 0 or 1.
      num_guesses: At most m, or the number of pairs.
      pairs: Shape [m], the pair number of each canary; None for independent coins.

    Returns:
      The number of right guesses.

    Raises:
      ValueError: As `audit`.
    """
    values, coins = _check_game(scores, included)
    correct = _correct_by_guesses(values, coins, _check_pairs(pairs, coins))
    (guesses,) = _check_guesses("num_guesses", [num_guesses], len(correct) - 1)
    return int(correct[guesses])


def _correct_by_guesses(values: np.ndarray, coins: np.ndarray, pairs: np.ndarray | None) -> np.ndarray:
    """Right guesses for 0 .. m guesses: integers, shape [m + 1]."""
    # Any order that ignores the coins is valid; by position, a table with all IN rows first would tell them.
    tiebreak = np.random.default_rng(0).permutation(len(values))
    if pairs is not None:
        return _correct_pairs(values, coins, pairs, tiebreak)
    ascending = coins[np.lexsort((tiebreak, values))]
    right_in = np.concatenate([[0], np.cumsum(ascending[::-1])])
    right_out = np.concatenate([[0], np.cumsum(~ascending)])
    guesses = np.arange(len(values) + 1)
    return right_in[guesses // 2] + right_out[guesses - guesses // 2]


def _correct_pairs(values: np.ndarray, coins: np.ndarray, pairs: np.ndarray, tiebreak: np.ndarray) -> np.ndarray:
    """Right guesses for 0 .. m guesses among m pairs, largest gaps first: integers, shape [m + 1]."""
    members = np.lexsort((tiebreak, pairs)).reshape(-1, 2)
    first, second = values[members].T
    guessed = np.where(second > first, members[:, 1], members[:, 0])
    by_gap = np.lexsort((tiebreak[members[:, 0]], -np.abs(first - second)))
    return np.concatenate([[0], np.cumsum(coins[guessed][by_gap])])


def _plan(
    protocol: str, total: int, significance: float, num_guesses: int | None, grid: Sequence[int] | None
) -> tuple[np.ndarray, float]:
    """The numbers of guesses to try, and the level of each."""
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol is {protocol!r}, expected one of {PROTOCOLS}")
    if protocol == "fixed":
        if grid is not None:
            raise ValueError(f"grid is {grid!r}, expected None under protocol 'fixed' (it takes num_guesses)")
        declared = [total if num_guesses is None else num_guesses]
        return _check_guesses("num_guesses", declared, total), significance
    if num_guesses is not None:
        raise ValueError(f"num_guesses is {num_guesses!r}, expected None under protocol {protocol!r} (it takes grid)")
    if protocol == "paper":
        return _check_guesses("grid", range(1, total + 1) if grid is None else grid, total), significance
    guesses = _check_guesses("grid", default_grid(total) if grid is None else grid, total)
    return guesses, significance / len(guesses)


def _bound(auditor: Auditor, correct: np.ndarray, guesses: np.ndarray, delta: float, level: float) -> dict[str, object]:
    """The best bound over the numbers of guesses, and the ceiling."""
    total = len(correct) - 1
    right = correct[guesses]
    # The most promising first: for the others one test at the best parameter so far is enough.
    accuracy = special.betaincinv(np.maximum(right, 1), guesses - right + 1, level) * (right > 0)
    best, chosen = 0.0, int(np.argmax(guesses))
    for index in np.argsort(-accuracy, kind="stable"):
        root = auditor.root(total, int(guesses[index]), int(right[index]), delta, level, best)
        if root > best:
            best, chosen = root, int(index)
    most = int(guesses.max())
    return {
        "auditor": auditor.name,
        "assumption": auditor.assumption,
        "epsilon_lower": auditor.to_epsilon(best, delta),
        "ceiling": auditor.to_epsilon(auditor.root(total, most, most, delta, level, 0.0), delta),
        "num_guesses": int(guesses[chosen]),
        "num_correct": int(right[chosen]),
    }


def _auroc(values: np.ndarray, coins: np.ndarray) -> float:
    """`scores.auroc`, NaN if all coins are equal."""
    return auroc(values, coins) if 0 < coins.sum() < len(coins) else float("nan")


def _check_levels(delta: float, significance: float) -> None:
    """ValueError unless delta and significance are in range."""
    bounds.check_delta(delta, zero=False)
    bounds.check_significance(significance)


def _check_game(scores: npt.ArrayLike, included: npt.ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Scores as float64 [m], coins as bool [m]."""
    values, coins = np.asarray(scores, np.float64), np.asarray(included)
    if values.ndim != 1 or values.size == 0 or values.shape != coins.shape:
        raise ValueError(
            f"scores and included have shapes {values.shape} and {coins.shape}, expected the same [m], m >= 1"
        )
    if not np.isfinite(values).all():
        raise ValueError(f"scores has {np.count_nonzero(~np.isfinite(values))} values that are not finite")
    if not np.isin(coins, (0, 1)).all():
        raise ValueError(f"included has values {np.unique(coins)[:5]}, expected 0 and 1 only")
    return values, coins.astype(bool)


def _check_pairs(pairs: npt.ArrayLike | None, coins: np.ndarray) -> np.ndarray | None:
    """Pair numbers as an array [m]: each number twice, one member included."""
    if pairs is None:
        return None
    numbers = np.asarray(pairs)
    if numbers.shape != coins.shape or not np.issubdtype(numbers.dtype, np.integer):
        raise ValueError(f"pairs has shape {numbers.shape} and dtype {numbers.dtype}, expected integers {coins.shape}")
    unique, inverse, members = np.unique(numbers, return_inverse=True, return_counts=True)
    if (members != 2).any():
        raise ValueError(f"pairs: pair {unique[members != 2][0]} has {members[members != 2][0]} members, expected 2")
    inserted = np.bincount(inverse, weights=coins)
    if (inserted != 1).any():
        raise ValueError(
            f"included: pair {unique[inserted != 1][0]} has {inserted[inserted != 1][0]:.0f} members in, expected 1"
        )
    return numbers


def _check_guesses(name: str, guesses: Sequence[int], total: int) -> np.ndarray:
    """Distinct numbers of guesses within 1 .. total, as an array."""
    numbers = np.asarray(list(guesses))
    if numbers.size == 0 or not np.issubdtype(numbers.dtype, np.integer) or len(np.unique(numbers)) != len(numbers):
        raise ValueError(f"{name} is {list(guesses)}, expected distinct integers")
    if numbers.min() < 1 or numbers.max() > total:
        raise ValueError(f"{name} is {list(guesses)}, expected 1 <= num_guesses <= {total} (canaries or pairs)")
    return numbers
