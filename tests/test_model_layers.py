"""Convolutions, pools and normalisation: the forms that are fast to differentiate are the ones in the books."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metacanary import model_layers, models
from metacanary.model_layers import average_pool, convolve, max_pool, normalise

ROWS = model_layers.SHORT


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("features", [4, ROWS, ROWS + 1])
@pytest.mark.parametrize(
    "shape", [(2, 5, 5, 1), (2, 4, 4, 3), (2, 3, ROWS, 1), (2, 4, 1, 2), (2, 3, ROWS + 1, 1), (3, 4, 6, 3)]
)
def test_convolve_as_matmul_equals_lax(shape, features, size):
    """By rows where they are short and by pixels: values, both derivatives of a scalar and their VJP, in float64."""
    rng = np.random.default_rng(0)

    def derivatives(x, kernel, as_matmul):
        def scalar(x, kernel):
            y = convolve(x, kernel, as_matmul=as_matmul)
            return jnp.sum(jnp.sin(y)), y

        gradient, pull_back, y = jax.vjp(jax.grad(scalar, (0, 1), has_aux=True), x, kernel, has_aux=True)
        return y, *gradient, *pull_back((x, kernel))

    with jax.enable_x64(True):
        x, kernel = (jnp.asarray(rng.normal(size=s)) for s in (shape, (size, size, shape[-1], features)))
        compiled = jax.jit(derivatives, static_argnums=2)
        ours, theirs = (compiled(x, kernel, as_matmul) for as_matmul in (True, False))
        assert len(ours) == 5
        for a, b in zip(ours, theirs, strict=True):
            assert np.allclose(a, b, rtol=1e-10, atol=1e-10)


def test_convolve_has_its_definition():
    """y[i, j] = sum of kernel[a, b] x[i + a - 1, j + b - 1], zero outside; a correlation, not flipped."""
    x = jnp.zeros((1, 3, 3, 1)).at[0, 1, 1, 0].set(1.0)
    kernel = jnp.arange(9.0).reshape(3, 3, 1, 1)
    for as_matmul in (True, False):
        assert convolve(x, kernel, as_matmul=as_matmul)[0, ..., 0].tolist() == [[8, 7, 6], [5, 4, 3], [2, 1, 0]]


@pytest.mark.parametrize("channels", [3, model_layers.NARROW, model_layers.NARROW + 1])
def test_average_pool_drops_the_odd_row_and_column(channels):
    """Of few channels by a product, of many by sums."""
    x = np.random.default_rng(0).random((2, 5, 7, channels)).astype(np.float32)
    expected = [[x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean(axis=(1, 2)) for j in range(3)] for i in range(2)]
    assert np.allclose(average_pool(jnp.asarray(x)), np.array(expected).transpose(2, 0, 1, 3), rtol=1e-6)


def test_average_pool_refuses_to_average_nothing():
    """A 1x1 map would become an empty one, and logits a constant or not a number."""
    with pytest.raises(ValueError, match="image size: got a 1x2 feature map"):
        average_pool(jnp.ones((1, 1, 2, 3)))
    with pytest.raises(ValueError, match="image size: got a 1x1 feature map"):
        models.init(models.build("convnet", num_classes=2, widths=[4, 4, 4]), jax.random.key(0), (4, 4, 1))


def test_max_pool_takes_the_largest_and_drops_the_odd_row_and_column():
    x = np.random.default_rng(0).normal(size=(2, 5, 7, 3)).astype(np.float32)
    expected = [[x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].max(axis=(1, 2)) for j in range(3)] for i in range(2)]
    assert np.array_equal(max_pool(jnp.asarray(x)), np.array(expected).transpose(2, 0, 1, 3))
    with pytest.raises(ValueError, match="image size: got a 1x2 feature map"):
        max_pool(jnp.ones((1, 1, 2, 3)))


def test_max_pool_has_the_derivatives_of_reduce_window():
    """The gradient, and the VJP of the gradient that a metagradient needs, to 1e-6; equal values share it evenly."""
    rng = np.random.default_rng(0)
    x, direction = (jnp.asarray(rng.normal(size=(2, 4, 6, 3)), jnp.float32) for _ in range(2))

    def window(x):
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")

    def derivatives(pool):
        gradient = jax.grad(lambda y: jnp.sum(jnp.sin(3 * pool(y))))
        value, pull_back = jax.vjp(gradient, x)
        return value, *pull_back(direction)

    for ours, theirs in zip(jax.jit(derivatives, static_argnums=0)(max_pool), derivatives(window), strict=True):
        assert np.allclose(ours, theirs, rtol=0, atol=1e-6)
    assert np.array_equal(jax.grad(lambda y: max_pool(y).sum())(jnp.ones((1, 2, 2, 1))), np.full((1, 2, 2, 1), 0.25))


@pytest.mark.parametrize("channels", [2, model_layers.NARROW + 1])
def test_average_pool_takes_no_channel_for_another(channels):
    """Of each channel the average, to the last bit of few additions, and the derivative 1/4 everywhere."""
    x = jnp.arange(4.0 * 4 * channels).reshape(1, 4, 4, channels)
    found = average_pool(x)
    assert np.array_equal(found[0, 0, 0], x[0, :2, :2].mean(axis=(0, 1)))
    assert np.array_equal(jax.grad(lambda y: average_pool(y).sum())(x), np.full(x.shape, 0.25))


def test_normalise_is_by_channel():
    x = jnp.array([0.2, 0.6]).reshape(1, 1, 1, 2)
    assert normalise(x, (0.1, 0.2), (0.5, 0.25)).ravel().tolist() == pytest.approx([0.2, 1.6], rel=1e-6)
    assert normalise(x, (0.1,), (0.5,)).ravel().tolist() == pytest.approx([0.2, 1.0], rel=1e-6)


@pytest.mark.parametrize(("groups", "channels"), [(1, 6), (2, 6), (6, 6)])
def test_group_norm_equals_flax(groups, channels):
    """Values, and both gradients, with the parameters of flax's; in float64."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x, v = (jnp.asarray(rng.normal(2.0, 3.0, size=(4, 5, 3, channels))) for _ in range(2))
        params = {name: jnp.asarray(rng.normal(size=channels)) for name in ("scale", "bias")}
        ours, flax = (
            lambda p, x, norm=norm: norm.apply({"params": p}, x) * v
            for norm in (
                model_layers.GroupNorm(groups),
                nn.GroupNorm(groups, use_fast_variance=False, param_dtype=jnp.float64),
            )
        )
        np.testing.assert_allclose(ours(params, x), flax(params, x), rtol=1e-12, atol=1e-12)
        for first in (0, 1):
            found, expected = (jax.grad(lambda *a, f=f: jnp.sin(f(*a)).sum(), first)(params, x) for f in (ours, flax))
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


