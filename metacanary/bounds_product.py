"""Lower bounds on epsilon that assume independent canaries: the exact order-statistic tail of Xiang et al.

The canaries pass through independent channels, and the guesses go to the r canaries whose channels gave most away. Any
other choice of r guesses, made from the same outputs, has stochastically more wrong ones: given the outputs, the
guesses are right independently of each other.
"""

import functools
import math

import numpy as np
from scipy import optimize, special

from metacanary import accounting
from metacanary.bounds import check_counts, check_delta, check_significance, last_rejected

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(160)
_SPREAD = 8.3  # standard deviations integrated over; what lies beyond weighs 1e-16
_ERROR = 1e-9  # of the integral, seen at most 1e-10 for m up to 100,000; added, so that a tail is never too small


def order_statistic(
    num_canaries: int, num_guesses: int, num_correct: int, *, delta: float, significance: float = 0.05
) -> float:
    """Lower confidence bound on epsilon at delta of a mechanism that treats canaries independently.

    Every (epsilon, delta)-DP channel of one coin is a function of one that reveals the coin with probability delta, and
    else tells the truth with probability e^eps / (1 + e^eps). So of r guesses min(R, r) are free,
    R ~ Binomial(m, delta), and the number of right ones among the others is binomial.

    Args:
      num_canaries: All canaries with a coin of their own (m), guessed or not; pairs in the paired game.
      num_guesses: Guesses made (r), abstentions not counted; fixed before looking at scores.
      num_correct: Right guesses (v).
      delta: The delta of the tested claim, in [0, 1).
      significance: Probability of a bound above the true epsilon (one minus confidence), in (0, 0.5).

    Returns:
      The bound; 0 if no epsilon is rejected. It is no bound for a mechanism whose outputs for different canaries
      depend on each other (docs/auditing.md has a counter-example).

    Raises:
      ValueError: If a count, delta or significance is out of range.

    Guarantees:
      - Exceeds the epsilon of a product of m independent (epsilon, delta)-DP channels with probability at most
        `significance`, and has exactly that level, up to the discreteness of counts, for the channel above.
      - Never falls as `num_correct` or `significance` grows; never grows with `delta` or `num_canaries`.

    References:
      Xiang et al. 2025, arXiv 2509.08704 (the tail for independent channels).
      Kairouz, Oh, Viswanath 2015, arXiv 1311.0776 (the channel all others are functions of).
    """
    counts = check_counts(num_canaries, num_guesses, num_correct)
    check_delta(delta, zero=True)
    check_significance(significance)
    return order_statistic_root(*counts, float(delta), float(significance))


def order_statistic_gaussian(
    num_canaries: int, num_guesses: int, num_correct: int, *, delta: float, significance: float = 0.05
) -> float:
    """Lower confidence bound on epsilon at delta of a product of channels whose trade-off curves are Gaussian.

    `order_statistic_gaussian_mu`, converted exactly at delta.

    Args:
      num_canaries: All canaries with a coin of their own (m), guessed or not; pairs in the paired game.
      num_guesses: Guesses made (r), abstentions not counted; fixed before looking at scores.
      num_correct: Right guesses (v).
      delta: Where the Gaussian trade-off curve is converted to epsilon, in (0, 1).
      significance: Probability of a bound above the true epsilon (one minus confidence), in (0, 0.5).

    Returns:
      The bound; 0 if no mu is rejected.

    Raises:
      ValueError: If a count, delta or significance is out of range.
    """
    check_delta(delta, zero=False)
    mu = order_statistic_gaussian_mu(num_canaries, num_guesses, num_correct, significance=significance)
    return accounting.gaussian_epsilon(mu, delta)


def order_statistic_gaussian_mu(
    num_canaries: int, num_guesses: int, num_correct: int, *, significance: float = 0.05
) -> float:
    """Largest mu such that a product of mu-GDP channels is rejected by that many right guesses.

    With x ~ N(+-mu/2, 1) for the two values of a coin, |x| says how sure its guess is. The threshold of the r largest
    |x| is an order statistic, and above it the guesses are wrong independently, with probability
    g(a) = P[wrong | |x| > a]. So with u = r - v,

        P[wrong <= u] = E[Binomial CDF(u; r, g(A))],  P[|x| <= A] ~ Beta(m - r, r + 1);  g(0) = Phi(-mu/2) if r = m.

    Args:
      num_canaries: All canaries with a coin of their own (m), guessed or not; pairs in the paired game.
      num_guesses: Guesses made (r), abstentions not counted; fixed before looking at scores.
      num_correct: Right guesses (v).
      significance: Probability of a bound above the true mu (one minus confidence), in (0, 0.5).

    Returns:
      The bound; 0 if no mu is rejected.

    Raises:
      ValueError: If a count or significance is out of range.

    Guarantees:
      - Exceeds the mu of a product of m independent mu-GDP channels with probability at most `significance`, and has
        exactly that level, up to the discreteness of counts, for Gaussian channels.

    References:
      Xiang et al. 2025, arXiv 2509.08704.
      Dong, Roth, Su 2019, arXiv 1905.02383, Theorem 2.10 (each mu-GDP channel is a function of the Gaussian one).
    """
    counts = check_counts(num_canaries, num_guesses, num_correct)
    check_significance(significance)
    return order_statistic_gaussian_root(*counts, float(significance))


