"""Canary optimisation: its gradient, its draws, its updates, its effect, resuming."""

import contextlib
import itertools
import re
from dataclasses import replace
from functools import cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

from metacanary import metagradient, optimization, scores, store, training
from metacanary.families import make
from metacanary.interference import interference
from metacanary.interruption import Stopped
from metacanary.objectives import (
    GradientNorm,
    LogitGap,
    LossGap,
    Separation,
    SmoothAUROC,
    SoftGuesses,
    logit_margin,
)
from metacanary.optimization import (
    Optimization,
    initial,
    optimize,
    plan_replay,
    split_seed,
)
from metacanary.recipes import DPSGD, SGD, Augmentation
from metacanary.runs import Pool, coins
from metacanary.soft_labels import LabelUpdate, SoftlyLabelled
from metacanary.updates import AdamUpdate, MetaState, SignedUpdate

NUM_CANARIES = 20


class Linear(nn.Module):
    """Logistic regression: its loss is convex, and a run of 30 steps takes milliseconds."""

    @nn.compact
    def __call__(self, images):
        return nn.Dense(10)(2 * images.reshape(len(images), -1) - 1)


MODEL = Linear()
RECIPE = SGD(num_steps=30, batch_size=32, learning_rate=0.1, momentum=0.9, nesterov=True)
PRIVATE = DPSGD(
    num_steps=30,
    sampling_prob=0.2,
    clip_norm=1.0,
    noise_multiplier=0.2,
    learning_rate=0.5,
    augmentation=Augmentation(multiplicity=2, crop_padding=1),
)
SETTINGS = Optimization(
    objective=SmoothAUROC(temperature=2.0),
    update=SignedUpdate(step_size=0.1),
    recipe=RECIPE,
    num_metasteps=3,
    num_splits=2,
)
LABELS = LabelUpdate(learning_rate=1.0, harden_after=2, scale=1.0)
TINY = pytest.mark.parametrize(
    ("settings", "at_least"),
    [
        (replace(SETTINGS, num_metasteps=36, update=SignedUpdate(step_size=0.05)), 0.77),
        (replace(SETTINGS, num_metasteps=6, complement=True), 0.92),
    ],
    ids=["plain", "complement"],
)
UPDATES = pytest.mark.parametrize(
    "update", [SignedUpdate(step_size=0.07), AdamUpdate(learning_rate=0.05)], ids=["signed", "adam"]
)


@pytest.fixture(scope="module")
def digits():
    """200 pictures of digits, 8x8, as bytes, and their labels."""
    data = load_digits()
    return (data.images[:200, ..., None] * 255 / 16).astype(np.uint8), data.target[:200]


@pytest.fixture(scope="module")
def start(digits):
    return make("random", *digits, num_canaries=NUM_CANARIES, num_classes=10, seed=0)


@pytest.fixture(scope="module")
def pool(digits, start):
    return Pool.make(*digits, start.source_index, start.label)


def run(settings, pool, start, **options):
    """All states and history rows of an optimisation."""
    options = {"seed": 1, "game": "independent", "branching": 6} | options
    return list(optimize(settings, MODEL, pool, start, **options))


def unseen(pool, start, images):
    """Mean AUROC and loss gap of ten models on coins, seeds and orders that the optimisation has not seen."""
    return audited(pool, replace(start, images=images))


def audited(pool, canaries):
    """As `unseen`, of canaries with their own labels."""
    results, pool = [], pool.with_canary_labels(canaries.label)
    for seed in range(1000, 1010):
        included = coins(seed, NUM_CANARIES, "independent")
        trained = training.train(RECIPE, MODEL, pool, canaries.images, included, seed=seed, snapshots=[30])[30]
        logits = training.predict(MODEL, trained, canaries.images)
        auroc = scores.auroc(scores.logit_margin(logits, canaries.label), included)
        gap = np.mean(np.where(included, -1, 1) * scores.negative_loss(logits, canaries.label))
        results.append((auroc, gap))
    return np.mean(results, axis=0)


@pytest.fixture
def draws(monkeypatch):
    """What each training run of an optimisation is given: (seed, coins, batches)."""
    drawn, original = [], training.initial_state

    def recorded(recipe, model, pool, included, *, seed):
        state = original(recipe, model, pool, included, seed=seed)
        drawn.append((seed, included, np.asarray(state["order" if isinstance(recipe, SGD) else "samples"])))
        return state

    monkeypatch.setattr(training, "initial_state", recorded)
    return drawn


