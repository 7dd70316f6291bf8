"""Gradient Max canaries: norms and their derivatives, proxies, effect, resuming."""

import contextlib
import itertools
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

from metacanary import gradient_max, models, store, training
from metacanary.families import make
from metacanary.gradient_max import GradientMax, log_norm_slopes, maximize, train_proxies
from metacanary.interruption import Stopped
from metacanary.recipes import DPSGD, EMA, SGD, Augmentation
from metacanary.runs import Pool
from metacanary.updates import AdamUpdate, MetaState, SignedUpdate

NUM_CANARIES = 12


class Linear(nn.Module):
    """Logistic regression, which compiles fast; without a bias a black picture has no gradient."""

    @nn.compact
    def __call__(self, images):
        return nn.Dense(10, use_bias=False)(images.reshape(len(images), -1))


MODEL = Linear()
RECIPE = SGD(num_steps=20, batch_size=32, learning_rate=0.2)
PRIVATE = DPSGD(num_steps=20, sampling_prob=0.2, clip_norm=1.0, noise_multiplier=0.5, learning_rate=1.0)
SETTINGS = GradientMax(
    update=AdamUpdate(learning_rate=0.05),
    recipe=RECIPE,
    num_steps=6,
    num_proxies=2,
    proxy_steps=(10, 20),
    microbatch=5,
)
UPDATES = pytest.mark.parametrize(
    "update", [SignedUpdate(step_size=0.05), AdamUpdate(learning_rate=0.05)], ids=["signed", "adam"]
)


class Batched(nn.Module):
    """Batch normalisation, by the batch's statistics."""

    @nn.compact
    def __call__(self, images):
        return nn.Dense(10)(nn.BatchNorm(use_running_average=False)(images.reshape(len(images), -1)))


class Centred(nn.Module):
    """Takes out the mean over the batch: no statistics are kept."""

    @nn.compact
    def __call__(self, images):
        x = nn.Dense(4)(images.reshape(len(images), -1))
        return nn.Dense(10)(x - x.mean(axis=0, keepdims=True))


@pytest.fixture(scope="module")
def digits():
    """300 pictures of digits, 8x8, as bytes, and their labels."""
    data = load_digits()
    return (data.images[:300, ..., None] * 255 / 16).astype(np.uint8), data.target[:300]


@pytest.fixture(scope="module")
def start(digits):
    return make("random", *digits, num_canaries=NUM_CANARIES, num_classes=10, seed=0)


@pytest.fixture(scope="module")
def pool(digits, start):
    return Pool.make(*digits, start.source_index, start.label)


@pytest.fixture(scope="module")
def proxies(pool, start):
    return train_proxies(SETTINGS, MODEL, pool, start, seed=1)


def run(settings, start, proxies, **options):
    """All states and history rows of an optimisation."""
    return list(maximize(settings, MODEL, start, proxies, **options))


def bits(trees):
    """The bits of all leaves of trees."""
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(trees)]


def naive_log_norms(model, params, images, labels, keep=lambda layer: True):
    """The logarithm [m] of each example's gradient norm: `jax.grad`, one example after the other."""

    def loss(p, image, label):
        logits = models.apply(model, p, image[None])[0]
        return -jax.nn.log_softmax(logits)[label]

    def norm(image, label):
        gradient = jax.grad(loss)(params, image, label)
        return jnp.sqrt(sum(jnp.sum(x**2) for name, own in gradient.items() for x in own.values() if keep(name)))

    return jnp.log(jnp.stack([norm(image, label) for image, label in zip(images, labels, strict=True)]))


