"""Lower bounds on epsilon from error rates: Clopper-Pearson, Gaussian DP, credible intervals, AUROC.

They treat every score as a trial of its own. That holds for scores of as many training runs (one canary each); for the
canaries of one run it is an assumption, as in `bounds_product`.

A decision rule that says IN to some of the scores has true positives (members said IN), false negatives, false
positives and true negatives. The rule may have been fixed beforehand, or set so that a given number of non-members is
above it: for alike scores the rate at an order statistic has the beta distribution that the limit is made of, members
know nothing of it, and both limits hold together by the union bound. Canaries that differ among themselves make counts
spread less than alike ones, so that the limits only become more cautious.
"""

import functools
import math

import numpy as np
from scipy import optimize, special

from metacanary import accounting
from metacanary.bounds import check_delta, check_significance, last_rejected

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(48)
_NEGLIGIBLE = 1e-16  # posterior mass left out at either end
_JEFFREYS = 0.5  # both parameters of the prior of a rate

Counts = tuple[int, int, int, int]


def clopper_pearson(
    true_positives: int,
    false_negatives: int,
    false_positives: int,
    true_negatives: int,
    *,
    delta: float,
    significance: float = 0.05,
) -> float:
    """Lower confidence bound on epsilon at delta from the error rates of a membership test.

    Both error rates are bounded from above, each at half the significance; then
    epsilon >= log((1 - delta - fnr) / fpr) and epsilon >= log((1 - delta - fpr) / fnr).

    Args:
      true_positives: Members said IN.
      false_negatives: Members said OUT; at least one member.
      false_positives: Non-members said IN.
      true_negatives: Non-members said OUT; at least one non-member.
      delta: The delta of the tested claim, in [0, 1).
      significance: Probability of a bound above the true epsilon (one minus confidence), in (0, 0.5).

    Returns:
      The bound; 0 if no claim is rejected.

    Raises:
      ValueError: If a count, delta or significance is out of range.

    Guarantees:
      - Exceeds the epsilon of an (epsilon, delta)-DP mechanism with probability at most `significance`, if all
        decisions are independent.

    References:
      Clopper, Pearson 1934, Biometrika 26. Jagielski, Ullman, Oprea 2020, arXiv 2006.07709.
      Kairouz, Oh, Viswanath 2015, arXiv 1311.0776 (both inequalities).
    """
    counts = _check(true_positives, false_negatives, false_positives, true_negatives)
    check_delta(delta, zero=True)
    check_significance(significance)
    return clopper_pearson_root(counts, float(delta), float(significance))


def gaussian_rates(
    true_positives: int,
    false_negatives: int,
    false_positives: int,
    true_negatives: int,
    *,
    delta: float,
    significance: float = 0.05,
) -> float:
    """Lower confidence bound on epsilon at delta of a mechanism whose curve is Gaussian, from error rates.

    Rates are bounded as in `clopper_pearson`; then mu >= Phi^-1(1 - fpr) - Phi^-1(fnr), converted exactly at delta.

    Args:
      true_positives: Members said IN.
      false_negatives: Members said OUT; at least one member.
      false_positives: Non-members said IN.
      true_negatives: Non-members said OUT; at least one non-member.
      delta: Where the Gaussian trade-off curve is converted to epsilon, in (0, 1).
      significance: Probability of a bound above the true epsilon (one minus confidence), in (0, 0.5).

    Returns:
      The bound; 0 if no mu is rejected.

    Raises:
      ValueError: If a count, delta or significance is out of range.

    Guarantees:
      - Exceeds the epsilon of a mechanism whose trade-off curve is Gaussian with probability at most `significance`,
        if all decisions are independent.

    References:
      Nasr et al. 2023, "Tight Auditing of Differentially Private Machine Learning", arXiv 2302.07956.
    """
    counts = _check(true_positives, false_negatives, false_positives, true_negatives)
    check_delta(delta, zero=False)
    check_significance(significance)
    return accounting.gaussian_epsilon(gaussian_rates_root(counts, float(significance)), delta)


