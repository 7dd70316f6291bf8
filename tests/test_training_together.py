"""Runs trained together against the same runs one after the other; nothing passes from one to another; resuming."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_training import DPSGD_RECIPE, INCLUDED, MODEL, NUM_CANARIES, NUM_CLASSES, NUM_OTHERS, SGD_RECIPE, same

from metacanary import dpsgd, models, training, training_together
from metacanary.interruption import Stopped
from metacanary.recipes import EMA, Augmentation, Clipping, Optimizer, Target
from metacanary.runs import Pool
from metacanary.training_together import initial_state, train_together

SEEDS = [3, 4, 5]
# The last is a reference run, without any canary.
COINS = np.stack([INCLUDED, ~INCLUDED, np.zeros_like(INCLUDED)])
AUGMENTATION = Augmentation(multiplicity=3, flip=True, crop_padding=1)
# Batches of up to 78 rows in microbatches of 8, of which the last are padding in some runs and not in others.
PRIVATE = replace(DPSGD_RECIPE, microbatch=8, augmentation=AUGMENTATION)
CASES = {
    "sgd": SGD_RECIPE,
    "sgd, copies and average": replace(SGD_RECIPE, augmentation=AUGMENTATION, ema=EMA(decay=0.8), microbatch=5),
    "flat": replace(PRIVATE, ema=EMA(decay=0.8)),
    "per layer": replace(
        PRIVATE, clipping=Clipping(name="per_layer", allocation="equal"), optimizer=Optimizer(name="adam"), momentum=0.0
    ),
    "adaptive": replace(PRIVATE, clipping=Clipping(name="adaptive", budget=0.3), rescale_to_unit_norm=True),
}
RECIPES = pytest.mark.parametrize("recipe", [SGD_RECIPE, replace(DPSGD_RECIPE, microbatch=8)], ids=["sgd", "dpsgd"])


@pytest.fixture(scope="module")
def pool():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, size=(NUM_OTHERS, 3, 3, 1), dtype=np.uint8)
    labels = rng.integers(0, NUM_CLASSES, size=NUM_OTHERS + NUM_CANARIES)
    return Pool(images=jnp.asarray(images), labels=jnp.asarray(labels, jnp.int32))


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(1).random((NUM_CANARIES, 3, 3, 1)).astype(np.float32)


def in_series(recipe, model, pool, pixels, *, initial=(None, None, None), coins=COINS, **options):
    triples = zip(coins, SEEDS, initial, strict=True)
    return [training.train(recipe, model, pool, pixels, c, seed=s, initial=i, **options) for c, s, i in triples]


def largest_difference(found, expected):
    """Of parameters by step of runs, over the largest parameter."""
    pairs = list(zip(*map(jax.tree.leaves, (found, expected)), strict=True))
    assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in pairs)
    return max(float(jnp.abs(a - b).max()) for a, b in pairs) / max(float(jnp.abs(b).max()) for _, b in pairs)


def starts(model, pool, dtype):
    """A start of its own for each run."""
    drawn = [models.init(model, jax.random.key(9 + seed), pool.images.shape[1:]) for seed in SEEDS]
    return [jax.tree.map(lambda x: x.astype(dtype), params) for params in drawn]


@pytest.mark.parametrize("recipe", CASES.values(), ids=CASES.keys())
def test_train_together_equals_series(pool, pixels, recipe):
    """Guarantee: after a few steps in float32, to 1e-5 of the largest parameter; three runs that are not alike."""
    found = train_together(recipe, MODEL, pool, pixels, COINS, seeds=SEEDS, snapshots=[2, 8])
    expected = in_series(recipe, MODEL, pool, pixels, snapshots=[2, 8])
    assert [list(run) for run in found] == [[2, 8]] * 3
    assert largest_difference(found, expected) < 1e-5
    for first, second in ((0, 1), (1, 2), (0, 2)):
        assert largest_difference(expected[first], expected[second]) > 1e-2


@pytest.mark.parametrize("name", ["sgd, copies and average", "flat", "per layer", "adaptive"])
def test_train_together_equals_series_in_float64(pool, pixels, name, monkeypatch):
    """Guarantee: what is left is rounding, for after 30 steps it is below 1e-10 of the largest parameter."""
    recipe = replace(CASES[name], num_steps=30)
    with jax.enable_x64(True):
        given, images = starts(MODEL, pool, jnp.float64), pixels.astype(np.float64)
        monkeypatch.setattr(jnp, "float32", jnp.float64)  # of thresholds and averages
        found = train_together(recipe, MODEL, pool, images, COINS, seeds=SEEDS, snapshots=[30], initial=given)
        expected = in_series(recipe, MODEL, pool, images, snapshots=[30], initial=given)
        assert jax.tree.leaves(found)[0].dtype == jnp.float64
        assert largest_difference(found, expected) < 1e-10


@pytest.mark.parametrize(("trainable", "as_matmul"), [("all", False), ("last", True)])
def test_train_together_equals_series_for_a_convolutional_network(pixels, trainable, as_matmul):
    """With a layer that stays, or none; and where series is a loop in Python."""
    rng = np.random.default_rng(2)
    images = rng.integers(0, 256, size=(30, 4, 4, 1), dtype=np.uint8)
    pool = Pool(images=jnp.asarray(images), labels=jnp.asarray(rng.integers(0, 3, size=38), jnp.int32))
    canaries = rng.random((8, 4, 4, 1)).astype(np.float32)
    model = models.build("convnet", num_classes=3, widths=[2], as_matmul=as_matmul)
    recipe = replace(DPSGD_RECIPE, microbatch=8, num_steps=3, trainable=trainable)
    given = starts(model, pool, jnp.float32)
    options = {"snapshots": [3], "initial": given}
    found = train_together(recipe, model, pool, canaries, COINS, seeds=SEEDS, **options)
    assert largest_difference(found, in_series(recipe, model, pool, canaries, **options)) < 1e-5
    for start, run in zip(given, found, strict=True):
        is_kept = [np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (start, run[3])), strict=True)]
        assert sum(is_kept) == (2 if trainable == "last" else 0)  # kernel and bias of the convolution


def test_noise_of_each_run_is_its_own_and_that_of_series(pool, pixels):
    """Without examples and from one start, what a run moves by is its noise."""
    recipe = replace(DPSGD_RECIPE, sampling_prob=1e-6, momentum=0.0)
    start = models.init(MODEL, jax.random.key(0), pool.images.shape[1:])
    options = {"snapshots": [1, 2], "initial": [start] * 3}

    def noise(runs):
        """Per run and step, over lr / (q (r + m / 2))."""
        moved = [[start, run[1], run[2]] for run in runs]
        flat = np.array([[np.concatenate([x.ravel() for x in jax.tree.leaves(p)]) for p in run] for run in moved])
        return np.diff(flat, axis=1) / (0.3 / (1e-6 * 74))

    found = noise(train_together(recipe, MODEL, pool, pixels, COINS, seeds=SEEDS, **options))
    expected = noise(in_series(recipe, MODEL, pool, pixels, **options))
    assert np.allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert found.std() == pytest.approx(0.7 * 0.5, rel=0.3)
    correlations = np.corrcoef(found.reshape(6, -1))[~np.eye(6, dtype=bool)]
    assert np.abs(correlations).max() < 0.7  # of 30 numbers: five standard errors are 0.9


@RECIPES
def test_no_run_depends_on_the_coins_of_another(pool, pixels, recipe):
    """Guarantee, bit by bit; the run whose coins changed is another one."""

    def run(coins):
        return train_together(recipe, MODEL, pool, pixels, coins, seeds=SEEDS, snapshots=[8])

    turned = COINS.copy()
    turned[1] = ~turned[1]
    before, after = run(COINS), run(turned)
    assert [same(a, b) for a, b in zip(before, after, strict=True)] == [True, False, True]


@RECIPES
@pytest.mark.parametrize("killed_at", [1, 5, 8])
@pytest.mark.parametrize("is_stopped", [True, False], ids=["stopped", "killed"])
def test_train_together_resumes_bit_identical(pool, pixels, recipe, killed_at, is_stopped, tmp_path):
    """Guarantee: with the averages and snapshots before and after it; and it goes on, it does not start again."""
    recipe, steps = replace(recipe, ema=EMA(decay=0.8)), []
    checkpoint = tmp_path / "runs.npz"

    def run(**options):
        return train_together(recipe, MODEL, pool, pixels, COINS, seeds=SEEDS, snapshots=[3, 8], **options)

    def record(step):
        steps.append(step)
        if not is_stopped and step == killed_at:
            raise KeyboardInterrupt

    due = {"should_stop": lambda: len(steps) == killed_at - 1} if is_stopped else {"checkpoint_seconds": 0.0}
    with pytest.raises(Stopped if is_stopped else KeyboardInterrupt):
        run(checkpoint=checkpoint, on_step=record, **due)
    resumed = run(checkpoint=checkpoint, on_step=steps.append)
    assert steps == list(range(1, 9))
    assert same(resumed, run())


def test_train_together_refuses_the_checkpoint_of_other_runs(pool, pixels, tmp_path):
    """Other seeds, the same in another order, other starts, another recipe."""
    options = {"snapshots": [8], "checkpoint": tmp_path / "runs.npz", "checkpoint_seconds": 0.0}

    def run(seeds, recipe=SGD_RECIPE, **more):
        return train_together(recipe, MODEL, pool, pixels, COINS, seeds=seeds, **options, **more)

    assert same(run(SEEDS), run(SEEDS))
    for seeds in ([3, 4, 6], [4, 3, 5]):
        with pytest.raises(ValueError, match="is of another seeds, expected"):
            run(seeds)
    with pytest.raises(ValueError, match="is of another initial, expected"):
        run(SEEDS, initial=starts(MODEL, pool, jnp.float32))
    with pytest.raises(ValueError, match="is of another recipe, expected"):
        run(SEEDS, replace(SGD_RECIPE, learning_rate=0.2))
    with pytest.raises(ValueError, match="is of another included, expected"):
        train_together(SGD_RECIPE, MODEL, pool, pixels, COINS[::-1], seeds=SEEDS, **options)


@RECIPES
def test_train_together_names_the_run_that_diverged(pool, pixels, recipe):
    """Its seed, and the step at which it does so alone; the others are finite."""
    recipe = replace(recipe, momentum=1e8)
    given = starts(MODEL, pool, jnp.float32)
    with pytest.raises(FloatingPointError) as alone:
        in_series(recipe, MODEL, pool, pixels, snapshots=[8], initial=given)
    calm = replace(recipe, momentum=0.0, nesterov=False)
    huge = [given[0], jax.tree.map(lambda x: x + 1e38, given[1]), given[2]]
    with pytest.raises(FloatingPointError) as together:
        train_together(calm, MODEL, pool, pixels, COINS, seeds=SEEDS, snapshots=[8], initial=huge)
    assert str(together.value) == "parameters of seed 4 are not finite after step 1 of 8: lower learning_rate"
    with pytest.raises(FloatingPointError) as all_of_them:
        train_together(recipe, MODEL, pool, pixels, COINS, seeds=SEEDS, snapshots=[8], initial=given)
    first = str(alone.value).replace("parameters", "parameters of seed 3").partition(":")[0]
    assert str(all_of_them.value).startswith(f"{first}; parameters of seed 4 are not finite after step ")


def test_train_together_refuses_what_does_not_fit(pool, pixels):
    def run(**options):
        given = {"included": COINS, "seeds": SEEDS, "snapshots": [8]} | options
        return train_together(SGD_RECIPE, MODEL, pool, pixels, given.pop("included"), **given)

    with pytest.raises(ValueError, match="included: got 2 runs, expected the 3 of seeds"):
        run(included=COINS[:2])
    with pytest.raises(ValueError, match="initial: got 1 runs, expected the 3 of seeds"):
        run(initial=starts(MODEL, pool, jnp.float32)[:1])
    with pytest.raises(ValueError, match=r"snapshots: got \[9\], expected steps between 1 and num_steps = 8"):
        run(snapshots=[9])


def test_train_together_asks_of_every_run_whether_it_is_private(pool, pixels):
    """75, 73 and 70 of 78 rows are trained on: 1 / 74 is refused for the first, whichever place it has."""
    allowed, refused = (
        replace(DPSGD_RECIPE, noise_multiplier=50.0, target=Target(epsilon=2.0, delta=1 / n)) for n in (76, 74)
    )
    options = {"seeds": SEEDS, "snapshots": [8]}
    train_together(allowed, MODEL, pool, pixels, COINS, **options)
    for order in ([0, 1, 2], [1, 2, 0]):
        with pytest.raises(ValueError, match=r"delta: got 0\.0135\d*, expected a number below 1 / 75"):
            train_together(refused, MODEL, pool, pixels, COINS[order], **options)


def test_initial_state_knows_where_any_run_has_a_row(pool):
    """A microbatch counts as used where one run has rows in it, and some are not in all of them."""
    state = initial_state(PRIVATE, MODEL, pool, COINS, seeds=SEEDS, initial=[None] * 3)
    used = (np.asarray(state["samples"]).reshape(3, 8, -1, 8) >= 0).any(axis=3)
    np.testing.assert_array_equal(state["is_used"], used.any(axis=0))
    assert (used.any(axis=0) & ~used.all(axis=0)).any()
    assert not used.any(axis=0).all()
    assert state["images"].shape == pool.images.shape
    assert state["noise"].shape == (3,)


def test_samples_of_other_widths_are_padded(pool, pixels, monkeypatch):
    """As those of a run whose draws lie beyond six standard deviations: bit by bit the same runs."""
    expected = train_together(PRIVATE, MODEL, pool, pixels, COINS, seeds=SEEDS, snapshots=[8])
    drawn, calls = dpsgd.poisson_batches, []

    def wider(*args):
        calls.append(args)
        return np.pad(drawn(*args), ((0, 0), (0, 16 if len(calls) == 2 else 0)), constant_values=-1)

    monkeypatch.setattr(training.steps.dpsgd, "poisson_batches", wider)
    found = train_together(PRIVATE, MODEL, pool, pixels, COINS, seeds=SEEDS, snapshots=[8])
    assert len(calls) == 3
    assert same(found, expected)


def test_compiled_step_is_compiled_once():
    assert training_together.compiled_step(PRIVATE, MODEL) is training_together.compiled_step(PRIVATE, MODEL)
