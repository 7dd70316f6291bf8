"""Training: SGD and DP-SGD against NumPy twins; what excluded canaries must not do; divergence; resuming."""

from collections.abc import Callable
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metacanary import dpsgd, models, steps, training, training_loop
from metacanary.accounting import noise_multiplier
from metacanary.interruption import Stopped
from metacanary.recipes import DPSGD, EMA, SGD, Augmentation, Clipping, Optimizer, Schedule, Target
from metacanary.runs import Pool, stream
from metacanary.steps import data_order
from metacanary.training import accuracy, predict, train

NUM_CLASSES, NUM_OTHERS, NUM_CANARIES = 3, 70, 8  # more rows than a microbatch of DP-SGD
INCLUDED = np.array([1, 1, 0, 1, 1, 0, 1, 0], bool)
OUT = np.flatnonzero(~INCLUDED)

SGD_RECIPE = SGD(
    num_steps=8,
    batch_size=20,
    learning_rate=0.3,
    momentum=0.9,
    nesterov=True,
    weight_decay=0.01,
    schedule=Schedule(name="one_cycle"),
)
DPSGD_RECIPE = DPSGD(
    num_steps=8, sampling_prob=0.4, clip_norm=0.5, noise_multiplier=0.7, learning_rate=0.3, momentum=0.9
)
RECIPES = pytest.mark.parametrize("recipe", [SGD_RECIPE, DPSGD_RECIPE], ids=["sgd", "dpsgd"])


class Linear(nn.Module):
    """Logistic regression: compiles fast, and its gradient is one line of NumPy."""

    @nn.compact
    def __call__(self, images):
        return nn.Dense(NUM_CLASSES)(images.reshape(len(images), -1))


MODEL = Linear()


@pytest.fixture(scope="module")
def pool():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, size=(NUM_OTHERS, 3, 3, 1), dtype=np.uint8)
    labels = rng.integers(0, NUM_CLASSES, size=NUM_OTHERS + NUM_CANARIES)
    return Pool(images=jnp.asarray(images), labels=jnp.asarray(labels, jnp.int32))


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(1).random((NUM_CANARIES, 3, 3, 1)).astype(np.float32)


def as_matrix(params):
    """Kernel and bias as one float64 [inputs + 1, classes]."""
    layer = params["Dense_0"]
    return np.concatenate([layer["kernel"], layer["bias"][None]]).astype(np.float64)


def naive_gradients(w, pool, pixels, rows):
    """Per-example gradients of the cross-entropy of logistic regression, [n, inputs + 1, classes]."""
    images = np.concatenate([np.asarray(pool.images) / 255.0, pixels])[rows].reshape(len(rows), -1)
    x = np.concatenate([images, np.ones((len(rows), 1))], axis=1)
    logits = x @ w
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p = p / p.sum(axis=1, keepdims=True) - np.eye(NUM_CLASSES)[np.asarray(pool.labels)[rows]]
    return x[:, :, None] * p[:, None, :]


def initial(pool, seed):
    return as_matrix(models.init(MODEL, stream(seed, "init"), pool.images.shape[1:]))


def same(first, second):
    """Whether two parameter trees have the same bits."""
    return all(a.tobytes() == b.tobytes() for a, b in zip(*map(jax.tree.leaves, (first, second)), strict=True))


def test_train_sgd_equals_a_numpy_loop(pool, pixels):
    """Nesterov momentum, weight decay, one cycle, float64; ours is float32, so 1e-5."""
    found = train(SGD_RECIPE, MODEL, pool, pixels, INCLUDED, seed=3, snapshots=[1, 5, 8])
    rates = 0.3 * np.interp(np.arange(8), [0, 4, 8], [0.07, 1.0, 0.2])
    w, momentum = initial(pool, 3), 0.0
    for t, rows in enumerate(data_order(stream(3, "order"), pool.used(INCLUDED), 8, 20)):
        gradient = naive_gradients(w, pool, pixels, rows).mean(axis=0) + 0.01 * w
        momentum = 0.9 * momentum + gradient
        w = w - rates[t] * (gradient + 0.9 * momentum)
        if t + 1 in found:
            assert np.allclose(as_matrix(found[t + 1]), w, rtol=0, atol=1e-5)
    assert list(found) == [1, 5, 8]
    assert np.abs(w - initial(pool, 3)).max() > 0.05