@pytest.mark.parametrize("trainable", ["all", "last"])
def test_norms_and_slopes_are_those_of_one_example_after_the_other(start, trainable):
    """In float64, against plain autodiff (reverse over reverse) and, along a direction, finite differences."""
    model = models.ConvNet(num_classes=10, widths=(4, 4))
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0), 2)
        params = [jax.tree.map(jnp.float64, models.init(model, key, (8, 8, 1))) for key in keys]
        pixels, labels = start.images[:3].astype(np.float64), start.label[:3]
        settings = replace(SETTINGS, recipe=replace(RECIPE, trainable=trainable), microbatch=2)
        norms, slopes = log_norm_slopes(settings, model, params, pixels, labels)

        @jax.jit
        def mean_log(pixels):
            logs = [
                naive_log_norms(model, p, pixels, labels, lambda name: trainable == "all" or name == "Dense_0")
                for p in params
            ]
            return jnp.stack(logs).mean(axis=0).sum(), jnp.stack(logs)

        expected, logs = jax.grad(mean_log, has_aux=True)(jnp.asarray(pixels))
        assert {name.partition("_")[0] for name in params[0]} == {"Conv3x3", "Dense"}
        assert norms.dtype == np.float64
        assert norms.shape == (2, 3)
        np.testing.assert_allclose(np.log(norms), logs, rtol=0, atol=1e-9)
        np.testing.assert_allclose(slopes, expected, rtol=0, atol=1e-9 * np.abs(expected).max())
        direction = np.random.default_rng(0).standard_normal(pixels.shape)
        ends = [log_norm_slopes(settings, model, params, pixels + h * direction, labels)[0] for h in (-1e-5, 1e-5)]
        difference = (np.log(ends[1]) - np.log(ends[0])).mean(axis=0).sum() / 2e-5
        assert difference == pytest.approx((slopes * direction).sum(), rel=1e-4)


@pytest.mark.parametrize("size", [1, 5, 12, 100])
def test_microbatches_change_rounding_alone(start, proxies, size):
    expected = log_norm_slopes(SETTINGS, MODEL, proxies, start.images, start.label)
    found = log_norm_slopes(replace(SETTINGS, microbatch=size), MODEL, proxies, start.images, start.label)
    for array, other in zip(found, expected, strict=True):
        assert array.shape == other.shape
        np.testing.assert_allclose(array, other, rtol=1e-4, atol=1e-5 * np.abs(other).max())


@UPDATES
def test_a_canary_without_gradient_from_the_start_stays_where_it_is(digits, update):
    """Guarantee: no NaN at a norm of 0; the geometric mean of norms is then 0, their mean is not."""
    blank = make("random", *digits, num_canaries=4, num_classes=10, seed=0)
    pixels = blank.images.copy()
    pixels[0] = 0
    blank = replace(blank, images=pixels)
    params = models.init(MODEL, jax.random.key(0), (8, 8, 1))
    for state, row in maximize(replace(SETTINGS, update=update), MODEL, blank, [params]):
        assert np.isfinite(state.images).all()
        assert (state.images[0] == 0).all()
        assert np.abs(state.images[1:] - blank.images[1:]).max() > 0.04
        assert row["geometric_mean_gradient_norm"] == 0
        assert row["mean_gradient_norm"] > 0.1


def test_a_canary_that_loses_its_gradient_goes_on_by_momentum(start, proxies):
    """So the guarantee is of canaries without gradient from the start: here all proxies become 0 after a step."""
    (moved, _), *_ = run(replace(SETTINGS, num_steps=1), start, proxies)
    flat = [jax.tree.map(jnp.zeros_like, proxy) for proxy in proxies]
    black = replace(moved, images=np.zeros_like(moved.images))  # without a bias, a picture of zeros has no gradient
    state, row = next(maximize(SETTINGS, MODEL, start, flat, resume=black))
    assert row["mean_gradient_norm"] == 0
    assert (state.images != 0).any()


def test_norms_are_of_the_image_without_augmentation(start, proxies):
    augmented = replace(PRIVATE, augmentation=Augmentation(multiplicity=3, flip=True, crop_padding=2))
    found = log_norm_slopes(replace(SETTINGS, recipe=augmented), MODEL, proxies, start.images, start.label)[0]
    expected = np.stack([naive_log_norms(MODEL, p, start.images, start.label) for p in proxies])
    np.testing.assert_allclose(np.log(found), expected, rtol=0, atol=1e-4)


