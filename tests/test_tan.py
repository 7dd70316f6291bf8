"""Total noise: the published reference, how well its rule foretells the accountant, and simulations of a run."""

import itertools
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import norm

from metacanary import accounting
from metacanary.recipes import DPSGD, EMA, Augmentation, Clipping, Optimizer, Target
from metacanary.tan import (
    approximate_epsilon,
    calibrate,
    compute_ratio,
    expected_batch,
    num_gradients,
    restore,
    simulate,
    total_noise,
    with_settings,
)

N = 50_000
DELTA = 1e-5


def make_reference(**changes):
    """The reference of arXiv 2210.03403 on CIFAR-10, with options that a simulation must keep."""
    options = {
        "num_steps": 2500,
        "sampling_prob": 4096 / N,
        "clip_norm": 1.0,
        "noise_multiplier": 3.0,
        "learning_rate": 4.0,
        "augmentation": Augmentation(multiplicity=16, flip=True, crop_padding=4),
        "ema": EMA(decay=0.9999),
        "microbatch": 32,
        "target": Target(epsilon=8.0, delta=DELTA),
    }
    return DPSGD(**options | changes)


def spent(recipe, accountant="pld"):
    names = ("noise_multiplier", "sampling_prob", "num_steps")
    return accounting.epsilon(delta=DELTA, accountant=accountant, **{name: getattr(recipe, name) for name in names})


def test_total_noise_of_the_reference():
    """By hand: 0.08192^2 * 2500 / 18 = 0.93207; eta^2 + 2 eta sqrt(ln 1e5) = 0.93207 + 6.55162."""
    eta = total_noise(3.0, 4096 / N, 2500)
    assert eta**2 == pytest.approx(0.932067556, rel=1e-8)
    assert approximate_epsilon(eta, DELTA) == pytest.approx(7.48371, abs=1e-4)


def test_total_noise_is_the_slope_of_the_renyi_divergence():
    """The Gaussian mechanism itself (q = 1): T steps have divergence alpha T / (2 sigma^2) = alpha eta^2, exactly."""
    for noise, steps in ((2.0, 1), (30.0, 400)):
        assert total_noise(noise, 1.0, steps) ** 2 == pytest.approx(steps / (2 * noise**2), rel=1e-12)


def test_approximate_epsilon_is_the_best_order_of_its_divergences():
    """The minimum over orders of alpha eta^2 + log(1 / delta) / (alpha - 1), on a grid of step 1e-4."""
    orders = 1 + 1e-4 * np.arange(1, 1_000_000)
    for eta in (0.05, 0.5, 2.0):
        naive = np.min(orders * eta**2 - math.log(DELTA) / (orders - 1))
        assert approximate_epsilon(eta, DELTA) == pytest.approx(naive, rel=1e-6)


GRID = [
    mechanism
    for mechanism in itertools.product((2.0, 5.0), (0.001, 0.005, 0.02, 0.2), (100, 2500))
    if 0.05 <= total_noise(*mechanism) <= 1.5
]


@pytest.mark.parametrize(("noise", "prob", "steps"), GRID)
def test_approximate_epsilon_is_near_the_accountants_where_noise_is_not_small(noise, prob, steps):
    """1.02 to 1.42 times PLD's epsilon where it was measured, for eta from 0.05 to 1.5; and a margin."""
    eta = total_noise(noise, prob, steps)
    exact = accounting.epsilon(noise_multiplier=noise, sampling_prob=prob, num_steps=steps, delta=DELTA)
    assert 1.0 <= approximate_epsilon(eta, DELTA) / exact <= 1.45


