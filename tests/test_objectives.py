"""Objectives: closed forms, naive twins, limits, and derivatives by finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metacanary import scores
from metacanary.objectives import OBJECTIVES, LossGap, SmoothAUROC, logit_margin

CASES = [LossGap(), SmoothAUROC(temperature=0.5), SmoothAUROC(temperature=3.0)]


def example(num=9, classes=4, seed=0):
    """Logits, labels and coins of `num` canaries."""
    rng = np.random.default_rng(seed)
    logits = jnp.asarray(3 * rng.normal(size=(num, classes)), jnp.float32)
    return logits, jnp.asarray(rng.integers(0, classes, size=num)), jnp.asarray(np.arange(num) % 3 != 0)


def test_logit_margin_equals_that_of_scores():
    """Within 1e-6 relative: the scores' twin is float64."""
    logits, labels, _ = example(num=200)
    with jax.enable_x64(True):
        exact = jax.jit(logit_margin)(jnp.asarray(logits, jnp.float64), labels)
        assert exact.dtype == jnp.float64
        assert np.allclose(exact, scores.logit_margin(logits, labels), rtol=1e-12, atol=1e-12)
    assert np.allclose(jax.jit(logit_margin)(logits, labels), scores.logit_margin(logits, labels), rtol=1e-6, atol=1e-6)


def test_logit_margin_is_finite_and_differentiable_at_extreme_logits():
    logits = jnp.array([[300.0, 0.0, -300.0], [-300.0, 0.0, 300.0]])
    labels = jnp.array([0, 0])
    assert logit_margin(logits, labels).tolist() == [300.0, -600.0]
    gradient = jax.grad(lambda x: logit_margin(x, labels).sum())(logits)
    assert np.allclose(gradient, [[1, -1, 0], [1, 0, -1]], atol=1e-6)


def test_loss_gap_has_its_closed_form():
    """(sum of losses in - sum of losses out) / m, by hand in float64, with groups of different size."""
    logits, labels, included = (np.asarray(x) for x in example())
    losses = [np.log(np.exp(row.astype(float)).sum()) - float(row[y]) for row, y in zip(logits, labels, strict=True)]
    expected = sum(loss if coin else -loss for loss, coin in zip(losses, included, strict=True)) / 9
    assert float(LossGap()(logits, labels, included)) == pytest.approx(expected, rel=1e-5)
    assert float(LossGap()(logits, labels, ~included)) == pytest.approx(-expected, rel=1e-5)


def test_smooth_auroc_equals_a_loop_over_pairs():
    logits, labels, included = example()
    margin = scores.logit_margin(logits, labels)
    inside, outside = margin[np.asarray(included)], margin[~np.asarray(included)]
    pairs = [1 / (1 + np.exp(-(a - b) / 0.7)) for a in inside for b in outside]
    found = float(SmoothAUROC(temperature=0.7)(logits, labels, included))
    assert found == pytest.approx(-np.mean(pairs), rel=1e-5)


def test_smooth_auroc_tends_to_minus_auroc():
    """As the temperature goes to 0; it differs from the limit while the temperature is not small."""
    logits, labels, included = example(num=40)
    exact = scores.auroc(scores.logit_margin(logits, labels), included)
    errors = [abs(float(SmoothAUROC(temperature=t)(logits, labels, included)) + exact) for t in (3.0, 0.3, 1e-4)]
    assert 0.3 < exact < 0.7
    assert errors[2] < 1e-6 < errors[1] < 0.02
    assert SmoothAUROC(temperature=1e-4)(logits, labels, ~included) == pytest.approx(exact - 1, abs=1e-6)


@pytest.mark.parametrize("coins", [np.ones(9, bool), np.zeros(9, bool)])
def test_smooth_auroc_without_pairs_is_zero_with_a_zero_derivative(coins):
    logits, labels, _ = example()
    value, gradient = jax.jit(jax.value_and_grad(SmoothAUROC()))(logits, labels, jnp.asarray(coins))
    assert (float(value), float(jnp.abs(gradient).max())) == (0.0, 0.0)


@pytest.mark.parametrize("objective", CASES, ids=repr)
def test_objectives_are_lower_when_members_fit_better(objective):
    """The direction: they are minimised, and inclusion lowers a canary's loss."""
    logits, labels, included = example()
    better = logits + 2.0 * jax.nn.one_hot(labels, 4) * included[:, None]
    assert objective(better, labels, included) < objective(logits, labels, included) - 0.05


@pytest.mark.parametrize("objective", CASES, ids=repr)
def test_objectives_have_the_derivative_of_finite_differences(objective):
    """Float64, central differences with step 1e-5: good to 1e-8 relative to the largest derivative."""
    logits, labels, included = example()
    with jax.enable_x64(True):
        x = jnp.asarray(logits, jnp.float64)
        gradient = np.asarray(jax.jit(jax.grad(objective))(x, labels, included))
        function = jax.jit(jax.vmap(lambda v: objective(v, labels, included)))
        bumps = 1e-5 * np.eye(x.size).reshape(x.size, *x.shape)
        differences = np.asarray(function(x[None] + bumps) - function(x[None] - bumps)) / 2e-5
    assert gradient.dtype == np.float64
    assert np.abs(gradient).max() > 1e-3
    assert np.allclose(gradient.ravel(), differences, rtol=0, atol=1e-8 * max(1.0, np.abs(gradient).max()))


def test_objectives_are_hashable_settings():
    """Equal settings are one key of the cache of compiled objectives."""
    assert {name: OBJECTIVES[name]() for name in OBJECTIVES} == {"loss_gap": LossGap(), "smooth_auroc": SmoothAUROC()}
    assert hash(SmoothAUROC(temperature=1.0)) == hash(SmoothAUROC(temperature=1.0))
    assert SmoothAUROC(temperature=1.0) != SmoothAUROC(temperature=2.0)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_smooth_auroc_rejects_temperature(temperature):
    with pytest.raises(ValueError, match=f"objective.temperature: got {temperature}, expected a number > 0"):
        SmoothAUROC(temperature=temperature)
