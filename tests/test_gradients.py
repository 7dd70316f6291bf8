"""Gradients for steps: both modes and every microbatch give the same gradient and the same pull-back."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metacanary import gradients, models, replay_schedule, steps

RNG = np.random.default_rng(0)


def loss(params, x, labels, key):
    """Mean over rows; carries integers and a PRNG key along."""
    hidden = jnp.tanh(x @ params["a"] + 0.1 * jax.random.normal(key, (1, 4)))
    return jnp.square(hidden @ params["b"] - labels).mean()


def example(dtype):
    params = {"a": jnp.asarray(RNG.normal(size=(3, 4)), dtype), "b": jnp.asarray(RNG.normal(size=(4, 2)), dtype)}
    x = jnp.asarray(RNG.normal(size=(6, 3)), dtype)
    v = jax.tree.map(lambda p: jnp.asarray(RNG.normal(size=p.shape), dtype), params)
    return params, x, jnp.asarray(RNG.integers(0, 5, (6, 2))), v


def pulled_back(function, params, x, v):
    """The gradient and (dg/d(params, x))^T v."""
    value, pull_back = jax.vjp(jax.jit(function), params, x)
    return value, pull_back(v)


def assert_close(found, expected, tolerance):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
@pytest.mark.parametrize("microbatch", [None, 1, 2, 6])
@pytest.mark.parametrize("mode", gradients.MODES)
def test_mean_gradient_equals_reverse_over_reverse(mode, microbatch, dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        params, x, labels, v = example(dtype)
        key = jax.random.key(1)
        expected = pulled_back(lambda p, x: jax.grad(loss)(p, x, labels, key), params, x, v)

        def function(p, x):
            keyed = lambda p, x, labels: loss(p, x, labels, key)  # noqa: E731
            return gradients.mean_gradient(keyed, p, x, labels, mode=mode, microbatch=microbatch)

        assert_close(pulled_back(function, params, x, v), expected, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
@pytest.mark.parametrize("name", ["convnet", pytest.param("resnet9", marks=pytest.mark.slow)])
def test_grad_of_a_network_has_the_same_pull_back_in_both_modes(name, dtype, tolerance):
    options = {"widths": [4]} if name == "convnet" else {"width": 0.125, "as_matmul": True}
    model = models.build(name, num_classes=3, mean=[0.5], std=[0.5], **options)
    with jax.enable_x64(dtype == "float64"):
        params = models.init(model, jax.random.key(0), (8, 8, 1))
        params = jax.tree.map(lambda p: jnp.asarray(p + 0.1 * RNG.normal(size=p.shape), dtype), params)
        x, labels = jnp.asarray(RNG.random((5, 8, 8, 1)), dtype), jnp.array([0, 1, 2, 1, 0])
        v = jax.tree.map(lambda p: jnp.asarray(RNG.normal(size=p.shape), dtype), params)

        def function(mode):
            return lambda p, x: gradients.grad(lambda q: steps.cross_entropy(model, q, x, labels), mode)(p)

        found, expected = (pulled_back(function(mode), params, x, v) for mode in ("mixed", "reverse"))
        assert jax.tree.leaves(found)[0].dtype == dtype
        assert np.linalg.norm(expected[1][1]) > 1e-3  # the pixels' share, through what the loss closes over
        assert_close(found, expected, tolerance)


def test_grad_in_mixed_mode_works_per_example():
    params, x, labels, v = example("float32")
    labels = labels.astype(jnp.float32)

    def total(mode):
        one = gradients.grad(lambda p, row, label: jnp.square(jnp.tanh(row @ p["a"]) @ p["b"] - label).sum(), mode)
        return lambda p, x: jax.tree.map(lambda g: jnp.tanh(g).sum(0), jax.vmap(one, (None, 0, 0))(p, x, labels))

    found, expected = (pulled_back(total(mode), params, x, v) for mode in ("mixed", "reverse"))
    assert_close(found, expected, 1e-5)


@pytest.mark.parametrize("microbatch", [None, 2])
def test_gradients_may_close_over_labels_and_keys_that_are_traced(microbatch):
    """In microbatches, under vmap, and in a loop within the step."""
    params, x, labels, v = example("float32")
    keys = jax.random.split(jax.random.key(0), 3)

    def function(mode):
        def one(p, x, key):
            noisy = lambda p, x, y: loss(p, x + 0.1 * jax.random.normal(key, (1, 3)), y, key)  # noqa: E731
            gradient = gradients.mean_gradient(noisy, p, x, labels, mode=mode, microbatch=microbatch)
            return jax.tree.map(lambda a, b: a - 0.1 * b, p, gradient)

        def member(p, x, key):
            return jax.lax.scan(lambda q, k: (one(q, x, k), None), p, jax.random.split(key, 2))[0]

        return lambda p, x: jax.tree.map(lambda g: g.sum(0), jax.vmap(member, (None, None, 0))(p, x, keys))

    found, expected = (pulled_back(function(mode), params, x, v) for mode in ("mixed", "reverse"))
    assert_close(found, expected, 1e-5)


@pytest.mark.parametrize("mode", gradients.MODES)
def test_mean_gradient_keeps_only_one_microbatch_alive(mode):
    """XLA's account of temporaries: an eighth of the batch at a time takes less than a third of the memory."""
    params, _, _, v = example("float32")
    x, labels = jnp.zeros((4096, 3)), jnp.zeros((4096, 2))

    def temporaries(microbatch):
        def function(p, x):
            return gradients.mean_gradient(
                lambda p, x, y: loss(p, x, y, jax.random.key(0)), p, x, labels, mode=mode, microbatch=microbatch
            )

        compiled = jax.jit(lambda p, x, v: jax.vjp(function, p, x)[1](v)).lower(params, x, v).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(512) < temporaries(None) / 3


