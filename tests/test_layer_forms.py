"""Forms of layers: norms of gradients do not depend on how they are made, and lose nothing to cancellation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_layer_gradients import ALONE, CHANNELS, check

from metacanary import model_layers
from metacanary.layer_forms import Convolution, StandardisedConvolution


@pytest.mark.parametrize("ghost", [True, False])
@pytest.mark.parametrize("name", ["convolution", "convolution without bias"])
def test_convolution_norms_do_not_depend_on_how_they_are_made(name, ghost, monkeypatch):
    """By Gram matrices, and by the gradients themselves."""
    monkeypatch.setattr(Convolution, "is_ghost_cheaper", lambda self, x, d: ghost)
    with jax.enable_x64(True):
        check(ALONE[name], (4, 5, CHANNELS), 2, np.float64, 1e-10)


def test_convolution_norms_are_by_gram_matrices_where_those_are_cheaper():
    """Multiplications, counted: pixels^2 (patch + features) against pixels patch features; all copies' pixels."""
    layer = Convolution(model_layers.Conv3x3(8))
    for size, copies, channels, features in [(32, 1, 3, 16), (4, 1, 256, 512), (4, 16, 256, 512), (8, 1, 16, 144)]:
        x, d = (2, copies, size, size, channels), (2, copies, size, size, features)
        pixels = copies * size * size
        gram, outer = pixels**2 * (9 * channels + features), pixels * 9 * channels * features
        assert layer.is_ghost_cheaper(x, d) == (gram < outer)
    cheap = (2, 1, 4, 4, 256), (2, 1, 4, 4, 512)
    assert layer.is_ghost_cheaper(*cheap)
    assert not StandardisedConvolution(model_layers.WeightStandardisedConv(8)).is_ghost_cheaper(*cheap)


def standardised(kernel_scale, along):
    """A layer, its parameters and a raw gradient that is `along` times one direction, and a little of all others."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, 3, 8, 4)) * kernel_scale
    params = {"kernel": kernel, "gain": np.full(4, 5.0), "bias": np.zeros(4)}
    centred = kernel - kernel.mean(axis=(0, 1, 2))
    unit = centred / np.sqrt(np.square(centred).sum(axis=(0, 1, 2)))
    direction = {"mean": np.ones(kernel.shape), "filter": unit, "none": np.zeros(kernel.shape)}[along]
    raw = {"kernel": 300 * direction + rng.normal(size=kernel.shape), "bias": rng.normal(size=4)}
    single = jax.tree.map(lambda x: np.asarray(x, np.float32), (params, raw))
    return StandardisedConvolution(model_layers.WeightStandardisedConv(4)), *single


@pytest.mark.parametrize("along", ["mean", "filter", "none"])
@pytest.mark.parametrize("kernel_scale", [2e-3, 0.3, 1e-5], ids=["small", "usual", "clamped"])
def test_standardised_convolution_norm_loses_nothing_to_cancellation(kernel_scale, along):
    """In float32 to 1e-4 of the exact norm by the layer's parameters, though almost all of the raw gradient cancels.

    A difference of sums of squares would be off by 300^2 float32 roundings, 5e-3. Filters of norm below 0.01 are
    divided by 0.01, which does not depend on them.
    """
    layer, params, raw = standardised(kernel_scale, along)
    norms = np.linalg.norm(params["kernel"].reshape(-1, 4), axis=0)
    assert (norms**2 < model_layers.LEAST_SQUARE).all() == (kernel_scale == 1e-5)
    as_raw = raw | {"kernel": raw["kernel"].reshape(-1, 4).T}
    found = float(layer.squared_norm(*jax.tree.map(jnp.asarray, (params, as_raw))))
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (params, raw))
        _, pull = jax.vjp(model_layers.standardise, exact[0]["kernel"], exact[0]["gain"])
        by_kernel, by_gain = pull(exact[1]["kernel"])
        expected = sum(float(jnp.sum(jnp.square(g))) for g in (by_kernel, by_gain, exact[1]["bias"]))
        kept = float(jnp.sum(jnp.square(by_kernel)))
    if kernel_scale == 2e-3:
        assert kept > 0.1 * expected  # the part that cancels is seen in the norm
    assert found == pytest.approx(expected, rel=1e-4)
