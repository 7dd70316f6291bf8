"""Bounds by a trade-off curve: the recursion against twins, its level, tightness, counter-examples."""

import math

import numpy as np
import pytest
from scipy import optimize, stats
from test_bounds import counts, levels, smallest_rejection, vectors

from metacanary import accounting
from metacanary.bounds import steinke
from metacanary.bounds_fdp import fdp_epsilon_delta, fdp_gaussian, fdp_gaussian_mu
from metacanary.bounds_product import order_statistic_gaussian_mu

COUNTS = [(1, 1, 1), (20, 10, 10), (100, 80, 70), (500, 500, 300), (500, 125, 90), (300, 300, 300)]


def naive_rejects(m, c, v, blow_up_inverse, significance):
    """The recursion of arXiv 2410.22235 as printed, with no shortcuts."""
    r, h = significance * v / m, significance * (c - v) / m
    for i in reversed(range(v)):
        new_h = max(h, blow_up_inverse(r))
        r = min(1, r + i / (c - i) * (new_h - h))
        h = new_h
    return r + h > c / m


def gaussian_blow_up_inverse(mu):
    return lambda x: stats.norm.cdf(stats.norm.ppf(x) - mu)


def epsilon_delta_blow_up_inverse(epsilon, delta):
    """1 - f inverted by root finding; f is the curve as printed."""

    def blow_up(x):
        return 1 - max(0, 1 - delta - math.exp(epsilon) * x, math.exp(-epsilon) * (1 - delta - x))

    def inverse(y):
        return 0.0 if y <= delta else float(optimize.brentq(lambda x: blow_up(x) - y, 0, 1 - delta, xtol=1e-15))

    return inverse


@pytest.mark.parametrize("case", vectors("fdp_gaussian_eps_lower", "fdp_gaussian_eps_lower_grid"))
def test_fdp_gaussian_matches_vectors(case):
    value = fdp_gaussian(*counts(case), **levels(case))
    assert abs(value - case["expected"]) <= case["tolerance"], case["source"]
    if case["method"].endswith("grid"):  # a grid rounds the exact bound down
        assert value - case["expected"] >= -1e-3, case["source"]
    if "mu" in case:
        mu = fdp_gaussian_mu(*counts(case), significance=case["inputs"]["significance"])
        assert mu == pytest.approx(case["mu"], abs=5e-6), case["source"]  # to their root finder's tolerance


def test_fdp_gaussian_is_its_mu_converted():
    mu = fdp_gaussian_mu(100, 60, 50, significance=0.02)
    assert fdp_gaussian(100, 60, 50, delta=1e-3, significance=0.02) == accounting.gaussian_epsilon(mu, 1e-3)


@pytest.mark.parametrize(("m", "c", "v"), COUNTS)
@pytest.mark.parametrize("significance", [0.05, 0.01])
def test_fdp_gaussian_mu_is_largest_rejected_by_naive_recursion(m, c, v, significance):
    mu = fdp_gaussian_mu(m, c, v, significance=significance)
    if mu > 0:
        assert naive_rejects(m, c, v, gaussian_blow_up_inverse(mu * (1 - 1e-7)), significance)
    assert not naive_rejects(m, c, v, gaussian_blow_up_inverse(mu + 1e-7), significance)


@pytest.mark.parametrize(("m", "c", "v"), COUNTS)
@pytest.mark.parametrize("delta", [0.0, 1e-5, 0.02])
def test_fdp_epsilon_delta_is_largest_rejected_by_naive_recursion(m, c, v, delta):
    epsilon = fdp_epsilon_delta(m, c, v, delta=delta)
    if epsilon > 0:
        assert naive_rejects(m, c, v, epsilon_delta_blow_up_inverse(epsilon * (1 - 1e-6), delta), 0.05)
    assert not naive_rejects(m, c, v, epsilon_delta_blow_up_inverse(epsilon + 1e-6, delta), 0.05)


