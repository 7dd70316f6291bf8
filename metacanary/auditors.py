"""The auditors: each turns what a game shows into a lower bound on epsilon.

An auditor is a bound from `bounds`, `bounds_fdp`, `bounds_product` or `bounds_rates`, and the statistic that it takes:
a count of right guesses, error rates, or the AUROC. docs/auditing.md says what each claims, and what breaks it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special, stats

from metacanary import accounting, bounds, bounds_fdp, bounds_product, bounds_rates
from metacanary.guesses import Games, Guesses

Numbers = tuple[int, ...]

_INDEPENDENT = {"product": "worst_case", "family+product": "family"}
_DEPENDENT = {independent: product for product, independent in _INDEPENDENT.items()}


@dataclass(frozen=True, kw_only=True)
class Statistic:
    """What an auditor looks at, as a tuple of integers.

    Attributes:
      observe: (games, guesses) -> one tuple per run, of the games' coins.
      expect: (surrogate games, guesses, m) -> what guesses that would be right as often give on m coins, or None where
        the surrogates have too few coins to tell.
      promise: tuple -> a number that is larger for what is likely to give a larger bound; it only saves time.
      perfect: (tuple, guesses) -> the same without errors, but for those that set a threshold.
      nested: Whether more perfect guesses never give a smaller bound.
      chosen: Whether it depends on the guesses at all.
      counts: (tuple, guesses) -> (guesses made, IN among them, right ones).
    """

    observe: Callable[[Games, Guesses], list[Numbers]]
    expect: Callable[[Games, Guesses, int], Numbers | None]
    promise: Callable[[Numbers], float]
    perfect: Callable[[Numbers, Guesses], Numbers]
    nested: bool
    chosen: bool
    counts: Callable[[Numbers, Guesses], Numbers]


@dataclass(frozen=True, kw_only=True)
class Auditor:
    """A lower bound on epsilon.

    Attributes:
      name: As in the results table.
      assumption: What must hold beside the rules of the game: "worst_case" (nothing), "family" (the mechanism's
        trade-off curve is Gaussian), "product" (canaries do not influence each other), "family+product", "asymptotic"
        (both, and many canaries), or "credible" (no confidence bound at all).
      statistic: What it looks at.
      root: (statistic, delta, significance, floor) -> the largest rejected parameter, or the floor.
      to_epsilon: (parameter, delta) -> epsilon.
    """

    name: str
    assumption: str
    statistic: Statistic
    root: Callable[[Numbers, float, float, float], float]
    to_epsilon: Callable[[float, float], float]

    def assumes(self, protocol: str, *, multi_run: bool = False) -> str:
        """The assumption under a protocol: "none" under "paper".

        Under "holdout" and "median" the number of guesses comes from the same output as what is tested. Then canaries
        must not influence each other: else a mechanism may announce in one half how many coins it gives away in the
        other. Where each canary has a training run of its own, they do not, whatever the protocol.
        """
        if protocol == "paper":
            return "none"
        if multi_run:
            return _INDEPENDENT.get(self.assumption, self.assumption)
        split = protocol in ("holdout", "median")
        return _DEPENDENT.get(self.assumption, self.assumption) if split else self.assumption


def _observe_guesses(games: Games, guesses: Guesses) -> list[Numbers]:
    """(m, r, v) of each run."""
    right_in, right_out = games.right
    right = right_in[:, guesses[0]] + right_out[:, guesses[1]]
    return [(games.size, sum(guesses), int(v)) for v in right]


def _expect_guesses(surrogates: Games, guesses: Guesses, size: int) -> Numbers | None:
    """(m, r, v) with the accuracy of the surrogates' guesses."""
    scaled = _scaled(guesses, surrogates.size / size)
    if scaled is None:
        return None
    _, made, right = np.sum(_observe_guesses(surrogates, scaled), axis=0)
    return size, sum(guesses), int(sum(guesses) * (right + 0.5) / (made + 1))


def _promise_of_guesses(numbers: Numbers) -> float:
    """The lower limit of the guesses' accuracy."""
    _, made, right = numbers
    return float(special.betaincinv(right, made - right + 1, 0.05)) if right else 0.0


def _observe_rates(games: Games, guesses: Guesses) -> list[Numbers]:
    """(TP, FN, FP, TN) of each run, all 0 if all its coins are equal.

    The threshold is an order statistic of one group: with k guesses IN of m coins, that many of 1/m of the non-members
    are above it, the last one not counted; without guesses IN, the same of the members below it.
    """
    # With guesses OUT only, the same from the other end: swap the groups, then swap the rates back.
    from_above = guesses[0] > 0
    coins = games.ascending[:, ::-1] if from_above else ~games.ascending
    share = (guesses[0] or guesses[1]) / games.size / (2 if games.paired else 1)
    others = np.cumsum(~coins, axis=1)
    rates: list[Numbers] = []
    for positives, negatives in zip(coins, others, strict=True):
        num_in, num_out = int(positives.sum()), int(negatives[-1])
        if num_in == 0 or num_out == 0:
            rates.append((0, 0, 0, 0))
            continue
        rank = max(1, round(share * num_out))
        hits = int(np.searchsorted(negatives, rank)) - (rank - 1)
        counted = (hits, num_in - hits, rank - 1, num_out - rank + 1)
        rates.append(counted if from_above else counted[::-1])
    return rates


def _expect_rates(surrogates: Games, guesses: Guesses, size: int) -> Numbers | None:
    """(TP, FN, FP, TN) with the rates of the surrogates, half of the coins IN."""
    scaled = _scaled(guesses, surrogates.size / size)
    if scaled is None:
        return None
    hits, missed, false, rejected = np.sum(_observe_rates(surrogates, scaled), axis=0)
    num_in, num_out = size // 2, size - size // 2
    errors_in = round(num_in * (missed + 0.5) / (hits + missed + 1))
    errors_out = round(num_out * (false + 0.5) / (false + rejected + 1))
    return num_in - errors_in, errors_in, errors_out, num_out - errors_out