def credible_rates(
    true_positives: int,
    false_negatives: int,
    false_positives: int,
    true_negatives: int,
    *,
    delta: float,
    significance: float = 0.05,
) -> float:
    """Lower end of a credible interval of epsilon at delta: no confidence bound.

    The posterior of both error rates under Jeffreys' priors, Beta(1/2, 1/2), is carried over to the epsilon that the
    rates imply; its quantile at `significance` is returned.

    Args:
      true_positives: Members said IN.
      false_negatives: Members said OUT; at least one member.
      false_positives: Non-members said IN.
      true_negatives: Non-members said OUT; at least one non-member.
      delta: The delta of epsilon, in [0, 1).
      significance: Posterior probability that epsilon is smaller, in (0, 0.5).

    Returns:
      The quantile; 0 where epsilon = 0 has at least that posterior probability.

    Raises:
      ValueError: If a count, delta or significance is out of range.

    References:
      Zanella-Beguelin et al. 2022, "Bayesian Estimation of Differential Privacy", arXiv 2206.05199.
    """
    counts = _check(true_positives, false_negatives, false_positives, true_negatives)
    check_delta(delta, zero=True)
    check_significance(significance)
    return credible_rates_root(counts, float(delta), float(significance))


def gaussian_auroc_mu(auroc: float, num_in: int, num_out: int, *, significance: float = 0.05) -> float:
    """Largest mu whose Gaussian channel makes so large an AUROC improbable, by the normal approximation.

    The AUROC of N(mu, 1) against N(0, 1) has mean A = Phi(mu / sqrt 2), which no test of a mu-GDP mechanism exceeds,
    and variance (A (1 - A) + (n + k - 2) (Q - A^2)) / (n k), Q = P[x > y, x' > y] for members x, x'; a mu is
    rejected if the AUROC is further above A than the normal quantile says. All scores are used, and none is selected.

    Args:
      auroc: Mann-Whitney, in [0, 1].
      num_in: Members (n), >= 1.
      num_out: Non-members (k), >= 1.
      significance: Nominal probability of a bound above the true mu, in (0, 0.5).

    Returns:
      The bound; 0 if no mu is rejected. Its level holds for many canaries only ("asymptotic").

    Raises:
      ValueError: If an argument is out of range.

    References:
      Hanley, McNeil 1982, Radiology 143 (the variance). Dong, Roth, Su 2019, arXiv 1905.02383 (the curve).
    """
    if not 0 <= auroc <= 1:
        raise ValueError(f"auroc is {auroc}, expected a number in [0, 1]")
    if num_in < 1 or num_out < 1:
        raise ValueError(f"num_in and num_out are {num_in} and {num_out}, expected both >= 1")
    check_significance(significance)
    return gaussian_auroc_root((round(2 * auroc * num_in * num_out), num_in, num_out), float(significance))


@functools.lru_cache(maxsize=65536)
def clopper_pearson_root(counts: Counts, delta: float, significance: float) -> float:
    """`clopper_pearson` without checks."""
    fnr, fpr = _upper_limits(counts, significance / 2)
    ratios = [(1 - delta - one) / other for one, other in ((fnr, fpr), (fpr, fnr))]
    return math.log(max(1.0, *ratios))


@functools.lru_cache(maxsize=65536)
def gaussian_rates_root(counts: Counts, significance: float) -> float:
    """The mu of `gaussian_rates`, without checks."""
    fnr, fpr = _upper_limits(counts, significance / 2)
    return max(0.0, float(-special.ndtri(fpr) - special.ndtri(fnr)))


@functools.lru_cache(maxsize=65536)
def credible_rates_root(counts: Counts, delta: float, significance: float, floor: float = 0.0) -> float:
    """`credible_rates` without checks, or `floor` where it is lower."""
    hits, missed, false, rejected = (count + _JEFFREYS for count in counts)

    def excess(epsilon: float) -> float:
        # The share of the posterior that (epsilon, delta)-DP allows: rates above two lines, which cross where both are
        # `corner`. Each line is shallow on one side of it; there it is integrated over, and the overlap taken off.
        grow, rest = math.exp(min(epsilon, 700.0)), 1.0 - delta
        corner = rest / (1.0 + grow)
        overlap = float(special.betaincc(missed, hits, corner) * special.betaincc(false, rejected, corner))
        one = _share_above((missed, hits), (false, rejected), corner, rest, grow)
        other = _share_above((false, rejected), (missed, hits), corner, rest, grow)
        return one + other - overlap - significance

    if excess(floor) >= 0:
        return floor
    upper = max(1.0, 2.0 * floor)
    while excess(upper) < 0:
        upper *= 2.0
    return last_rejected(excess, floor, upper)