@functools.lru_cache(maxsize=65536)
def order_statistic_root(
    num_canaries: int, num_guesses: int, num_correct: int, delta: float, significance: float, floor: float = 0.0
) -> float:
    """`order_statistic` without checks, or `floor` where the bound is lower (costs one tail)."""
    free, weights, missed = _revealed(num_canaries, delta)
    wrong = num_guesses - num_correct
    left = np.maximum(num_guesses - free, 0)

    def excess(epsilon: float) -> float:
        return float(weights @ _binomial_cdf(wrong, left, special.expit(-epsilon))) + missed - significance

    if excess(floor) >= 0:
        return floor
    # Without free guesses this is the Clopper-Pearson lower limit; free ones only lower it.
    most = special.betainccinv(wrong + 1, num_correct, significance)
    upper = float(math.log1p(-most) - math.log(most))
    return last_rejected(excess, floor, max(upper, floor))


@functools.lru_cache(maxsize=65536)
def order_statistic_gaussian_root(
    num_canaries: int, num_guesses: int, num_correct: int, significance: float, floor: float = 0.0
) -> float:
    """`order_statistic_gaussian_mu` without checks, or `floor` where the bound is lower (costs one tail)."""

    def excess(mu: float) -> float:
        return _gaussian_tail(num_canaries, num_guesses, num_guesses - num_correct, mu) - significance

    if excess(floor) >= 0:
        return floor
    upper = max(1.0, 2.0 * floor)
    while excess(upper) < 0:
        upper *= 2.0
    return last_rejected(excess, floor, upper)


@functools.lru_cache(maxsize=64)
def _revealed(num_canaries: int, delta: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Numbers of revealed coins, their probabilities, and the probability of more: nothing is lost to truncation."""
    mean = num_canaries * delta
    most = min(num_canaries, math.ceil(mean + 10 * math.sqrt(mean) + 30))
    numbers = np.arange(most + 1)
    below = special.bdtr(numbers, num_canaries, delta)
    missed = float(special.bdtrc(most, num_canaries, delta)) if most < num_canaries else 0.0
    return numbers, np.diff(below, prepend=0.0), missed


def _gaussian_tail(num_canaries: int, num_guesses: int, wrong: int, mu: float) -> float:
    """P[at most that many of the guesses are wrong], for the best guesses on Gaussian channels."""
    if num_guesses == num_canaries:
        return float(special.bdtr(wrong, num_guesses, special.ndtr(-mu / 2)))
    if wrong >= num_guesses:
        return 1.0
    lowest, highest, log_scale = _order_statistic_range(num_canaries, num_guesses)
    low, high = (_folded_quantile(above, mu) for above in (highest, lowest))
    a = 0.5 * (high + low) + 0.5 * (high - low) * _NODES
    miss, hit = special.ndtr(-a - mu / 2), special.ndtr(mu / 2 - a)
    above = miss + hit
    # Beta density of the share above the threshold, times the density of |x| there.
    log_density = (
        log_scale
        + num_guesses * np.log(above)
        + (num_canaries - num_guesses - 1) * np.log1p(-np.minimum(above, 1.0 - 1e-16))
        + np.logaddexp(-0.5 * (a - mu / 2) ** 2, -0.5 * (a + mu / 2) ** 2)
        - 0.5 * math.log(2 * math.pi)
    )
    cdf = special.bdtr(wrong, num_guesses, miss / above)
    return min(1.0, 0.5 * (high - low) * float(_WEIGHTS @ (np.exp(log_density) * cdf)) + _ERROR)


@functools.lru_cache(maxsize=4096)
def _order_statistic_range(num_canaries: int, num_guesses: int) -> tuple[float, float, float]:
    """Where the share of channels above the threshold lies, lowest and highest, and the log of its density's scale.

    The share is Beta(r + 1, m - r): the (m - r)-th of m ordered uniforms, counted from above.
    """
    a, b = num_guesses + 1, num_canaries - num_guesses
    tail = float(special.ndtr(-_SPREAD))
    return float(special.betaincinv(a, b, tail)), float(special.betainccinv(a, b, tail)), -float(special.betaln(a, b))


def _folded_quantile(above: float, mu: float) -> float:
    """The a with P[|x| > a] = above for x ~ N(mu/2, 1)."""

    def excess(a: float) -> float:
        return 0.5 * (math.erfc((a + mu / 2) * math.sqrt(0.5)) + math.erfc((a - mu / 2) * math.sqrt(0.5))) - above

    if above >= 1.0:
        return 0.0
    upper = mu / 2 - float(special.ndtri(above / 2))  # P[|x| > a] <= 2 Phi(mu/2 - a)
    return float(optimize.brentq(excess, 0.0, upper + 1e-9, xtol=1e-14))


def _binomial_cdf(most: int, trials: np.ndarray, probability: float) -> np.ndarray:
    """P[Bin(trials, probability) <= most], 1 where there are no more trials than that."""
    return np.where(trials <= most, 1.0, special.bdtr(most, np.maximum(trials, most + 1), probability))