def test_train_dpsgd_without_noise_and_clipping_is_full_batch_descent(pool, pixels):
    """All 75 rows, the sum divided by 70 + 8 / 2: the expected size under fair coins, not the 75 of these coins."""
    recipe = replace(DPSGD_RECIPE, noise_multiplier=0.0, sampling_prob=1.0, clip_norm=1e6)
    found = as_matrix(train(recipe, MODEL, pool, pixels, INCLUDED, seed=3, snapshots=[8])[8])
    w, momentum, rows = initial(pool, 3), 0.0, np.flatnonzero(pool.used(INCLUDED))
    assert len(rows) == 75
    for _ in range(8):
        momentum = 0.9 * momentum + naive_gradients(w, pool, pixels, rows).sum(axis=0) / 74
        w = w - 0.3 * momentum
    assert np.allclose(found, w, rtol=0, atol=1e-5)
    assert np.abs(w - initial(pool, 3)).max() > 0.05


def test_train_dpsgd_equals_a_numpy_loop(pool, pixels):
    """Poisson sampling and clipping as a loop with the library's own draws and noise; divided by q 74.

    Every row has its own coin, whether it is used or not.
    """
    found = as_matrix(train(DPSGD_RECIPE, MODEL, pool, pixels, INCLUDED, seed=4, snapshots=[8])[8])
    w, momentum, used, sizes, clipped = initial(pool, 4), 0.0, pool.used(INCLUDED), [], 0
    like = models.init(MODEL, stream(4, "init"), pool.images.shape[1:])
    for t in range(8):
        drawn = dpsgd.poisson_sample(jax.random.fold_in(stream(4, "sampling"), t), 0.4, 78)
        drawn = drawn[used[drawn]]
        gradients = naive_gradients(w, pool, pixels, drawn)
        norms = np.linalg.norm(gradients, axis=(1, 2), keepdims=True)
        zeros = jax.tree.map(jnp.zeros_like, like)
        noise = as_matrix(dpsgd.add_noise(jax.random.fold_in(stream(4, "noise"), t), zeros, 0.7 * 0.5))
        total = (gradients * np.minimum(1, 0.5 / norms)).sum(axis=0) + noise
        momentum = 0.9 * momentum + total / (0.4 * 74)
        w = w - 0.3 * momentum
        sizes.append(len(drawn))
        clipped += (norms > 0.5).sum()
    assert np.allclose(found, w, rtol=0, atol=1e-5)
    assert clipped > 50
    assert len(set(sizes)) > 3


@pytest.fixture(scope="module")
def noise_of_two_steps(pool):
    """What noise adds to 3,003 parameters in each of two steps, over its expected deviation lr sigma C / (q n)."""
    images = jnp.zeros((10, 1000, 1, 1), jnp.uint8)
    wide = Pool(images=images, labels=pool.labels[:14])
    none, coins_in = np.zeros((4, 1000, 1, 1), np.float32), np.array([1, 0, 1, 0], bool)
    recipe = DPSGD(num_steps=2, sampling_prob=0.5, clip_norm=1e-3, noise_multiplier=50.0, learning_rate=0.2)

    def parameters(recipe):
        return train(recipe, MODEL, wide, none, coins_in, seed=5, snapshots=[1, 2])

    noisy, quiet = parameters(recipe), parameters(replace(recipe, noise_multiplier=0.0))
    first, both = (as_matrix(noisy[t]) - as_matrix(quiet[t]) for t in (1, 2))
    deviation = 0.2 * 50.0 * 1e-3 / (0.5 * 12)
    return np.array([first.ravel(), (both - first).ravel()]) / deviation


def test_train_dpsgd_noise_has_its_scale(noise_of_two_steps):
    """Deviation lr sigma C / (q (r + m / 2)) within 5 standard errors; without noise, or without C, it is far off."""
    n = noise_of_two_steps.shape[1]
    assert n == 3003
    assert np.abs(noise_of_two_steps.std(axis=1) - 1).max() < 5 / np.sqrt(2 * n)
    assert np.abs(noise_of_two_steps.mean(axis=1)).max() < 5 / np.sqrt(n)


def test_train_dpsgd_noise_is_fresh_at_every_step(noise_of_two_steps):
    correlation = np.corrcoef(noise_of_two_steps)[0, 1]
    assert abs(correlation) < 5 / np.sqrt(noise_of_two_steps.shape[1])