def test_fdp_gaussian_uses_the_inverse_blow_up():
    """Trap 3: the inverse of the trade-off curve in its place gives 0.881."""
    assert fdp_gaussian(500, 500, 300, delta=1e-5) == pytest.approx(0.5200, abs=1e-4)


@pytest.mark.parametrize("mu", [0.0, 0.5, 2.0])
def test_fdp_gaussian_holds_its_level_under_gaussian_channels(mu):
    """One N(+-mu/2, 1) per canary, guessed by its sign: V is Binomial(m, Phi(mu/2)). Tight at mu = 0 only."""
    m = 80
    v = smallest_rejection(lambda v: fdp_gaussian_mu(m, m, v), mu, m)
    level = stats.binom.sf(v - 1, m, stats.norm.cdf(mu / 2))
    assert level <= 0.05
    assert level > 0.01 or mu > 0


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("delta", [0.0, 1e-4, 0.05])
def test_fdp_epsilon_delta_holds_its_level_where_coins_are_revealed(epsilon, delta):
    """Each coin is revealed with probability delta, else told by randomised response; V is binomial."""
    m = 80
    v = smallest_rejection(lambda v: fdp_epsilon_delta(m, m, v, delta=delta), epsilon, m)
    right = delta + (1 - delta) / (1 + math.exp(-epsilon))
    assert stats.binom.sf(v - 1, m, right) <= 0.05


@pytest.mark.parametrize("mu", [0.5, 1.0])
def test_fdp_gaussian_survives_a_level_shared_by_all_coins(mu):
    """A mechanism whose coins depend on each other: it breaks bounds for products, not this one.

    Draw a = |x|, x ~ N(mu/2, 1), once; publish a, and each coin by randomised response with log-odds mu a. Seen from
    one coin, whatever the others are, that is N(+-mu/2, 1) observed, so the mechanism is exactly mu-GDP; but the count
    is a mixture over a. Probability of a bound above mu by integration over a.
    """
    m = 100
    a, step = np.linspace(0, 10, 20_001, retstep=True)
    density = stats.norm.pdf(a - mu / 2) + stats.norm.pdf(a + mu / 2)

    def false_alarms(bound):
        v = smallest_rejection(lambda v: bound(m, m, v), mu, m)
        return np.trapezoid(density * stats.binom.sf(v - 1, m, 1 / (1 + np.exp(-mu * a))), dx=step)

    assert np.trapezoid(density, dx=step) == pytest.approx(1, abs=1e-9)
    assert false_alarms(order_statistic_gaussian_mu) > 0.15
    assert 1e-4 < false_alarms(fdp_gaussian_mu) <= 0.05


def test_fdp_gaussian_is_no_bound_outside_its_family():
    """Randomised response with epsilon = 2 is (2, 0)-DP; its expected count gives 3.43 under the family."""
    right = round(1000 / (1 + math.exp(-2.0)))
    assert fdp_gaussian(1000, 1000, right, delta=1e-5) == pytest.approx(3.433, abs=1e-3)
    for bound in (steinke, fdp_epsilon_delta):
        assert 1.7 < bound(1000, 1000, right, delta=1e-5) < 2.0


@pytest.mark.parametrize("m", [10, 1000, 100_000])
def test_fdp_epsilon_delta_lies_below_steinke_without_delta_and_above_with_much(m):
    """Without delta Steinke's is the exact test of randomised response; both agree on perfect guesses."""
    assert fdp_epsilon_delta(m, m, m, delta=0.0) == pytest.approx(steinke(m, m, m, delta=0.0), abs=2e-8)
    right = 9 * m // 10
    assert 0 < fdp_epsilon_delta(m, m, right, delta=0.0) < steinke(m, m, right, delta=0.0)
    assert fdp_epsilon_delta(m, m, right, delta=1e-3) > steinke(m, m, right, delta=1e-3)
