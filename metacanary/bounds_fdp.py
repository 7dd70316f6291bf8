"""Lower bounds on epsilon from a count of right guesses, by a trade-off curve: Mahloujifar et al.

The same recursion serves every curve; it takes the inverse of the curve's blow-up function.
"""

import functools
import math
import statistics
from collections.abc import Callable

from metacanary import accounting
from metacanary.bounds import check_counts, check_delta, check_significance

_XTOL = 1e-8  # a bound is at most this much below the exact root, never above it


def fdp_gaussian(
    num_canaries: int, num_guesses: int, num_correct: int, *, delta: float, significance: float = 0.05
) -> float:
    """Lower confidence bound on epsilon at delta of a mechanism whose trade-off curve is Gaussian.

    `fdp_gaussian_mu`, converted exactly at delta.

    Args:
      num_canaries: All canaries with a coin of their own (m), guessed or not; pairs in the paired game.
      num_guesses: Guesses made (c), abstentions not counted; fixed before looking at scores.
      num_correct: Right guesses (v).
      delta: Where the Gaussian trade-off curve is converted to epsilon, in (0, 1).
      significance: Probability of a bound above the true epsilon (one minus confidence), in (0, 0.5).

    Returns:
      The bound; 0 if no mu is rejected. It is no bound for a mechanism with another trade-off curve
      (docs/auditing.md has a counter-example).

    Raises:
      ValueError: If a count, delta or significance is out of range.

    Guarantees:
      - Exceeds the epsilon of a mechanism whose trade-off curve is Gaussian with probability at most
        `significance`.
      - 0 if at most half of the guesses are right.
      - Never falls as `num_correct` or `significance` grows; never grows with `delta`.

    References:
      Mahloujifar, Melis, Chaudhuri 2024, "Auditing f-Differential Privacy in One Run", arXiv 2410.22235.
      Dong, Roth, Su 2019, "Gaussian Differential Privacy", arXiv 1905.02383, Corollary 2.13.
    """
    check_delta(delta, zero=False)
    mu = fdp_gaussian_mu(num_canaries, num_guesses, num_correct, significance=significance)
    return accounting.gaussian_epsilon(mu, delta)


def fdp_gaussian_mu(num_canaries: int, num_guesses: int, num_correct: int, *, significance: float = 0.05) -> float:
    """Largest mu such that mu-GDP is rejected by that many right guesses.

    With m canaries, c guesses, v right ones, tau the significance and the inverse blow-up
    fbar^-1(x) = Phi(Phi^-1(x) - mu): start at r = tau v/m, h = tau (c-v)/m; for i = v-1 .. 0:

        h' = max(h, fbar^-1(r)),  r = min(1, r + i/(c-i) (h' - h)),  h = h';

    reject iff r + h > c/m. Here r and h bound from below the shares of right and of wrong guesses that a
    mu-GDP mechanism must make if it makes v right ones with probability tau; their sum cannot exceed c/m.

    Args:
      num_canaries: All canaries with a coin of their own (m), guessed or not; pairs in the paired game.
      num_guesses: Guesses made (c), abstentions not counted; fixed before looking at scores.
      num_correct: Right guesses (v).
      significance: Probability of a bound above the true mu (tau), in (0, 0.5).

    Returns:
      The bound; 0 if no mu is rejected.

    Raises:
      ValueError: If a count or significance is out of range.

    References:
      Mahloujifar, Melis, Chaudhuri 2024, "Auditing f-Differential Privacy in One Run", arXiv 2410.22235,
      algorithm "audit with cap".
    """
    counts = check_counts(num_canaries, num_guesses, num_correct)
    check_significance(significance)
    return fdp_gaussian_root(*counts, float(significance))