def test_train_dpsgd_survives_an_empty_batch(pool, pixels):
    recipe = replace(DPSGD_RECIPE, sampling_prob=1e-6, noise_multiplier=0.0)
    found = train(recipe, MODEL, pool, pixels, INCLUDED, seed=3, snapshots=[8])
    assert np.array_equal(as_matrix(found[8]), initial(pool, 3))


@RECIPES
def test_train_is_not_touched_by_excluded_canaries(pool, pixels, recipe):
    """Bit by bit; one that is included changes the parameters."""
    recipe = replace(recipe, sampling_prob=1.0) if isinstance(recipe, DPSGD) else recipe
    expected = train(recipe, MODEL, pool, pixels, INCLUDED, seed=3, snapshots=[8])[8]
    others = pixels.copy()
    others[OUT] = 1 - others[OUT]
    labels = pool.labels.at[NUM_OTHERS + OUT].set((pool.labels[NUM_OTHERS + OUT] + 1) % NUM_CLASSES)
    found = train(recipe, MODEL, replace(pool, labels=labels), others, INCLUDED, seed=3, snapshots=[8])[8]
    assert same(found, expected)
    for row in np.flatnonzero(INCLUDED):
        changed = pixels.copy()
        changed[row] = 1 - changed[row]
        assert not same(train(recipe, MODEL, pool, changed, INCLUDED, seed=3, snapshots=[8])[8], expected)


@RECIPES
def test_train_depends_on_the_seed_only(pool, pixels, recipe):
    runs = [train(recipe, MODEL, pool, pixels, INCLUDED, seed=seed, snapshots=[8])[8] for seed in (1, 1, 2)]
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


@RECIPES
def test_train_keeps_the_snapshots_asked_for(pool, pixels, recipe):
    """Each is what a run with that snapshot alone keeps; they differ from step to step."""
    found = train(recipe, MODEL, pool, pixels, INCLUDED, seed=3, snapshots=[2, 5, 8])
    assert list(found) == [2, 5, 8]
    for step in found:
        alone = train(recipe, MODEL, pool, pixels, INCLUDED, seed=3, snapshots=[step])
        assert same(alone[step], found[step])
    assert not same(found[2], found[5])


@pytest.mark.parametrize("step", [0, 9, -1])
def test_train_rejects_snapshots_outside_the_run(pool, pixels, step):
    with pytest.raises(ValueError, match=rf"snapshots: got \[{step}\], expected steps between 1 and num_steps = 8"):
        train(SGD_RECIPE, MODEL, pool, pixels, INCLUDED, seed=3, snapshots=[4, step])


@RECIPES
@pytest.mark.parametrize("killed_at", [1, 5, 7])
def test_train_resumes_bit_identical(pool, pixels, recipe, killed_at, tmp_path):
    """Guarantee: with the snapshots before and after the kill; and it does resume, not start again."""

    def kill(step):
        if step == killed_at:
            raise KeyboardInterrupt

    def run(**options):
        return train(recipe, MODEL, pool, pixels, INCLUDED, seed=3, snapshots=[3, 8], **options)

    checkpoint, steps = tmp_path / "run.npz", []
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint=checkpoint, checkpoint_seconds=0.0, on_step=kill)
    resumed = run(checkpoint=checkpoint, on_step=steps.append)
    assert steps == list(range(killed_at + 1, 9))
    undisturbed = run()
    assert list(resumed) == list(undisturbed) == [3, 8]
    assert same(resumed, undisturbed)


@RECIPES
@pytest.mark.parametrize("stop_after", [1, 3, 8])
def test_train_that_is_stopped_loses_no_step(pool, pixels, recipe, stop_after, tmp_path):
    """Guarantee: the checkpoint is of the step after which it was asked to stop, long before it was due."""
    checkpoint, steps = tmp_path / "run.npz", []

    def run(**options):
        return train(recipe, MODEL, pool, pixels, INCLUDED, seed=3, snapshots=[3, 8], **options)

    with pytest.raises(Stopped, match=f"stopped after step {stop_after} of 8"):
        run(checkpoint=checkpoint, on_step=steps.append, should_stop=lambda: len(steps) == stop_after - 1)
    resumed = run(checkpoint=checkpoint, on_step=steps.append, should_stop=lambda: False)
    assert steps == list(range(1, 9))
    assert same(resumed, run())


