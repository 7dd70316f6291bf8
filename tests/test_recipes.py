"""Recipes: schedules at their points, optimisers against their formulas, and refusals that name key and value."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metacanary.recipes import DPSGD, EMA, SGD, Augmentation, Clipping, Optimizer, Schedule, Target

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


def test_schedule_constant_is_constant():
    rate = Schedule().build(0.3, 10)
    assert [float(rate(t)) for t in (0, 5, 9)] == [0.3] * 3


def test_schedule_one_cycle_passes_its_points():
    """Linear from 0.07 of the peak up to it at the middle and down to 0.2 of it; to 1e-6 relative."""
    rate = Schedule(name="one_cycle").build(1.2, 100)
    expected = {0: 0.07, 25: 0.535, 50: 1.0, 75: 0.6, 100: 0.2}
    assert [float(rate(t)) for t in expected] == pytest.approx([1.2 * f for f in expected.values()], rel=1e-6)


def test_schedule_one_cycle_with_other_points():
    rate = Schedule(name="one_cycle", start=0.5, peak_at=0.2, end=0.0).build(2.0, 10)
    assert [float(rate(t)) for t in (0, 1, 2, 6, 10)] == pytest.approx([1.0, 1.5, 2.0, 1.0, 0.0], rel=1e-6)


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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "cosine"}, "schedule.name: got 'cosine', expected constant or one_cycle"),
        ({"peak_at": 0.0}, "schedule.peak_at: got 0.0"),
        ({"peak_at": 1.0}, "schedule.peak_at: got 1.0"),
    ],
)
def test_schedule_rejects_by_key_and_value(settings, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**settings)


@pytest.mark.parametrize("microbatch", [None, 1, 2, 4])
def test_sgd_accepts_microbatches_that_divide_the_batch(microbatch):
    assert SGD(**SGD_SETTINGS, microbatch=microbatch).microbatch == microbatch


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"multiplicity": 0, "flip": True}, "augmentation.multiplicity: got 0, expected an integer >= 1"),
        ({"crop_padding": -1}, "augmentation.crop_padding: got -1, expected an integer >= 0"),
        ({"multiplicity": 16}, "augmentation.multiplicity: got 16, expected 1 without flip and crop_padding, since"),
    ],
)
def test_augmentation_rejects_by_key_and_value(settings, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**settings)


def test_augmentation_is_off_by_default():
    assert not DPSGD(**DPSGD_SETTINGS).augmentation.is_on
    assert Augmentation(flip=True).is_on
    assert Augmentation(multiplicity=2, crop_padding=4).is_on


def test_dpsgd_accepts_the_ends_of_its_ranges():
    recipe = DPSGD(**DPSGD_SETTINGS | {"sampling_prob": 1.0, "noise_multiplier": 0.0})
    assert (recipe.sampling_prob, recipe.noise_multiplier) == (1.0, 0.0)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Optimizer(name="adamm"),
            "optimizer.name: got 'adamm', expected an optimiser of Optax with a learning",
        ),
        (
            lambda: Optimizer(name="chain"),
            "optimizer.name: got 'chain', expected an optimiser of Optax with a learning",
        ),
        (lambda: Optimizer(name="losses"), "optimizer.name: got 'losses', expected an optimiser of Optax"),
        (
            lambda: Optimizer(name="adam", options={"b3": 1.0}),
            "optimizer.options: got 'b3', expected some of b1, b2, eps",
        ),
        (
            lambda: Optimizer(name="adam", options={"learning_rate": 1.0}),
            "optimizer.options: got 'learning_rate', expected some of b1",
        ),
        *[
            (lambda value=value: EMA(decay=value), f"ema.decay: got {value}, expected a number >= 0 and < 1")
            for value in (-0.1, 1.0, NAN)
        ],
        (lambda: Clipping(name="global"), "clipping.name: got 'global', expected one of flat, per_layer, adaptive"),
        (lambda: Clipping(allocation="even"), "clipping.allocation: got 'even', expected one of shared, equal"),
        *[
            (
                lambda key=key, value=value: Clipping(**{key: value}),
                f"clipping.{key}: got {value}, expected a number between 0 and 1",
            )
            for key in ("quantile", "budget")
            for value in (0.0, 1.0, -0.5, NAN)
        ],
        *[
            (
                lambda value=value: Clipping(learning_rate=value),
                f"clipping.learning_rate: got {value}, expected a number > 0",
            )
            for value in (0.0, -1.0, NAN)
        ],
        *[
            (
                lambda value=value: Clipping(name="per_layer", thresholds={"Dense_0": 1.0, "Dense_1": value}),
                f"clipping.thresholds: got {value} for layer 'Dense_1', expected a number > 0",
            )
            for value in (0.0, -1.0, INF, NAN)
        ],
        (
            lambda: Clipping(thresholds={"Dense_0": 1.0}),
            "clipping.thresholds: got (('Dense_0', 1.0),), expected none: flat clipping has no use for it",
        ),
        (lambda: Clipping(allocation="equal"), "clipping.allocation: got equal, expected none: flat clipping has no"),
        *[
            (
                lambda key=key, name=name: Clipping(name=name, **{key: 0.2}),
                f"clipping.{key}: got 0.2, expected none: a threshold that does not adapt has no use for it",
            )
            for key in ("quantile", "learning_rate", "budget")
            for name in ("flat", "per_layer")
        ],
        *[
            (
                lambda key=key: Schedule(**{key: 0.4}),
                f"schedule.{key}: got 0.4, expected none: a constant schedule has no use for it",
            )
            for key in ("start", "peak_at", "end")
        ],
        *[
            (lambda name=name: Optimizer(name=name), f"optimizer: got '{name}' with options {{}}, expected one that")
            for name in ("lbfgs", "rprop")
        ],
        (
            lambda: Optimizer(name="adam", options={"b1": "high"}),
            "optimizer: got 'adam' with options {'b1': 'high'}, expected one that updates by a gradient",
        ),
        (
            lambda: Optimizer(name="noisy_sgd"),
            "optimizer.name: got 'noisy_sgd', expected one without noise: its own is in no accountant",
        ),
        *[
            (
                lambda value=value: Target(epsilon=value, delta=1e-5),
                f"target.epsilon: got {value}, expected a number > 0",
            )
            for value in (0.0, -1.0, NAN)
        ],
        *[
            (
                lambda value=value: Target(epsilon=1.0, delta=value),
                f"target.delta: got {value}, expected a number between 0 and 1",
            )
            for value in (0.0, 1.0, NAN)
        ],
    ],
)
def test_settings_reject_by_key_and_value(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert str(error.value).startswith(message)


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


@pytest.mark.parametrize("name", ["adam", "adamw", "lion", "lamb", "adafactor", "adagrad", "sign_sgd"])
def test_optimizers_of_optax_are_accepted(name):
    assert Optimizer(name=name).name == name


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


def test_clipping_noise_takes_the_counts_share():
    """1 / a^2 + 1 / b^2 = 1 / sigma^2, for counts of K layers whose sensitivity is sqrt(K) / 2."""
    adaptive = Clipping(name="adaptive", budget=0.2)
    a, b = adaptive.gradient_noise(3.0), adaptive.count_noise(3.0, 4) / (4**0.5 / 2)
    assert 1 / a**2 + 1 / b**2 == pytest.approx(1 / 9)
    assert (3.0 / b) ** 2 == pytest.approx(0.2)
    assert Clipping().gradient_noise(3.0) == Clipping(name="per_layer").gradient_noise(3.0) == 3.0