def objective_of(settings, params, pixels, labels, included):
    """The objective of a trained model, with the norms of gradients in their closed form for `Linear`."""
    logits = MODEL.apply({"params": params}, pixels)
    if isinstance(settings.objective, GradientNorm):
        by_logits = jax.nn.softmax(logits) - jax.nn.one_hot(labels, 10)
        inputs = 2 * pixels.reshape(len(pixels), -1) - 1
        squares = jnp.square(by_logits).sum(axis=1) * (1 + jnp.square(inputs).sum(axis=1))
        value = -jnp.where(included, jnp.log(squares) / 2, 0).sum() / included.sum()
    else:
        value = settings.objective(logits, labels, included)
    return value + settings.interference * interference(MODEL, params, pixels, labels)


def mean_objective(settings, pixels, state, included, labels):
    """The mean over steps of the unrolled run, as a plain function of the pixels."""
    step, begin, values = training.step_function(settings.recipe, MODEL), 0, []
    for end in settings.objective_steps or (settings.recipe.num_steps,):
        part = jnp.arange(begin, end, dtype=jnp.int32)
        state, begin = jax.lax.scan(lambda s, t: (step(s, pixels, t), None), state, part)[0], end
        values.append(objective_of(settings, state["params"], pixels, labels, included))
    return sum(values) / len(values)


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        (RECIPE, {}),
        (RECIPE, {"complement": True}),
        (RECIPE, {"interference": 3.0}),
        (PRIVATE, {"complement": True}),
        (PRIVATE, {"complement": True, "unit_gradients": True}),
        (RECIPE, {"objective_steps": (4, 17, 30), "interference": 3.0}),
        (RECIPE, {"objective": GradientNorm(microbatch=7), "complement": True}),
        (PRIVATE, {"objective": GradientNorm(), "objective_steps": (5, 20), "complement": True}),
    ],
    ids=["sgd", "complement", "interference", "dpsgd", "units", "steps", "gradient_norm", "persistence_through_dpsgd"],
)
def test_optimize_uses_the_total_derivative_averaged_over_splits(pool, start, recipe, options, draws, monkeypatch):
    """The gradient that the update is given, against plain autodiff through the unrolled runs; float32, so 1e-4."""
    given = []

    def update(gradient, state, params=None):
        given.append(np.asarray(gradient))
        return jnp.zeros_like(gradient), state

    probe = optax.GradientTransformation(lambda params: (), update)
    monkeypatch.setattr(SignedUpdate, "optimizer", lambda self: probe)
    settings = replace(SETTINGS, recipe=recipe, num_metasteps=1, **options)
    ((_, row),) = run(settings, pool, start)

    @jax.jit
    @jax.value_and_grad
    def objective(pixels, state, included):
        return mean_objective(settings, pixels, state, included, jnp.asarray(start.label))

    values, gradients = [], []
    for seed, included, _ in list(draws):
        state = training.initial_state(recipe, MODEL, pool, included, seed=seed)
        value, gradient = objective(jnp.asarray(start.images), state, included)
        values.append(value)
        gradients.append(gradient / np.linalg.norm(gradient) if settings.unit_gradients else gradient)
    assert len(values) == (4 if settings.complement else 2)
    expected = np.mean(gradients, axis=0)
    assert np.linalg.norm(given[0] - expected) < 1e-4 * np.linalg.norm(expected)
    assert (np.abs(expected).max(axis=(1, 2, 3)) > 1e-5).all()
    assert row["objective"] == pytest.approx(np.mean(values), rel=1e-5)


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        (RECIPE, {"objective": GradientNorm(microbatch=7)}),
        (RECIPE, {"interference": 3.0}),
        (PRIVATE, {"objective": GradientNorm()}),
    ],
    ids=["sgd", "interference", "dpsgd"],
)
def test_objectives_on_the_way_have_exact_derivatives(pool, start, recipe, options):
    """Through a whole run in float64: against plain autodiff, and finite differences along a direction."""
    settings = replace(SETTINGS, recipe=replace(recipe, num_steps=8), objective_steps=(3, 6, 8), **options)
    included = np.arange(NUM_CANARIES) % 3 != 0
    step_fn = training.step_function(settings.recipe, MODEL)
    objective_fn = optimization._objective_fn(settings.objective, settings.recipe, MODEL, settings.interference)
    state = training.initial_state(settings.recipe, MODEL, pool, included, seed=4) | {"included": jnp.asarray(included)}
    with jax.enable_x64(True):
        floats = lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x  # noqa: E731
        state, pixels = jax.tree.map(floats, state), jnp.asarray(start.images, jnp.float64)
        options = {"branching": 3, "objective_steps": settings.objective_steps}
        found = metagradient.replay(step_fn, objective_fn, state, pixels, 8, **options)
        labels = jnp.asarray(start.label)
        function = jax.jit(lambda z: mean_objective(settings, z, state, jnp.asarray(included), labels))
        expected, gradient = jax.jit(jax.value_and_grad(function))(pixels)
        assert found.gradient.dtype == jnp.float64
        assert float(found.value) == pytest.approx(float(expected), rel=1e-12)
        assert float(jnp.linalg.norm(found.gradient - gradient)) < 1e-10 * float(jnp.linalg.norm(gradient))
        direction = jnp.asarray(np.random.default_rng(0).normal(size=pixels.shape))
        difference = (function(pixels + 1e-6 * direction) - function(pixels - 1e-6 * direction)) / 2e-6
        slope = float(jnp.vdot(found.gradient, direction))
        assert abs(slope) > 1e-3
        assert float(difference) == pytest.approx(slope, rel=1e-6)


