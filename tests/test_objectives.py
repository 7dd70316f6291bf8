"""Objectives: closed forms, naive twins, limits, and derivatives by finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, special, stats

from metacanary import guesses, models, scores
from metacanary.objectives import (
    OBJECTIVES,
    GradientNorm,
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


def test_logit_margin_of_probabilities_is_the_mean_over_classes():
    """Against a loop over canaries and classes, in float64; and its derivative by them is the margin of each class."""
    logits, _, _ = example(num=20)
    soft = special.softmax(np.random.default_rng(1).normal(size=(20, 4)), axis=-1)
    margins = np.array([[scores.logit_margin(row[None], [c])[0] for c in range(4)] for row in np.asarray(logits)])
    with jax.enable_x64(True):
        given = jnp.asarray(logits, jnp.float64), jnp.asarray(soft)
        assert np.allclose(jax.jit(logit_margin)(*given), (soft * margins).sum(axis=1), rtol=1e-12)
        assert np.allclose(jax.grad(lambda p: logit_margin(given[0], p).sum())(given[1]), margins, rtol=1e-12)


@pytest.mark.parametrize(
    "objective", [*CASES, lambda *given: logit_margin(*given[:2])], ids=[*map(repr, CASES), "logit_margin"]
)
def test_objectives_of_classes_are_those_of_their_one_hot_labels(objective):
    """Guarantee of the margin and the loss: the same bits, so that hardening changes nothing where labels are hard."""
    logits, labels, included = example(num=30)
    for function in (objective, jax.jit(objective)):
        expected = np.asarray(function(logits, labels, included))
        assert np.asarray(function(logits, jax.nn.one_hot(labels, 4), included)).tobytes() == expected.tobytes()


@pytest.mark.parametrize("objective", CASES, ids=repr)
def test_objectives_have_the_derivative_of_finite_differences_by_probabilities(objective):
    """Float64, central differences with step 1e-5: good to 1e-8 relative to the largest derivative."""
    logits, _, included = example()
    with jax.enable_x64(True):
        x = jnp.asarray(logits, jnp.float64)
        soft = jax.nn.softmax(jnp.asarray(np.random.default_rng(1).normal(size=x.shape)))
        gradient = np.asarray(jax.jit(jax.grad(objective, argnums=1))(x, soft, included))
        function = jax.jit(jax.vmap(lambda p: objective(x, p, included)))
        bumps = 1e-5 * np.eye(x.size).reshape(x.size, *x.shape)
        differences = np.asarray(function(soft[None] + bumps) - function(soft[None] - bumps)) / 2e-5
    assert np.abs(gradient).max() > 1e-3
    assert np.allclose(gradient.ravel(), differences, rtol=0, atol=1e-8 * max(1.0, np.abs(gradient).max()))


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
        "gradient_norm": GradientNorm(microbatch=64),
    }
    assert hash(SmoothAUROC(temperature=1.0)) == hash(SmoothAUROC(temperature=1.0))
    assert SmoothAUROC(temperature=1.0) != SmoothAUROC(temperature=2.0)


CONVNET = models.ConvNet(num_classes=4, widths=(4,), logit_scale=0.3)
COINS = jnp.array([True, False, True, True, False])


def trained_model(dtype=jnp.float64):
    """Parameters, five images and their labels."""
    rng = np.random.default_rng(1)
    params = models.init(CONVNET, jax.random.key(0), (8, 8, 1))
    images, labels = jnp.asarray(rng.random((5, 8, 8, 1))), jnp.asarray(rng.integers(0, 4, 5))
    return (*jax.tree.map(lambda x: x.astype(dtype), (params, images)), labels)


def of_model(params, images, labels, included=COINS, trainable="all"):
    return GradientNorm(microbatch=2).of_model(CONVNET, params, images, labels, included, trainable=trainable)


def naive_gradient_norm(params, images, labels, included, layers):
    """One canary after the other, the loss from the softmax."""

    @jax.jit
    @jax.grad
    def gradient(p, image, label):
        return -jnp.log(jax.nn.softmax(models.apply(CONVNET, p, image[None])[0]))[label]

    gradients = [gradient(params, x, y) for x, y, coin in zip(images, labels, included, strict=True) if coin]
    squares = [sum(float(jnp.sum(x**2)) for name in layers for x in g[name].values()) for g in gradients]
    return -np.mean(0.5 * np.log(squares))


def test_gradient_norm_is_that_of_plain_gradients_of_included_canaries():
    """By all layers and by the last alone, in float64."""
    with jax.enable_x64(True):
        params, images, labels = trained_model()
        for trainable, layers in (("all", list(params)), ("last", ["Dense_0"])):
            expected = naive_gradient_norm(params, images, labels, COINS, layers)
            found = float(of_model(params, images, labels, trainable=trainable))
            assert found == pytest.approx(expected, rel=1e-10)
            turned = float(of_model(params, images, labels, ~COINS, trainable=trainable))
            assert abs(turned - expected) > 1e-3
        assert float(of_model(params, images, labels, jnp.zeros(5, bool))) == 0


def test_gradient_norm_has_the_derivative_of_finite_differences():
    """By parameters and images at once, in float64; by excluded images it is 0."""
    with jax.enable_x64(True):
        *point, labels = trained_model()
        rng = np.random.default_rng(2)
        direction = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), point)
        function = jax.jit(lambda p: of_model(*p, labels))
        gradient = jax.grad(function)(point)
        slope = sum(jnp.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True))
        ends = [function(jax.tree.map(lambda x, d, h=h: x + h * d, point, direction)) for h in (-1e-6, 1e-6)]
        assert abs(float(slope)) > 1e-2
        assert float(ends[1] - ends[0]) / 2e-6 == pytest.approx(float(slope), rel=1e-6)
        assert ((jnp.abs(gradient[1]).max(axis=(1, 2, 3)) > 1e-6) == COINS).all()


def test_gradient_norm_does_not_fade_with_the_loss():
    """At margins above 17 float32 has p = 1; the value keeps five digits of that in float64, the derivative four."""
    params, images, labels = trained_model(jnp.float32)
    labels = jnp.zeros_like(labels)
    params["Dense_0"]["bias"] = params["Dense_0"]["bias"].at[0].set(70.0)
    logits = models.apply(CONVNET, params, images)
    assert (logit_margin(logits, labels) > 17).all()
    assert (jax.nn.softmax(logits)[:, 0] == 1).all()
    found, gradient = jax.value_and_grad(of_model, argnums=1)(params, images, labels)
    with jax.enable_x64(True):
        point = jax.tree.map(lambda x: x.astype(jnp.float64), (params, images))
        expected, exact = jax.value_and_grad(of_model, argnums=1)(*point, labels)
    exact = np.asarray(exact)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    np.testing.assert_allclose(gradient, exact, rtol=0, atol=1e-4 * np.abs(exact).max())


def test_gradient_norm_of_one_hot_probabilities_is_that_of_classes():
    """Probabilities are differentiated by as well, against finite differences."""
    with jax.enable_x64(True):
        params, images, labels = trained_model()
        one_hot = jax.nn.one_hot(labels, 4, dtype=images.dtype)
        found, expected = (float(of_model(params, images, y)) for y in (one_hot, labels))
        assert found == pytest.approx(expected, rel=1e-10)
        soft, step = 0.7 * one_hot + 0.1, jnp.zeros_like(one_hot).at[2, 1].set(1e-6)
        slope = jax.grad(of_model, argnums=2)(params, images, soft)[2, 1]
        difference = (of_model(params, images, soft + step) - of_model(params, images, soft - step)) / 2e-6
        assert abs(float(slope)) > 1e-3
        assert float(difference) == pytest.approx(float(slope), rel=1e-5)


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
