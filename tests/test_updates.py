"""Updates of canaries: where pixels go, and which canaries a state stands for."""

import jax.numpy as jnp
import numpy as np
import pytest

from metacanary.families import make
from metacanary.soft_labels import LabelUpdate
from metacanary.updates import UPDATES, AdamUpdate, MetaState, SignedUpdate


@pytest.fixture
def start():
    images = np.arange(6 * 16, dtype=np.uint8).reshape(6, 4, 4, 1)
    return make("random", images, np.arange(6) % 3, num_canaries=3, num_classes=3, seed=0)


def moved(update, gradient):
    """Where pixels of 0 go by one update."""
    optimizer = update.optimizer()
    return np.asarray(optimizer.update(gradient, optimizer.init(gradient))[0])


def test_signed_moves_each_pixel_against_its_sign():
    gradient = jnp.array([3.0, -0.001, 0.0])
    np.testing.assert_allclose(moved(SignedUpdate(step_size=0.02), gradient), [-0.02, 0.02, 0.0])


def test_adam_moves_each_pixel_by_its_rate_at_first():
    """m / sqrt(v) is the sign after one step."""
    np.testing.assert_allclose(moved(AdamUpdate(learning_rate=0.1), jnp.array([3.0, -2.0])), [-0.1, 0.1], rtol=1e-5)


def test_updates_are_named():
    assert {"signed": SignedUpdate, "adam": AdamUpdate} == UPDATES


def test_state_stands_for_its_pixels_and_the_labels_of_the_start(start):
    images = np.full_like(start.images, 0.5)
    reached = MetaState(step=1, images=images, optimizer=()).canaries(start)
    np.testing.assert_array_equal(reached.images, images)
    np.testing.assert_array_equal(reached.label, start.label)
    np.testing.assert_array_equal(reached.source_images, start.source_images)


def test_state_stands_for_its_own_labels_where_they_move(start):
    labels = LabelUpdate(learning_rate=1.0, harden_after=1).start(start.label, 3)
    labels = labels._replace(logits=np.roll(np.asarray(labels.logits), 1, axis=1))
    reached = MetaState(step=1, images=start.images, optimizer=(), labels=labels).canaries(start)
    np.testing.assert_array_equal(reached.label, (start.label + 1) % 3)
    np.testing.assert_array_equal(reached.source_labels, start.source_labels)