@UPDATES
def test_maximize_raises_norms_on_unseen_proxies(pool, start, proxies, update):
    """Of every canary; their geometric mean grew 1.8 times when written."""
    end, _ = run(replace(SETTINGS, update=update, num_steps=15), start, proxies)[-1]
    unseen = train_proxies(replace(SETTINGS, num_proxies=3), MODEL, pool, start, seed=1000)
    before, after = (
        np.log(log_norm_slopes(SETTINGS, MODEL, unseen, images, start.label)[0]).mean(axis=0)
        for images in (start.images, end.images)
    )
    assert (after > before).all()
    assert (after - before).mean() > np.log(1.6)


@UPDATES
def test_maximize_keeps_pixels_valid(start, proxies, update):
    """Guarantee: in [0, 1] after every step, with pixels at both ends and others that moved freely."""
    for state, _ in run(replace(SETTINGS, update=update), start, proxies):
        assert state.images.dtype == np.float32
        assert (state.images.min(), state.images.max()) == (0.0, 1.0)
        assert ((state.images != start.images) & (state.images > 0) & (state.images < 1)).mean() > 0.2


def test_maximize_moves_each_canary_by_its_own_gradients(start, proxies):
    """Guarantee: the same steps alone and among others, up to rounding; a sign may fall otherwise near 0."""
    fields = {name: array[:3] for name, array in start.arrays().items()}
    alone = type(start).from_arrays(fields)
    settings = replace(SETTINGS, num_steps=3)
    among, single = (run(settings, chosen, proxies)[-1][0].images for chosen in (start, alone))
    np.testing.assert_allclose(among[:3], single, rtol=0, atol=1e-3)


def test_maximize_reports_the_canaries_before_the_update(start, proxies):
    rows = [row for _, row in run(SETTINGS, start, proxies)]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    logs = np.stack([naive_log_norms(MODEL, p, start.images, start.label) for p in proxies])
    assert rows[0]["geometric_mean_gradient_norm"] == pytest.approx(np.exp(logs.mean()), rel=1e-4)
    assert rows[0]["mean_gradient_norm"] == pytest.approx(np.exp(logs).mean(), rel=1e-4)
    assert rows[-1]["geometric_mean_gradient_norm"] > rows[0]["geometric_mean_gradient_norm"]
    assert all(row["seconds"] > 0 for row in rows)


@UPDATES
def test_maximize_resumes_bit_identical_after_every_step(start, proxies, update, tmp_path):
    """Guarantee: from any yielded state, through a file; the optimiser's state is part of it."""
    settings = replace(SETTINGS, update=update)
    full = run(settings, start, proxies)
    like = vars(gradient_max.initial(settings, start))
    for state, _ in full:
        store.write_tree(tmp_path / "state.npz", vars(state), {})
        resume = MetaState(**store.read_tree(tmp_path / "state.npz", like))
        rest = run(settings, start, proxies, resume=resume)
        assert [s.step for s, _ in rest] == list(range(state.step + 1, 7))
        assert bits([vars(s) for s, _ in rest]) == bits([vars(s) for s, _ in full[state.step :]])


def test_maximize_stops_at_a_gradient_that_is_not_finite(start, proxies):
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, proxies[0])
    with pytest.raises(FloatingPointError, match="gradients of canaries are not finite before step 1"):
        run(SETTINGS, start, [*proxies, broken])


@pytest.mark.parametrize("recipe", [RECIPE, PRIVATE, replace(RECIPE, ema=EMA(decay=0.9))], ids=["sgd", "dpsgd", "ema"])
def test_train_proxies_trains_on_the_pool_alone(pool, start, recipe):
    """Each from its own seed, as `training.train` does without any canary; what is released at each step."""
    settings = replace(SETTINGS, recipe=recipe)
    found = train_proxies(settings, MODEL, pool, start, seed=1)
    none = np.zeros(NUM_CANARIES, bool)
    seeds = [gradient_max.proxy_seed(1, number) for number in range(2)]
    runs = [
        training.train(recipe, MODEL, pool, 1 - start.images, none, seed=seed, snapshots=[10, 20]) for seed in seeds
    ]
    assert len(set(seeds)) == 2
    assert bits(found) == bits([params for snapshots in runs for params in snapshots.values()])


