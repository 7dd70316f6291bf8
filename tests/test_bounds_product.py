"""Bounds for independent canaries: enumeration, quadrature, simulation, level, counter-examples."""

import itertools
import math

import numpy as np
import pytest
from scipy import integrate, optimize, stats
from test_bounds import smallest_rejection

from metacanary import accounting
from metacanary.bounds import steinke
from metacanary.bounds_fdp import fdp_gaussian_mu
from metacanary.bounds_product import order_statistic, order_statistic_gaussian, order_statistic_gaussian_mu


def enumerated_tail(m, r, v, epsilon, delta):
    """P[at least v of r guesses are right] over all sets of revealed coins and all outcomes of guesses."""
    right, total = 1 / (1 + math.exp(-epsilon)), 0.0
    for revealed in itertools.product((False, True), repeat=m):
        weight = math.prod(delta if known else 1 - delta for known in revealed)
        guessed = sorted(revealed, reverse=True)[:r]
        for hits in itertools.product((False, True), repeat=r):
            if sum(hits) >= v:
                chances = (1.0 if known else right for known in guessed)
                total += weight * math.prod(p if hit else 1 - p for p, hit in zip(chances, hits, strict=True))
    return total


def naive_tail(m, r, v, epsilon, delta):
    """The same by plain sums over the number of revealed coins; more than r are as good as r."""
    wrong, free = 1 / (1 + math.exp(epsilon)), np.arange(r)
    return stats.binom.pmf(free, m, delta) @ stats.binom.cdf(r - v, r - free, wrong) + stats.binom.sf(r - 1, m, delta)


def naive_gaussian_tail(m, r, v, mu):
    """P[at least v of r guesses are right], by adaptive quadrature over the largest |x| that is not guessed."""

    def folded(a):
        return stats.norm.sf(a - mu / 2) + stats.norm.sf(a + mu / 2)

    def integrand(a):
        density = stats.norm.pdf(a - mu / 2) + stats.norm.pdf(a + mu / 2)
        order = math.exp(math.lgamma(m + 1) - math.lgamma(m - r) - math.lgamma(r + 1))
        order *= (1 - folded(a)) ** (m - r - 1) * folded(a) ** r
        return order * density * stats.binom.cdf(r - v, r, stats.norm.sf(a + mu / 2) / folded(a))

    peak = optimize.brentq(lambda a: folded(a) - r / m, 0, 20)
    return integrate.quad(integrand, 0, 20, points=[peak], limit=200, epsabs=1e-13)[0]


def simulated_gaussian_tail(m, r, v, mu, num_games):
    """P[at least v of r guesses are right] by playing, and its standard error."""
    rng = np.random.default_rng(0)
    x = rng.normal(mu / 2, 1, size=(num_games, m))  # a coin is told as sign of x; the truth is positive
    guessed = np.argsort(-np.abs(x), axis=1)[:, :r]
    share = ((np.take_along_axis(x, guessed, axis=1) > 0).sum(axis=1) >= v).mean()
    return share, math.sqrt(share * (1 - share) / num_games)


@pytest.mark.parametrize(("m", "r", "v"), [(4, 4, 4), (5, 3, 3), (6, 6, 5), (6, 2, 2)])
@pytest.mark.parametrize("delta", [0.0, 1e-3, 0.2])
def test_order_statistic_equals_enumeration(m, r, v, delta):
    bound = order_statistic(m, r, v, delta=delta, significance=0.4)
    if bound > 0:
        assert enumerated_tail(m, r, v, bound, delta) == pytest.approx(0.4, abs=1e-9)
    else:
        assert enumerated_tail(m, r, v, 0.0, delta) >= 0.4


@pytest.mark.parametrize(("m", "r", "v"), [(5, 3, 3), (100, 100, 80), (1000, 100, 99), (1000, 1000, 700)])
@pytest.mark.parametrize("delta", [1e-9, 1e-5, 1e-2, 0.1])
def test_order_statistic_is_where_the_naive_tail_is_the_level(m, r, v, delta):
    bound = order_statistic(m, r, v, delta=delta)
    if bound > 0:
        assert naive_tail(m, r, v, bound, delta) == pytest.approx(0.05, abs=1e-9)
    else:
        assert naive_tail(m, r, v, 0.0, delta) >= 0.05 - 1e-9


