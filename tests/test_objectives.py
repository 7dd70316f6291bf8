"""Objectives: closed forms, naive twins, limits, and derivatives by finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, special, stats

from metacanary import guesses, scores
from metacanary.objectives import (
    OBJECTIVES,
    LogitGap,
    LossGap,
    Separation,
    SmoothAUROC,
    SoftGuesses,
    logit_margin,
    soft_top,
)

CASES = [
    LossGap(),
    LogitGap(),
    Separation(),
    Separation(winsorized=0.15),
    SmoothAUROC(temperature=0.5),
    SmoothAUROC(temperature=3.0),
    SoftGuesses(temperature=0.5),
    SoftGuesses(temperature=3.0, share=0.2),
    SoftGuesses(share=1.0),
]


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


def with_margins(margins):
    """Logits of two classes that have these margins, and their labels."""
    logits = jnp.stack([jnp.asarray(margins), jnp.zeros(len(margins))], axis=1)
    return logits, jnp.zeros(len(margins), int)


def test_logit_gap_has_its_closed_form():
    logits, labels, included = example()
    margin, coins = scores.logit_margin(logits, labels), np.asarray(included)
    expected = margin[~coins].mean() - margin[coins].mean()
    assert abs(expected) > 0.1
    assert float(LogitGap()(logits, labels, included)) == pytest.approx(expected, rel=1e-5)
    assert float(LogitGap()(logits, labels, jnp.ones(9, bool))) == pytest.approx(-margin.mean(), rel=1e-5)


def test_logit_gap_does_not_saturate():
    """Its derivative by a margin is the same at -40 and 40, where that of the loss is -1 and 0."""
    logits, labels = with_margins([40.0, -40.0, 0.0])
    included = jnp.array([True, True, False])
    gap, loss = (jax.grad(objective)(logits, labels, included)[:, 0] for objective in (LogitGap(), LossGap()))
    assert np.allclose(gap, [-0.5, -0.5, 1.0], atol=1e-6)
    assert np.allclose(loss, [0.0, -1 / 3, 1 / 6], atol=1e-6)


@pytest.mark.parametrize("winsorized", [0.0, 0.1, 0.3])
def test_separation_has_its_closed_form(winsorized):
    """Against numpy in float64, with the pooled variance of the two-sample t test."""
    logits, labels, included = example(num=30)
    margin, coins = scores.logit_margin(logits, labels), np.asarray(included)
    margin = np.clip(margin, *np.quantile(margin, [winsorized, 1 - winsorized]))
    t = stats.ttest_ind(margin[coins], margin[~coins]).statistic
    expected = t * np.sqrt(1 / coins.sum() + 1 / (~coins).sum())
    assert abs(expected) > 0.01
    assert float(Separation(winsorized=winsorized)(logits, labels, included)) == pytest.approx(-expected, rel=1e-4)


def test_separation_is_the_mu_of_gaussian_margins():
    """And so their AUROC is Phi(mu / sqrt 2); 40,000 margins, four standard errors (0.011 and 0.0025)."""
    coins = np.arange(40_000) % 2 == 0
    margins = 7 + 3 * (np.random.default_rng(0).normal(size=len(coins)) + 1.5 * coins)
    assert float(Separation()(*with_margins(margins), jnp.asarray(coins))) == pytest.approx(-1.5, abs=0.045)
    assert scores.auroc(margins, coins) == pytest.approx(stats.norm.cdf(1.5 / np.sqrt(2)), abs=0.01)


@pytest.mark.parametrize("objective", [Separation(), Separation(winsorized=0.2), SoftGuesses(), SmoothAUROC()])
def test_objectives_do_not_see_a_shift_of_all_margins(objective):
    margins = np.random.default_rng(0).normal(size=12)
    included = jnp.asarray(np.arange(12) % 2 == 0)
    value, gradient = jax.value_and_grad(lambda m: objective(*with_margins(m), included))(jnp.asarray(margins))
    assert float(gradient.sum()) == pytest.approx(0.0, abs=1e-6)
    assert float(jnp.abs(gradient).max()) > 1e-3
    assert float(objective(*with_margins(margins + 5), included)) == pytest.approx(float(value), abs=1e-5)


def test_separation_does_not_see_the_scale_of_margins():
    coins = np.arange(12) % 2 == 0
    margins, included = np.random.default_rng(0).normal(size=12) + coins, jnp.asarray(coins)
    for objective in (Separation(), Separation(winsorized=0.2)):
        value = float(objective(*with_margins(margins), included))
        assert value < -0.5
        assert float(objective(*with_margins(100 * margins), included)) == pytest.approx(value, rel=1e-4)


def test_separation_is_hidden_by_an_outlier_unless_winsorized():
    """Of 40 margins, told apart by 3 standard deviations, one member's is 1,000."""
    coins = np.arange(40) % 2 == 0
    margins = np.random.default_rng(0).normal(size=40) + 3 * coins
    margins[0] = 1000.0
    given = (*with_margins(margins), jnp.asarray(coins))
    assert -0.5 < float(Separation()(*given)) < 0
    assert float(Separation(winsorized=0.05)(*given)) < -2


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_soft_guesses_equal_a_loop_with_thresholds_by_root_finding(share):
    logits, labels, included = example(num=30)
    scaled = scores.logit_margin(logits, labels) / 0.7

    def top(values):
        threshold = optimize.brentq(lambda a: special.expit(values - a).sum() - share * 15, -50, 50, xtol=1e-13)
        return special.expit(values - threshold)

    right = [
        high if coin else low for high, low, coin in zip(top(scaled), top(-scaled), np.asarray(included), strict=True)
    ]
    found = float(SoftGuesses(temperature=0.7, share=share)(logits, labels, included))
    assert found == pytest.approx(-sum(right) / (share * 30), rel=1e-5)


