"""Runs: streams, coins, pools, and the images that are taken from them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metacanary.runs import STREAMS, Pool, coins, stream, take, take_labels


@pytest.fixture(scope="module")
def pool():
    images = np.random.default_rng(0).integers(0, 256, size=(70, 3, 3, 1), dtype=np.uint8)
    return Pool(images=jnp.asarray(images), labels=jnp.zeros(78, jnp.int32))


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(1).random((8, 3, 3, 1)).astype(np.float32)


def test_stream_keys_differ_by_name_and_seed():
    keys = [stream(seed, name) for seed in (0, 1, 2) for name in STREAMS]
    assert len({jax.random.key_data(key).tobytes() for key in keys}) == 18


def test_coins_are_fair_and_independent():
    """256 runs of 64 canaries: means, and correlations of canaries and of runs, within 5 standard errors."""
    drawn = np.array([coins(seed, 64, "independent") for seed in range(256)])
    assert drawn.dtype == bool
    signs = 2.0 * drawn - 1
    assert abs(signs.mean()) < 5 / np.sqrt(signs.size)
    assert np.abs(signs.mean(axis=0)).max() < 5 / np.sqrt(256)
    assert np.abs(np.corrcoef(signs.T)[np.triu_indices(64, 1)]).max() < 5 / np.sqrt(256)
    assert np.abs(np.corrcoef(signs)[np.triu_indices(256, 1)]).max() < 5 / np.sqrt(64)
    sizes = drawn.sum(axis=1)
    assert abs(sizes.var(ddof=1) - 16) < 5 * 16 * np.sqrt(2 / 256)  # not a fixed half


def test_coins_paired_include_exactly_one_of_each_pair():
    drawn = np.array([coins(seed, 64, "paired") for seed in range(256)]).reshape(256, 32, 2)
    assert (drawn.sum(axis=2) == 1).all()
    signs = 2.0 * drawn[:, :, 0] - 1
    assert abs(signs.mean()) < 5 / np.sqrt(signs.size)
    assert np.abs(np.corrcoef(signs.T)[np.triu_indices(32, 1)]).max() < 5 / np.sqrt(256)


def test_coins_depend_on_the_seed_only():
    assert np.array_equal(coins(5, 40, "independent"), coins(5, 40, "independent"))
    assert not np.array_equal(coins(5, 40, "independent"), coins(6, 40, "independent"))


@pytest.mark.parametrize(
    ("num", "game", "message"),
    [(4, "fair", "game: got 'fair'"), (5, "paired", "num_canaries: got 5, expected an even number")],
)
def test_coins_reject(num, game, message):
    with pytest.raises(ValueError, match=message):
        coins(0, num, game)


def test_pool_make_leaves_the_originals_out():
    """Trap 8: a canary's source in the pool would be a second, always included copy of it."""
    images = np.arange(10, dtype=np.uint8)[:, None, None, None]
    pool = Pool.make(images, np.arange(10) + 20, np.array([7, 2, 5]), np.array([0, 1, 2]))
    assert np.ravel(pool.images).tolist() == [0, 1, 3, 4, 6, 8, 9]
    assert pool.labels.tolist() == [20, 21, 23, 24, 26, 28, 29, 0, 1, 2]
    assert (pool.images.dtype, pool.labels.dtype) == (jnp.uint8, jnp.int32)
    assert pool.used(np.array([True, False, True])).tolist() == [True] * 8 + [False, True]


def test_pool_with_canary_labels_changes_no_other_label():
    pool = Pool.make(np.zeros((6, 1, 1, 1), np.uint8), np.arange(6), np.array([4, 1]), np.array([4, 1]))
    changed = pool.with_canary_labels(np.array([8, 9]))
    assert changed.labels.tolist() == [0, 2, 3, 5, 8, 9]
    assert pool.labels.tolist() == [0, 2, 3, 5, 4, 1]
    assert changed.labels.dtype == jnp.int32
    assert changed.images is pool.images


def test_take_reads_the_pool_then_the_canaries(pool, pixels):
    rows = jnp.array([0, 69, 70, 77, 3])
    expected = [pool.images[0] / 255, pool.images[69] / 255, pixels[0], pixels[7], pool.images[3] / 255]
    taken = take(pool.images, jnp.asarray(pixels), rows)
    assert taken.dtype == jnp.float32
    assert np.allclose(taken, np.stack(expected), rtol=0, atol=1e-7)
    with jax.enable_x64(True):
        exact = take(pool.images, jnp.asarray(pixels, jnp.float64), rows)
        assert exact.dtype == jnp.float64
        assert np.allclose(exact[0], np.asarray(pool.images[0]) / 255.0, rtol=1e-15)


def test_take_is_differentiable_by_the_canaries_taken(pool, pixels):
    """A canary that comes twice gets both derivatives; one that is not in the batch gets exactly 0."""
    rows = jnp.array([0, 70, 77, 70, 5])
    weights = jnp.array([1.0, 2, 3, 4, 5]).reshape(5, 1, 1, 1)
    gradient = jax.grad(lambda z: jnp.sum(weights * take(pool.images, z, rows)))(jnp.asarray(pixels))
    assert gradient[:, 0, 0, 0].tolist() == [6, 0, 0, 0, 0, 0, 0, 3]


def test_take_labels_reads_the_pool_then_the_canaries():
    """What the pool says of canaries is not looked at."""
    labels, soft = jnp.array([2, 0, 1, 1, 1]), jnp.array([[0.25, 0.75, 0.0], [0.5, 0.25, 0.25]])
    taken = take_labels(labels, soft, jnp.array([0, 3, 4, 2, 3, 1]))
    expected = [[0, 0, 1], [0.25, 0.75, 0], [0.5, 0.25, 0.25], [0, 1, 0], [0.25, 0.75, 0], [1, 0, 0]]
    assert taken.tolist() == expected
    assert take_labels(labels.at[3:].set(-7), soft, jnp.array([3, 4])).tolist() == expected[1:3]


def test_take_labels_is_differentiable_by_the_canaries_taken():
    """A canary that comes twice gets both derivatives; one that is not in the batch gets exactly 0."""
    weights = jnp.array([[1.0, 10], [2, 20], [3, 30], [4, 40]])
    gradient = jax.grad(lambda p: jnp.sum(weights * take_labels(jnp.zeros(5, int), p, jnp.array([0, 2, 4, 2]))))
    assert gradient(jnp.full((3, 2), 0.5)).tolist() == [[6, 60], [0, 0], [3, 30]]