@UPDATES
def test_optimize_keeps_pixels_valid(pool, start, update):
    """Guarantee: in [0, 1] after every metastep, with pixels that reached both ends and others that moved freely."""
    for state, _ in run(replace(SETTINGS, update=update), pool, start):
        assert state.images.dtype == np.float32
        assert (state.images.min(), state.images.max()) == (0.0, 1.0)
        moved = (state.images != start.images) & (state.images > 0) & (state.images < 1)
        assert moved.mean() > 0.2


def test_optimize_signed_moves_each_pixel_by_its_step(pool, start):
    """By 0.1 up or down, by 0 where the derivative is 0, or less at the ends of [0, 1]."""
    before = start.images
    for state, _ in run(SETTINGS, pool, start):
        move = np.abs(state.images - before)
        full, none = np.isclose(move, 0.1, rtol=0, atol=1e-6), move == 0
        at_end = (state.images == 0) | (state.images == 1)
        assert (full | none | at_end).all()
        assert (move < 0.1 + 1e-6).all()
        assert full.mean() > 0.3
        before = state.images


def test_optimize_draws_anew_at_every_metastep(pool, start, draws):
    """Coins, model seed and data order, in every metastep and split."""
    run(SETTINGS, pool, start)
    seeds, coins_drawn, orders = zip(*draws, strict=True)
    assert len(seeds) == 6
    for column in (seeds, [c.tobytes() for c in coins_drawn], [o.tobytes() for o in orders]):
        assert len(set(column)) == 6
    expected = [split_seed(1, metastep, split) for metastep in range(3) for split in range(2)]
    assert list(seeds) == expected
    assert all(np.array_equal(c, coins(s, NUM_CANARIES, "independent")) for s, c, _ in draws)


@pytest.mark.parametrize("recipe", [RECIPE, PRIVATE], ids=["sgd", "dpsgd"])
def test_optimize_complement_turns_the_coins_of_the_same_run(pool, start, recipe, draws):
    run(replace(SETTINGS, recipe=recipe, complement=True, num_metasteps=2), pool, start)
    assert len(draws) == 8
    for (seed, included, order), (other_seed, turned, other_order) in zip(draws[::2], draws[1::2], strict=True):
        assert seed == other_seed
        assert np.array_equal(turned, ~included)
        others = [o[(o >= 0) & (o < len(pool.images))] for o in (order, other_order)]
        shared = min(map(len, others))
        assert shared > 500
        assert np.array_equal(others[0][:shared], others[1][:shared])


def test_optimize_plays_the_paired_game(pool, start, draws):
    run(replace(SETTINGS, num_metasteps=1), pool, start, game="paired")
    for _, included, _ in draws:
        assert (included.reshape(-1, 2).sum(axis=1) == 1).all()


@pytest.mark.parametrize("value", [1e-30, 1.0, 1e30])
def test_unit_gradients_of_pixels_and_labels_have_norm_1_and_0_stays(value):
    exploded = SoftlyLabelled(images=jnp.full((2, 3, 3, 1), value), labels=jnp.zeros((2, 10)))
    unit = optimization._unit(exploded)
    assert np.linalg.norm(unit.images) == pytest.approx(1.0)
    assert not unit.labels.any()


