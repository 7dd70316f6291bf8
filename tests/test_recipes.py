"""Recipes: schedules at their points, optimisers against their formulas, and refusals that name key and value."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metacanary.recipes import DPSGD, EMA, SGD, Augmentation, Clipping, Optimizer, Schedule

SGD_SETTINGS = {"num_steps": 10, "batch_size": 4, "learning_rate": 0.5}
DPSGD_SETTINGS = {
    "num_steps": 10,
    "sampling_prob": 0.1,
    "clip_norm": 1.0,
    "noise_multiplier": 1.0,
    "learning_rate": 0.5,
}


def run(recipe, gradients, start=1.0):
    """The values of one parameter that is given these gradients one after the other."""
    optimizer, value = recipe.build_optimizer(), jnp.float32(start)
    state, values = optimizer.init(value), []
    for gradient in gradients:
        update, state = optimizer.update(jnp.float32(gradient), state, value)
        value = value + update
        values.append(float(value))
    return values


def test_sgd_optimizer_plain():
    """p - lr g."""
    assert run(SGD(**SGD_SETTINGS), [1.0, -2.0]) == pytest.approx([0.5, 1.5], rel=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_optimizer_adds_decay_to_the_gradient_then_momentum(nesterov):
    """m = 0.9 m + (g + wd p); p -= lr (g + wd p + 0.9 m) with Nesterov, lr m without."""
    recipe = SGD(**SGD_SETTINGS, momentum=0.9, nesterov=nesterov, weight_decay=0.1)
    gradients, p, m, expected = [1.0, -0.5, 0.25, 2.0], 1.0, 0.0, []
    for gradient in gradients:
        decayed = gradient + 0.1 * p
        m = 0.9 * m + decayed
        p -= 0.5 * (decayed + 0.9 * m if nesterov else m)
        expected.append(p)
    assert run(recipe, gradients) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("recipe", [SGD(**SGD_SETTINGS), DPSGD(**DPSGD_SETTINGS)], ids=["sgd", "dpsgd"])
def test_optimizers_follow_the_schedule(recipe):
    """Step t uses the rate at t, from t = 0."""
    settings = vars(recipe) | {"schedule": Schedule(name="one_cycle")}
    values = run(type(recipe)(**settings), [1.0] * 10, start=0.0)
    rates = -np.diff([0.0, *values])
    assert rates == pytest.approx(0.5 * np.interp(np.arange(10), [0, 5, 10], [0.07, 1.0, 0.2]), rel=1e-5)


@pytest.mark.parametrize("nesterov", [False, True])
def test_dpsgd_optimizer_has_momentum_after_the_noise(nesterov):
    """The noisy mean is what the optimiser is given; nothing is decayed."""
    values = run(DPSGD(**DPSGD_SETTINGS, momentum=0.5, nesterov=nesterov), [1.0, 0.0], start=0.0)
    assert values == pytest.approx([-0.75, -0.875] if nesterov else [-0.5, -0.75], rel=1e-6)


@pytest.mark.parametrize("recipe", [SGD(**SGD_SETTINGS), DPSGD(**DPSGD_SETTINGS)], ids=["sgd", "dpsgd"])
def test_recipes_are_frozen_and_hashable(recipe):
    """They are static arguments of compiled functions."""
    assert hash(recipe) == hash(type(recipe)(**vars(recipe)))
    with pytest.raises(AttributeError):
        recipe.num_steps = 1


@pytest.mark.parametrize(
    ("make", "key", "value"),
    [
        *[(SGD, key, value) for key in SGD_SETTINGS for value in (0, -1, float("nan"))],
        *[(DPSGD, key, value) for key in DPSGD_SETTINGS if key != "noise_multiplier" for value in (0, -0.5)],
        *[(SGD, "microbatch", value) for value in (0, -2, 3, 8)],
        (DPSGD, "microbatch", 0),
        (DPSGD, "sampling_prob", 1.5),
        (DPSGD, "noise_multiplier", -0.1),
        (DPSGD, "noise_multiplier", float("nan")),
        (DPSGD, "clip_norm", float("inf")),
        *[(make, "momentum", value) for make in (SGD, DPSGD) for value in (-0.1, float("nan"))],
        *[(SGD, "weight_decay", value) for value in (-0.1, float("inf"))],
    ],
)
def test_recipes_reject_by_key_and_value(make, key, value):
    settings = {SGD: SGD_SETTINGS, DPSGD: DPSGD_SETTINGS}[make]
    with pytest.raises(ValueError, match=f"^{key}: got {value}, expected a "):
        make(**settings | {key: value})


@pytest.mark.parametrize("microbatch", [None, 1, 2, 4])
def test_sgd_accepts_microbatches_that_divide_the_batch(microbatch):
    assert SGD(**SGD_SETTINGS, microbatch=microbatch).microbatch == microbatch


def test_augmentation_is_off_by_default():
    assert not DPSGD(**DPSGD_SETTINGS).augmentation.is_on
    assert Augmentation(flip=True).is_on
    assert Augmentation(multiplicity=2, crop_padding=4).is_on


def test_dpsgd_accepts_the_ends_of_its_ranges():
    recipe = DPSGD(**DPSGD_SETTINGS | {"sampling_prob": 1.0, "noise_multiplier": 0.0})
    assert (recipe.sampling_prob, recipe.noise_multiplier) == (1.0, 0.0)


@pytest.mark.parametrize(("make", "settings"), [(SGD, SGD_SETTINGS), (DPSGD, DPSGD_SETTINGS)], ids=["sgd", "dpsgd"])
def test_recipes_reject_what_does_not_fit_together(make, settings):
    """Momentum has a place of its own, which optimisers other than SGD would not read."""
    with pytest.raises(ValueError, match=r"momentum: got 0\.9, expected 0 with optimizer 'adam'"):
        make(**settings, momentum=0.9, optimizer=Optimizer(name="adam"))
    with pytest.raises(ValueError, match=r"optimizer\.options: got some, expected none for sgd, whose momentum"):
        make(**settings, optimizer=Optimizer(options={"momentum": 0.9}))
    with pytest.raises(ValueError, match="trainable: got 'first', expected one of all, last"):
        make(**settings, trainable="first")
    with pytest.raises(ValueError, match="nesterov: got True, expected False without momentum, of which it is a form"):
        make(**settings, nesterov=True)
    for name in ("num_steps", "microbatch"):
        with pytest.raises(ValueError, match=rf"{name}: got 2\.5, expected an integer"):
            make(**settings | {name: 2.5})


@pytest.mark.parametrize(("make", "settings"), [(SGD, SGD_SETTINGS), (DPSGD, DPSGD_SETTINGS)], ids=["sgd", "dpsgd"])
def test_optimizer_of_another_name_is_optax_own(make, settings):
    """Adam with its options, against Optax and the formula: m / (1 - b1^t) over sqrt(v / (1 - b2^t)) + eps."""
    options = {"b1": 0.5, "eps": 1e-3}
    recipe = make(**settings, optimizer=Optimizer(name="adam", options=options))
    drawn, p, m, v, expected = [1.0, -2.0, 0.5], 1.0, 0.0, 0.0, []
    for t, gradient in enumerate(drawn, start=1):
        m, v = 0.5 * m + 0.5 * gradient, 0.999 * v + 0.001 * gradient**2
        p -= 0.5 * (m / (1 - 0.5**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-3)
        expected.append(p)
    found = run(recipe, drawn)
    assert found == pytest.approx(expected, rel=1e-4)
    theirs, value = optax.adam(0.5, **options), jnp.float32(1.0)
    state = theirs.init(value)
    for gradient, ours in zip(drawn, found, strict=True):
        update, state = theirs.update(jnp.float32(gradient), state, value)
        value = value + update
        assert ours == pytest.approx(float(value), rel=1e-6)


def test_optimizer_of_another_name_follows_the_schedule():
    """With one gradient at every step Adam moves by the rate: (to eps)."""
    recipe = DPSGD(**DPSGD_SETTINGS, optimizer=Optimizer(name="adam"), schedule=Schedule(name="one_cycle"))
    rates = -np.diff([0.0, *run(recipe, [1.0] * 10, start=0.0)])
    assert rates == pytest.approx(0.5 * np.interp(np.arange(10), [0, 5, 10], [0.07, 1.0, 0.2]), rel=1e-4)


def test_settings_of_mappings_are_hashable_and_know_no_order():
    """They are part of recipes, which are static arguments of compiled functions."""
    for first, second in [
        (
            Optimizer(name="adam", options={"b2": 0.9, "b1": 0.5}),
            Optimizer(name="adam", options=(("b1", 0.5), ("b2", 0.9))),
        ),
        (
            Clipping(name="per_layer", thresholds={"b": 2, "a": 1}),
            Clipping(name="per_layer", thresholds=(("a", 1.0), ("b", 2.0))),
        ),
    ]:
        assert first == second
        assert hash(first) == hash(second)
    recipe = DPSGD(**DPSGD_SETTINGS, optimizer=Optimizer(name="adam", options={"b1": 0.5}), ema=EMA(decay=0.9))
    assert hash(recipe) == hash(DPSGD(**vars(recipe)))
