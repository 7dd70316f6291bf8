"""Bounds from error rates and AUROCs: other libraries, quadrature, sampling, level."""

import itertools
import math

import numpy as np
import pytest
from scipy import integrate, stats
from test_bounds import vectors

from metacanary import accounting
from metacanary.bounds_rates import clopper_pearson, credible_rates, gaussian_auroc_mu, gaussian_rates
from metacanary.bounds_rates import gaussian_rates_root as gaussian_rates_mu

BOUNDS = {"clopper_pearson": clopper_pearson, "gaussian_rates": gaussian_rates, "credible_rates": credible_rates}
COUNTS = [(450, 50, 100, 400), (50, 0, 0, 50), (30, 20, 0, 40), (0, 10, 10, 0), (7, 0, 3, 2), (499, 1, 1, 499)]


def rates(case):
    return tuple(case["inputs"][key] for key in ("TP", "FN", "FP", "TN"))


def upper_limits(counts, significance):
    """Of the false negative and false positive rate, each at half the significance, by scipy's binomial test."""
    hits, missed, false, rejected = counts
    pairs = ((missed, hits + missed), (false, false + rejected))
    return [stats.binomtest(*pair).proportion_ci(1 - significance, method="exact").high for pair in pairs]


def implied_epsilon(fnr, fpr, delta):
    """The smallest epsilon that allows these rates."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.maximum((1 - delta - fnr) / fpr, (1 - delta - fpr) / fnr)
        return np.log(np.maximum(ratios, 1.0))


@pytest.mark.parametrize("case", vectors("clopper_pearson_eps_lower_two_sided"))
def test_clopper_pearson_matches_vectors(case):
    value = clopper_pearson(*rates(case), delta=case["inputs"]["delta"], significance=case["inputs"]["alpha"])
    assert abs(value - case["expected"]) <= case["tolerance"], case["source"]


@pytest.mark.parametrize("case", vectors("clopper_pearson_gdp_eps_lower"))
def test_gaussian_rates_match_vectors(case):
    """Theirs bounds each rate at alpha, ours both together; at delta = 0 theirs returns 50 where ours refuses."""
    inputs = case["inputs"]
    level = 2 * inputs["alpha"]
    if inputs["delta"] > 0:
        value = gaussian_rates(*rates(case), delta=inputs["delta"], significance=level)
        assert abs(value - case["expected"]) <= case["tolerance"], case["source"]
        return
    with pytest.raises(ValueError, match=r"delta is 0, expected \(0, 1\)"):
        gaussian_rates(*rates(case), delta=0, significance=level)
    # Any mu > 0 has an infinite epsilon at delta = 0, which they cap.
    unbounded = math.inf if gaussian_rates_mu(rates(case), level) > 0 else 0.0
    assert min(50.0, unbounded) == case["expected"], case["source"]


@pytest.mark.parametrize("case", vectors("jeffreys_optimal_eps_lower"))
def test_credible_rates_bracket_a_vector_by_separate_quantiles(case):
    """The vector takes each rate's own Jeffreys quantile at 1 - alpha, and the best of all thresholds.

    That choice is on the tested data and keeps no level, so it is rebuilt here. Both rates lie below their quantiles
    with posterior probability (1 - alpha)^2, so that ours at that level is no smaller; Clopper-Pearson is no larger.
    """
    alpha, delta = case["inputs"]["alpha"], case["inputs"]["delta"]
    rng = np.random.default_rng(0xBAD5EED)
    seen, unseen = rng.normal(1, 1, 100), rng.normal(0, 1, 100)
    best = 0.0
    for threshold in np.append(seen, unseen):
        hits, false = int((seen >= threshold).sum()), int((unseen >= threshold).sum())
        found = (hits, 100 - hits, false, 100 - false)
        fnr, fpr = (stats.beta.ppf(1 - alpha, k + 0.5, 100.5 - k) for k in (100 - hits, false))
        theirs = float(implied_epsilon(fnr, fpr, delta))
        assert credible_rates(*found, delta=delta, significance=1 - (1 - alpha) ** 2) >= theirs - 1e-9
        assert clopper_pearson(*found, delta=delta, significance=2 * alpha) <= theirs
        best = max(best, theirs)
    assert abs(best - case["expected"]) <= case["tolerance"], case["source"]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("delta", [0.0, 1e-5, 0.1])
def test_clopper_pearson_equals_limits_of_scipy(counts, delta):
    for significance in (0.05, 0.2):
        expected = implied_epsilon(*upper_limits(counts, significance), delta)
        assert clopper_pearson(*counts, delta=delta, significance=significance) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("counts", COUNTS)
def test_gaussian_rates_equal_limits_of_scipy(counts):
    fnr, fpr = upper_limits(counts, 0.1)
    mu = max(0.0, stats.norm.isf(fpr) - stats.norm.ppf(fnr))
    expected = accounting.gaussian_epsilon(mu, 1e-3)
    assert gaussian_rates(*counts, delta=1e-3, significance=0.1) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("counts", [(45, 5, 10, 40), (30, 20, 3, 40), (499, 1, 1, 499), (40, 60, 2, 98)])
@pytest.mark.parametrize("delta", [0.0, 1e-5, 0.05])
def test_credible_rates_are_a_quantile_by_quadrature(counts, delta):
    """The posterior probability of a smaller epsilon, by scipy's adaptive quadrature over the false negative rate."""
    hits, missed, false, rejected = (count + 0.5 for count in counts)
    bound = credible_rates(*counts, delta=delta)
    assert bound > 0.5

    def allowed(fnr):
        least = max(1 - delta - fnr * math.exp(bound), (1 - delta - fnr) * math.exp(-bound), 0.0)
        return stats.beta.pdf(fnr, missed, hits) * stats.beta.sf(least, false, rejected)

    corner = (1 - delta) / (1 + math.exp(bound))
    center = missed / (missed + hits)
    points = sorted({corner, center, *np.clip(center + np.array([-0.1, 0.1, -0.02, 0.02]), 1e-9, 1 - 1e-9)})
    mass = integrate.quad(allowed, 0, 1, points=points, limit=500, epsabs=1e-11)[0]
    assert mass == pytest.approx(0.05, abs=1e-8)