def test_train_refuses_the_checkpoint_of_another_run(pool, pixels, tmp_path):
    checkpoint = tmp_path / "run.npz"

    def run(seed):
        options = {"snapshots": [8], "checkpoint": checkpoint, "checkpoint_seconds": 0.0}
        return train(SGD_RECIPE, MODEL, pool, pixels, INCLUDED, seed=seed, **options)

    assert same(run(3)[8], run(3)[8])
    with pytest.raises(ValueError, match="is of another seed"):
        run(4)


@pytest.mark.parametrize("changed", ["images", "labels", "canaries", "included"])
def test_train_refuses_the_checkpoint_of_other_data(pool, pixels, changed, tmp_path):
    """Above all of other coins: the audit would take in what the model was not trained on for what it was."""
    options = {"seed": 3, "snapshots": [8], "checkpoint": tmp_path / "run.npz", "checkpoint_seconds": 0.0}
    train(SGD_RECIPE, MODEL, pool, pixels, INCLUDED, **options)
    other, canaries, included = pool, np.array(pixels), INCLUDED
    if changed in ("images", "labels"):
        array = np.array(getattr(pool, changed))
        array.flat[0] += 1
        other = replace(pool, **{changed: jnp.asarray(array)})
    elif changed == "canaries":
        canaries.flat[0] += 0.25
    else:
        included = INCLUDED[::-1]
    name = "images" if changed == "canaries" else changed
    with pytest.raises(ValueError, match=f"is of another {name}, expected"):
        train(SGD_RECIPE, MODEL, other, canaries, included, **options)


def test_train_writes_no_checkpoint_before_its_time(pool, pixels, tmp_path):
    checkpoint = tmp_path / "run.npz"
    train(SGD_RECIPE, MODEL, pool, pixels, INCLUDED, seed=3, snapshots=[8], checkpoint=checkpoint)
    assert not checkpoint.exists()


def first_bad_step(recipe, pool, pixels):
    """Looks at the parameters after every step, with NumPy."""
    state = training.initial_state(recipe, MODEL, pool, INCLUDED, seed=3)
    step = jax.jit(training.step_function(recipe, MODEL))
    for t in range(recipe.num_steps):
        state = step(state, jnp.asarray(pixels), jnp.int32(t))
        if not np.isfinite(as_matrix(state["params"])).all():
            return t + 1
    return None


@RECIPES
def test_train_names_the_step_at_which_it_diverged(pool, pixels, recipe):
    """The true one, not the snapshot or the look at which it was seen."""
    recipe = replace(recipe, momentum=1e8)
    expected = first_bad_step(recipe, pool, pixels)
    assert 2 < expected < 8
    with pytest.raises(
        FloatingPointError, match=f"parameters are not finite after step {expected} of 8: lower learning_rate"
    ):
        train(recipe, MODEL, pool, pixels, INCLUDED, seed=3, snapshots=[8])


@RECIPES
def test_train_stops_soon_after_it_diverged(pool, pixels, recipe):
    """Within CHECK_EVERY steps."""
    recipe, steps = replace(recipe, momentum=1e8, num_steps=2 * training_loop.CHECK_EVERY), []
    expected = first_bad_step(recipe, pool, pixels)
    with pytest.raises(FloatingPointError, match=f"after step {expected} of 100"):
        train(recipe, MODEL, pool, pixels, INCLUDED, seed=3, snapshots=[100], on_step=steps.append)
    assert expected <= len(steps) + 1 == training_loop.CHECK_EVERY


@RECIPES
def test_train_writes_no_checkpoint_that_is_not_finite(pool, pixels, recipe, tmp_path):
    recipe, checkpoint = replace(recipe, momentum=1e8), tmp_path / "run.npz"
    expected = first_bad_step(recipe, pool, pixels)
    options = {"checkpoint": checkpoint, "checkpoint_seconds": 0.0}
    for _ in range(2):  # a second try goes on from the checkpoint and says the same
        with pytest.raises(FloatingPointError, match=f"after step {expected} of 8"):
            train(recipe, MODEL, pool, pixels, INCLUDED, seed=3, snapshots=[8], **options)
        with np.load(checkpoint, allow_pickle=False) as saved:
            assert saved["leaf['step']"] == expected - 1
            assert all(np.isfinite(saved[name]).all() for name in saved.files if name.startswith("leaf['carried']"))


