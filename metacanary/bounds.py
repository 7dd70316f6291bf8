"""The lower bound on epsilon of Steinke et al. from a count of right guesses, and what all bounds share.

All bounds are found by exact root finding in float64, never on a grid that could end too early. `bounds_fdp`,
`bounds_product` and `bounds_rates` hold the others; `auditors` lists them.
"""

import functools
import math
import operator
from collections.abc import Callable

import numpy as np
from scipy import optimize, special

_XTOL = 1e-12


def steinke_p_value(num_canaries: int, num_guesses: int, num_correct: int, *, epsilon: float, delta: float) -> float:
    """Bound on the probability of that many right guesses under any (epsilon, delta)-DP mechanism.

    With m canaries, r guesses, v right ones, W ~ Binomial(r, e^eps / (1 + e^eps)), the bound is

        P[V >= v] <= P[W >= v] + 2 m delta max_{1 <= i <= v} P[v - i <= W < v] / i.

    Args:
      num_canaries: All canaries with a coin of their own (m), guessed or not; pairs in the paired game.
      num_guesses: Guesses made (r), abstentions not counted.
      num_correct: Right guesses (v).
      epsilon: The epsilon to test, >= 0.
      delta: The delta to test, in [0, 1).

    Returns:
      The p-value, in [0, 1].

    Raises:
      ValueError: If a count, epsilon or delta is out of range.

    Guarantees:
      - The set of epsilon whose p-value is below any level < 1 is an interval that starts at 0.
      - For delta = 0 and num_guesses = num_canaries it is the exact tail under randomised response.

    References:
      Steinke, Nasr, Jagielski 2023, "Privacy Auditing with One (1) Training Run", arXiv 2305.08846,
      Theorem 5.2.
    """
    counts = check_counts(num_canaries, num_guesses, num_correct)
    check_delta(delta, zero=True)
    if not 0 <= epsilon < math.inf:
        raise ValueError(f"epsilon is {epsilon}, expected a finite number >= 0")
    return _steinke_p_value(*counts, float(epsilon), float(delta))


def steinke(
    num_canaries: int, num_guesses: int, num_correct: int, *, delta: float, significance: float = 0.05
) -> float:
    """Lower confidence bound on epsilon at delta that holds for every mechanism.

    The largest epsilon such that `steinke_p_value` is below `significance` for it and all smaller ones.

    Args:
      num_canaries: All canaries with a coin of their own (m), guessed or not; pairs in the paired game.
      num_guesses: Guesses made (r), abstentions not counted; fixed before looking at scores.
      num_correct: Right guesses (v).
      delta: The delta of the tested claim, in [0, 1).
      significance: Probability of a bound above the true epsilon (one minus confidence), in (0, 0.5).

    Returns:
      The bound; 0 if no claim is rejected.

    Raises:
      ValueError: If a count, delta or significance is out of range.

    Guarantees:
      - Exceeds the epsilon of an (epsilon, delta)-DP mechanism with probability at most `significance`.
      - 0 if at most half of the guesses are right.
      - Never falls as `num_correct` or `significance` grows; never grows with `delta` or `num_canaries`.

    References:
      Steinke, Nasr, Jagielski 2023, "Privacy Auditing with One (1) Training Run", arXiv 2305.08846,
      Theorem 5.2.
    """
    counts = check_counts(num_canaries, num_guesses, num_correct)
    check_delta(delta, zero=True)
    check_significance(significance)
    return steinke_root(*counts, float(delta), float(significance))


@functools.lru_cache(maxsize=65536)
def steinke_root(
    num_canaries: int,
    num_guesses: int,
    num_correct: int,
    delta: float,
    significance: float,
    floor: float = 0.0,
) -> float:
    """`steinke` without checks, or `floor` where the bound is lower (costs one p-value)."""
    counts = (num_canaries, num_guesses, num_correct)

    def excess(epsilon: float) -> float:
        return _steinke_p_value(*counts, epsilon, delta) - significance

    if excess(floor) >= 0:
        return floor
    # With delta = 0 this is the Clopper-Pearson lower limit; the delta term only lowers it.
    wrong = special.betainccinv(num_guesses - num_correct + 1, num_correct, significance)
    upper = float(math.log1p(-wrong) - math.log(wrong))
    return last_rejected(excess, floor, max(upper, floor))


def last_rejected(excess: Callable[[float], float], lower: float, upper: float) -> float:
    """The crossing of `excess` from negative to non-negative; `upper` if rounding hides it."""
    if excess(upper) <= 0:
        return upper
    return float(optimize.brentq(excess, lower, upper, xtol=_XTOL))


def _steinke_p_value(num_canaries: int, num_guesses: int, num_correct: int, epsilon: float, delta: float) -> float:
    """`steinke_p_value` without checks.

    Why it crosses a level < 1 only once, although the delta term may fall with epsilon: it is the maximum
    over i of (1 - c/i) P[W >= v] + (c/i) P[W >= v-i], c = 2 m delta. The derivative in q is a positive factor
    times (1 - c/i) pmf(v-1) + (c/i) pmf(v-i-1), pmf of r-1 guesses, and pmf(v-1) / pmf(v-i-1) grows with q.
    So each term rises to 1, or rises above 1 and falls to 1 at q = 1 (i = v may only fall, from above 1).
    """
    if num_correct == 0:
        return 1.0
    # Counted in wrong guesses, so that nothing cancels where q is close to 1.
    allowed = num_guesses - num_correct
    tail = float(special.betaincc(allowed + 1, num_correct, special.expit(-epsilon)))
    if delta == 0.0:
        return tail
    wrong = np.arange(allowed + 1, num_guesses + 1)
    log_pmf = _log_choose(num_guesses)[wrong]
    log_pmf = log_pmf + wrong * special.log_expit(-epsilon) + (num_guesses - wrong) * special.log_expit(epsilon)
    mean_mass = np.cumsum(np.exp(log_pmf)) / np.arange(1, num_correct + 1)
    return min(1.0, tail + 2.0 * num_canaries * delta * float(mean_mass.max()))


@functools.lru_cache(maxsize=64)
def _log_choose(total: int) -> np.ndarray:
    """log C(total, k) for k = 0 .. total."""
    k = np.arange(total + 1)
    return special.gammaln(total + 1) - special.gammaln(k + 1) - special.gammaln(total - k + 1)


def check_counts(num_canaries: int, num_guesses: int, num_correct: int) -> tuple[int, int, int]:
    """The counts as Python ints; ValueError unless 0 <= correct <= guesses <= canaries and guesses >= 1."""
    try:
        counts = tuple(operator.index(count) for count in (num_canaries, num_guesses, num_correct))
    except TypeError as error:
        raise ValueError(f"counts must be integers: {error}") from None
    m, r, v = counts
    if not 1 <= r <= m:
        raise ValueError(f"num_guesses is {r}, expected 1 <= num_guesses <= num_canaries = {m}")
    if not 0 <= v <= r:
        raise ValueError(f"num_correct is {v}, expected 0 <= num_correct <= num_guesses = {r}")
    return m, r, v


def check_delta(delta: float, *, zero: bool) -> None:
    """ValueError unless delta is in (0, 1), or 0 where `zero` allows it."""
    if not (0 < delta < 1 or (zero and delta == 0)):
        raise ValueError(f"delta is {delta}, expected {'[' if zero else '('}0, 1)")


def check_significance(significance: float) -> None:
    """ValueError unless significance is in (0, 0.5)."""
    if not 0 < significance < 0.5:
        raise ValueError(f"significance is {significance}, expected a number in (0, 0.5)")
