"""Recipes: schedules at their points, optimisers against their formulas, and refusals that name key and value."""

import jax.numpy as jnp
import numpy as np
import pytest

from metacanary.recipes import DPSGD, SGD, Augmentation, Schedule

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
    optimizer, value = recipe.optimizer(), jnp.float32(start)
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