def fdp_epsilon_delta(
    num_canaries: int, num_guesses: int, num_correct: int, *, delta: float, significance: float = 0.05
) -> float:
    """Lower confidence bound on epsilon at delta that holds for every mechanism, by the recursion for f-DP.

    The recursion of `fdp_gaussian_mu` for the trade-off curve of (epsilon, delta)-DP,
    f(x) = max(0, 1 - delta - e^eps x, e^-eps (1 - delta - x)); the largest rejected epsilon.

    Args:
      num_canaries: All canaries with a coin of their own (m), guessed or not; pairs in the paired game.
      num_guesses: Guesses made (c), abstentions not counted; fixed before looking at scores.
      num_correct: Right guesses (v).
      delta: The delta of the tested claim, in [0, 1).
      significance: Probability of a bound above the true epsilon (one minus confidence), in (0, 0.5).

    Returns:
      The bound; 0 if no epsilon is rejected.

    Raises:
      ValueError: If a count, delta or significance is out of range.

    Guarantees:
      - Exceeds the epsilon of an (epsilon, delta)-DP mechanism with probability at most `significance`.
      - 0 if at most half of the guesses are right.
      - Never falls as `num_correct` or `significance` grows; never grows with `delta`.

    References:
      Mahloujifar, Melis, Chaudhuri 2024, "Auditing f-Differential Privacy in One Run", arXiv 2410.22235.
      Wasserman, Zhou 2010, arXiv 0811.2501, and Dong, Roth, Su 2019, arXiv 1905.02383 (the curve).
    """
    counts = check_counts(num_canaries, num_guesses, num_correct)
    check_delta(delta, zero=True)
    check_significance(significance)
    return fdp_epsilon_delta_root(*counts, float(delta), float(significance))


@functools.lru_cache(maxsize=65536)
def fdp_gaussian_root(
    num_canaries: int, num_guesses: int, num_correct: int, significance: float, floor: float = 0.0
) -> float:
    """`fdp_gaussian_mu` without checks, or `floor` where the bound is lower (costs one recursion)."""
    return _root(num_canaries, num_guesses, num_correct, significance, floor, _gaussian_blow_up_inverse)


@functools.lru_cache(maxsize=65536)
def fdp_epsilon_delta_root(
    num_canaries: int, num_guesses: int, num_correct: int, delta: float, significance: float, floor: float = 0.0
) -> float:
    """`fdp_epsilon_delta` without checks, or `floor` where the bound is lower (costs one recursion)."""

    def blow_up_inverse(epsilon: float) -> Callable[[float], float]:
        # The blow-up min(1, delta + e^eps x, 1 - e^-eps (1 - delta - x)), each piece solved for x.
        grow, shrink, rest = math.exp(min(epsilon, 700.0)), math.exp(-epsilon), 1.0 - delta
        return lambda y: max(0.0, (y - delta) * shrink, rest - (1.0 - y) * grow)

    return _root(num_canaries, num_guesses, num_correct, significance, floor, blow_up_inverse)


def _root(
    num_canaries: int,
    num_guesses: int,
    num_correct: int,
    significance: float,
    floor: float,
    blow_up_inverse: Callable[[float], Callable[[float], float]],
) -> float:
    """The largest rejected parameter of a family of curves, or `floor`."""

    def rejects(parameter: float) -> bool:
        return _rejects(num_canaries, num_guesses, num_correct, significance, blow_up_inverse(parameter))

    if not rejects(floor):
        return floor
    lower, upper = floor, max(1.0, 2.0 * floor)
    while rejects(upper):
        lower, upper = upper, 2.0 * upper
    # By bisection: what the recursion leads to is almost a step function, on which faster methods are slower.
    while upper - lower > _XTOL:
        middle = 0.5 * (lower + upper)
        lower, upper = (middle, upper) if rejects(middle) else (lower, middle)
    return lower


def _rejects(
    num_canaries: int,
    num_guesses: int,
    num_correct: int,
    significance: float,
    blow_up_inverse: Callable[[float], float],
) -> bool:
    """Whether the recursion leads to r + h > c/m; if it does for a curve, so it does for those of more privacy."""
    right = significance * num_correct / num_canaries
    wrong = significance * (num_guesses - num_correct) / num_canaries
    most = num_guesses / num_canaries
    for i in range(num_correct - 1, -1, -1):
        forced = blow_up_inverse(right)
        if forced <= wrong:
            return False  # a fixed point: neither value can change any more
        right = min(1.0, right + i / (num_guesses - i) * (forced - wrong))
        wrong = forced
        if right + wrong > most:
            return True  # neither value ever falls
    return False


def _gaussian_blow_up_inverse(mu: float) -> Callable[[float], float]:
    """Phi(Phi^-1(x) - mu), as a function of x."""
    # Phi(y) = erfc(-y / sqrt 2) / 2: the shift and the scale are left to the quantile function.
    scale = math.sqrt(0.5)
    quantile = statistics.NormalDist(-mu * scale, scale).inv_cdf  # 20 times faster on scalars than scipy.special.ndtri
    erfc = math.erfc
    return lambda x: 1.0 if x >= 1.0 else 0.5 * erfc(-quantile(x))