@pytest.mark.parametrize("counts", [(50, 0, 0, 50), (7, 0, 3, 2), (60, 40, 0, 3), (20, 80, 1, 99), (12, 8, 9, 11)])
def test_credible_rates_are_a_quantile_of_posterior_samples(counts):
    """Also without errors, where the density has poles. 4 standard errors of the share below."""
    hits, missed, false, rejected = (count + 0.5 for count in counts)
    rng = np.random.default_rng(1)
    epsilons = implied_epsilon(rng.beta(missed, hits, 200_000), rng.beta(false, rejected, 200_000), 1e-3)
    for significance in (0.05, 0.3):
        bound = credible_rates(*counts, delta=1e-3, significance=significance)
        error = 4 * math.sqrt(significance * (1 - significance) / 200_000)
        assert (epsilons < bound).mean() <= significance + error
        assert (epsilons <= bound + 1e-9).mean() >= significance - error


def auroc_moments(mu, num_in, num_out):
    """Mean and standard deviation of the AUROC of N(mu, 1) against N(0, 1), by quadrature."""

    def expected(power):
        return integrate.quad(lambda y: stats.norm.pdf(y) * stats.norm.cdf(mu - y) ** power, -12, 12, epsabs=1e-13)[0]

    mean, both = expected(1), expected(2)
    variance = (mean * (1 - mean) + (num_in + num_out - 2) * (both - mean**2)) / (num_in * num_out)
    return mean, math.sqrt(variance)