def test_split_seed_is_distinct_and_fits_a_key():
    """Over optimisations, metasteps and splits; 31 bits, as `training.stream` takes."""
    seeds = [split_seed(seed, step, split) for seed in range(5) for step in range(40) for split in range(5)]
    assert len(set(seeds)) == 1000
    assert 0 <= min(seeds) < max(seeds) < 2**31


@pytest.mark.parametrize("labels", [None, LABELS])
@UPDATES
def test_optimize_resumes_bit_identical(pool, start, update, labels, tmp_path):
    """Guarantee: from any yielded state, through a file; the state of what moves pixels and labels is part of it."""
    settings = replace(SETTINGS, update=update, labels=labels)
    full = run(settings, pool, start)
    assert [state.step for state, _ in full] == [row["metastep"] for _, row in full] == [1, 2, 3]
    like = vars(initial(settings, MODEL, start))
    store.write_tree(tmp_path / "state.npz", vars(full[0][0]), {})
    resume = MetaState(**store.read_tree(tmp_path / "state.npz", like))
    rest = run(settings, pool, start, resume=resume)
    assert [state.step for state, _ in rest] == [2, 3]
    assert bits(rest) == bits(full[1:])
    for (_, row), (_, expected_row) in zip(rest, full[1:], strict=True):
        assert (row["objective"], row["auroc"]) == (expected_row["objective"], expected_row["auroc"])
    assert run(settings, pool, start, resume=full[-1][0]) == []


def test_optimize_carries_the_state_of_its_update(pool, start):
    """Adam's moments and count go from metastep to metastep, they do not start anew."""
    settings = replace(SETTINGS, update=AdamUpdate(learning_rate=0.05))
    states = [state.optimizer[0] for state, _ in run(settings, pool, start)]
    assert [int(state.count) for state in states] == [1, 2, 3]
    assert not np.allclose(states[1].mu, states[0].mu)


def test_optimize_depends_on_its_seed(pool, start):
    ends = [run(SETTINGS, pool, start, seed=seed)[-1][0].images for seed in (1, 1, 2)]
    assert np.array_equal(ends[0], ends[1])
    assert not np.array_equal(ends[0], ends[2])


def test_optimize_reports_the_canaries_before_the_update(pool, start):
    """History: the AUROC of the very models that were differentiated, on the canaries as they were."""
    ((_, row),) = run(replace(SETTINGS, num_metasteps=1, num_splits=1), pool, start)
    seed = split_seed(1, 0, 0)
    included = coins(seed, NUM_CANARIES, "independent")
    trained = training.train(RECIPE, MODEL, pool, start.images, included, seed=seed, snapshots=[30])[30]
    logits = training.predict(MODEL, trained, start.images)
    margin = logit_margin(jnp.asarray(logits), jnp.asarray(start.label))
    assert row["auroc"] == pytest.approx(scores.auroc(margin, included), abs=0.02)  # ties may fall otherwise
    assert row["objective"] == pytest.approx(
        float(SETTINGS.objective(jnp.asarray(logits), jnp.asarray(start.label), included)), rel=1e-4
    )
    assert row["seconds"] > 0


def test_optimize_shows_progress(pool, start):
    calls = []
    run(replace(SETTINGS, num_metasteps=1), pool, start, on_step=lambda phase, t: calls.append((phase, t)))
    assert [t for phase, t in calls if phase == "backward"] == 2 * list(reversed(range(30)))


@TINY
def test_optimize_raises_auroc_on_unseen_models(pool, start, settings, at_least):
    """From chance (0.50 +- 0.03) to 0.86 +- 0.02 and, with complements, in 6 metasteps to 0.99, when written."""
    end, _ = run(settings, pool, start)[-1]
    assert unseen(pool, start, start.images)[0] < 0.6
    assert unseen(pool, start, end.images)[0] > at_least


@TINY
def test_optimize_without_the_path_through_training_does_not(pool, start, settings, at_least, monkeypatch):
    """Trap 1: with the pixels detached in training 0.65 and 0.79, as pixels turn to noise, when written."""

    original = training.step_function

    @cache
    def detached(recipe, model):
        step = original(recipe, model)
        return lambda state, pixels, t: step(state, jax.lax.stop_gradient(pixels), t)

    with monkeypatch.context() as patch:
        patch.setattr(training, "step_function", detached)
        end, _ = run(settings, pool, start)[-1]
    assert np.abs(end.images - start.images).mean() > 0.05
    assert unseen(pool, start, end.images)[0] < at_least