@RECIPES
def test_train_is_the_replayed_step_bit_by_bit(pool, pixels, recipe):
    """After every step: what looks at the parameters does not change them. Metagradients replay these steps."""
    step = jax.jit(training.step_function(recipe, MODEL))
    state = training.initial_state(recipe, MODEL, pool, INCLUDED, seed=3)
    trained = train(recipe, MODEL, pool, pixels, INCLUDED, seed=3, snapshots=range(1, 9))
    for t in range(8):
        state = step(state, jnp.asarray(pixels), jnp.int32(t))
        assert same(trained[t + 1], state["params"])


def test_predict_takes_bytes_floats_and_any_batch_size(pool):
    params = models.init(MODEL, jax.random.key(0), pool.images.shape[1:])
    images = np.asarray(pool.images)
    w = as_matrix(params)
    expected = images.reshape(70, -1) / 255.0 @ w[:-1] + w[-1]
    for given in (images, images.astype(np.float32) / 255):
        assert np.allclose(predict(MODEL, params, given, batch_size=32), expected, rtol=0, atol=1e-5)
    assert predict(MODEL, params, images).shape == (70, NUM_CLASSES)
    labels = expected.argmax(axis=1)
    labels[:7] = (labels[:7] + 1) % NUM_CLASSES
    assert accuracy(MODEL, params, images, labels) == pytest.approx(0.9)


AVERAGED = pytest.mark.parametrize(
    "recipe",
    [
        replace(SGD_RECIPE, ema=EMA(decay=0.8), augmentation=Augmentation(multiplicity=2, flip=True)),
        replace(
            DPSGD_RECIPE,
            ema=EMA(decay=0.8),
            clipping=Clipping(name="adaptive", budget=0.3),
            optimizer=Optimizer(name="adam"),
            momentum=0.0,
        ),
    ],
    ids=["sgd", "dpsgd"],
)


@AVERAGED
def test_train_with_averages_and_thresholds_resumes_bit_identical(pool, pixels, recipe, tmp_path):
    """Guarantee: the moving average, the optimiser's moments and the thresholds are part of a checkpoint."""
    checkpoint, finished = tmp_path / "run.npz", []

    def kill(step):
        if step == 4:
            raise KeyboardInterrupt

    def run(**options):
        return train(recipe, MODEL, pool, pixels, INCLUDED, seed=3, snapshots=[3, 8], **options)

    with pytest.raises(KeyboardInterrupt):
        run(checkpoint=checkpoint, checkpoint_seconds=0.0, on_step=kill)
    resumed = run(checkpoint=checkpoint, on_step=finished.append)
    assert finished == [5, 6, 7, 8]
    assert same(resumed, run())


@AVERAGED
def test_train_keeps_the_average(pool, pixels, recipe):
    """A snapshot is the average of the parameters after each step, from the start on: to 1e-6 of a loop."""
    kept = train(recipe, MODEL, pool, pixels, INCLUDED, seed=3, snapshots=range(1, 9))
    plain = train(replace(recipe, ema=EMA()), MODEL, pool, pixels, INCLUDED, seed=3, snapshots=range(1, 9))
    mean = initial(pool, 3)
    for t in range(8):
        decay = min(0.8, (1 + t) / (10 + t))
        mean = decay * mean + (1 - decay) * as_matrix(plain[t + 1])
        assert np.allclose(as_matrix(kept[t + 1]), mean, rtol=0, atol=1e-6)
    assert np.abs(as_matrix(plain[8]) - mean).max() > 1e-3


@pytest.mark.parametrize("name", ["flat", "per_layer", "adaptive"])
def test_compiled_step_in_programs_of_microbatches_is_the_step(pool, pixels, name):
    """Where loops of convolutions are slow a step is several programs: the same state after three steps, to 1e-5.

    With batches of up to 78 rows in microbatches of 16, of which the last are padding.
    """
    model = models.build("convnet", num_classes=NUM_CLASSES, widths=[2], as_matmul=False)
    recipe = replace(DPSGD_RECIPE, microbatch=16, clipping=Clipping(name=name), ema=EMA(decay=0.5))
    start = training.initial_state(recipe, model, pool, INCLUDED, seed=3)
    found, expected, carried = start, start, {"params", "optimizer", "ema"}
    in_programs = training.compiled_step(recipe, model)
    assert in_programs is training._in_microbatches(recipe, model)
    whole = training._compiled(training.step_function(recipe, model))
    for t in range(3):
        changed = in_programs(found, jnp.asarray(pixels), np.int32(t))
        assert set(changed) == carried | ({"thresholds"} if name != "flat" else set())
        found, expected = found | changed, expected | whole(expected, jnp.asarray(pixels), np.int32(t))
    for a, b, c in zip(*(jax.tree.leaves({k: s[k] for k in changed}) for s in (found, expected, start)), strict=True):
        assert np.allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())
        assert name == "per_layer" or not np.array_equal(a, c)