def _promise_of_rates(numbers: Numbers) -> float:
    """How many times more often members are said IN than non-members."""
    hits, missed, false, rejected = numbers
    return (hits + 0.5) / (hits + missed + 1) / ((false + 0.5) / (false + rejected + 1))


def _perfect_rates(numbers: Numbers, guesses: Guesses) -> Numbers:
    """The same without errors in the group that did not set the threshold."""
    hits, missed, false, rejected = numbers
    return (hits + missed, 0, false, rejected) if guesses[0] else (hits, missed, 0, false + rejected)


def _observe_auroc(games: Games, guesses: Guesses) -> list[Numbers]:
    """(twice the Mann-Whitney statistic, members, non-members) of each run; ties count 1/2."""
    ranks = stats.rankdata(games.values, axis=1)
    num_in = games.coins.sum(axis=1)
    rank_sums = np.where(games.coins, ranks, 0.0).sum(axis=1)
    twice = np.rint(2 * rank_sums - num_in * (num_in + 1)).astype(int)
    return [(int(u), int(n), games.size - int(n)) for u, n in zip(twice, num_in, strict=True)]


def _scaled(guesses: Guesses, factor: float) -> Guesses | None:
    """So many times the guesses; None where nothing of a side is left."""
    first, second = (round(k * factor) for k in guesses)
    return None if any(k > 0 == new for k, new in zip(guesses, (first, second), strict=True)) else (first, second)


GUESSES = Statistic(
    observe=_observe_guesses,
    expect=_expect_guesses,
    promise=_promise_of_guesses,
    perfect=lambda numbers, guesses: (numbers[0], numbers[1], numbers[1]),
    nested=True,
    chosen=True,
    counts=lambda numbers, guesses: (numbers[1], guesses[0], numbers[2]),
)
RATES = Statistic(
    observe=_observe_rates,
    expect=_expect_rates,
    promise=_promise_of_rates,
    perfect=_perfect_rates,
    nested=False,
    chosen=True,
    counts=lambda numbers, guesses: (sum(numbers), numbers[0] + numbers[2], numbers[0] + numbers[3]),
)
AUROC = Statistic(
    observe=_observe_auroc,
    expect=lambda surrogates, guesses, size: None,
    promise=lambda numbers: 0.0,
    perfect=lambda numbers, guesses: (2 * numbers[1] * numbers[2], numbers[1], numbers[2]),
    nested=True,
    chosen=False,
    counts=lambda numbers, guesses: (0, 0, 0),
)


def _identity(epsilon: float, delta: float) -> float:
    """For auditors whose parameter is epsilon."""
    return epsilon


AUDITORS = (
    Auditor(
        name="steinke",
        assumption="worst_case",
        statistic=GUESSES,
        root=lambda n, delta, level, floor: bounds.steinke_root(*n, delta, level, floor),
        to_epsilon=_identity,
    ),
    Auditor(
        name="fdp_epsilon_delta",
        assumption="worst_case",
        statistic=GUESSES,
        root=lambda n, delta, level, floor: bounds_fdp.fdp_epsilon_delta_root(*n, delta, level, floor),
        to_epsilon=_identity,
    ),
    Auditor(
        name="fdp_gaussian",
        assumption="family",
        statistic=GUESSES,
        root=lambda n, delta, level, floor: bounds_fdp.fdp_gaussian_root(*n, level, floor),
        to_epsilon=accounting.gaussian_epsilon,
    ),
    Auditor(
        name="order_statistic",
        assumption="product",
        statistic=GUESSES,
        root=lambda n, delta, level, floor: bounds_product.order_statistic_root(*n, delta, level, floor),
        to_epsilon=_identity,
    ),
    Auditor(
        name="order_statistic_gaussian",
        assumption="family+product",
        statistic=GUESSES,
        root=lambda n, delta, level, floor: bounds_product.order_statistic_gaussian_root(*n, level, floor),
        to_epsilon=accounting.gaussian_epsilon,
    ),
    Auditor(
        name="clopper_pearson",
        assumption="product",
        statistic=RATES,
        root=lambda n, delta, level, floor: max(floor, bounds_rates.clopper_pearson_root(n, delta, level)),
        to_epsilon=_identity,
    ),
    Auditor(
        name="gaussian_rates",
        assumption="family+product",
        statistic=RATES,
        root=lambda n, delta, level, floor: max(floor, bounds_rates.gaussian_rates_root(n, level)),
        to_epsilon=accounting.gaussian_epsilon,
    ),
    Auditor(
        name="gaussian_auroc",
        assumption="asymptotic",
        statistic=AUROC,
        root=lambda n, delta, level, floor: max(floor, bounds_rates.gaussian_auroc_root(n, level)),
        to_epsilon=accounting.gaussian_epsilon,
    ),
    Auditor(
        name="credible_rates",
        assumption="credible",
        statistic=RATES,
        root=lambda n, delta, level, floor: bounds_rates.credible_rates_root(n, delta, level, floor),
        to_epsilon=_identity,
    ),
)
NAMES = tuple(auditor.name for auditor in AUDITORS)


def select(names: Sequence[str] | None) -> list[Auditor]:
    """The auditors of these names, in the order of `AUDITORS`; all for None. ValueError for an unknown name."""
    unknown = [name for name in names or () if name not in NAMES]
    if unknown or (names is not None and not names):
        raise ValueError(f"auditors is {list(names or ())}, expected some of {', '.join(NAMES)}")
    return [auditor for auditor in AUDITORS if names is None or auditor.name in names]