@pytest.mark.parametrize(
    "objective", [LogitGap(), Separation(), Separation(winsorized=0.1), SoftGuesses(temperature=0.5)], ids=repr
)
def test_optimize_raises_auroc_by_any_objective(pool, start, objective):
    """From chance (0.50 +- 0.03) in 12 metasteps to 0.98, 0.90, 0.95 and 0.98, when written."""
    end, _ = run(replace(SETTINGS, objective=objective, num_metasteps=12, complement=True), pool, start)[-1]
    assert unseen(pool, start, end.images)[0] > 0.85


def test_optimize_lowers_the_loss_gap_on_unseen_models(pool, start):
    """From -0.02 to -2.5 when written."""
    update = SignedUpdate(step_size=0.05)
    end, _ = run(replace(SETTINGS, objective=LossGap(), update=update, num_metasteps=36), pool, start)[-1]
    assert unseen(pool, start, start.images)[1] > -0.2
    assert unseen(pool, start, end.images)[1] < -1.9


def test_optimize_stops_when_training_diverges(pool, start):
    recipe = replace(RECIPE, momentum=1e30, num_steps=8)
    with pytest.raises(FloatingPointError, match=r"training state is not finite after step \d of 8"):
        run(replace(SETTINGS, recipe=recipe), pool, start)


@pytest.mark.parametrize(("name", "value"), [("num_metasteps", 0), ("num_splits", 0)])
def test_optimization_rejects_by_key_and_value(name, value):
    with pytest.raises(ValueError, match=f"{name}: got {value}, expected an integer >= {value + 1}"):
        replace(SETTINGS, **{name: value})


@pytest.mark.parametrize("steps", [(0, 30), (5, 31), (7, 5), (5, 5)])
def test_optimization_rejects_objective_steps(steps):
    expected = re.escape(f"got {[*steps]}, expected ascending steps from 1 to num_steps = 30")
    with pytest.raises(ValueError, match=f"objective_steps: {expected}"):
        replace(SETTINGS, objective_steps=steps)


def test_optimize_trains_up_to_the_last_objective(pool, start):
    """The plan, the run and the AUROC of the history; with the last step alone the bits are those without steps."""
    settings, calls = replace(SETTINGS, num_metasteps=1, num_splits=1, objective_steps=(5, 12)), []
    ((_, row),) = run(settings, pool, start, on_step=lambda phase, t: calls.append((phase, t)))
    assert [t for phase, t in calls if phase == "backward"] == list(reversed(range(12)))
    assert plan_replay(settings, MODEL, pool, start, budget={"device": 10**9})[0].num_steps == settings.num_steps == 12
    seed = split_seed(1, 0, 0)
    included = coins(seed, NUM_CANARIES, "independent")
    trained = training.train(RECIPE, MODEL, pool, start.images, included, seed=seed, snapshots=[12])[12]
    margin = scores.logit_margin(training.predict(MODEL, trained, start.images), start.label)
    assert row["auroc"] == pytest.approx(scores.auroc(margin, included), abs=0.02)  # ties may fall otherwise
    assert bits(run(replace(SETTINGS, objective_steps=(30,)), pool, start)) == bits(run(SETTINGS, pool, start))


def test_optimize_that_is_killed_keeps_the_objectives_on_the_way(pool, start, tmp_path, monkeypatch):
    """Between the objectives after 17 and after 4 steps: what the later one gave is in the checkpoint."""
    settings = replace(SETTINGS, num_metasteps=1, num_splits=1, objective_steps=(4, 17, 30))
    expected = run(settings, pool, start)
    original = metagradient.replay
    eager = lambda *args, **options: original(*args, **options, checkpoint_seconds=0.0)  # noqa: E731
    monkeypatch.setattr(metagradient, "replay", eager)

    def kill(phase, t):
        if (phase, t) == ("backward", 10):
            raise Killed

    with pytest.raises(Killed):
        run(settings, pool, start, checkpoint=tmp_path, on_step=kill)
    again = []
    resumed = run(settings, pool, start, checkpoint=tmp_path, on_step=lambda *step: again.append(step))
    assert [t for phase, t in again if phase == "backward"] == list(reversed(range(11)))
    assert bits(resumed) == bits(expected)
    assert resumed[0][1]["objective"] == expected[0][1]["objective"]