def test_group_norm_refuses_groups_that_do_not_divide_the_channels():
    with pytest.raises(ValueError, match="groups: got 4, expected a divisor of the 6 channels"):
        model_layers.GroupNorm(4).init(jax.random.key(0), jnp.zeros((1, 2, 2, 6)))


def test_gelu_and_its_derivatives_are_those_of_flax():
    """To 1e-11 in float64, up to the third; far out no power overflows to what is not a number."""
    with jax.enable_x64(True):
        near, far = jnp.linspace(-6.0, 6.0, 501), jnp.array([-1e18, -1e3, 1e3, 1e15])
        ours, theirs, limits = model_layers.gelu, nn.gelu, [(0, 0, 1e3, 1e15), (0, 0, 1, 1), (0, 0, 0, 0)]
        for limit in [*limits, limits[-1]]:
            assert np.allclose(jax.vmap(ours)(near), jax.vmap(theirs)(near), rtol=0, atol=1e-11)
            assert jax.vmap(ours)(far).tolist() == list(limit)
            ours, theirs = jax.grad(ours), jax.grad(theirs)


def test_gelu_has_one_derivative_in_both_modes():
    x = jnp.linspace(-3.0, 3.0, 101)
    forward = jax.jvp(jax.vmap(model_layers.gelu), (x,), (jnp.ones_like(x),))[1]
    assert np.array_equal(forward, jax.vmap(jax.grad(model_layers.gelu))(x))