@pytest.mark.parametrize(("num_in", "num_out"), [(30, 20), (500, 500), (1, 40)])
@pytest.mark.parametrize("mu", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("significance", [0.05, 0.2])
def test_gaussian_auroc_mu_inverts_its_definition(num_in, num_out, mu, significance):
    """For the AUROC that lies just the normal quantile above the mean, to its resolution of half a comparison."""
    mean, deviation = auroc_moments(mu, num_in, num_out)
    observed = mean + stats.norm.isf(significance) * deviation
    if observed > 1:  # not even perfect scores reject this mu
        assert gaussian_auroc_mu(1.0, num_in, num_out, significance=significance) < mu
        return
    found = gaussian_auroc_mu(observed, num_in, num_out, significance=significance)
    ends = [
        gaussian_auroc_mu(
            np.clip(observed + shift / (num_in * num_out), 0, 1), num_in, num_out, significance=significance
        )
        for shift in (-0.5, 0.5)
    ]
    assert ends[0] <= mu + 1e-9
    assert mu <= ends[1] + 1e-9
    assert ends[0] <= found <= ends[1]


@pytest.mark.parametrize(("num_in", "num_out", "mu"), [(30, 20, 0.0), (30, 20, 1.5), (80, 80, 1.0)])
def test_gaussian_auroc_mu_keeps_its_level_by_simulation(num_in, num_out, mu):
    """And its mean and variance are those of 20,000 simulated AUROCs, to 4 standard errors."""
    rng = np.random.default_rng(2)
    inside, outside = rng.normal(mu, 1, (20_000, num_in)), rng.normal(0, 1, (20_000, num_out))
    ranks = np.argsort(np.argsort(np.concatenate([inside, outside], axis=1), axis=1), axis=1)[:, :num_in].sum(axis=1)
    areas = (ranks - num_in * (num_in - 1) / 2) / (num_in * num_out)
    mean, deviation = auroc_moments(mu, num_in, num_out)
    assert abs(areas.mean() - mean) <= 4 * deviation / math.sqrt(20_000)
    assert areas.std() == pytest.approx(deviation, rel=4 / math.sqrt(2 * 20_000))
    # The bound is above mu if and only if the area is above its normal quantile; so few canaries have fewer alarms.
    alarms = {area: gaussian_auroc_mu(area, num_in, num_out) > mu for area in np.unique(areas.round(9))}
    level = np.mean([alarms[area] for area in areas.round(9)])
    assert level == pytest.approx((areas > mean + stats.norm.isf(0.05) * deviation).mean(), abs=1e-3)
    assert 0.03 <= level <= 0.055


def test_gaussian_auroc_mu_is_zero_at_chance_and_finite_at_one():
    assert gaussian_auroc_mu(0.5, 100, 100) == 0.0
    assert gaussian_auroc_mu(0.0, 100, 100) == 0.0
    values = [gaussian_auroc_mu(1.0, size, size) for size in (2, 10, 100, 10_000)]
    assert (np.diff(values) > 0).all()
    assert values[-1] < 16


@pytest.mark.parametrize(("name", "bound"), BOUNDS.items(), ids=BOUNDS)
def test_bounds_are_monotone(name, bound):
    """Fewer errors, more delta, less confidence."""
    fewer = [bound(100 - k, k, k, 100 - k, delta=1e-4) for k in range(50, -1, -1)]
    assert (np.diff(fewer) >= -1e-9).all()
    assert fewer[0] == 0.0 < fewer[-1]
    by_delta = [bound(80, 20, 10, 90, delta=delta) for delta in (0.3, 0.1, 1e-2, 1e-4)]
    by_significance = [bound(80, 20, 10, 90, delta=1e-4, significance=s) for s in (1e-4, 1e-2, 0.05, 0.3)]
    assert (np.diff(by_delta) > 0).all()
    assert (np.diff(by_significance) > 0).all()


@pytest.mark.parametrize(("name", "bound"), BOUNDS.items(), ids=BOUNDS)
def test_bounds_are_symmetric_in_the_two_errors(name, bound):
    """Said the other way round, a test has its errors exchanged."""
    for hits, missed, false, rejected in [(80, 20, 10, 95), (99_999, 1, 50_000, 50_000)]:
        exchanged = bound(rejected, false, missed, hits, delta=1e-4)
        assert bound(hits, missed, false, rejected, delta=1e-4) == pytest.approx(exchanged, rel=1e-9)


@pytest.mark.parametrize("epsilon", [0.0, 1.0, 3.0])
def test_clopper_pearson_holds_its_level_at_a_fixed_threshold(epsilon):
    """Exact, by summing over all counts of randomised response with 40 members and 30 non-members."""
    members, others, wrong = 40, 30, 1 / (1 + math.exp(epsilon))
    alarms = 0.0
    for missed, false in itertools.product(range(members + 1), range(others + 1)):
        if clopper_pearson(members - missed, missed, false, others - false, delta=0.0) > epsilon:
            alarms += stats.binom.pmf(missed, members, wrong) * stats.binom.pmf(false, others, wrong)
    assert alarms <= 0.05


@pytest.mark.parametrize("mu", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("rank", [1, 5, 20])
def test_rates_hold_their_level_at_an_order_statistic(mu, rank):
    """The threshold is the rank-th highest non-member, itself not counted; 4,000 games, 3 standard errors."""
    rng = np.random.default_rng(3)
    inside, outside = rng.normal(mu, 1, (4000, 40)), np.sort(rng.normal(0, 1, (4000, 30)), axis=1)
    hits = (inside > outside[:, [-rank]]).sum(axis=1)
    true = accounting.gaussian_epsilon(mu, 1e-2)
    for bound in (clopper_pearson, gaussian_rates):
        values = {k: bound(k, 40 - k, rank - 1, 31 - rank, delta=1e-2) for k in range(41)}
        assert np.mean([values[k] > true for k in hits]) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 4000)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ((-1, 2, 3, 4), "expected integers >= 0"),
        ((1.5, 2, 3, 4), "expected integers >= 0"),
        ((0, 0, 3, 4), "expected at least one member and one non-member"),
        ((1, 2, 0, 0), "expected at least one member and one non-member"),
    ],
)
@pytest.mark.parametrize("bound", BOUNDS.values(), ids=BOUNDS)
def test_bounds_reject_bad_counts(bound, counts, message):
    with pytest.raises(ValueError, match=message):
        bound(*counts, delta=1e-5)


@pytest.mark.parametrize("bound", BOUNDS.values(), ids=BOUNDS)
def test_bounds_reject_levels_out_of_range(bound):
    with pytest.raises(ValueError, match="delta is 1, expected"):
        bound(1, 2, 3, 4, delta=1)
    with pytest.raises(ValueError, match=r"significance is 0\.5"):
        bound(1, 2, 3, 4, delta=1e-5, significance=0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.1, 2, 3), r"auroc is 1\.1"),
        ((math.nan, 2, 3), "auroc is nan"),
        ((0.7, 0, 3), "num_in and num_out are 0 and 3"),
    ],
)
def test_gaussian_auroc_mu_rejects_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        gaussian_auroc_mu(*arguments)
    with pytest.raises(ValueError, match="significance is 0"):
        gaussian_auroc_mu(0.7, 2, 3, significance=0)