def test_optimize_by_gradient_norm_raises_it_on_unseen_models(pool, start):
    """Of members, through training; the mean logarithm of their norms grew by 4.1 when written."""
    settings = replace(SETTINGS, objective=GradientNorm(), complement=True, num_metasteps=6)

    def mean_objective(images):
        values = []
        for seed in range(1000, 1006):
            included = coins(seed, NUM_CANARIES, "independent")
            trained = training.train(RECIPE, MODEL, pool, images, included, seed=seed, snapshots=[30])[30]
            values.append(objective_of(settings, trained, jnp.asarray(images), jnp.asarray(start.label), included))
        return float(np.mean(values))

    end, _ = run(settings, pool, start)[-1]
    assert mean_objective(end.images) < mean_objective(start.images) - 3


class Centred(nn.Module):
    """Takes out the mean over the batch."""

    @nn.compact
    def __call__(self, images):
        x = nn.Dense(10)(images.reshape(len(images), -1))
        return x - x.mean(axis=0, keepdims=True)


def test_optimize_by_gradient_norm_rejects_a_model_that_mixes_examples(pool, start):
    settings = replace(SETTINGS, objective=GradientNorm())
    options = {"seed": 1, "game": "independent", "branching": 6}
    with pytest.raises(ValueError, match="model Centred"):
        next(optimize(settings, Centred(), pool, start, **options))
    with pytest.raises(ValueError, match="model Centred"):
        plan_replay(settings, Centred(), pool, start, budget={"device": 10**9})


@pytest.mark.parametrize("weight", [-0.1, float("nan")])
def test_optimization_rejects_interference(weight):
    with pytest.raises(ValueError, match=f"interference: got {weight}, expected a number >= 0"):
        replace(SETTINGS, interference=weight)


def test_optimize_lowers_interference(pool, start):
    """On the models that are differentiated: the objective, of which interference is a thousandfold part, falls."""
    weighted = replace(SETTINGS, interference=1000.0, num_metasteps=12, update=SignedUpdate(step_size=0.02))
    first, *_, last = [row["objective"] for _, row in run(weighted, pool, start)]
    assert last < 0.8 * first


class Killed(BaseException):
    """What a test raises in the middle of a metastep."""


def bits(states):
    """The bits of all canaries of an optimisation, and of what their labels are made of."""
    return [[leaf.tobytes() for leaf in jax.tree.leaves((state.images, state.labels))] for state, _ in states]


@pytest.mark.parametrize(
    ("kill_at", "labels"),
    [
        (1, None),
        (40, None),
        (75, None),
        (100, None),
        (170, None),
        *((k, replace(LABELS, harden_after=1)) for k in (75, 170)),
    ],
)
def test_optimize_resumes_within_a_metastep_to_the_same_bits(pool, start, tmp_path, monkeypatch, kill_at, labels):
    """Two trainings a metastep; the second attempt repeats no step that a checkpoint holds."""
    settings = replace(SETTINGS, num_metasteps=2, labels=labels)
    steps = []
    expected = run(settings, pool, start, on_step=lambda *step: steps.append(step))
    original = metagradient.replay
    eager = lambda *args, **options: original(*args, **options, checkpoint_seconds=0.0)  # noqa: E731
    monkeypatch.setattr(metagradient, "replay", eager)
    states, done = [], []

    def killing(*step):
        done.append(step)
        if len(done) == kill_at:
            raise Killed

    try:
        for state in optimize(
            settings, MODEL, pool, start, seed=1, game="independent", branching=6, checkpoint=tmp_path, on_step=killing
        ):
            states.append(state)
    except Killed:
        resume = states[-1][0] if states else None
        states += run(settings, pool, start, resume=resume, checkpoint=tmp_path, on_step=lambda *s: done.append(s))
    assert bits(states) == bits(expected)
    assert len(done) <= len(steps) + 1  # but the one in which it was killed
    assert list(tmp_path.iterdir()) == []


def test_optimize_that_is_stopped_repeats_no_step(pool, start, tmp_path):
    """After each 37th action, of about 100 a training; the caller keeps the last state it was given."""
    settings = replace(SETTINGS, num_metasteps=2)
    steps, done, states = [], [], []
    expected = run(settings, pool, start, on_step=lambda *step: steps.append(step))
    attempts = 0
    while len(states) < 2:
        looks, attempts = itertools.count(1), attempts + 1
        with contextlib.suppress(Stopped):
            for state in optimize(
                settings,
                MODEL,
                pool,
                start,
                seed=1,
                game="independent",
                branching=6,
                checkpoint=tmp_path,
                resume=states[-1][0] if states else None,
                on_step=lambda *step: done.append(step),
                should_stop=lambda looks=looks: next(looks) == 37,
            ):
                states.append(state)
    assert attempts > 4
    assert bits(states) == bits(expected)
    assert done == steps


