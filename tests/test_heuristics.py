"""The last-iterate heuristic: closed forms, quadrature, simulation, 40 digits, and the accountant above it."""

import math

import numpy as np
import pytest
from scipy import optimize, stats

from metacanary import accounting, heuristics
from metacanary.accounting import gaussian_epsilon
from metacanary.heuristics import last_iterate_epsilon

DIGITS = {"noise_multiplier": 2.0, "sampling_prob": 0.2, "num_steps": 200, "delta": 1e-5}
SMALL = [(0.3, 0.08, 3), (1.0, 0.3, 20), (2.0, 0.9, 12), (0.5, 1e-3, 30), (1.5, 0.5, 1)]  # sigma, q, T


def by(**change):
    return last_iterate_epsilon(**(DIGITS | change))


def density(x, sign, sigma, sampling_prob, num_steps):
    """Density of sign * Binomial(T, q) + N(0, sigma^2 T), term by term; of the noise alone for sign 0."""
    scale = sigma * math.sqrt(num_steps)
    if not sign:
        return stats.norm.pdf(x, 0, scale)
    weights = stats.binom.pmf(range(num_steps + 1), num_steps, sampling_prob)
    return sum(w * stats.norm.pdf(x, sign * k, scale) for k, w in enumerate(weights))


def divergence(epsilon, one, other, *mechanism):
    """Hockey-stick divergence by the trapezoidal rule; the signs say how each neighbour is shifted."""
    sigma, _, num_steps = mechanism
    half = num_steps + 12 * sigma * math.sqrt(num_steps)
    x = np.linspace(-half, half, 50_001)
    positive = np.maximum(0.0, density(x, one, *mechanism) - math.exp(epsilon) * density(x, other, *mechanism))
    return np.trapezoid(positive, x)