@RECIPES
def test_train_starts_from_given_parameters(pool, pixels, recipe, tmp_path):
    """With no rate to speak of they stay; a run that goes on from another's end is not that run's beginning again."""
    given = train(recipe, MODEL, pool, pixels, INCLUDED, seed=9, snapshots=[8])[8]
    still = replace(recipe, learning_rate=1e-30)
    kept = train(still, MODEL, pool, pixels, INCLUDED, seed=3, snapshots=[8], initial=given)[8]
    assert same(kept, given)
    checkpoint = tmp_path / "run.npz"

    def run(start):
        options = {"snapshots": [8], "checkpoint": checkpoint, "checkpoint_seconds": 0.0, "initial": start}
        return train(recipe, MODEL, pool, pixels, INCLUDED, seed=3, **options)[8]

    first = run(given)
    assert same(run(given), first)
    assert not same(first, train(recipe, MODEL, pool, pixels, INCLUDED, seed=3, snapshots=[8])[8])
    for other in (None, jax.tree.map(lambda x: x + 1, given)):
        with pytest.raises(ValueError, match="is of another initial"):
            run(other)


class Batched(nn.Module):
    """Batch normalisation, by the batch's statistics or by those that it keeps."""

    running: bool

    @nn.compact
    def __call__(self, images):
        x = nn.Dense(4)(images.reshape(len(images), -1))
        return nn.Dense(NUM_CLASSES)(nn.BatchNorm(use_running_average=self.running)(x))


class Centred(nn.Module):
    """Takes out the mean over the batch: no statistics are kept."""

    @nn.compact
    def __call__(self, images):
        x = nn.Dense(4)(images.reshape(len(images), -1))
        return nn.Dense(NUM_CLASSES)(x - x.mean(axis=0, keepdims=True))


class Turned(nn.Module):
    """A layer on the examples in another order, turned back behind it: logits are each example's own."""

    @nn.compact
    def __call__(self, images):
        return nn.Dense(NUM_CLASSES)(images.reshape(len(images), -1)[::-1])[::-1]


class Leaking(nn.Module):
    """Adds what little of an image the others see, by a way to mix them."""

    mix: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, images):
        x = nn.Dense(4)(images.reshape(len(images), -1))
        return nn.Dense(NUM_CLASSES)(x + self.mix(x))


LEAKS = {
    "a little": lambda x: 1e-6 * x.mean(axis=0, keepdims=True),
    "a little, bounded": lambda x: 1e-6 * jnp.tanh(x).mean(axis=0, keepdims=True),
    "what is huge": lambda x: jnp.where(x > 50, 1e3, 0.0).sum(axis=0, keepdims=True),
    "what came before": lambda x: 1e-6 * (jnp.cumsum(x, axis=0) - x),
    "what comes after": lambda x: 1e-6 * (jnp.cumsum(x[::-1], axis=0)[::-1] - x),
}


@pytest.mark.parametrize("mix", list(LEAKS.values()), ids=list(LEAKS))
def test_models_that_mix_examples_ever_so_little_are_refused(mix):
    """No coefficient is so small that a bound on one example's influence would hold."""
    training.require_independent(Leaking(jnp.zeros_like), (2, 2, 1))
    with pytest.raises(ValueError, match="model Leaking: the logits of one image depend on the others"):
        training.require_independent(Leaking(mix), (2, 2, 1))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Batched(running=False), "model Batched: keeps batch_stats, expected parameters alone under DP-SGD"),
        (Batched(running=True), "model Batched: keeps batch_stats, expected parameters alone under DP-SGD"),
        (Centred(), "model Centred: the logits of one image depend on the others of its batch, expected"),
        (Turned(), "model Turned: the output of Dense_0 for one image depends on the others of its batch, expected"),
    ],
    ids=["batch statistics", "running average", "centred", "turned"],
)
def test_train_refuses_models_that_mix_examples_under_dpsgd(pool, pixels, model, message):
    """Before the first step; without privacy such a model may be trained."""
    finished = []
    with pytest.raises(ValueError) as error:
        train(DPSGD_RECIPE, model, pool, pixels, INCLUDED, seed=3, snapshots=[8], on_step=finished.append)
    assert str(error.value).startswith(message)
    assert not finished