def _share_above(
    first: tuple[float, float], second: tuple[float, float], corner: float, rest: float, grow: float
) -> float:
    """P[x > corner and y > (rest - x) / grow] for x and y with these beta distributions."""
    # x is sin(angle)^2, whose density has no poles.
    most = math.asin(math.sqrt(special.betainccinv(*first, _NEGLIGIBLE)))
    least = min(most, math.asin(math.sqrt(max(corner, special.betaincinv(*first, _NEGLIGIBLE)))))
    angle = 0.5 * (least + most) + 0.5 * (most - least) * _NODES
    sine, cosine = np.sin(angle), np.cos(angle)
    scale = math.log(2) - float(special.betaln(*first))
    log_density = scale + (2 * first[0] - 1) * np.log(sine) + (2 * first[1] - 1) * np.log(cosine)
    above = special.betaincc(*second, np.maximum(rest - sine**2, 0.0) / grow)
    return 0.5 * (most - least) * float(_WEIGHTS @ (np.exp(log_density) * above))


@functools.lru_cache(maxsize=65536)
def gaussian_auroc_root(counts: tuple[int, int, int], significance: float) -> float:
    """`gaussian_auroc_mu` without checks, from (twice the Mann-Whitney statistic, members, non-members)."""
    twice, num_in, num_out = counts
    if num_in == 0 or num_out == 0:
        return 0.0
    auroc = twice / (2 * num_in * num_out)
    quantile = -float(special.ndtri(significance))

    def excess(mu: float) -> float:
        mean = float(special.ndtr(mu / math.sqrt(2)))
        return mean + quantile * _auroc_deviation(mu, num_in, num_out) - auroc

    if excess(0.0) >= 0:
        return 0.0
    upper = 1.0
    while excess(upper) < 0 and upper < 16.0:  # beyond, AUROCs of 1 cannot be told apart
        upper *= 2.0
    return float(optimize.brentq(excess, 0.0, upper, xtol=1e-12)) if excess(upper) > 0 else upper


def _auroc_deviation(mu: float, num_in: int, num_out: int) -> float:
    """Standard deviation of the AUROC of N(mu, 1) against N(0, 1)."""
    mean = float(special.ndtr(mu / math.sqrt(2)))
    # x - y and x' - y have correlation 1/2: P[both > 0] = Phi(h) - 2 T(h, 1/sqrt 3), T Owen's function.
    both = mean - 2 * float(special.owens_t(mu / math.sqrt(2), 1 / math.sqrt(3)))
    variance = mean * (1 - mean) + (num_in + num_out - 2) * (both - mean**2)
    return math.sqrt(max(0.0, variance) / (num_in * num_out))


def _upper_limits(counts: Counts, level: float) -> tuple[float, float]:
    """One-sided Clopper-Pearson limits of the false negative and false positive rate."""
    true_positives, false_negatives, false_positives, true_negatives = counts
    return _upper_limit(false_negatives, true_positives, level), _upper_limit(false_positives, true_negatives, level)


def _upper_limit(errors: int, rest: int, level: float) -> float:
    """The rate at which so few errors have probability `level`; 1 if there were errors only."""
    return float(special.betainccinv(errors + 1, rest, level)) if rest else 1.0


def _check(true_positives: int, false_negatives: int, false_positives: int, true_negatives: int) -> Counts:
    """The counts, ValueError unless they are integers >= 0 with a member and a non-member."""
    counts = (true_positives, false_negatives, false_positives, true_negatives)
    if any(int(count) != count or count < 0 for count in counts):
        raise ValueError(f"counts are {counts} (TP, FN, FP, TN), expected integers >= 0")
    if true_positives + false_negatives == 0 or false_positives + true_negatives == 0:
        raise ValueError(f"counts are {counts} (TP, FN, FP, TN), expected at least one member and one non-member")
    return tuple(int(count) for count in counts)  # type: ignore[return-value]