def test_equal_total_noise_nearly_fixes_epsilon_where_noise_is_not_small():
    """eta = 0.5: sigma 2 to 8 within 8%, as measured; sigma 0.5 spends four times as much."""

    def at(noise):
        steps = round(2 * (0.5 * noise / 0.01) ** 2)
        assert total_noise(noise, 0.01, steps) == pytest.approx(0.5, rel=1e-3)
        return accounting.epsilon(noise_multiplier=noise, sampling_prob=0.01, num_steps=steps, delta=DELTA)

    epsilons = [at(noise) for noise in (2.0, 4.0, 8.0)]
    assert max(epsilons) / min(epsilons) < 1.08
    assert at(0.5) > 4 * max(epsilons)


def test_simulate_keeps_all_but_the_batch():
    reference = make_reference(
        momentum=0.0,
        optimizer=Optimizer(name="adam", options={"b1": 0.5}),
        clipping=Clipping(name="adaptive"),
        rescale_to_unit_norm=True,
    )
    small = simulate(reference, 256, num_examples=N)
    assert expected_batch(small, N) == pytest.approx(256, rel=1e-12)
    assert small.noise_multiplier == pytest.approx(3 * 256 / 4096, rel=1e-12)
    changed = {"sampling_prob": small.sampling_prob, "noise_multiplier": small.noise_multiplier, "target": None}
    assert small == replace(reference, **changed)


@pytest.mark.parametrize("batch_size", [1, 256, 4096, 20_000])
def test_simulate_keeps_the_noise_of_an_update_and_the_total_noise(batch_size):
    reference = make_reference()
    small = simulate(reference, batch_size, num_examples=N)
    per_update = [r.noise_multiplier * r.clip_norm / expected_batch(r, N) for r in (reference, small)]
    assert per_update[0] == pytest.approx(per_update[1], rel=1e-12)
    etas = [total_noise(r.noise_multiplier, r.sampling_prob, r.num_steps) for r in (reference, small)]
    assert etas[0] == pytest.approx(etas[1], rel=1e-12)


def test_simulate_on_fewer_examples_keeps_the_noise_of_an_update():
    small = simulate(make_reference(), 256, num_examples=N, num_simulated=40_000)
    assert expected_batch(small, 40_000) == pytest.approx(256, rel=1e-12)
    assert small.noise_multiplier == pytest.approx(3 * 256 / 4096, rel=1e-12)


def test_simulation_is_not_private_and_claims_nothing():
    """Its epsilon is tens of times the reference's by RDP, an upper bound; by a lower one a step alone spends more.

    Of two neighbours one step is N(0, sigma^2), or with probability q N(1, sigma^2): P and Q of the event x > 1 have
    P <= e^epsilon Q + delta.
    """
    reference = make_reference()
    small = simulate(reference, 256, num_examples=N)
    assert small.target is None
    assert spent(small, "rdp") > 40 * spent(reference, "rdp")
    noise, prob = small.noise_multiplier, small.sampling_prob
    with_it, without = prob / 2 + (1 - prob) * norm.sf(1 / noise), norm.sf(1 / noise)
    assert math.log((with_it - DELTA) / without) > spent(reference)


@pytest.mark.parametrize("num_simulated", [None, 40_000])
def test_restore_undoes_simulate(num_simulated):
    reference = make_reference(target=None)
    sizes = {"num_examples": N, "num_simulated": num_simulated}
    back = restore(simulate(reference, 37.5, **sizes), 4096, **sizes)
    for name in ("sampling_prob", "noise_multiplier"):
        assert getattr(back, name) == pytest.approx(getattr(reference, name), rel=1e-12)
    exact = {name: getattr(reference, name) for name in ("sampling_prob", "noise_multiplier")}
    assert replace(back, **exact) == reference


def test_restore_takes_full_batches():
    """q = 1, where rounding must not make a probability above 1."""
    for num_examples in (3, 49, 1437):
        reference = make_reference(sampling_prob=1.0)
        small = simulate(reference, num_examples / 7, num_examples=num_examples)
        back = restore(small, expected_batch(small, num_examples) * 7, num_examples=num_examples)
        assert back.sampling_prob == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("num_steps", [625, 2500, 10_000])
