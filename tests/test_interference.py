"""Interference: against plain gradients, its derivative, its ends, and where losses vanish."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metacanary import models
from metacanary.interference import interference

CONVNET = models.ConvNet(num_classes=5, widths=(4, 6), logit_scale=0.3)


class Linear(nn.Module):
    """Logistic regression."""

    use_bias: bool = False

    @nn.compact
    def __call__(self, images):
        return nn.Dense(3, use_bias=self.use_bias)(images.reshape(len(images), -1))


class Scaled(nn.Module):
    """Ends with a layer of its own."""

    @nn.compact
    def __call__(self, images):
        return nn.LayerNorm()(nn.Dense(3)(images.reshape(len(images), -1)))


class Pixels(nn.Module):
    """Ends with a Dense on every pixel."""

    @nn.compact
    def __call__(self, images):
        return nn.Dense(3)(images).mean(axis=(1, 2))


def example(model, num=6, classes=3, shape=(8, 8, 1)):
    """Parameters, and images with labels."""
    rng = np.random.default_rng(0)
    params = models.init(model, jax.random.key(0), shape)
    return params, jnp.asarray(rng.random((num, *shape)), jnp.float32), jnp.asarray(rng.integers(0, classes, num))


def naive(model, params, images, labels, last="Dense_0"):
    """The mean over pairs, of gradients by `jax.grad`, one example after the other."""

    def loss(own, image, label):
        return -jax.nn.log_softmax(models.apply(model, {**params, last: own}, image[None])[0])[label]

    found = [jax.grad(loss)(params[last], image, label) for image, label in zip(images, labels, strict=True)]
    vectors = [np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in found]
    units = [vector / np.linalg.norm(vector) for vector in vectors]
    pairs = [(units[i] @ units[j]) ** 2 for i in range(len(units)) for j in range(i)]
    return np.mean(pairs)


@pytest.mark.parametrize(
    ("model", "classes"), [(CONVNET, 5), (Linear(), 3), (Linear(use_bias=True), 3)], ids=["convnet", "linear", "bias"]
)
def test_interference_is_that_of_plain_gradients(model, classes):
    """In float64, within 1e-9: the margin's gradients lie on the lines of the loss's."""
    params, images, labels = example(model, classes=classes)
    with jax.enable_x64(True):
        params, images = jax.tree.map(jnp.float64, (params, images))
        expected = naive(model, params, images, labels)
        assert 0.01 < expected < 0.9
        assert float(interference(model, params, images, labels)) == pytest.approx(expected, rel=1e-9)


def test_interference_has_the_derivative_of_finite_differences():
    """By parameters and images at once, in float64, along one direction."""
    params, images, labels = example(CONVNET, classes=5)
    with jax.enable_x64(True):
        point = jax.tree.map(jnp.float64, (params, images))
        rng = np.random.default_rng(1)
        direction = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), point)
        function = jax.jit(lambda p: interference(CONVNET, *p, labels))
        gradient = jax.grad(function)(point)
        slope = sum(jnp.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True))
        ends = [function(jax.tree.map(lambda x, d, h=h: x + h * d, point, direction)) for h in (-1e-6, 1e-6)]
        assert abs(float(slope)) > 1e-2
        assert float(ends[1] - ends[0]) / 2e-6 == pytest.approx(float(slope), rel=1e-5)


def soft_labels(num=6, classes=5):
    """Probabilities of classes."""
    return jax.nn.softmax(jnp.asarray(np.random.default_rng(3).normal(size=(num, classes)), jnp.float32))


def test_interference_of_probabilities_is_that_of_plain_gradients():
    """Of the mean margin, by `jax.grad` one example after the other, in float64 within 1e-9."""
    params, images, _ = example(CONVNET, classes=5)
    with jax.enable_x64(True):
        params, images, soft = jax.tree.map(jnp.float64, (params, images, soft_labels()))

        def margin(own, image, p):
            z = models.apply(CONVNET, {**params, "Dense_0": own}, image[None])[0]
            return sum(p[c] * (z[c] - jax.nn.logsumexp(jnp.delete(z, c))) for c in range(5))

        found = [jax.grad(margin)(params["Dense_0"], image, p) for image, p in zip(images, soft, strict=True)]
        vectors = [np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in found]
        units = [vector / np.linalg.norm(vector) for vector in vectors]
        expected = np.mean([(units[i] @ units[j]) ** 2 for i in range(6) for j in range(i)])
        assert 0.01 < expected < 0.9
        assert float(interference(CONVNET, params, images, soft)) == pytest.approx(expected, rel=1e-9)


def test_interference_has_the_derivative_of_finite_differences_by_probabilities():
    """In float64, along one direction; and a class is its one-hot label, within rounding."""
    params, images, labels = example(CONVNET, classes=5)
    with jax.enable_x64(True):
        params, images, soft = jax.tree.map(jnp.float64, (params, images, soft_labels()))
        direction = jnp.asarray(np.random.default_rng(4).normal(size=soft.shape))
        function = jax.jit(lambda p: interference(CONVNET, params, images, p))
        slope = float(jnp.vdot(jax.grad(function)(soft), direction))
        difference = float(function(soft + 1e-6 * direction) - function(soft - 1e-6 * direction)) / 2e-6
        assert abs(slope) > 1e-3
        assert difference == pytest.approx(slope, rel=1e-5)
        hard = float(interference(CONVNET, params, images, labels))
        assert float(function(jax.nn.one_hot(labels, 5, dtype=jnp.float64))) == pytest.approx(hard, rel=1e-12)


def test_interference_is_one_for_equal_and_zero_for_orthogonal_gradients():
    """Without a bias, gradients of images without a common pixel are orthogonal."""
    params, _, _ = example(Linear())
    labels = jnp.zeros(4, int)
    same = jnp.broadcast_to(jnp.linspace(0, 1, 64).reshape(8, 8, 1), (4, 8, 8, 1))
    apart = jnp.zeros((4, 64)).at[jnp.arange(4), jnp.arange(4)].set(1.0).reshape(4, 8, 8, 1)
    assert float(interference(Linear(), params, same, labels)) == pytest.approx(1, abs=1e-6)
    assert float(interference(Linear(), params, apart, labels)) == 0


def test_interference_does_not_fade_with_the_loss():
    """At a margin of 22 float32 has p = 1, and no gradient of the loss; float64 still has six digits of it."""
    model = Linear()
    _, images, _ = example(model)
    kernel = jnp.zeros((64, 3)).at[0, 0].set(22.0).at[1:3, 1:].set(jnp.eye(2))
    images, params = images.at[:, 0, 0].set(1.0), {"Dense_0": {"kernel": kernel}}
    labels = jnp.zeros(6, int)
    assert float(jax.nn.softmax(models.apply(model, params, images))[:, 0].min()) == 1
    found, gradient = jax.value_and_grad(lambda x: interference(model, params, x, labels))(images)
    with jax.enable_x64(True):
        exact = naive(model, *jax.tree.map(jnp.float64, (params, images)), labels)
    assert 0.1 < exact < 0.9
    assert float(found) == pytest.approx(exact, rel=1e-4)
    assert bool(jnp.isfinite(gradient).all())


def test_interference_of_gradients_that_are_zero_is_zero_with_a_finite_derivative():
    params, images, labels = example(Linear())
    black = images.at[1:].set(0)
    value, gradient = jax.value_and_grad(lambda x: interference(Linear(), params, x, labels))(black)
    assert float(value) == 0
    assert bool(jnp.isfinite(gradient).all())


def test_interference_rejects_a_single_example():
    params, images, labels = example(Linear())
    with pytest.raises(ValueError, match="images: got 1 of them, expected at least 2"):
        interference(Linear(), params, images[:1], labels[:1])


@pytest.mark.parametrize(("model", "layer"), [(Scaled(), "LayerNorm_0"), (Pixels(), "Dense_0")], ids=repr)
def test_interference_rejects_another_last_layer(model, layer):
    params, images, labels = example(model)
    with pytest.raises(ValueError, match=f"model: got {layer} as its last layer, expected a Dense on vectors"):
        interference(model, params, images, labels)