def test_optimize_deletes_checkpoints_of_metasteps_that_are_in_safety(pool, start, tmp_path):
    """As one finds them after a kill between the caller's write and the next metastep."""
    (tmp_path / "metastep_0" / "training_0").mkdir(parents=True)
    (tmp_path / "state.npz").write_bytes(b"the caller's")
    first = next(iter(run(replace(SETTINGS, num_metasteps=1), pool, start)))[0]
    states = optimize(
        SETTINGS, MODEL, pool, start, seed=1, game="independent", branching=6, resume=first, checkpoint=tmp_path
    )
    next(states)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metastep_1", "state.npz"]
    next(states)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metastep_2", "state.npz"]


def test_plan_replay_keeps_to_its_budget(pool, start, tmp_path):
    """Of a state of 650 numbers and their momentum: all 30 states in plenty, fewer in less, elsewhere in a folder."""
    plenty, storage = plan_replay(SETTINGS, MODEL, pool, start, budget={"device": 10**9, "host": 0, "disk": 0})
    assert (plenty.branching, plenty.states_held, storage.name) == (30, 30, "device")
    assert plenty.held_bytes == 30 * (2 * 650 * 4 + 4)  # the optimiser counts its steps
    working = plenty.device_bytes - plenty.held_bytes
    scarce, _ = plan_replay(SETTINGS, MODEL, pool, start, budget={"device": working + 12 * 5204})
    assert scarce.states_held <= 12
    assert scarce.step_calls > 30
    with pytest.raises(ValueError, match="budget: got"):
        plan_replay(SETTINGS, MODEL, pool, start, budget={"device": working})
    with pytest.raises(ValueError, match="spill: got None"):
        plan_replay(SETTINGS, MODEL, pool, start, budget={"device": working, "disk": 10**9})
    away, storage = plan_replay(
        SETTINGS, MODEL, pool, start, budget={"device": working + 3 * 5204, "disk": 10**9}, spill=tmp_path
    )
    assert (away.storage, storage.name) == ("disk", "disk")
    expected = run(replace(SETTINGS, num_metasteps=1), pool, start)
    found = run(replace(SETTINGS, num_metasteps=1), pool, start, branching=away.branching, storage=storage)
    assert bits(found) == bits(expected)


@pytest.mark.parametrize("complement", [False, True])
def test_optimize_moves_labels_by_the_total_derivative_averaged_over_splits(
    pool, start, complement, draws, monkeypatch
):
    """What the labels' update is given, against plain autodiff through the unrolled runs; float32, so 1e-4."""
    given = []
    monkeypatch.setattr(LabelUpdate, "update", lambda self, state, gradient: given.append(gradient) or state)
    settings = replace(SETTINGS, num_metasteps=2, complement=complement, interference=2.0, labels=LABELS)
    (_, row), _ = run(settings, pool, start)
    step = training.step_function(RECIPE, MODEL)

    @jax.jit
    @jax.value_and_grad
    def objective(labels, state, included):
        canaries = SoftlyLabelled(jnp.asarray(start.images), labels)
        end = jax.lax.scan(lambda s, t: (step(s, canaries, t), None), state, jnp.arange(30, dtype=jnp.int32))[0]
        logits = MODEL.apply({"params": end["params"]}, canaries.images)
        value = SETTINGS.objective(logits, labels, included)
        return value + 2.0 * interference(MODEL, end["params"], canaries.images, labels)

    probabilities = jax.nn.softmax(jax.nn.one_hot(start.label, 10))
    found = []
    for seed, included, _ in list(draws)[: 4 if complement else 2]:
        state = training.initial_state(RECIPE, MODEL, pool, included, seed=seed)
        found.append(objective(probabilities, state, included))
    expected = np.mean([gradient for _, gradient in found], axis=0)
    assert np.linalg.norm(given[0] - expected) < 1e-4 * np.linalg.norm(expected)
    assert (np.abs(expected).max(axis=1) > 1e-5).all()
    assert row["objective"] == pytest.approx(np.mean([value for value, _ in found]), rel=1e-5)


