"""Soft labels: cross-entropy of probabilities, and how label logits start, move and harden."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from metacanary.soft_labels import LabelUpdate, are_soft, cross_entropy

UPDATE = LabelUpdate(learning_rate=0.3, harden_after=2, scale=2.0)


def example(num=40, classes=5):
    """Logits, probabilities and classes, in float32."""
    rng = np.random.default_rng(0)
    logits, others = 4 * rng.normal(size=(2, num, classes))
    soft = special.softmax(others, axis=-1).astype(np.float32)
    return jnp.asarray(logits, jnp.float32), jnp.asarray(soft), jnp.asarray(rng.integers(0, classes, num))


def test_are_soft_tells_probabilities_from_classes():
    _, soft, hard = example()
    assert (are_soft(soft), are_soft(hard), are_soft(np.arange(3))) == (True, False, False)


def test_cross_entropy_is_that_of_numpy():
    """Float32 against float64: 1e-5 of a loss."""
    logits, soft, hard = example()
    log_p = special.log_softmax(np.asarray(logits, np.float64), axis=-1)
    assert np.allclose(cross_entropy(logits, soft), -(np.asarray(soft) * log_p).sum(axis=-1), rtol=1e-5)
    assert np.allclose(cross_entropy(logits, hard), -log_p[np.arange(40), hard], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("compiled", [False, True])
def test_cross_entropy_of_a_class_is_that_of_its_one_hot_label(compiled):
    """Guarantee: the same bits; also at logits that are far apart."""
    logits, _, hard = example()
    function = jax.jit(cross_entropy) if compiled else cross_entropy
    for scale in (1.0, 100.0):
        expected = np.asarray(function(scale * logits, hard))
        assert np.asarray(function(scale * logits, jax.nn.one_hot(hard, 5))).tobytes() == expected.tobytes()


def test_cross_entropy_has_its_closed_derivatives():
    """softmax - p by the logits, -log softmax by the probabilities."""
    logits, soft, _ = example()
    by_logits, by_labels = jax.grad(lambda z, p: cross_entropy(z, p).sum(), argnums=(0, 1))(logits, soft)
    assert np.allclose(by_logits, jax.nn.softmax(logits) - soft, atol=1e-6)
    assert np.allclose(by_labels, -jax.nn.log_softmax(logits), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("scale", "classes", "likeliest"), [(3.0, 10, 0.6906), (2.0, 4, 0.7112), (0.1, 2, 0.5250)])
def test_label_update_starts_at_the_start_labels(scale, classes, likeliest):
    """Probabilities by hand: 1 / (1 + (k - 1) exp(-scale)), and the rest in equal parts."""
    labels = np.arange(7) % classes
    state = LabelUpdate(learning_rate=0.1, harden_after=1, scale=scale).start(labels, classes)
    probabilities = np.asarray(state.probabilities)
    assert (state.logits.dtype, probabilities.dtype, state.classes.dtype) == (np.float32, np.float32, np.int32)
    assert state.classes.tolist() == labels.tolist()
    assert np.allclose(probabilities[np.arange(7), labels], likeliest, atol=1e-4)
    assert np.allclose(probabilities.sum(axis=1), 1, atol=1e-6)
    others = np.sort(probabilities, axis=1)[:, :-1]
    assert np.allclose(others, others[:, :1], rtol=1e-6)


def test_label_update_is_adam_on_logits():
    """Three updates against Adam in NumPy, on gradients pulled back through the softmax by its Jacobian."""
    rng = np.random.default_rng(1)
    state = UPDATE.start(np.array([2, 0, 1, 1]), 3)
    logits, first, second = state.logits.astype(np.float64), 0.0, 0.0
    for count in (1, 2, 3):
        gradient = rng.normal(size=(4, 3))
        p = special.softmax(logits, axis=-1)
        jacobian = p[:, :, None] * np.eye(3) - p[:, :, None] * p[:, None, :]
        by_logits = np.einsum("mij,mj->mi", jacobian, gradient)
        first, second = 0.9 * first + 0.1 * by_logits, 0.999 * second + 0.001 * by_logits**2
        logits -= 0.3 * (first / (1 - 0.9**count)) / (np.sqrt(second / (1 - 0.999**count)) + 1e-8)
        state = UPDATE.update(state, jnp.asarray(gradient, jnp.float32))
        assert state.logits.dtype == np.float32
        assert np.allclose(state.logits, logits, atol=1e-5)
    assert state.classes.tolist() == logits.argmax(axis=1).tolist()


def test_label_update_moves_a_label_to_the_class_that_lowers_the_objective():
    """Its derivative is lowest there; after some updates it is the label."""
    state, wanted = UPDATE.start(np.array([0, 1, 2]), 4), [3, 0, 2]
    for _ in range(20):
        state = UPDATE.update(state, -jax.nn.one_hot(jnp.array(wanted), 4))
    assert state.classes.tolist() == wanted


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("learning_rate", 0.0, "a finite number > 0"),
        ("learning_rate", float("nan"), "a finite number > 0"),
        ("scale", -1.0, "a finite number > 0"),
        ("scale", float("inf"), "a finite number > 0"),
        ("harden_after", 0, "an integer >= 1"),
    ],
)
def test_label_update_rejects_by_key_and_value(name, value, expected):
    given = {"learning_rate": 0.1, "harden_after": 3, "scale": 1.0} | {name: value}
    with pytest.raises(ValueError, match=rf"labels.{name}: got {value}, expected {expected}"):
        LabelUpdate(**given)
