"""Membership guesses: which canaries are guessed, in or out, and how many of the guesses are right.

A number of guesses is a pair (IN, OUT), as k+ and k- of Steinke et al.: so many of the highest scores are guessed IN,
so many of the lowest OUT, and no guess is made on the rest. In the paired game every guess says which one of a pair is
in; (k, 0) are guesses on the k pairs with the largest gaps.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Guesses = tuple[int, int]

_SMALLEST = 10  # fewer right guesses reject little: 10 of 10 bound epsilon by 1.05 at level 0.05


@dataclass(frozen=True, eq=False, kw_only=True)
class Games:
    """The games of R runs with m coins each, checked.

    Attributes:
      values: Float64 [R, m], higher for IN. In the paired game the gap within a pair, first minus second member.
      coins: Bool [R, m]. In the paired game whether the first member is in.
      ties: Integers [m]: a fixed pseudo-random order that breaks ties. Any order that ignores the coins is valid; by
        position, a table with all IN rows first would tell them.
      paired: Whether the coins are of pairs.
    """

    values: np.ndarray
    coins: np.ndarray
    ties: np.ndarray
    paired: bool

    @property
    def size(self) -> int:
        """The number of coins of a run (m)."""
        return self.values.shape[1]

    @functools.cached_property
    def ascending(self) -> np.ndarray:
        """Coins by ascending value, bool [R, m]."""
        order = np.lexsort((np.broadcast_to(self.ties, self.values.shape), self.values), axis=1)
        return np.take_along_axis(self.coins, order, axis=1)

    @functools.cached_property
    def right(self) -> tuple[np.ndarray, np.ndarray]:
        """Right ones among the first k guesses IN, and among the first k guesses OUT: integers [R, m + 1]."""
        if not self.paired:
            return _counted(self.ascending[:, ::-1]), _counted(~self.ascending)
        order = np.lexsort((np.broadcast_to(self.ties, self.values.shape), -np.abs(self.values)), axis=1)
        hits = _counted(np.take_along_axis((self.values >= 0) == self.coins, order, axis=1))
        return hits, np.zeros_like(hits)

    def run(self, index: int) -> "Games":
        """The game of one run."""
        return Games(values=self.values[[index]], coins=self.coins[[index]], ties=self.ties, paired=self.paired)

    def pooled(self) -> "Games":
        """The coins of all runs as one game; valid if each run flips its own."""
        size = self.values.size
        ties = np.random.default_rng(0).permutation(size)
        return Games(values=self.values.reshape(1, -1), coins=self.coins.reshape(1, -1), ties=ties, paired=self.paired)

    def split(self, seed: int) -> tuple["Games", "Games"]:
        """Two halves of the coins, drawn without looking at them; the second has one more if m is odd."""
        order = np.random.default_rng(seed).permutation(self.size)
        return self._part(order[: self.size // 2]), self._part(order[self.size // 2 :])

    def _part(self, chosen: np.ndarray) -> "Games":
        return Games(
            values=self.values[:, chosen], coins=self.coins[:, chosen], ties=self.ties[chosen], paired=self.paired
        )


def make_games(scores: npt.ArrayLike, included: npt.ArrayLike, pairs: npt.ArrayLike | None = None) -> Games:
    """Check scores and coins.

    Args:
      scores: Shape [m] or [R, m], finite; higher means more likely to have been inserted.
      included: The same shape, 0 or 1.
      pairs: Shape [m], the pair number of each canary; None for independent coins.

    Returns:
      The games; the coins of the paired game are those of pairs.

    Raises:
      ValueError: If shapes differ, scores are not finite, coins are not 0 or 1, or a pair has not exactly two members
        with exactly one included.
    """
    values, coins = np.asarray(scores, np.float64), np.asarray(included)
    if values.ndim not in (1, 2) or values.size == 0 or values.shape != coins.shape:
        raise ValueError(
            f"scores and included have shapes {values.shape} and {coins.shape}, expected the same [m] or [R, m], m >= 1"
        )
    if not np.isfinite(values).all():
        raise ValueError(f"scores has {np.count_nonzero(~np.isfinite(values))} values that are not finite")
    if not np.isin(coins, (0, 1)).all():
        raise ValueError(f"included has values {np.unique(coins)[:5]}, expected 0 and 1 only")
    values, coins = np.atleast_2d(values), np.atleast_2d(coins).astype(bool)
    ties = np.random.default_rng(0).permutation(values.shape[1])
    if pairs is None:
        return Games(values=values, coins=coins, ties=ties, paired=False)
    members = np.lexsort((ties, _check_pairs(pairs, coins))).reshape(-1, 2)
    first, second = members.T
    gaps = values[:, first] - values[:, second]
    return Games(values=gaps, coins=coins[:, first], ties=ties[first], paired=True)


def count_correct(
    scores: npt.ArrayLike,
    included: npt.ArrayLike,
    num_guesses: int | float | Guesses,
    *,
    pairs: npt.ArrayLike | None = None,
) -> int:
    """How many guesses are right.

    Args:
      scores: Shape [m], finite; higher means more likely to have been inserted.
      included: Shape [m], 0 or 1.
      num_guesses: (IN, OUT), or their sum, of which half (rounded down) is IN; at most m. In the paired game the
        number of pairs guessed. A float is a fraction of m.
      pairs: Shape [m], the pair number of each canary; None for independent coins.

    Returns:
      The number of right guesses.

    Raises:
      ValueError: As `make_games`, or if the number of guesses is out of range.

    Guarantees:
      Ties are broken by a fixed pseudo-random order of positions, so that nothing leaks from how canaries are ordered.
    """
    games = make_games(scores, included, pairs)
    ((guessed_in, guessed_out),) = check_guesses("num_guesses", [num_guesses], games)
    right_in, right_out = games.right
    return int(right_in[0, guessed_in] + right_out[0, guessed_out])


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
    while (half := -(-num_canaries // 2 ** len(grid))) >= _SMALLEST:
        grid.append(half)
    return tuple(grid)


def two_sided_grid(num_canaries: int, *, paired: bool) -> tuple[Guesses, ...]:
    """Every combination of numbers of guesses IN and OUT from m/2, m/4, ... while at least 5, and 0.

    Args:
      num_canaries: Canaries, or pairs (m), >= 1.
      paired: Whether guesses are on pairs; then `default_grid`.

    Returns:
      Distinct (IN, OUT), the most guesses first.
    """
    if paired:
        return tuple((number, 0) for number in default_grid(num_canaries))
    sides = sorted({number // 2 for number in default_grid(num_canaries)} | {0}, reverse=True)
    grid = [(k, num_canaries - k if k == num_canaries // 2 == other else other) for k in sides for other in sides]
    return tuple(sorted((g for g in grid if sum(g) > 0), key=sum, reverse=True))


def check_guesses(name: str, guesses: Sequence[int | float | Guesses], games: Games) -> list[Guesses]:
    """Numbers of guesses as (IN, OUT); ValueError unless they are distinct, and each within 1 .. m.

    A float is a fraction of the coins, at least 1 guess; fractions that come to the same number are taken once.
    """
    expected = f"distinct integers, fractions or pairs (IN, OUT) of 1 to {games.size} guesses (canaries or pairs)"
    try:
        numbers = [_both(number, games) for number in guesses]
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {list(guesses)}, expected {expected}") from None
    wrong = any(min(number) < 0 or not 1 <= sum(number) <= games.size for number in numbers)
    declared = {number if isinstance(number, float) else both for number, both in zip(guesses, numbers, strict=True)}
    if wrong or not numbers or len(declared) != len(numbers):
        raise ValueError(f"{name} is {list(guesses)}, expected {expected}")
    return list(dict.fromkeys(numbers))


def _both(number: int | float | Guesses, games: Games) -> Guesses:
    """(IN, OUT) of a number of guesses; TypeError or ValueError unless it is one."""
    if isinstance(number, float):
        if not 0 < number <= 1:
            raise ValueError
        number = max(1, round(number * games.size))
    if isinstance(number, int | np.integer) and not isinstance(number, bool):
        total = int(number)
        return (total, 0) if games.paired else (total // 2, total - total // 2)
    guessed_in, guessed_out = number  # type: ignore[misc]
    if not all(isinstance(k, int | np.integer) for k in (guessed_in, guessed_out)) or (games.paired and guessed_out):
        raise TypeError
    return int(guessed_in), int(guessed_out)


def _counted(right: np.ndarray) -> np.ndarray:
    """Running number of right guesses, from 0 guesses on: [R, m] -> [R, m + 1]."""
    return np.pad(np.cumsum(right, axis=1), ((0, 0), (1, 0)))


def _check_pairs(pairs: npt.ArrayLike, coins: np.ndarray) -> np.ndarray:
    """Pair numbers as an array [m]: each number twice, one member included in every run."""
    numbers = np.asarray(pairs)
    if numbers.shape != coins.shape[1:] or not np.issubdtype(numbers.dtype, np.integer):
        raise ValueError(
            f"pairs has shape {numbers.shape} and dtype {numbers.dtype}, expected integers {coins.shape[1:]}"
        )
    unique, inverse, members = np.unique(numbers, return_inverse=True, return_counts=True)
    if (members != 2).any():
        raise ValueError(f"pairs: pair {unique[members != 2][0]} has {members[members != 2][0]} members, expected 2")
    for run in coins:
        inserted = np.bincount(inverse, weights=run)
        if (inserted != 1).any():
            raise ValueError(
                f"included: pair {unique[inserted != 1][0]} has {inserted[inserted != 1][0]:.0f} members in, expected 1"
            )
    return numbers
