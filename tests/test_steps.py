"""Steps: batches, microbatches, augmented copies; and metagradients through DP-SGD, exact by finite differences."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metacanary import augmentation, clipping, dpsgd, metagradient, models, optimization, steps
from metacanary.gradient_check import check_gradient
from metacanary.objectives import SmoothAUROC
from metacanary.recipes import DPSGD, EMA, SGD, Augmentation, Clipping, Optimizer, Schedule
from metacanary.runs import Pool, stream, take
from metacanary.soft_labels import SoftlyLabelled
from metacanary.steps import clipped_sum, data_order

NUM_CLASSES, NUM_OTHERS, NUM_CANARIES, NUM_STEPS = 3, 14, 6, 5
INCLUDED = np.array([1, 0, 1, 1, 0, 1], bool)
SGD_RECIPE = SGD(num_steps=4, batch_size=12, learning_rate=0.3)
RECIPE = DPSGD(
    num_steps=NUM_STEPS,
    sampling_prob=0.4,
    clip_norm=1.3,
    noise_multiplier=0.5,
    learning_rate=0.3,
    momentum=0.9,
    nesterov=True,
    microbatch=10,
    augmentation=Augmentation(multiplicity=2, flip=True, crop_padding=1),
    schedule=Schedule(name="one_cycle"),
)
CONVNET = models.build("convnet", num_classes=NUM_CLASSES, widths=[4])


class Linear(nn.Module):
    """Logistic regression without intercept: a black image has a gradient of exactly 0."""

    @nn.compact
    def __call__(self, images):
        return nn.Dense(NUM_CLASSES, use_bias=False)(images.reshape(len(images), -1))


@pytest.fixture(scope="module")
def pool():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, size=(NUM_OTHERS, 4, 4, 1), dtype=np.uint8)
    labels = rng.integers(0, NUM_CLASSES, size=NUM_OTHERS + NUM_CANARIES)
    return Pool(images=jnp.asarray(images), labels=jnp.asarray(labels, jnp.int32))


@pytest.fixture(scope="module")
def pixels():
    """The first canary, which is included, is black."""
    drawn = np.random.default_rng(1).random((NUM_CANARIES, 4, 4, 1)).astype(np.float32)
    drawn[0] = 0
    return drawn


def flat(tree):
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


def relative_error(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize(("num_steps", "batch_size"), [(9, 5), (6, 7), (3, 18), (1, 4)])
def test_data_order_has_every_used_row_once_an_epoch(num_steps, batch_size):
    used = np.arange(24) % 4 != 1
    assert used.sum() == 18
    order = data_order(stream(1, "order"), used, num_steps, batch_size)
    assert (order.shape, order.dtype) == ((num_steps, batch_size), np.int32)
    for start in range(0, order.size, 18):
        epoch = order.ravel()[start : start + 18]
        assert len(set(epoch)) == len(epoch)
        assert used[epoch].all()
    if order.size >= 36:  # each epoch is shuffled anew
        assert order.ravel()[:18].tolist() != order.ravel()[18:36].tolist()


def test_data_order_of_complementary_coins_shares_the_other_rows():
    """In each epoch the shared rows come in the same order, so that such runs differ by the canaries alone."""
    used = np.concatenate([np.ones(15, bool), INCLUDED])
    turned = np.concatenate([np.ones(15, bool), ~INCLUDED])
    first = data_order(stream(2, "order"), used, 8, 10).ravel()
    second = data_order(stream(2, "order"), turned, 8, 10).ravel()
    shared = min((first < 15).sum(), (second < 15).sum())
    assert shared >= 45
    assert first[first < 15][:shared].tolist() == second[second < 15][:shared].tolist()
    other = data_order(stream(3, "order"), used, 8, 10).ravel()
    assert other.tolist() != first.tolist()


def test_data_order_rejects_a_batch_beyond_the_training_set():
    with pytest.raises(ValueError, match="batch_size: got 4, expected at most the 3 training images"):
        data_order(stream(0, "order"), np.array([1, 1, 0, 1], bool), 2, 4)


def test_steps_are_one_function_for_equal_settings():
    """Or every run would compile anew."""
    assert steps.sgd_step(SGD_RECIPE, Linear()) is steps.sgd_step(replace(SGD_RECIPE), Linear())
    assert steps.dpsgd_step(RECIPE, Linear()) is steps.dpsgd_step(replace(RECIPE), Linear())


@pytest.mark.parametrize("microbatch", [1, 3, 12])
def test_sgd_step_in_microbatches_is_that_of_the_batch(pool, pixels, microbatch):
    """After one step of plain SGD the change of the parameters is the gradient: 1e-5 relative in float32."""

    def change(recipe):
        state = steps.sgd_state(recipe, CONVNET, pool, INCLUDED, seed=3)
        after = jax.jit(steps.sgd_step(recipe, CONVNET))(state, jnp.asarray(pixels), jnp.int32(0))
        return flat(after["params"]) - flat(state["params"])

    whole = change(SGD_RECIPE)
    assert np.linalg.norm(whole) > 0.01
    assert relative_error(change(replace(SGD_RECIPE, microbatch=microbatch)), whole) < 1e-5


def test_dpsgd_state_of_complementary_coins_shares_all_draws(pool):
    """Batches but for the canaries in them, the model, noise, augmentation: such runs differ by the canaries alone."""
    first, second = (steps.dpsgd_state(RECIPE, CONVNET, pool, coins, seed=3) for coins in (INCLUDED, ~INCLUDED))
    assert first["samples"].shape == second["samples"].shape
    for some, others in zip(np.asarray(first["samples"]), np.asarray(second["samples"]), strict=True):
        others_drawn = others[(others >= 0) & (others < NUM_OTHERS)]
        assert some[(some >= 0) & (some < NUM_OTHERS)].tolist() == others_drawn.tolist()
        assert len(others_drawn) > 0
        assert not set(some[some >= NUM_OTHERS]) & set(others[others >= NUM_OTHERS])
    assert (flat(first["params"]) == flat(second["params"])).all()
    for name in ("noise", "augmentation"):
        assert jax.random.key_data(first[name]).tolist() == jax.random.key_data(stream(3, name)).tolist()
        assert jax.random.key_data(second[name]).tolist() == jax.random.key_data(stream(3, name)).tolist()


def naive_sum(recipe, model, state, z, t):
    """The clipped sum as a Python loop over rows and copies, by plain autodiff; and the norms before clipping."""
    key, total, norms = jax.random.fold_in(state["augmentation"], t), [], []
    for row in (int(r) for r in state["samples"][t] if r >= 0):
        gradient, squared = naive_gradient(recipe, model, state, z, jax.random.fold_in(key, row), jnp.int32(row))
        norms.append(float(jax.lax.stop_gradient(squared)) ** 0.5)
        # Only a gradient that is too long is scaled, so that the twin has a derivative at 0 as well.
        factor = recipe.clip_norm / jnp.sqrt(squared) if norms[-1] > recipe.clip_norm else 1.0
        total.append(jax.tree.map(lambda g, f=factor: g * f, gradient))
    return jax.tree.map(lambda *g: sum(g), *total), np.array(norms)


@partial(jax.jit, static_argnums=(0, 1))
def naive_gradient(recipe, model, state, z, key, row):
    """The gradient of one row, a mean over its copies, and its squared norm."""
    image = take(state["images"], z, row[None])[0]

    def loss(params, copy):
        logits = model.apply({"params": params}, copy[None])[0]
        return jax.nn.logsumexp(logits) - logits[state["labels"][row]]

    copies = augmentation.copies(recipe.augmentation, key, image)
    gradients = [jax.grad(loss)(state["params"], copy) for copy in copies]
    mean = jax.tree.map(lambda *g: sum(g) / len(g), *gradients)
    return mean, sum(jnp.sum(g**2) for g in jax.tree.leaves(mean))


def test_clipped_sum_equals_a_loop_over_rows_and_copies(pool, pixels):
    """Float32, so 1e-5. Gradients of copies are averaged, then clipped: not clipped and then averaged."""
    z = jnp.asarray(pixels)
    state = steps.dpsgd_state(RECIPE, CONVNET, pool, INCLUDED, seed=3)
    total = jax.jit(partial(clipped_sum, RECIPE, CONVNET))
    for t in (0, 4):
        expected, norms = naive_sum(RECIPE, CONVNET, state, z, t)
        assert norms.min() < RECIPE.clip_norm < norms.max()
        assert relative_error(flat(total(state, z, jnp.int32(t))[0]), flat(expected)) < 1e-5


@pytest.mark.parametrize(("microbatch", "unroll"), [(1, 1), (4, None), (4, 1), (4, 2), (64, None)])
def test_clipped_sum_does_not_depend_on_how_the_batch_is_cut(pool, pixels, microbatch, unroll):
    """Guarantee: microbatch, padding and unrolling change nothing but rounding, with copies drawn by row."""
    z = jnp.asarray(pixels)

    def found(recipe, unroll):
        state = steps.dpsgd_state(recipe, Linear(), pool, INCLUDED, seed=3)
        return flat(jax.jit(partial(clipped_sum, recipe, Linear(), unroll=unroll))(state, z, jnp.int32(1))[0])

    expected = found(RECIPE, None)
    assert np.linalg.norm(expected) > 0.1
    assert relative_error(found(replace(RECIPE, microbatch=microbatch), unroll), expected) < 1e-5


def test_clipped_sum_has_one_derivative_in_a_loop_and_without(pool, pixels):
    """GPUs loop over microbatches, CPUs write them out; both pull back alike, by the parameters and by the pixels."""
    recipe = replace(RECIPE, microbatch=7)
    state, z = steps.dpsgd_state(recipe, Linear(), pool, INCLUDED, seed=3), jnp.asarray(pixels)

    def pulled_back(unroll):
        def total(params, z):
            return clipped_sum(recipe, Linear(), state | {"params": params}, z, 1, unroll=unroll)[0]

        return jax.jit(lambda v: jax.vjp(total, state["params"], z)[1](v))(state["params"])

    for looped, written_out in zip(pulled_back(1), pulled_back(8), strict=True):
        assert np.linalg.norm(flat(looped)) > 0.01
        assert relative_error(flat(looped), flat(written_out)) < 1e-5


def test_clipped_sum_of_an_empty_batch_is_zero(pool, pixels):
    state = steps.dpsgd_state(RECIPE, Linear(), pool, INCLUDED, seed=3)
    state["samples"] = jnp.full_like(state["samples"], -1)
    for unroll in (1, 2):
        assert not flat(clipped_sum(RECIPE, Linear(), state, jnp.asarray(pixels), 0, unroll=unroll)[0]).any()


def test_dpsgd_step_draws_copies_anew_at_every_step(pool, pixels):
    """The same rows in every step, all of them: without noise only the copies change the sum."""
    recipe = replace(RECIPE, sampling_prob=1.0)
    state = steps.dpsgd_state(recipe, Linear(), pool, INCLUDED, seed=3)

    def sums(recipe):
        total = jax.jit(partial(clipped_sum, recipe, Linear()))
        return [flat(total(state, jnp.asarray(pixels), jnp.int32(t))[0]) for t in (0, 1)]

    assert relative_error(*sums(recipe)) > 1e-3
    first, second = sums(replace(recipe, augmentation=Augmentation()))
    assert (first == second).all()


def naive_run(recipe, model, objective_fn, state):
    """The objective of a whole private run as a plain function of the pixels; also the norms of all gradients."""
    optimizer, start = recipe.build_optimizer(), state

    def function(z):
        state, norms = start, []
        for t in range(recipe.num_steps):
            total, step_norms = naive_sum(recipe, model, state, z, t)
            noise = dpsgd.add_noise(
                jax.random.fold_in(state["noise"], t),
                jax.tree.map(jnp.zeros_like, total),
                recipe.noise_multiplier * recipe.clip_norm,
            )
            divisor = recipe.sampling_prob * (NUM_OTHERS + NUM_CANARIES / 2)
            mean = jax.tree.map(lambda g, n: (g + n) / divisor, total, noise)  # noqa: B023
            updates, moments = optimizer.update(mean, state["optimizer"])
            params = optax.apply_updates(state["params"], updates)
            state, norms = state | {"params": params, "optimizer": moments}, [*norms, *step_norms]
        return objective_fn(state, z)[0], np.array(norms)

    return function


def unrolled(recipe, model, objective_fn, state):
    """The objective as a plain function of the pixels, by the library's own step."""
    step, ts = steps.dpsgd_step(recipe, model), jnp.arange(recipe.num_steps, dtype=jnp.int32)
    return lambda z: objective_fn(jax.lax.scan(lambda s, t: (step(s, z, t), None), state, ts)[0], z)[0]