@pytest.mark.parametrize(
    ("m", "r", "v"),
    [(2, 1, 1), (10, 9, 9), (100, 1, 1), (100, 50, 40), (300, 20, 20), (300, 299, 180), (1000, 250, 214)],
)
@pytest.mark.parametrize("significance", [0.05, 0.3])
def test_order_statistic_gaussian_mu_is_where_the_naive_tail_is_the_level(m, r, v, significance):
    mu = order_statistic_gaussian_mu(m, r, v, significance=significance)
    if mu > 0:
        assert naive_gaussian_tail(m, r, v, mu) == pytest.approx(significance, abs=2e-9)
    else:
        assert naive_gaussian_tail(m, r, v, 0.0) >= significance - 2e-9


def test_order_statistic_gaussian_mu_is_the_binomial_limit_if_all_are_guessed():
    for m, v in [(10, 9), (1000, 691), (100_000, 69_146)]:
        right = stats.beta.ppf(0.05, v, m - v + 1)
        assert order_statistic_gaussian_mu(m, m, v) == pytest.approx(2 * stats.norm.ppf(right), rel=1e-9)


@pytest.mark.parametrize(("m", "r", "v"), [(20, 5, 5), (60, 30, 27), (100, 25, 24)])
def test_order_statistic_gaussian_mu_has_its_level_in_simulated_games(m, r, v):
    mu = order_statistic_gaussian_mu(m, r, v)
    share, error = simulated_gaussian_tail(m, r, v, mu, num_games=20_000)
    assert abs(share - 0.05) <= 4 * error


def test_order_statistic_gaussian_is_its_mu_converted():
    mu = order_statistic_gaussian_mu(100, 60, 50, significance=0.02)
    assert order_statistic_gaussian(100, 60, 50, delta=1e-3, significance=0.02) == accounting.gaussian_epsilon(mu, 1e-3)


@pytest.mark.parametrize("delta", [0.0, 1e-3, 0.05])
def test_order_statistic_has_its_level_on_its_own_channel(delta):
    """Exact: the fewest right guesses that reject have probability at most 5%, one fewer more than that."""
    for m, r, epsilon in [(50, 50, 0.0), (80, 80, 1.0), (80, 30, 2.0)]:
        v = smallest_rejection(lambda v, m=m, r=r: order_statistic(m, r, v, delta=delta), epsilon, r)
        assert naive_tail(m, r, v, epsilon, delta) <= 0.05 < naive_tail(m, r, v - 1, epsilon, delta)


def test_order_statistic_is_never_below_steinke():
    """It assumes more; they agree without delta."""
    for m, r, v in [(100, 100, 80), (1000, 100, 90), (1000, 500, 300)]:
        assert order_statistic(m, r, v, delta=0.0) == pytest.approx(steinke(m, r, v, delta=0.0), rel=1e-12)
        assert order_statistic(m, r, v, delta=1e-4) > steinke(m, r, v, delta=1e-4)


def test_order_statistic_gaussian_is_never_below_fdp_gaussian():
    for m, r, v in [(100, 100, 80), (1000, 100, 90), (1000, 500, 300)]:
        assert order_statistic_gaussian_mu(m, r, v) > fdp_gaussian_mu(m, r, v)


def test_order_statistic_gaussian_mu_counts_abstentions():
    """The same guesses are less surprising if they are the surest of many."""
    values = [order_statistic_gaussian_mu(m, 50, 45) for m in (50, 100, 1000, 100_000)]
    assert (np.diff(values) < 0).all()


def test_order_statistic_loses_nothing_to_truncation():
    """Of 10^6 canaries 10 are revealed on average; the numbers summed over end where the naive sum goes on."""
    for guesses in (60, 18):
        bound = order_statistic(10**6, guesses, guesses, delta=1e-5, significance=0.1)
        assert naive_tail(10**6, guesses, guesses, bound, 1e-5) == pytest.approx(0.1, abs=1e-9)
