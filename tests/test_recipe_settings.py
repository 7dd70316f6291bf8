"""Settings of recipes: schedules, copies, optimisers, clipping; what each refuses, by key and value."""

import pytest

from metacanary.recipes import EMA, Augmentation, Clipping, Optimizer, Schedule, Target


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


@pytest.mark.parametrize("name", ["adam", "adamw", "lion", "lamb", "adafactor", "adagrad", "sign_sgd"])
def test_optimizers_of_optax_are_accepted(name):
    assert Optimizer(name=name).name == name


def test_clipping_noise_takes_the_counts_share():
    """1 / a^2 + 1 / b^2 = 1 / sigma^2, for counts of K layers whose sensitivity is sqrt(K) / 2."""
    adaptive = Clipping(name="adaptive", budget=0.2)
    a, b = adaptive.gradient_noise(3.0), adaptive.count_noise(3.0, 4) / (4**0.5 / 2)
    assert 1 / a**2 + 1 / b**2 == pytest.approx(1 / 9)
    assert (3.0 / b) ** 2 == pytest.approx(0.2)
    assert Clipping().gradient_noise(3.0) == Clipping(name="per_layer").gradient_noise(3.0) == 3.0