def test_optimize_while_labels_move_takes_none_from_the_pool(pool, start):
    """The labels that the pool has for canaries are those of the start: once a label moves they are stale."""
    settings = replace(SETTINGS, num_metasteps=2, labels=LABELS)
    stale = pool.with_canary_labels(np.roll(start.label, 1) + 1)
    assert bits(run(settings, stale, start)) == bits(run(settings, pool, start))


@UPDATES
def test_optimize_with_hardened_labels_is_that_of_these_labels(pool, start, update):
    """After harden_after metasteps the bits are those of an optimisation that started with the labels found."""
    settings = replace(SETTINGS, update=update, labels=LABELS)
    states = [state for state, _ in run(settings, pool, start)]
    reached = states[1].canaries(start)
    assert (reached.label != start.label).any()
    resume = MetaState(step=2, images=states[1].images, optimizer=states[1].optimizer)
    given = Pool(images=pool.images, labels=jnp.concatenate([pool.labels[:-NUM_CANARIES], reached.label]))
    ((expected, _),) = run(replace(settings, labels=None), given, reached, resume=resume)
    assert states[2].images.tobytes() == expected.images.tobytes()
    assert states[2].labels.logits.tobytes() == states[1].labels.logits.tobytes()
    ((stale, _),) = run(replace(settings, labels=None), pool, start, resume=resume)
    assert states[2].images.tobytes() != stale.images.tobytes()


def test_optimize_ends_with_classes_and_counts_those_that_changed(pool, start):
    """Guarantee: also where labels harden at the very end; kinds without labels have no such count."""
    states = run(replace(SETTINGS, labels=replace(LABELS, harden_after=3)), pool, start)
    changed = [int((state.labels.logits.argmax(axis=1) != start.label).sum()) for state, _ in states]
    assert [row["labels_changed"] for _, row in states] == changed
    assert 0 < changed[-1] < NUM_CANARIES
    end = states[-1][0].canaries(start)
    assert (end.label.dtype, end.label.shape) == (np.int32, (NUM_CANARIES,))
    assert (end.label != start.label).sum() == changed[-1]
    assert np.array_equal(end.images, states[-1][0].images)
    assert np.array_equal(end.source_labels, start.source_labels)
    ((state, row),) = run(replace(SETTINGS, num_metasteps=1), pool, start)
    assert "labels_changed" not in row
    assert state.canaries(start).label is start.label


def test_optimize_labels_alone_raises_auroc_on_unseen_models(pool, start):
    """With pixels that stay: from chance (0.50 +- 0.03) to 0.92 when written."""
    labels = LabelUpdate(learning_rate=0.5, harden_after=10, scale=2.0)
    still = SignedUpdate(step_size=0.0)
    end, _ = run(replace(SETTINGS, num_metasteps=10, complement=True, update=still, labels=labels), pool, start)[-1]
    assert np.array_equal(end.images, start.images)
    assert audited(pool, start)[0] < 0.6
    assert audited(pool, end.canaries(start))[0] > 0.8


def test_optimize_with_labels_through_dpsgd(pool, start):
    """Labels move by a finite gradient through clipping and noise, and harden."""
    states = run(replace(SETTINGS, recipe=PRIVATE, num_splits=1, labels=LABELS), pool, start)
    moves = [
        np.abs(after.labels.logits - before.labels.logits) for (before, _), (after, _) in itertools.pairwise(states)
    ]
    assert (moves[0].max(axis=1) > 0.1).all()
    assert not moves[1].any()


def test_plan_replay_plans_for_labels_that_move(pool, start):
    settings = replace(SETTINGS, num_metasteps=1, labels=replace(LABELS, harden_after=1))
    chosen, storage = plan_replay(settings, MODEL, pool, start, budget={"device": 10**9})
    found = run(settings, pool, start, branching=chosen.branching, storage=storage)
    assert bits(found) == bits(run(settings, pool, start))


def test_optimization_rejects_labels_that_do_not_harden():
    with pytest.raises(ValueError, match=r"labels.harden_after: got 4, expected at most num_metasteps = 3"):
        replace(SETTINGS, labels=replace(LABELS, harden_after=4))


@pytest.mark.parametrize(("given", "of", "got"), [(LABELS, None, "None"), (None, LABELS, "some")])
def test_optimize_rejects_a_state_of_other_labels(pool, start, given, of, got):
    resume = initial(replace(SETTINGS, labels=of), MODEL, start)
    with pytest.raises(ValueError, match=rf"resume.labels: got {got}, expected {'some' if given else 'None'}, as"):
        run(replace(SETTINGS, labels=given), pool, start, resume=resume)