@pytest.mark.parametrize("delta", [1e-10, 1e-5, 0.01])
@pytest.mark.parametrize("num_steps", [1, 16, 10_000])
@pytest.mark.parametrize("sigma", [0.3, 3.0, 100.0])
@pytest.mark.parametrize(("adjacency", "sensitivity"), [("add_remove", 1), ("replace_one", 2)])
def test_last_iterate_without_sampling_is_gaussian(adjacency, sensitivity, sigma, num_steps, delta):
    """q = 1: mu = sensitivity sqrt(T) / sigma, up to epsilon = 220,000; rounding only."""
    value = by(noise_multiplier=sigma, sampling_prob=1.0, num_steps=num_steps, delta=delta, adjacency=adjacency)
    exact = gaussian_epsilon(sensitivity * math.sqrt(num_steps) / sigma, delta)
    assert value == pytest.approx(exact, rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("delta", [1e-8, 1e-4])
@pytest.mark.parametrize("mechanism", SMALL)
def test_last_iterate_epsilon_solves_the_definition(mechanism, delta):
    """The larger direction spends delta; 1e-5 is the error of the rule at the kink."""
    sigma, sampling_prob, num_steps = mechanism
    options = {"noise_multiplier": sigma, "sampling_prob": sampling_prob, "num_steps": num_steps, "delta": delta}
    value = last_iterate_epsilon(**options)
    spent = max(divergence(value, 1, 0, *mechanism), divergence(value, 0, 1, *mechanism))
    assert spent == pytest.approx(delta, rel=1e-5)
    value = last_iterate_epsilon(**options, adjacency="replace_one")
    assert divergence(value, 1, -1, *mechanism) == pytest.approx(delta, rel=1e-5)


@pytest.mark.parametrize("delta", [1e-5, 0.6])
@pytest.mark.parametrize("mechanism", [*SMALL, (0.5, 0.9, 12)])
def test_removing_solves_the_definition(mechanism, delta):
    """The direction Q over P alone: in all trials the other one was larger, so the maximum does not show it."""
    sigma, sampling_prob, num_steps = mechanism
    counts = np.arange(num_steps + 1)
    log_weights = stats.binom.logpmf(counts, num_steps, sampling_prob)
    pair = heuristics._Pair(counts / (sigma * math.sqrt(num_steps)), log_weights, right=False, left=True)
    value = pair.epsilon(delta)
    spent = divergence(value, 0, 1, *mechanism)
    assert spent == pytest.approx(delta, rel=1e-5) or (value == 0 and spent < delta)
    assert value < -num_steps * math.log1p(-sampling_prob)  # with probability (1 - q)^T the example is in no batch


@pytest.mark.parametrize(
    ("sigma", "sampling_prob", "num_steps", "delta", "adjacency", "expected"),
    [
        (3.0, 0.08, 2500, 1e-5, "add_remove", 6.21734315730654939),
        (0.3, 0.08, 40, 1e-10, "add_remove", 45.079509966525674),
        (8.0, 0.2, 10_000, 1e-10, "add_remove", 18.600047735576965),
        (100.0, 0.05, 200, 1e-10, "add_remove", 0.0371635722685798517),
        (5.0, 1e-5, 30, 1e-9, "add_remove", 3.96876308593127583e-5),
        (8.0, 0.05, 10_000, 1e-5, "replace_one", 5.677136532250801),
        (0.5, 1e-4, 50, 1e-5, "replace_one", 7.00055168178252127e-3),
    ],
)
def test_last_iterate_epsilon_matches_forty_digits(sigma, sampling_prob, num_steps, delta, adjacency, expected):
    """The definition by mpmath 1.4.1 with 40 digits, sums and bisection; weights of 10,000 coins round to 1e-12."""
    value = by(
        noise_multiplier=sigma, sampling_prob=sampling_prob, num_steps=num_steps, delta=delta, adjacency=adjacency
    )
    assert value == pytest.approx(expected, rel=1e-11, abs=1e-11)


@pytest.mark.parametrize("adjacency", accounting.ADJACENCIES)
@pytest.mark.parametrize(("sigma", "sampling_prob"), [(1.0, 0.05), (0.6, 0.4)])
def test_last_iterate_of_one_step_is_accounted(sigma, sampling_prob, adjacency):
    """With one step there is only one iterate. The accountant rounds up, by less than its bucket of 1e-4."""
    step = {"noise_multiplier": sigma, "sampling_prob": sampling_prob, "num_steps": 1, "delta": 1e-5}
    exact = last_iterate_epsilon(**step, adjacency=adjacency)
    assert exact <= accounting.epsilon(**step, adjacency=adjacency) <= exact + 1e-4


@pytest.mark.parametrize("adjacency", accounting.ADJACENCIES)
@pytest.mark.parametrize(
    ("sigma", "sampling_prob", "num_steps"),
    [(3.0, 0.08, 2500), (2.0, 0.2, 200), (1.0, 0.01, 100), (2.0, 0.5, 50), (10.0, 0.9, 300)],
)
def test_last_iterate_never_exceeds_the_accountant(sigma, sampling_prob, num_steps, adjacency):
    change = {"noise_multiplier": sigma, "sampling_prob": sampling_prob, "num_steps": num_steps, "adjacency": adjacency}
    assert 0 < by(**change) < accounting.epsilon(**(DIGITS | change))


def test_last_iterate_epsilon_agrees_with_a_simulation():
    """Eight steps of SGD on a linear loss, 400,000 runs with and without the example; four standard errors."""
    sigma, sampling_prob, num_steps, delta, runs = 1.0, 0.3, 8, 0.05, 400_000
    epsilon = last_iterate_epsilon(
        noise_multiplier=sigma, sampling_prob=sampling_prob, num_steps=num_steps, delta=delta
    )
    rng = np.random.default_rng(0)
    without, present = np.zeros(runs), np.zeros(runs)
    for _ in range(num_steps):
        without += sigma * rng.standard_normal(runs)
        present += (rng.random(runs) < sampling_prob) + sigma * rng.standard_normal(runs)

    def excess(x):
        ratio = density(x, 1, sigma, sampling_prob, num_steps) / density(x, 0, sigma, sampling_prob, num_steps)
        return math.log(ratio) - epsilon

    threshold = optimize.brentq(excess, 0, 20)
    in_, out = np.mean(present > threshold), np.mean(without > threshold)
    error = math.sqrt((in_ * (1 - in_) + math.exp(2 * epsilon) * out * (1 - out)) / runs)
    assert abs(in_ - math.exp(epsilon) * out - delta) < 4 * error < 0.1 * delta


@pytest.mark.parametrize("adjacency", accounting.ADJACENCIES)
def test_last_iterate_epsilon_is_monotone(adjacency):
    sigmas, probs, deltas = np.geomspace(0.3, 100, 25), np.geomspace(1e-5, 1, 25), np.geomspace(1e-10, 0.1, 25)
    assert np.all(np.diff([by(noise_multiplier=s, adjacency=adjacency) for s in sigmas]) < 0)
    assert np.all(np.diff([by(sampling_prob=q, adjacency=adjacency) for q in probs]) > 0)
    assert np.all(np.diff([by(delta=d, adjacency=adjacency) for d in deltas]) < 0)


def test_last_iterate_epsilon_may_fall_with_steps():
    """More steps drown a rare example in noise, until it is drawn often enough."""
    rare = [by(noise_multiplier=0.3, sampling_prob=0.01, num_steps=t) for t in (1, 10, 100, 1000, 10_000)]
    assert np.all(np.sign(np.diff(rare)) == [-1, -1, 1, 1])
    usual = [by(sampling_prob=0.08, num_steps=t) for t in (1, 10, 100, 1000, 10_000)]
    assert np.all(np.diff(usual) > 0)


@pytest.mark.parametrize(("adjacency", "half"), [("add_remove", 0.5), ("replace_one", 1.0)])
def test_last_iterate_epsilon_is_zero_where_delta_covers_it(adjacency, half):
    """T = 1, sigma = 1: the total variation is q times that of Gaussians `half` to each side of the middle."""
    total_variation = 0.3 * (2 * stats.norm.cdf(half) - 1)
    step = {"noise_multiplier": 1.0, "sampling_prob": 0.3, "num_steps": 1, "adjacency": adjacency}
    assert last_iterate_epsilon(**step, delta=total_variation * 1.001) == 0.0
    assert last_iterate_epsilon(**step, delta=total_variation * 0.999) > 0.0


def test_last_iterate_epsilon_without_noise_is_infinite():
    assert by(noise_multiplier=0.0) == math.inf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise_multiplier": -1.0}, r"noise_multiplier is -1\.0, expected a finite number >= 0"),
        ({"noise_multiplier": math.nan}, "noise_multiplier is nan"),
        ({"noise_multiplier": math.inf}, "noise_multiplier is inf"),
        ({"sampling_prob": 0.0}, r"sampling_prob is 0\.0, expected a number in \(0, 1\]"),
        ({"num_steps": 2.5}, r"num_steps is 2\.5, expected an integer >= 1"),
        ({"delta": 1.0}, r"delta is 1\.0, expected a number in \(0, 1\)"),
        ({"adjacency": "swap"}, "adjacency is 'swap', expected one of"),
    ],
)
def test_last_iterate_epsilon_rejects_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        by(**change)