@pytest.mark.slow
def test_a_step_of_the_papers_metamodel_fits_24_gigabytes():
    """ResNet-9 of width 2.5, batch 1,000, differentiated again, by XLA's account of a compiled VJP (on this backend).

    In microbatches it fits beside the states that a tree of branching 9 holds of 588 steps; whole, it does not.
    """
    model = models.build("resnet9", num_classes=10, width=2.5)
    params = jax.eval_shape(lambda: models.init(model, jax.random.key(0), (32, 32, 3)))
    images, labels = (
        jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (((1000, 32, 32, 3), "f4"), ((1000,), "i4"))
    )

    def num_bytes(microbatch):
        def pull_back(params, images, labels, v):
            def gradient(p, x):
                loss = lambda p, x, y: steps.cross_entropy(model, p, x, y)  # noqa: E731
                return gradients.mean_gradient(loss, p, x, labels, microbatch=microbatch)

            return jax.vjp(gradient, params, images)[1](v)

        compiled = jax.jit(pull_back).lower(params, images, labels, params).compile()
        found = compiled.memory_analysis()
        return found.temp_size_in_bytes + found.argument_size_in_bytes + found.output_size_in_bytes

    state = 2 * sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(params))  # with momentum
    held = replay_schedule.work(588, 9).states_held * state
    assert num_bytes(250) + held < 24e9
    assert num_bytes(None) + held > 24e9


@pytest.mark.parametrize(
    ("returned", "got"),
    [
        (lambda p: ({"acc": 3 * p}, p**2), "({'acc': 'float32 []'}, 'float32 []')"),
        (lambda p: (p**2, {"acc": 3 * p}), "('float32 []', {'acc': 'float32 []'})"),
        (lambda p: {"acc": 3 * p, "loss": p**2}, "{'acc': 'float32 []', 'loss': 'float32 []'}"),
        (lambda p: [p**2], "['float32 []']"),
        (lambda p: p * jnp.ones(3), "float32 [3]"),
        (lambda p: jnp.int32(p), "int32 []"),
        (lambda p: p + 1j, "complex64 []"),
        (lambda p: None, "None"),
        (lambda p: "float32", "str 'float32'"),
    ],
    ids=["aux first", "aux last", "dict", "list", "vector", "integer", "complex", "nothing", "text"],
)
@pytest.mark.parametrize("mode", gradients.MODES)
def test_grad_refuses_a_loss_that_is_not_one_scalar(mode, returned, got):
    """Of several results, none may be taken for the loss."""
    message = re.escape(f"loss_fn: got {got}, expected one floating-point scalar")
    with pytest.raises(ValueError, match=message):
        gradients.grad(returned, mode)(2.0)
    with pytest.raises(ValueError, match=message):
        gradients.mean_gradient(lambda p, x: returned(p), jnp.float32(2), jnp.ones((4, 1)), mode=mode, microbatch=2)


@pytest.mark.parametrize("mode", gradients.MODES)
def test_grad_takes_every_kind_of_scalar(mode):
    """Of any floating dtype, and a plain number, which no parameter changes."""
    assert float(gradients.grad(lambda p: p**2, mode)(2.0)) == 4.0
    assert float(gradients.grad(lambda p: (p**2).astype(jnp.bfloat16), mode)(2.0)) == 4.0
    assert float(gradients.grad(lambda p: 1.5, mode)(2.0)) == 0.0


def test_gradients_refuse_bad_arguments():
    params, x, labels, _ = example("float32")
    with pytest.raises(ValueError, match="mode: got 'forward', expected one of mixed, reverse"):
        gradients.grad(loss, "forward")
    with pytest.raises(
        ValueError, match=r"batch: got arrays of shapes \[\(6, 3\), \(5, 2\)\], expected one number of rows"
    ):
        gradients.mean_gradient(loss, params, x, labels[:5])
    for microbatch in (0, -2, 4, 12):
        with pytest.raises(ValueError, match=f"microbatch: got {microbatch}, expected a divisor of the 6 rows"):
            gradients.mean_gradient(loss, params, x, labels, microbatch=microbatch)
