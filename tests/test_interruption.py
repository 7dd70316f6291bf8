"""What all that can be stopped has in common; that no step is lost is tested where it is computed."""

import jax.numpy as jnp
import numpy as np
import pytest

from metacanary.interruption import Stopped
from metacanary.metagradient import replay
from metacanary.models import build
from metacanary.recipes import SGD
from metacanary.runs import Pool
from metacanary.training import train


def stop_train(**options):
    images, labels = np.zeros((20, 8, 8, 1), np.uint8), np.zeros(20, int)
    pool = Pool.make(images, labels, np.arange(2), labels[:2])
    recipe, included = SGD(num_steps=2, batch_size=4, learning_rate=0.1), np.array([True, False])
    model = build("convnet", num_classes=10, widths=[1])
    train(recipe, model, pool, images[:2] / np.float32(255), included, seed=0, snapshots=[2], **options)


def stop_replay(**options):
    state, z = {"w": jnp.ones(2)}, jnp.ones(2)
    step = lambda state, z, t: {"w": state["w"] * z}  # noqa: E731
    replay(step, lambda state, z: (state["w"].sum(), None), state, z, 4, branching=2, **options)


@pytest.mark.parametrize("computation", [stop_train, stop_replay])
def test_stopped_is_raised_once_the_checkpoint_is_written(computation, tmp_path):
    path = tmp_path / "checkpoint"
    with pytest.raises(Stopped, match="stopped after "):
        computation(checkpoint=path, should_stop=lambda: True)
    assert path.exists()


@pytest.mark.parametrize("computation", [stop_train, stop_replay])
def test_should_stop_needs_a_checkpoint(computation):
    with pytest.raises(ValueError, match=r"checkpoint: got None, expected a (file|folder), since should_stop is given"):
        computation(should_stop=lambda: False)


@pytest.mark.parametrize("computation", [stop_train, stop_replay])
def test_should_stop_that_says_no_changes_nothing(computation, tmp_path):
    looks = []
    computation(checkpoint=tmp_path / "checkpoint", should_stop=lambda: bool(looks.append(None)))
    assert len(looks) >= 2