def test_with_settings_keeps_the_total_noise(num_steps):
    reference = make_reference()
    found = with_settings(reference, learning_rate=2.0, multiplicity=4, num_steps=num_steps)
    assert found.noise_multiplier == pytest.approx(3 * math.sqrt(num_steps / 2500), rel=1e-12)
    etas = [total_noise(r.noise_multiplier, r.sampling_prob, r.num_steps) for r in (reference, found)]
    assert etas[0] == pytest.approx(etas[1], rel=1e-12)
    assert (found.learning_rate, found.augmentation.multiplicity, found.num_steps) == (2.0, 4, num_steps)
    assert found.augmentation == replace(reference.augmentation, multiplicity=4)
    assert found.target is None


def test_calibrate_sets_the_noise_and_its_target():
    """After a search at equal total noise: near the searched noise, and exactly at the budget."""
    found = with_settings(make_reference(), learning_rate=2.0, multiplicity=16, num_steps=1000)
    full = calibrate(found, epsilon=6.58, delta=DELTA)
    assert full.target == Target(epsilon=6.58, delta=DELTA)
    assert 6.58 - 1e-3 <= spent(full) <= 6.58
    assert full.noise_multiplier == pytest.approx(found.noise_multiplier, rel=0.08)
    assert replace(full, noise_multiplier=found.noise_multiplier, target=None) == found


def test_compute_ratio_counts_gradients():
    reference = make_reference()
    assert num_gradients(reference, N) == pytest.approx(4096 * 16 * 2500, rel=1e-12)
    assert compute_ratio(reference, simulate(reference, 256, num_examples=N), num_examples=N) == pytest.approx(16)
    cheap = simulate(with_settings(reference, learning_rate=4.0, multiplicity=4, num_steps=1250), 256, num_examples=N)
    assert compute_ratio(reference, cheap, num_examples=N) == pytest.approx(16 * 4 * 2)
    held_out = simulate(reference, 256, num_examples=N, num_simulated=40_000)
    assert compute_ratio(reference, held_out, num_examples=N, num_simulated=40_000) == pytest.approx(16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: total_noise(0.0, 0.1, 10), "noise_multiplier: got 0.0, expected a finite number > 0"),
        (lambda: total_noise(math.nan, 0.1, 10), "noise_multiplier: got nan, expected"),
        (lambda: total_noise(1.0, 1.5, 10), "sampling_prob: got 1.5, expected a probability in (0, 1]"),
        (lambda: total_noise(1.0, 0.1, 0), "num_steps: got 0, expected an integer >= 1"),
        (lambda: approximate_epsilon(-0.1, DELTA), "eta: got -0.1, expected a finite number >= 0"),
        (lambda: approximate_epsilon(0.1, 1.0), "delta: got 1.0, expected a number between 0 and 1"),
        (lambda: simulate(make_reference(), 0, num_examples=N), "batch_size: got 0, expected a number > 0, at most"),
        (lambda: simulate(make_reference(), N + 1, num_examples=N), "batch_size: got 50001, expected a number > 0"),
        (
            lambda: simulate(make_reference(), 9, num_examples=N, num_simulated=8),
            "batch_size: got 9, expected a number > 0, at most the 8 examples",
        ),
        (lambda: simulate(make_reference(), 9, num_examples=0), "num_examples: got 0, expected an integer >= 1"),
        (
            lambda: restore(make_reference(), 9, num_examples=N, num_simulated=0),
            "num_simulated: got 0, expected an integer >= 1",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_guide_example_runs(root):
    """It computes what its comments say."""
    text = (root / "docs/tan.md").read_text(encoding="utf-8")
    names = {}
    exec(compile(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], "docs/tan.md", "exec"), names)
    assert names["small"].noise_multiplier == pytest.approx(0.1875)
    assert names["saved"] == pytest.approx(16.0)
    assert names["full"].target == Target(epsilon=6.58, delta=DELTA)