def test_train_refuses_thresholds_that_would_follow_noise(pool, pixels):
    """A share's noise is sigma sqrt(K) / (2 sqrt(budget)) over the batch that is expected, 0.4 (70 + 8 / 2) = 29.6."""
    adaptive = replace(DPSGD_RECIPE, clipping=Clipping(name="adaptive", budget=0.01))
    num_layers = len(training.clipping.trained_layers("all", MODEL, pool.images.shape[1:]))
    widest = 29.6 * 2 * 0.1 / num_layers**0.5
    training.require_private(replace(adaptive, noise_multiplier=0.99 * widest), MODEL, pool, INCLUDED)
    with pytest.raises(
        ValueError, match=r"clipping\.budget: got 0\.01, with which .* deviation 1\.01, expected at most 1"
    ):
        training.require_private(replace(adaptive, noise_multiplier=1.01 * widest), MODEL, pool, INCLUDED)


@pytest.mark.parametrize("model", [MODEL, models.ConvNet(num_classes=NUM_CLASSES, widths=(2,))], ids=["linear", "conv"])
def test_train_compiles_once_for_all_seeds_and_coins(pool, pixels, model, monkeypatch):
    """Poisson samples of other sizes are padded to the same shape."""
    recipe = replace(DPSGD_RECIPE, learning_rate=0.0625)  # no other test's
    traced, microbatch_sum = [], steps.microbatch_sum
    monkeypatch.setattr(steps, "microbatch_sum", lambda *args: traced.append(args) or microbatch_sum(*args))
    counts = []
    for seed in (3, 4, 5):
        train(recipe, model, pool, pixels, np.roll(INCLUDED, seed), seed=seed, snapshots=[8])
        counts.append(len(traced))
    assert counts[0] > 0
    assert counts[1:] == counts[:1] * 2


TARGET = Target(epsilon=2.0, delta=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_steps": 9},
            r"noise_multiplier: got .*, with which 9 steps at sampling_prob 0\.4 spend epsilon 2\.\d+, exp",
        ),
        ({"noise_multiplier": 0.9}, r"noise_multiplier: got 0\.9, with which 8 steps .*, expected at most 2$"),
        (
            {"noise_multiplier": 0.0},
            "noise_multiplier: got 0, with which 8 steps .* spend epsilon inf, expected at most 2",
        ),
        ({"sampling_prob": 0.5}, r"noise_multiplier: got .* 8 steps at sampling_prob 0\.5 spend epsilon"),
        (
            {"target": Target(epsilon=2.0, delta=1 / 75)},
            r"delta: got 0\.0133\d*, expected a number below 1 / 75, the train",
        ),
        ({"target": Target(epsilon=2.0, delta=0.5)}, r"delta: got 0\.5, expected a number below 1 / 75, the training"),
    ],
    ids=["steps", "noise", "no noise", "sampling", "delta at 1/N", "delta"],
)
def test_train_refuses_to_spend_more_than_its_target(pool, pixels, change, message):
    """Before the first step; with the noise that the accountant asks for it trains."""
    noise = noise_multiplier(epsilon=2.0, sampling_prob=0.4, num_steps=8, delta=1e-5)
    recipe, finished = replace(DPSGD_RECIPE, noise_multiplier=noise, target=TARGET), []
    training.require_private(recipe, MODEL, pool, INCLUDED)
    options = {"seed": 3, "snapshots": [8], "on_step": finished.append}
    with pytest.raises(ValueError, match=message):
        train(replace(recipe, **change), MODEL, pool, pixels, INCLUDED, **options)
    assert not finished
    train(recipe, MODEL, pool, pixels, INCLUDED, **options)
    assert len(finished) == 8


def test_train_counts_the_examples_of_the_run_for_delta(pool, pixels):
    """75 of 78 rows are trained on: 1 / 76 is below 1 / 75, 1 / 74 is not."""
    recipe = replace(DPSGD_RECIPE, noise_multiplier=50.0, target=Target(epsilon=2.0, delta=1 / 76))
    training.require_private(recipe, MODEL, pool, INCLUDED)
    with pytest.raises(ValueError, match="expected a number below 1 / 75"):
        training.require_private(replace(recipe, target=Target(epsilon=2.0, delta=1 / 74)), MODEL, pool, INCLUDED)