@pytest.mark.parametrize("number", [2, 10, 20])
def test_soft_guesses_tend_to_the_count_of_the_audit(number):
    """As the temperature goes to 0; it differs from the limit while the temperature is not small."""
    logits, labels, included = example(num=40)
    margin = scores.logit_margin(logits, labels)
    exact = guesses.count_correct(margin, included, (number, number)) / (2 * number)
    given = [SoftGuesses(temperature=t, share=number / 20) for t in (3.0, 1e-4)]
    errors = [abs(float(objective(logits, labels, included)) + exact) for objective in given]
    assert errors[1] < 1e-4 < errors[0]


@pytest.mark.parametrize("share", [0.01, 0.25, 0.9])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e5])
def test_soft_top_adds_up_and_has_a_finite_derivative(share, scale):
    """Also for equal values, and for values so far apart that all slopes round to 0."""
    values = scale * jnp.asarray(np.random.default_rng(0).permutation(60), jnp.float32)
    soft, pull = jax.vjp(lambda v: soft_top(v, share), values)
    assert float(soft.mean()) == pytest.approx(share, abs=0.5 / 60 if scale == 1e5 else 1e-5)
    (gradient,) = pull(jnp.cos(values))
    assert bool(jnp.isfinite(gradient).all())
    assert np.allclose(pull(jnp.ones(60))[0], 0, atol=1e-6)  # the sum is constant


@pytest.mark.parametrize("objective", [Separation(), Separation(winsorized=0.2), SmoothAUROC()])
@pytest.mark.parametrize("coins", [np.ones(9, bool), np.zeros(9, bool)])
def test_objectives_without_one_of_the_groups_are_zero_with_a_zero_derivative(objective, coins):
    logits, labels, _ = example()
    value, gradient = jax.jit(jax.value_and_grad(objective))(logits, labels, jnp.asarray(coins))
    assert (float(value), float(jnp.abs(gradient).max())) == (0.0, 0.0)


@pytest.mark.parametrize("objective", CASES, ids=repr)
@pytest.mark.parametrize("num_included", [0, 1, 5, 9])
def test_objectives_and_derivatives_are_finite_for_equal_logits(objective, num_included):
    """As of a model that has not been trained."""
    value_and_grad = jax.jit(jax.value_and_grad(objective))
    value, gradient = value_and_grad(jnp.zeros((9, 4)), jnp.arange(9) % 4, jnp.arange(9) < num_included)
    assert np.isfinite(value)
    assert bool(jnp.isfinite(gradient).all())


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
    assert {name: OBJECTIVES[name]() for name in OBJECTIVES} == {
        "loss_gap": LossGap(),
        "logit_gap": LogitGap(),
        "separation": Separation(winsorized=0.0),
        "smooth_auroc": SmoothAUROC(temperature=2.0),
        "soft_guesses": SoftGuesses(temperature=2.0, share=0.5),
    }
    assert hash(SmoothAUROC(temperature=1.0)) == hash(SmoothAUROC(temperature=1.0))
    assert SmoothAUROC(temperature=1.0) != SmoothAUROC(temperature=2.0)


@pytest.mark.parametrize(
    ("objective", "name", "value", "expected"),
    [
        *((kind, "temperature", t, "> 0") for kind in (SmoothAUROC, SoftGuesses) for t in (0.0, -1.0, float("nan"))),
        *((SoftGuesses, "share", share, "> 0 <= 1") for share in (0.0, 1.01, float("nan"))),
        *((Separation, "winsorized", share, ">= 0 < 0.5") for share in (-0.1, 0.5, float("nan"))),
    ],
)
def test_objectives_reject_by_key_and_value(objective, name, value, expected):
    with pytest.raises(ValueError, match=f"objective.{name}: got {value}, expected a number {expected}"):
        objective(**{name: value})
