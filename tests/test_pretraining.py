"""What a training starts from: nothing, a pretrained model, or one without its last layer."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from metacanary import models, store
from metacanary.pretraining import Pretrained, start

SHAPE, CLASSES = (8, 8, 1), ("cat", "dog", "cow")


def convnet(num_classes=3, **options):
    return models.build("convnet", num_classes=num_classes, **{"widths": [4, 6], **options})


def flat(params):
    return {path: np.asarray(leaf) for path, leaf in flatten_dict(params, sep="/").items()}


def assert_equal(found, expected):
    found, expected = flat(found), flat(expected)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)


@pytest.fixture(scope="module")
def pretrained():
    return Pretrained(params=models.init(convnet(), jax.random.key(1), SHAPE), class_names=CLASSES)


def begin(model, pretrained, class_names=CLASSES, key=2, image_shape=SHAPE):
    return start(model, pretrained, class_names, key=jax.random.key(key), image_shape=image_shape)


def test_start_from_scratch_is_the_models_own():
    assert_equal(begin(convnet(), None), models.init(convnet(), jax.random.key(2), SHAPE))


def test_start_of_the_same_classes_is_the_pretrained_model(pretrained):
    assert_equal(begin(convnet(), pretrained), pretrained.params)


@pytest.mark.parametrize("names", [("dog", "cat", "cow"), ("cat", "dog"), ("cat", "dog", "cow", "pig")])
def test_start_of_other_classes_draws_the_last_layer_alone(pretrained, names):
    """Also of as many classes in another order, of which the logits would stand for the wrong ones."""
    model = convnet(len(names))
    found, drawn = flat(begin(model, pretrained, names)), flat(models.init(model, jax.random.key(2), SHAPE))
    expected = flat(pretrained.params) | {path: drawn[path] for path in ("Dense_0/kernel", "Dense_0/bias")}
    assert_equal(found, expected)
    assert not np.array_equal(found["Dense_0/kernel"], flat(begin(model, pretrained, names, key=3))["Dense_0/kernel"])


@pytest.mark.parametrize("name", ["resnet9", "wrn16_4"])
def test_start_finds_the_last_layer_of_every_network(name):
    options = {"resnet9": {"width": 0.125}, "wrn16_4": {}}[name]
    shape, one, other = (
        (8, 8, 3),
        models.build(name, num_classes=3, **options),
        models.build(name, num_classes=5, **options),
    )
    source = Pretrained(params=models.init(one, jax.random.key(1), shape), class_names=CLASSES)
    found, before = flat(begin(other, source, tuple("abcde"), image_shape=shape)), flat(source.params)
    differ = [path for path in found if found[path].shape != before[path].shape]
    assert differ == ["Dense_0/bias", "Dense_0/kernel"] or differ == ["Dense_0/kernel", "Dense_0/bias"]
    for path in found.keys() - set(differ):
        np.testing.assert_array_equal(found[path], before[path])


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (convnet(widths=[5, 6]), SHAPE, r"got shape \(4,\) at 'Conv3x3_0/bias', expected \(5,\)"),
        (convnet(widths=[4]), SHAPE, r"got shape \(6,\) at 'Conv3x3_1/bias', expected None"),
        (convnet(widths=[4, 6, 8]), SHAPE, r"got shape None at 'Conv3x3_2/bias', expected \(8,\)"),
        (convnet(), (16, 16, 1), r"got shape \(24, 3\) at 'Dense_0/kernel', expected \(96, 3\)"),
        (convnet(), (8, 8, 3), r"got shape \(3, 3, 1, 4\) at 'Conv3x3_0/kernel', expected \(3, 3, 3, 4\)"),
    ],
)
def test_start_refuses_another_network_or_size(pretrained, model, shape, message):
    with pytest.raises(ValueError, match=f"pretrained: {message}"):
        begin(model, pretrained, image_shape=shape)


def test_pretrained_is_read_as_it_was_written(pretrained, tmp_path):
    store.write_npz(tmp_path / "model.npz", pretrained.arrays() | {"test_accuracy": np.array(0.5)}, {})
    read = Pretrained.from_arrays(store.read_npz(tmp_path / "model.npz")[0])
    assert read.class_names == CLASSES
    assert_equal(read.params, pretrained.params)
