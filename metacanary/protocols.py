"""Protocols: how the number of guesses is chosen, and what that costs.

Choosing the number on the scores that are then tested is a multiple comparison. Each protocol but "paper" pays for it,
or chooses elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from metacanary.auditors import Auditor, Numbers
from metacanary.guesses import Games, Guesses, check_guesses, default_grid, two_sided_grid

PROTOCOLS = ("fixed", "corrected", "holdout", "median", "surrogate", "paper")
SPENDING = ("bonferroni", "geometric")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a protocol is told beforehand.

    Attributes:
      delta: Where epsilon is bounded, in (0, 1).
      significance: Probability of a bound above the true epsilon, in (0, 0.5).
      num_guesses: For "fixed"; None for all canaries (pairs).
      grid: Numbers of guesses to choose from; None for the protocol's own.
      spending: How "corrected" spends the significance over its grid.
      surrogates: Games of runs that are not audited, for "surrogate".
      num_splits: For "median".
      seed: Of the splits of "holdout" and "median".
    """

    delta: float
    significance: float = 0.05
    num_guesses: int | float | Guesses | None = None
    grid: Sequence[int | float | Guesses] | None = None
    spending: str = "bonferroni"
    surrogates: Games | None = None
    num_splits: int = 25
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What an auditor finds in one run.

    Attributes:
      parameter: The largest rejected parameter of the auditor.
      ceiling: The most that it could have been under the protocol, over all guesses to choose from, had there been no
        errors.
      numbers: What it looked at.
      guesses: (IN, OUT) that were made.
      size: Coins that were tested (m), fewer than the run's where some of them chose the guesses.
    """

    parameter: float
    ceiling: float
    numbers: Numbers
    guesses: Guesses
    size: int


def check(protocol: str, options: Options, games: Games) -> None:
    """ValueError unless the options belong to the protocol and fit the games."""
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol is {protocol!r}, expected one of {PROTOCOLS}")
    if protocol == "fixed" and options.grid is not None:
        raise ValueError(f"grid is {options.grid!r}, expected None under protocol 'fixed' (it takes num_guesses)")
    if protocol != "fixed" and options.num_guesses is not None:
        raise ValueError(
            f"num_guesses is {options.num_guesses!r}, expected None under protocol {protocol!r} (it takes grid)"
        )
    if options.spending not in SPENDING:
        raise ValueError(f"spending is {options.spending!r}, expected one of {SPENDING}")
    if protocol == "surrogate" and options.surrogates is None:
        raise ValueError("surrogates is None, expected runs that are not audited under protocol 'surrogate'")
    if protocol != "surrogate" and options.surrogates is not None:
        raise ValueError(f"surrogates is given, expected None under protocol {protocol!r}")
    if options.surrogates is not None and options.surrogates.paired != games.paired:
        raise ValueError("surrogates are of another game than the scores, expected both paired or both independent")
    if options.num_splits < 1:
        raise ValueError(f"num_splits is {options.num_splits}, expected an integer >= 1")
    if protocol in ("holdout", "median") and games.size < 2:
        raise ValueError(f"scores have {games.size} coin, expected at least 2 under protocol {protocol!r}")


def find(auditor: Auditor, protocol: str, options: Options, games: Games) -> list[Finding]:
    """Audits each run under a protocol.

    Args:
      auditor: Whose bound.
      protocol: One of `PROTOCOLS`.
      options: Checked by `check`.
      games: Of R runs.

    Returns:
      A finding per run.

    Guarantees:
      - An auditor that has nothing to choose takes all coins at the full significance.
      - But under "paper", each exceeds the true parameter with probability at most the significance, given what the
        auditor assumes under the protocol (`Auditor.assumes`). "median" takes the median of bounds at half the
        significance: if it is too large, so are half of them, which has at most twice the probability that one is
        (Markov's inequality).
    """
    level = options.significance
    if not auditor.statistic.chosen:
        return _best(auditor, games, [(games.size, 0)], [level], options.delta)
    if protocol == "fixed":
        declared = [games.size if options.num_guesses is None else options.num_guesses]
        return _best(auditor, games, check_guesses("num_guesses", declared, games), [level], options.delta)
    if protocol == "corrected":
        grid = _grid(options, games, default_grid(games.size))
        return _best(auditor, games, grid, _spend(level, len(grid), options.spending), options.delta)
    if protocol == "paper":
        grid = _grid(options, games, _paper_grid(games.size))
        return _best(auditor, games, grid, [level] * len(grid), options.delta)
    if protocol == "surrogate":
        assert options.surrogates is not None
        grid = _grid(options, games, two_sided_grid(games.size, paired=games.paired))
        chosen = _choose(auditor, options.surrogates, grid, games.size, level, options.delta)
        return _tested(auditor, games, chosen, grid, level, options.delta)
    if protocol == "holdout":
        return [_split(auditor, games.run(run), options, level, options.seed) for run in range(len(games.values))]
    return [_median(auditor, games.run(run), options) for run in range(len(games.values))]


def _median(auditor: Auditor, game: Games, options: Options) -> Finding:
    """The lower median over splits of bounds at half the level."""
    seeds = [options.seed + split for split in range(options.num_splits)]
    found = [_split(auditor, game, options, options.significance / 2, seed) for seed in seeds]
    return sorted(found, key=lambda finding: finding.parameter)[(len(found) - 1) // 2]


def _split(auditor: Auditor, game: Games, options: Options, level: float, seed: int) -> Finding:
    """Chooses on one half of the coins, tests on the other."""
    first, second = game.split(seed)
    grid = _grid(options, second, default_grid(second.size))
    chosen = _choose(auditor, first, grid, second.size, level, options.delta)
    return _tested(auditor, second, chosen, grid, level, options.delta)[0]


def _tested(
    auditor: Auditor, games: Games, chosen: Guesses, grid: Sequence[Guesses], level: float, delta: float
) -> list[Finding]:
    """The bounds of guesses that were chosen from a grid elsewhere; the ceiling is over the grid."""
    found = _best(auditor, games, [chosen], [level], delta)
    able = _ceilings(auditor, games, grid, [level] * len(grid), delta)
    return [replace(finding, ceiling=ceiling) for finding, ceiling in zip(found, able, strict=True)]


def _choose(
    auditor: Auditor, surrogates: Games, grid: Sequence[Guesses], size: int, level: float, delta: float
) -> Guesses:
    """The guesses with the largest bound on so many coins, were they right as often as on the surrogates."""
    statistic = auditor.statistic
    expected = [(statistic.expect(surrogates, guesses, size), guesses) for guesses in grid]
    able = [(numbers, guesses) for numbers, guesses in expected if numbers is not None]
    best, chosen = 0.0, max(grid, key=sum)
    for numbers, guesses in sorted(able, key=lambda pair: -statistic.promise(pair[0])):
        root = auditor.root(numbers, delta, level, best)
        if root > best:
            best, chosen = root, guesses
    return chosen


def _best(
    auditor: Auditor, games: Games, grid: Sequence[Guesses], levels: Sequence[float], delta: float
) -> list[Finding]:
    """The largest bound over the guesses of a grid, each at its level."""
    statistic = auditor.statistic
    observed = [statistic.observe(games, guesses) for guesses in grid]
    runs = range(len(games.values))
    return [_best_of_run(auditor, [n[run] for n in observed], grid, levels, delta, games.size) for run in runs]


def _ceilings(
    auditor: Auditor, games: Games, grid: Sequence[Guesses], levels: Sequence[float], delta: float
) -> list[float]:
    """The ceiling of each run."""
    observed = [auditor.statistic.observe(games, guesses) for guesses in grid]
    return [_ceiling(auditor, [n[run] for n in observed], grid, levels, delta) for run in range(len(games.values))]


def _best_of_run(
    auditor: Auditor,
    observed: Sequence[Numbers],
    grid: Sequence[Guesses],
    levels: Sequence[float],
    delta: float,
    size: int,
) -> Finding:
    """The largest bound over what a run showed for each entry of the grid."""
    best, chosen = 0.0, max(range(len(grid)), key=lambda index: sum(grid[index]))
    # The most promising first: for the others one test at the best parameter so far is enough.
    tried = set()
    for index in sorted(range(len(grid)), key=lambda index: -auditor.statistic.promise(observed[index])):
        if (observed[index], levels[index]) in tried:
            continue
        tried.add((observed[index], levels[index]))
        root = auditor.root(observed[index], delta, levels[index], best)
        if root > best:
            best, chosen = root, index
    return Finding(
        parameter=best,
        ceiling=_ceiling(auditor, observed, grid, levels, delta),
        numbers=observed[chosen],
        guesses=grid[chosen],
        size=size,
    )


def _ceiling(
    auditor: Auditor, observed: Sequence[Numbers], grid: Sequence[Guesses], levels: Sequence[float], delta: float
) -> float:
    """The largest bound over the guesses of a grid, each at its level, had there been no errors."""
    statistic, best = auditor.statistic, 0.0
    perfect = [(statistic.perfect(n, guesses), level) for n, guesses, level in zip(observed, grid, levels, strict=True)]
    if statistic.nested:
        perfect = list({level: (numbers, level) for numbers, level in sorted(perfect)}.values())
    for numbers, level in sorted(set(perfect), key=lambda pair: -statistic.promise(pair[0])):
        best = auditor.root(numbers, delta, level, best)
    return best


def _paper_grid(size: int) -> list[int]:
    """Every number of guesses, or 1,000 of them where there are more."""
    return (
        list(dict.fromkeys(np.geomspace(1, size, 1000).round().astype(int).tolist()))
        if size > 1000
        else [*range(1, size + 1)]
    )


def _grid(options: Options, games: Games, default: Sequence[int | Guesses]) -> list[Guesses]:
    """The declared numbers of guesses, or the protocol's own, checked."""
    return check_guesses("grid", default if options.grid is None else options.grid, games)


def _spend(level: float, number: int, spending: str) -> list[float]:
    """The level of each of so many bounds; they add up to the level."""
    if spending == "bonferroni":
        return [level / number] * number
    shares = [0.5**index for index in range(number)]
    return [level * share / sum(shares) for share in shares]
