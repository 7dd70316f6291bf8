"""Scores that need reference models, against naive loops and closed forms."""

import math

import numpy as np
import pytest
from scipy import stats

from metacanary import reference_scores
from metacanary.reference_scores import offline_lira, relative_to_reference, rmia


def draw(num_references, num_canaries=20, seed=0):
    """Values of 3 runs and of reference models."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(3, num_canaries)), rng.normal(1.0, 2.0, size=(num_references, num_canaries))


def log_probabilities(shape, seed):
    return np.log(np.random.default_rng(seed).uniform(0.01, 0.99, size=shape))


def test_relative_to_reference_equals_a_loop():
    values, reference = draw(3)
    found = relative_to_reference(values, reference)
    for k in range(3):
        for i in range(20):
            expected = values[k, i] - sum(reference[r, i] for r in range(3)) / 3
            assert found[k, i] == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("num_references", [2, 7])
def test_offline_lira_of_few_references_equals_a_loop_with_one_variance(num_references):
    values, reference = draw(num_references)
    means = [sum(reference[:, i]) / num_references for i in range(20)]
    squares = [(reference[r, i] - means[i]) ** 2 for r in range(num_references) for i in range(20)]
    deviation = math.sqrt(sum(squares) / (20 * (num_references - 1)))
    found = offline_lira(values, reference)
    for k in range(3):
        for i in range(20):
            assert found[k, i] == pytest.approx((values[k, i] - means[i]) / deviation, rel=1e-12, abs=1e-12)


def test_offline_lira_of_many_references_equals_a_loop_with_a_variance_for_each_canary():
    values, reference = draw(8)
    found = offline_lira(values, reference)
    for i in range(20):
        z = (values[:, i] - np.mean(reference[:, i])) / np.std(reference[:, i], ddof=1)
        np.testing.assert_allclose(found[:, i], z, rtol=1e-12)


def test_offline_lira_ranks_as_the_paper_and_where_its_score_is_1():
    reference = np.random.default_rng(0).normal(size=(8, 1))
    margins = np.linspace(-60, 60, 50)
    found = np.array([offline_lira([margin], reference)[0] for margin in margins])
    assert (np.diff(found) > 0).all()
    normal = stats.norm(reference.mean(), reference.std(ddof=1))
    assert np.allclose(stats.norm.cdf(found), normal.cdf(margins), rtol=1e-9)
    assert len(np.unique(normal.cdf(margins))) < 50


def naive_rmia(log_probability, population, reference, reference_population, gamma, a):
    """The share of the population that is dominated, by the paper's formulas; and the ratios of the canaries."""

    def ratio(value, others):
        p_out = sum(math.exp(other) for other in others) / len(others)
        return math.exp(value) / (((1 + a) * p_out + (1 - a)) / 2)

    canaries = [ratio(value, reference[:, i]) for i, value in enumerate(log_probability)]
    images = [ratio(value, reference_population[:, i]) for i, value in enumerate(population)]
    return [sum(x / z >= gamma for z in images) / len(images) for x in canaries], canaries


@pytest.mark.parametrize("num_references", [1, 4])
@pytest.mark.parametrize(("gamma", "offline_a"), [(1.0, 0.3), (2.0, 0.0), (0.7, 1.0)])
def test_rmia_is_the_share_of_a_loop_and_less_than_an_image_more(num_references, gamma, offline_a):
    inputs = (
        log_probabilities(200, 0),
        log_probabilities(30, 1),
        log_probabilities((num_references, 200), 2),
        log_probabilities((num_references, 30), 3),
    )
    found = rmia(*inputs, gamma=gamma, offline_a=offline_a)
    shares, ratios = naive_rmia(*inputs, gamma, offline_a)
    np.testing.assert_array_equal(np.floor(found * 30), np.round(np.array(shares) * 30))
    order = np.argsort(ratios)
    assert (np.diff(found[order]) > 0).all()
    assert len(set(shares)) < 31 < len(set(found))


def test_rmia_is_continuous_and_has_these_values():
    """References that say 1 of all: ratio(x) is p(x). The population has log p = -4, -2, -1, -1."""
    population = np.array([-1.0, -4.0, -2.0, -1.0])
    values = np.array([-5.0, -4.0, -3.0, -2.0, -1.25, -1.0, 0.0])
    found = rmia(values, population, np.zeros((1, 7)), np.zeros((1, 4)))
    # tail 1 / (1 + 1) below; at the first; half way; at the second; three quarters; at the last two; tail 1 / (1 + 1)
    np.testing.assert_allclose(4 * found, [0.5, 1.0, 1.5, 2.0, 2.75, 4.0, 4.5], rtol=1e-12)


def test_rmia_orders_canaries_of_one_model_alike_whatever_population_and_gamma():
    canaries, reference = log_probabilities(100, 0), log_probabilities((2, 100), 1)
    orders = {
        tuple(np.argsort(rmia(canaries, log_probabilities(z, 2), reference, log_probabilities((2, z), 3), gamma=gamma)))
        for z in (1, 20)
        for gamma in (0.5, 1.0, 2.0)
    }
    assert len(orders) == 1


def test_rmia_keeps_the_order_of_canaries_far_below_the_population():
    values = np.array([-1e4, -1e3, -800.0, -750.0])
    found = rmia(values, np.zeros(3), np.zeros((1, 4)), np.zeros((1, 3)))
    assert (np.diff(found) > 0).all()


FUNCTIONS = {
    "relative_to_reference": relative_to_reference,
    "offline_lira": offline_lira,
    "rmia": lambda values, reference: rmia(values, [-1.0], reference, np.full((len(reference), 1), -1.0)),
}


def test_every_score_is_tested_here():
    assert FUNCTIONS.keys() == reference_scores.MIN_REFERENCES.keys()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_scores_reject_too_few_references_and_other_canaries(name):
    least = reference_scores.MIN_REFERENCES[name]
    values, reference = draw(least)
    with pytest.raises(ValueError, match=f"reference has {least - 1} models, expected at least {least}"):
        FUNCTIONS[name](values[0], reference[1:])
    with pytest.raises(ValueError, match=r"shapes \(20,\) and \(\d, 19\), expected \[..., m\], \[R, m\]"):
        FUNCTIONS[name](values[0], reference[:, 1:])


def test_offline_lira_rejects_references_that_agree():
    """On one canary if each has its own variance, on all if they share one."""
    values, few = draw(2)
    few[:, 0] = 0.1
    assert np.isfinite(offline_lira(values, few)).all()
    few[:] = few[0]
    with pytest.raises(ValueError, match="reference models agree on 20 canaries, expected a variance"):
        offline_lira(values, few)
    values, many = draw(8)
    many[:, [3, 5]] = 0.1  # not a binary fraction: the variance of eight equal numbers may round to more than 0
    with pytest.raises(ValueError, match="reference models agree on 2 canaries"):
        offline_lira(values, many)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 0.0}, "gamma is 0.0, expected a number > 0"),
        ({"offline_a": 1.5}, r"offline_a is 1.5, expected a number in \[0, 1\]"),
    ],
)
def test_rmia_rejects_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        rmia([-1.0], [-1.0], [[-1.0]], [[-1.0]], **options)


def test_rmia_rejects_an_empty_population():
    with pytest.raises(ValueError, match="population is empty"):
        rmia([-1.0], [], [[-1.0]], np.zeros((1, 0)))