def central_differences(function, z, chosen, step):
    """Derivatives by single pixels, with an error of order step^2."""
    bumps = [jnp.zeros(z.size).at[i].set(step).reshape(z.shape) for i in chosen]
    return np.array([float(function(z + e) - function(z - e)) / (2 * step) for e in bumps])


def audited(recipe, model, pool, pixels):
    """Metagradients through a private run in float64, by replay and by differences."""
    objective_fn = optimization._objective_fn(SmoothAUROC(temperature=1.0), recipe, model)
    state = steps.dpsgd_state(recipe, model, pool, INCLUDED, seed=3) | {"included": jnp.asarray(INCLUDED)}
    step_fn = steps.dpsgd_step(recipe, model)
    state = jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, state)
    z = jnp.asarray(pixels, jnp.float64)
    chosen = np.random.default_rng(2).choice(16, size=(NUM_CANARIES, 3)) + 16 * np.arange(NUM_CANARIES)[:, None]
    function = jax.jit(unrolled(recipe, model, objective_fn, state))
    return SimpleNamespace(
        replay=metagradient.replay(step_fn, objective_fn, state, z, recipe.num_steps, branching=2),
        naive=naive_run(recipe, model, objective_fn, state),
        clip_norm=recipe.clip_norm,
        run=(step_fn, objective_fn, state, z, recipe.num_steps),
        z=z,
        chosen=chosen,
        differences=central_differences(function, z, chosen.ravel(), 1e-5).reshape(chosen.shape),
    )


