"""Norms of examples' gradients: against plain gradients, in pieces, at a zero gradient."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metacanary import models
from metacanary.gradient_norms import log_norms
from metacanary.soft_labels import cross_entropy

CONVNET = models.ConvNet(num_classes=5, widths=(4,), logit_scale=0.3)
WITH_LAX_CONV = models.ConvNet(num_classes=5, widths=(4,), logit_scale=0.3, as_matmul=False)


class Linear(nn.Module):
    """Logistic regression; without a bias a black picture has no gradient."""

    @nn.compact
    def __call__(self, images):
        return nn.Dense(3, use_bias=False)(images.reshape(len(images), -1))


def example(model, num=5, classes=5):
    """Parameters, and images with labels."""
    rng = np.random.default_rng(0)
    params = models.init(model, jax.random.key(0), (8, 8, 1))
    return params, jnp.asarray(rng.random((num, 8, 8, 1)), jnp.float32), jnp.asarray(rng.integers(0, classes, num))


def naive(model, params, images, labels, keep):
    """The logarithm of each example's norm: `jax.grad` by all parameters, one example after the other."""

    def loss(p, image, label):
        return -jax.nn.log_softmax(models.apply(model, p, image[None])[0])[label]

    def norm(example):
        gradient = jax.grad(loss)(params, *example)
        return jnp.sqrt(sum(jnp.sum(x**2) for name, own in gradient.items() if keep(name) for x in own.values()))

    return jnp.log(jax.lax.map(norm, (images, labels)))


@pytest.mark.parametrize(
    ("model", "trainable", "microbatch"),
    [(CONVNET, "all", 2), (CONVNET, "last", 64), (WITH_LAX_CONV, "all", 3)],
    ids=["pieces", "last_layer", "lax_conv"],
)
def test_log_norms_are_those_of_plain_gradients(model, trainable, microbatch):
    """With their derivatives by parameters and images, by reverse over reverse; float64, within 1e-10."""
    params, images, labels = example(model)
    options = {"trainable": trainable, "microbatch": microbatch}
    weights = jnp.arange(1.0, 6.0)
    with jax.enable_x64(True):
        point = jax.tree.map(jnp.float64, (params, images))
        keep = (lambda name: True) if trainable == "all" else (lambda name: name == "Dense_0")

        def ours(point):
            logs, norms = log_norms(model, cross_entropy, *point, labels, **options)
            return jnp.vdot(weights, logs), (logs, norms)

        def plain(point):
            logs = naive(model, *point, labels, keep)
            return jnp.vdot(weights, logs), (logs, jnp.exp(logs))

        found, expected = (jax.jit(jax.value_and_grad(f, has_aux=True))(point) for f in (ours, plain))
        for got, want in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-10 * np.abs(want).max())
            assert np.abs(want).max() > 1e-3


def test_log_norms_have_no_derivative_where_a_gradient_is_zero():
    """Guarantee: 0 and not NaN, by the image and by the parameters; other examples are not touched."""
    params, images, labels = example(Linear(), classes=3)
    options = {"trainable": "all", "microbatch": 64}
    black = images.at[0].set(0)
    logs, norms = log_norms(Linear(), cross_entropy, params, black, labels, **options)
    assert (float(logs[0]), float(norms[0])) == (0, 0)
    of_first, of_all = (
        jax.grad(lambda p, n=n: log_norms(Linear(), cross_entropy, *p, labels, **options)[0][:n].sum())((params, black))
        for n in (1, 5)
    )
    assert all((x == 0).all() for x in jax.tree.leaves(of_first))
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(of_all))
    assert (jnp.abs(of_all[1][1:]).max(axis=(1, 2, 3)) > 1e-3).all()