def test_train_proxies_takes_the_last_step_if_none_is_named(pool, start, proxies):
    assert bits(train_proxies(replace(SETTINGS, proxy_steps=()), MODEL, pool, start, seed=1)) == bits(proxies[1::2])


def test_train_proxies_shows_progress_over_all_of_them(pool, start):
    steps = []
    train_proxies(SETTINGS, MODEL, pool, start, seed=1, on_step=steps.append)
    assert steps == list(range(1, 41))


class Killed(BaseException):
    """What a test raises in the middle of a training."""


@pytest.mark.parametrize("kill_at", [1, 15, 20, 21, 39, 40])
def test_train_proxies_that_is_killed_goes_on_to_the_same_bits(pool, start, proxies, tmp_path, kill_at):
    """A proxy that is trained is not trained again."""

    def killing(step):
        if step == kill_at:
            raise Killed

    with pytest.raises(Killed):
        train_proxies(SETTINGS, MODEL, pool, start, seed=1, checkpoint=tmp_path, on_step=killing)
    steps = []
    found = train_proxies(SETTINGS, MODEL, pool, start, seed=1, checkpoint=tmp_path, on_step=steps.append)
    assert bits(found) == bits(proxies)
    assert steps == list(range(1 if kill_at <= 20 else 21, 41))
    again = train_proxies(SETTINGS, MODEL, pool, start, seed=1, checkpoint=tmp_path, on_step=steps.append)
    assert bits(again) == bits(proxies)
    assert steps[-1] == 40
    assert len(steps) <= 40


def test_train_proxies_that_is_stopped_repeats_no_step(pool, start, proxies, tmp_path):
    """After each seventh step of 40."""
    steps, attempts, found = [], 0, None
    while found is None:
        looks, attempts = itertools.count(1), attempts + 1
        with contextlib.suppress(Stopped):
            found = train_proxies(
                SETTINGS,
                MODEL,
                pool,
                start,
                seed=1,
                checkpoint=tmp_path,
                on_step=steps.append,
                should_stop=lambda looks=looks: next(looks) == 7,
            )
    assert attempts == 6
    assert steps == list(range(1, 41))
    assert bits(found) == bits(proxies)


@pytest.mark.parametrize(
    ("model", "message"),
    [(Batched(), "model Batched: keeps batch_stats"), (Centred(), "model Centred: the logits of one image depend")],
)
def test_train_proxies_refuses_models_without_gradients_of_examples(pool, start, model, message):
    with pytest.raises(ValueError, match=message):
        train_proxies(SETTINGS, model, pool, start, seed=1)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("num_steps", 0, "num_steps: got 0, expected an integer >= 1"),
        ("num_proxies", 0, "num_proxies: got 0, expected an integer >= 1"),
        ("microbatch", 0, "microbatch: got 0, expected an integer >= 1"),
        ("proxy_steps", (0, 20), r"proxy_steps: got \(0, 20\), expected different steps from 1 to 20"),
        ("proxy_steps", (21,), r"proxy_steps: got \(21,\), expected different steps from 1 to 20"),
        ("proxy_steps", (5, 5), r"proxy_steps: got \(5, 5\), expected different steps from 1 to 20"),
    ],
)
def test_gradient_max_rejects_by_key_and_value(name, value, expected):
    with pytest.raises(ValueError, match=expected):
        replace(SETTINGS, **{name: value})


def test_loss_is_the_one_of_training(start, proxies):
    """The norm is of what `steps` trains by: the mean cross-entropy of a batch of one."""
    norms, _ = log_norm_slopes(SETTINGS, MODEL, proxies[:1], start.images, start.label)

    def loss(params):
        logits = models.apply(MODEL, params, jnp.asarray(start.images[:1]))
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(start.label[:1])).mean()

    assert norms[0, 0] == pytest.approx(float(optax.tree.norm(jax.grad(loss)(proxies[0]))), rel=1e-5)