@pytest.fixture(scope="module")
def audit(pool, pixels):
    """A convnet, Nesterov momentum, a schedule, noise, two augmented copies, microbatches with padding."""
    with jax.enable_x64(True):
        return audited(RECIPE, CONVNET, pool, pixels)


def test_replay_through_dpsgd_equals_finite_differences(audit):
    """For pixels of included and of excluded canaries; the differences are good to 1e-6 of the largest one."""
    found = np.asarray(audit.replay.gradient).ravel()[audit.chosen]
    scale = np.abs(audit.differences).max(axis=1, keepdims=True)
    assert (scale > 1e-4).all()  # no canary's gradient is so small that anything would pass
    assert np.allclose(found / scale, audit.differences / scale, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def linear_audit(pool, pixels):
    """Logistic regression on all rows in every step."""
    with jax.enable_x64(True):
        return audited(replace(RECIPE, sampling_prob=1.0, num_steps=3, clip_norm=1.8), Linear(), pool, pixels)


@pytest.mark.parametrize("name", ["linear_audit", pytest.param("audit", marks=pytest.mark.slow)])
def test_replay_through_dpsgd_equals_plain_autodiff_of_a_loop(name, request):
    """Of a twin without microbatches, remat, vmap and Hessian-vector products; some gradients are clipped, some not."""
    audit = request.getfixturevalue(name)
    with jax.enable_x64(True):
        (value, norms), expected = jax.value_and_grad(audit.naive, has_aux=True)(audit.z)
    assert 0.2 < np.mean(norms > audit.clip_norm) < 0.8
    assert np.abs(norms - audit.clip_norm).min() > 1e-4  # the differences above cross no kink
    assert float(audit.replay.value) == pytest.approx(float(value), rel=1e-12)
    assert audit.replay.gradient.dtype == np.float64
    assert relative_error(np.asarray(audit.replay.gradient), np.asarray(expected)) < 1e-10


def test_replay_through_dpsgd_without_the_path_through_training_is_told_apart(linear_audit):
    """Trap 1: a mutant whose steps detach the pixels differs, for included canaries only."""
    step_fn, objective_fn, state, z, num_steps = linear_audit.run

    def detached(state, z, t):
        return step_fn(state, jax.lax.stop_gradient(z), t)

    with jax.enable_x64(True):
        found = np.asarray(metagradient.replay(detached, objective_fn, state, z, num_steps, branching=3).gradient)
    expected = np.asarray(linear_audit.replay.gradient)
    per_canary = np.array([relative_error(f, e) for f, e in zip(found, expected, strict=True)])
    assert per_canary[INCLUDED].min() > 1e-2
    assert per_canary[~INCLUDED].max() < 1e-10


def test_replay_through_a_zero_gradient_is_exact(linear_audit):
    """Trap 10: a black canary has a gradient of 0 in every step; its derivative is finite, and that of differences."""
    with jax.enable_x64(True):
        _, norms = linear_audit.naive(linear_audit.z)
    assert (norms == 0).sum() == 3
    gradient, differences = np.asarray(linear_audit.replay.gradient), linear_audit.differences
    assert np.isfinite(gradient).all()
    assert np.abs(differences[0]).max() > 1e-4
    found = gradient.ravel()[linear_audit.chosen]
    assert np.allclose(found, differences, rtol=0, atol=1e-6 * np.abs(differences).max())


@pytest.fixture(scope="module")
def adaptive_audit(pool, pixels):
    """Thresholds of layers that adapt, equal allocation, unit norm, and the average of parameters that is released."""
    recipe = replace(
        RECIPE,
        num_steps=4,
        augmentation=Augmentation(),
        nesterov=False,
        momentum=0.0,
        clipping=Clipping(name="adaptive", allocation="equal", quantile=0.9, budget=0.5),
        rescale_to_unit_norm=True,
        ema=EMA(decay=0.6, warm_up=True),
    )
    with jax.enable_x64(True):
        return audited(recipe, CONVNET, pool, pixels)


def test_replay_through_adaptive_clipping_and_an_average_equals_finite_differences(adaptive_audit):
    """Counts are constants, and thresholds with them; no norm is near its threshold. To 1e-6 of the largest."""
    step_fn, _, state, z, num_steps = adaptive_audit.run
    with jax.enable_x64(True):
        after = jax.jit(lambda: jax.lax.fori_loop(0, num_steps, lambda t, s: step_fn(s, z, t), state))()
    for name, start in state["thresholds"].items():
        assert abs(np.log(after["thresholds"][name] / start)) > 0.1  # they have moved
    assert relative_error(flat(after["ema"]), flat(after["params"])) > 1e-2
    found = np.asarray(adaptive_audit.replay.gradient).ravel()[adaptive_audit.chosen]
    scale = np.abs(adaptive_audit.differences).max(axis=1, keepdims=True)
    assert (scale > 1e-5).all()
    assert np.allclose(found / scale, adaptive_audit.differences / scale, rtol=0, atol=1e-6)


def states_of(recipe, model, pool, pixels, num_steps):
    """The states after 0, 1, ... steps."""
    if isinstance(recipe, DPSGD):
        state, step = steps.dpsgd_state(recipe, model, pool, INCLUDED, seed=3), steps.dpsgd_step(recipe, model)
    else:
        state, step = steps.sgd_state(recipe, model, pool, INCLUDED, seed=3), steps.sgd_step(recipe, model)
    compiled, found = jax.jit(step), [state]
    for t in range(num_steps):
        found.append(compiled(found[-1], jnp.asarray(pixels), jnp.int32(t)))
    return found


@pytest.mark.parametrize("recipe", [SGD_RECIPE, RECIPE], ids=["sgd", "dpsgd"])
@pytest.mark.parametrize(
    ("ema", "decays"),
    [
        (EMA(decay=0.9, warm_up=False), [0.9] * 4),
        (EMA(decay=0.25), [1 / 10, 2 / 11, 3 / 12, 0.25]),  # (1 + t) / (10 + t) up to the decay
    ],
    ids=["constant", "warm-up"],
)
def test_steps_average_parameters(pool, pixels, recipe, ema, decays):
    """From the start on, against a loop in float64: 1e-6; the average is released, and without one the parameters."""
    states = states_of(replace(recipe, ema=ema), Linear(), pool, pixels, 4)
    mean = flat(states[0]["params"])
    assert (flat(states[0]["ema"]) == mean).all()
    for decay, state in zip(decays, states[1:], strict=True):
        mean = decay * mean + (1 - decay) * flat(state["params"])
        np.testing.assert_allclose(flat(state["ema"]), mean, rtol=0, atol=1e-6)
        assert steps.released(replace(recipe, ema=ema), state) is state["ema"]
        assert steps.released(recipe, state) is state["params"]
    assert relative_error(flat(states[4]["params"]), mean) > 1e-3
    plain = states_of(recipe, Linear(), pool, pixels, 4)
    assert "ema" not in plain[0]
    assert (flat(plain[4]["params"]) == flat(states[4]["params"])).all()  # the average does not change the training


@pytest.mark.parametrize(
    ("settings", "unit"),
    [
        (Clipping(), 1.3),
        (Clipping(name="per_layer", thresholds={"Conv3x3_0": 0.3, "Dense_0": 0.4}), 0.5),
        (Clipping(name="adaptive", thresholds={"Conv3x3_0": 0.3, "Dense_0": 0.4}), 0.5),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_dpsgd_step_rescaled_to_unit_norm_is_divided_by_the_sensitivity(pool, pixels, settings, unit):
    """Noise and all, to 1e-5: C for flat clipping, sqrt(sum_k C_k^2) for that of layers."""
    recipe = replace(RECIPE, momentum=0.0, nesterov=False, clipping=settings)

    def change(recipe):
        before, after = states_of(recipe, CONVNET, pool, pixels, 1)
        return flat(after["params"]) - flat(before["params"])

    plain = change(recipe)
    assert np.linalg.norm(plain) > 1e-3
    assert relative_error(change(replace(recipe, rescale_to_unit_norm=True)) * unit, plain) < 1e-5


@pytest.mark.parametrize(
    "recipe",
    [
        replace(SGD_RECIPE, momentum=0.9, weight_decay=0.1),
        replace(RECIPE, noise_multiplier=10.0),
        replace(
            RECIPE, clipping=Clipping(name="adaptive"), optimizer=Optimizer(name="adam"), momentum=0.0, nesterov=False
        ),
    ],
    ids=["sgd", "dpsgd", "adaptive"],
)
def test_steps_of_the_last_layer_touch_nothing_else(pool, pixels, recipe):
    """Bit by bit, neither decay nor noise; the optimiser's state and thresholds are of that layer alone."""
    recipe = replace(recipe, trainable="last", ema=EMA(decay=0.5))
    states = states_of(recipe, CONVNET, pool, pixels, 2)
    before, after = states[0]["params"], states[-1]["params"]
    assert flat(after["Conv3x3_0"]).tobytes() == flat(before["Conv3x3_0"]).tobytes()
    assert relative_error(flat(after["Dense_0"]), flat(before["Dense_0"])) > 1e-3
    sizes = {x.size for x in jax.tree.leaves(before["Dense_0"])}
    shaped = [x.size for x in jax.tree.leaves(states[-1]["optimizer"]) if x.ndim]
    assert set(shaped) == sizes
    assert set(states[-1].get("thresholds", {"Dense_0"})) == {"Dense_0"}
    assert jax.tree.structure(states[-1]["ema"]) == jax.tree.structure(before)


def test_dpsgd_step_of_the_last_layer_is_that_of_its_gradient(pool, pixels):
    """The last layer's gradient is clipped by its own norm, not by that of all layers: 1e-5 against a loop."""
    recipe = replace(RECIPE, trainable="last", augmentation=Augmentation(), clip_norm=0.5)
    state = steps.dpsgd_state(recipe, CONVNET, pool, INCLUDED, seed=3)
    total = flat(clipped_sum(recipe, CONVNET, state, jnp.asarray(pixels), 0)[0])
    expected, num_clipped = 0.0, 0
    for row in (int(r) for r in state["samples"][0] if r >= 0):
        image = take(state["images"], jnp.asarray(pixels), jnp.int32([row]))
        gradient = jax.grad(partial(steps.cross_entropy, CONVNET))(state["params"], image, state["labels"][row][None])
        own = flat(gradient["Dense_0"])
        expected = expected + own * min(1, 0.5 / np.linalg.norm(own))
        num_clipped += np.linalg.norm(own) > 0.5
    assert num_clipped > 0
    assert relative_error(total, expected) < 1e-5


@pytest.mark.parametrize("microbatch", [None, 4])
def test_sgd_step_averages_copies(pool, pixels, microbatch):
    """Of three random copies of each image, drawn by row: the gradient is the mean over all of them, to 1e-5."""
    settings = Augmentation(multiplicity=3, flip=True, crop_padding=1)
    recipe = replace(SGD_RECIPE, augmentation=settings, microbatch=microbatch)
    before, after = states_of(recipe, CONVNET, pool, pixels, 1)
    gradients, key = [], jax.random.fold_in(stream(3, "augmentation"), 0)
    one = jax.jit(jax.grad(partial(steps.cross_entropy, CONVNET)))
    for row in before["order"][0]:
        image, label = take(before["images"], jnp.asarray(pixels), row[None])[0], before["labels"][row]
        for copy in augmentation.copies(settings, jax.random.fold_in(key, row), image):
            gradients.append(flat(one(before["params"], copy[None], label[None])))
    change = flat(after["params"]) - flat(before["params"])
    assert len(gradients) == 36
    assert relative_error(change, -0.3 * np.mean(gradients, axis=0)) < 1e-5
    plain = states_of(replace(recipe, augmentation=Augmentation()), CONVNET, pool, pixels, 1)[1]
    assert relative_error(flat(plain["params"]) - flat(before["params"]), change) > 1e-2


ADAPTIVE = replace(RECIPE, clipping=Clipping(name="adaptive"), momentum=0.0, nesterov=False)


def test_private_update_moves_thresholds_by_counts_alone(pool):
    """Other sums with the same counts give the same thresholds, bit by bit; other counts do not."""
    state = steps.dpsgd_state(ADAPTIVE, CONVNET, pool, INCLUDED, seed=3)
    total, counts = steps.zero_sum(ADAPTIVE, CONVNET, state)
    ones = jax.tree.map(jnp.ones_like, total)
    more = {name: count + 1 for name, count in counts.items()}
    update = jax.jit(partial(steps.private_update, ADAPTIVE, CONVNET, state))
    first, same, other = (update(summed, jnp.int32(0)) for summed in ((total, counts), (ones, counts), (total, more)))
    assert flat(first["thresholds"]).tobytes() == flat(same["thresholds"]).tobytes()
    assert flat(first["params"]).tobytes() != flat(same["params"]).tobytes()
    batch = 0.4 * (NUM_OTHERS + NUM_CANARIES / 2)
    expected = flat(first["thresholds"]) * np.exp(-0.3 / batch)
    assert np.allclose(flat(other["thresholds"]), expected, rtol=1e-5)


def test_private_update_draws_noise_on_counts_that_no_gradient_has(pool):
    """Over 400 steps no count's noise is correlated with that of any parameter: below 5 standard errors.

    Two looks at one sample through the same noise would cost more than what is accounted. JAX's fold_in(key, i) is the
    i-th key of split(key, n), which is a parameter's.
    """
    recipe = replace(ADAPTIVE, num_steps=400)
    state = steps.dpsgd_state(recipe, CONVNET, pool, INCLUDED, seed=3)
    empty = steps.zero_sum(recipe, CONVNET, state)

    def noises(t):
        after = steps.private_update(recipe, CONVNET, state, empty, t)
        moved = jax.tree.map(lambda a, b: (a - b).ravel()[:6], after["params"], state["params"])
        of_counts = [jnp.log(after["thresholds"][name] / start) for name, start in sorted(state["thresholds"].items())]
        return jnp.concatenate(jax.tree.leaves(moved)), jnp.stack(of_counts)

    of_gradients, of_counts = jax.jit(jax.lax.map, static_argnums=0)(noises, jnp.arange(400))
    both = np.concatenate([of_counts, of_gradients], axis=1)
    assert (both.std(axis=0) > 0).all()
    correlation = np.corrcoef(both.T) - np.eye(both.shape[1])
    assert np.abs(correlation).max() < 5 / np.sqrt(400)


@pytest.mark.parametrize("name", ["flat", "per_layer"])
def test_dpsgd_step_without_noise_by_layers_equals_a_loop(pool, pixels, name):
    """Clipped by the thresholds of the state, whatever the way: one step against naive gradients, 1e-5."""
    given = {} if name == "flat" else {"Conv3x3_0": 0.2, "Dense_0": 0.9}
    recipe = replace(
        RECIPE,
        momentum=0.0,
        nesterov=False,
        noise_multiplier=0.0,
        clipping=Clipping(name=name, thresholds=given),
        schedule=Schedule(),
    )
    before, after = states_of(recipe, CONVNET, pool, pixels, 1)
    key, expected = jax.random.fold_in(before["augmentation"], 0), 0.0
    for row in (int(r) for r in before["samples"][0] if r >= 0):
        gradient, _ = naive_gradient(recipe, CONVNET, before, jnp.asarray(pixels), jax.random.fold_in(key, row), row)
        parts = [gradient] if name == "flat" else [{k: gradient[k]} for k in sorted(gradient)]
        bounds = [recipe.clip_norm] if name == "flat" else [given[k] for k in sorted(gradient)]
        clipped = [flat(g) * min(1, c / np.linalg.norm(flat(g))) for g, c in zip(parts, bounds, strict=True)]
        expected = expected + np.concatenate(clipped)
    change = flat(after["params"]) - flat(before["params"])
    batch = 0.4 * (NUM_OTHERS + NUM_CANARIES / 2)
    assert relative_error(change, -0.3 * expected / batch) < 1e-5


def test_dpsgd_noise_of_layers_has_its_deviation(pool, pixels):
    """Equal allocation: sigma sqrt(K) C_k on layer k, over 200 steps' draws, within 5 standard errors."""
    settings = Clipping(name="per_layer", allocation="equal", thresholds={"Conv3x3_0": 0.1, "Dense_0": 3.0})
    recipe = replace(RECIPE, clipping=settings, momentum=0.0, nesterov=False, num_steps=200, schedule=Schedule())
    state = steps.dpsgd_state(recipe, CONVNET, pool, INCLUDED, seed=3)
    empty = steps.zero_sum(recipe, CONVNET, state)

    def change(t):
        after = steps.private_update(recipe, CONVNET, state, empty, t)["params"]
        return jax.tree.map(lambda a, b: a - b, after, state["params"])

    changes = jax.jit(jax.lax.map, static_argnums=0)(change, jnp.arange(200))
    batch = 0.4 * (NUM_OTHERS + NUM_CANARIES / 2)
    for name, threshold in settings.thresholds:
        drawn = flat(changes[name]) * batch / 0.3
        assert abs(drawn.std() / (0.5 * 2**0.5 * threshold) - 1) < 5 / np.sqrt(2 * drawn.size)
    assert clipping.sensitivity(1.0, state["thresholds"]) == pytest.approx(9.01**0.5)


LABELLED = pytest.mark.parametrize(
    "recipe",
    [
        replace(SGD_RECIPE, microbatch=4, momentum=0.9),
        replace(SGD_RECIPE, augmentation=Augmentation(multiplicity=2, flip=True)),
        replace(RECIPE, num_steps=3),
        replace(RECIPE, num_steps=3, clipping=Clipping(name="adaptive")),
    ],
    ids=["sgd", "copies", "dpsgd", "adaptive"],
)


def labelled(recipe, pool):
    """A step, and the state before the first one."""
    state_of, step_of = (
        (steps.sgd_state, steps.sgd_step) if isinstance(recipe, SGD) else (steps.dpsgd_state, steps.dpsgd_step)
    )
    state = state_of(recipe, Linear(), pool, INCLUDED, seed=3)
    return step_of(recipe, Linear()), state | {"included": jnp.asarray(INCLUDED)}


def softly_labelled(pixels):
    """Pixels, and probabilities of which some are near 0."""
    labels = jax.nn.softmax(jnp.asarray(3 * np.random.default_rng(4).normal(size=(NUM_CANARIES, NUM_CLASSES))))
    return SoftlyLabelled(images=jnp.asarray(pixels), labels=labels.astype(jnp.float32))


@LABELLED
def test_steps_of_one_hot_labels_are_those_of_classes(pool, pixels, recipe):
    """Within rounding of float32; the labels that the pool has for canaries are not looked at."""
    step, state = labelled(recipe, pool)
    hard = SoftlyLabelled(jnp.asarray(pixels), jax.nn.one_hot(pool.labels[NUM_OTHERS:], NUM_CLASSES))
    elsewhere = {**state, "labels": state["labels"].at[NUM_OTHERS:].add(1)}
    step = jax.jit(step)
    for t in (0, 2):
        expected = flat(step(state, jnp.asarray(pixels), jnp.int32(t))["params"])
        assert np.allclose(flat(step(elsewhere, hard, jnp.int32(t))["params"]), expected, rtol=0, atol=1e-6)
        moved = flat(step(elsewhere, jnp.asarray(pixels), jnp.int32(t))["params"])
        assert np.abs(moved - expected).max() > 1e-3


@pytest.mark.parametrize("augmentation", [Augmentation(), Augmentation(multiplicity=3, flip=True)])
def test_sgd_step_of_probabilities_is_the_mean_over_classes(pool, pixels, augmentation):
    """The gradient is linear in a label: the parameters after a step are the mean of those of each class."""
    step, state = labelled(replace(SGD_RECIPE, augmentation=augmentation), pool)
    canary = int(np.flatnonzero(np.isin(NUM_OTHERS + np.arange(NUM_CANARIES), state["order"][0]))[-1])
    classes = jax.nn.one_hot(pool.labels[NUM_OTHERS:], NUM_CLASSES)

    def after(label):
        given = SoftlyLabelled(jnp.asarray(pixels), classes.at[canary].set(jnp.asarray(label)))
        return flat(jax.jit(step)(state, given, jnp.int32(0))["params"])

    each = np.array([after(one) for one in np.eye(NUM_CLASSES, dtype=np.float32)])
    assert np.ptp(each, axis=0).max() > 1e-2
    weights = np.array([0.2, 0.5, 0.3], np.float32)
    assert np.allclose(after(weights), weights @ each, rtol=0, atol=1e-6)


def test_clipped_sum_of_probabilities_clips_the_mean_over_classes(pool, pixels):
    """Each included canary alone in a batch, against plain autodiff of each class, in float32."""
    _, state = labelled(RECIPE, pool)
    canaries, norms = softly_labelled(pixels * np.float32(0.5)), []
    canaries = canaries._replace(images=canaries.images.at[3].multiply(2.0))
    key, total = jax.random.fold_in(state["augmentation"], 0), jax.jit(partial(clipped_sum, RECIPE, Linear()))
    for row in NUM_OTHERS + np.flatnonzero(INCLUDED)[1:]:
        alone = state | {"samples": jnp.full_like(state["samples"], -1).at[0, 0].set(row)}
        weights = canaries.labels[row - NUM_OTHERS]
        each = [
            flat(
                naive_gradient(
                    RECIPE,
                    Linear(),
                    state | {"labels": state["labels"].at[row].set(c)},
                    canaries.images,
                    jax.random.fold_in(key, int(row)),
                    jnp.int32(row),
                )[0]
            )
            for c in range(NUM_CLASSES)
        ]
        mean = np.asarray(weights, np.float64) @ np.array(each)
        norms.append(np.linalg.norm(mean))
        expected = mean * min(1.0, RECIPE.clip_norm / norms[-1])
        assert relative_error(flat(total(alone, canaries, jnp.int32(0))[0]), expected) < 1e-5
    assert min(norms) < RECIPE.clip_norm < max(norms)


@LABELLED
def test_replay_by_pixels_and_labels_equals_finite_differences(pool, pixels, recipe):
    """In float64 along random directions, and along labels alone; the objective sees the labels too."""
    step, state = labelled(recipe, pool)
    objective_fn = optimization._objective_fn(SmoothAUROC(temperature=1.0), recipe, Linear())
    canaries = softly_labelled(pixels)
    found = check_gradient(step, objective_fn, state, canaries, recipe.num_steps)
    assert abs(found.derivative) > 1e-3
    assert found.relative_error < 1e-6
    state = state | {"pixels": jnp.asarray(pixels)}

    def of_labels(state, labels, t):
        return step(state, SoftlyLabelled(state["pixels"], labels), t)

    def by_labels(state, labels):
        return objective_fn(state, SoftlyLabelled(state["pixels"], labels))

    found = check_gradient(of_labels, by_labels, state, canaries.labels, recipe.num_steps)
    assert abs(found.derivative) > 1e-3
    assert found.relative_error < 1e-6


@LABELLED
def test_replay_by_labels_has_a_direct_path_and_one_through_training(pool, pixels, recipe):
    """Trap 1: cut in the step, labels of included canaries have another gradient; cut in the objective, all have."""
    step, state = labelled(recipe, pool)
    objective_fn = optimization._objective_fn(SmoothAUROC(temperature=1.0), recipe, Linear())

    def cut(canaries):
        return canaries._replace(labels=jax.lax.stop_gradient(canaries.labels))

    def by_labels(step_fn, objective_fn):
        replayed = metagradient.replay(
            step_fn, objective_fn, state, softly_labelled(pixels), recipe.num_steps, branching=4
        )
        return np.asarray(replayed.gradient.labels)

    whole = by_labels(step, objective_fn)
    in_step = by_labels(lambda s, z, t: step(s, cut(z), t), objective_fn)
    in_objective = by_labels(step, lambda s, z: objective_fn(s, cut(z)))
    largest = np.abs(whole).max()
    used = INCLUDED & np.isin(NUM_OTHERS + np.arange(NUM_CANARIES), state.get("order", state.get("samples")))
    used[0] = False  # black, without a gradient
    assert used.sum() >= 2
    assert (np.abs(whole - in_step).max(axis=1)[used] > 1e-4 * largest).all()
    assert np.abs(whole - in_step)[~INCLUDED].max() < 1e-6 * largest
    assert (np.abs(whole - in_objective).max(axis=1)[~INCLUDED] > 1e-2 * largest).all()
