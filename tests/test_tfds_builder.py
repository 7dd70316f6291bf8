"""Tests of metacanary.tfds_builder; tests of metacanary.data and metacanary.registry go through it too."""

import fake_archives
import numpy as np
import pytest

from metacanary import data, tfds_builder


@pytest.mark.parametrize("shape", [(32, 32, 3), (28, 28, 1), (5, 7, 3)])
def test_fetch_keeps_pixels_labels_and_order(tmp_path, shape):
    """Through PNG and shuffled records; more of them than digits of a number, so that text order is another order."""
    arrays = fake_archives.make_arrays(shape=shape, num_train=150, num_test=12)
    source = fake_archives.registered("cifar10", arrays, [], image_shape=shape)
    asked = []
    found = tfds_builder.fetch(source, tmp_path, lambda *args: asked.append(args) or arrays)
    for name in data.ARRAYS:
        np.testing.assert_array_equal(found[name], arrays[name])
    assert asked == [(source, [])]
    # A second time from what was prepared.
    again = tfds_builder.fetch(source, tmp_path, lambda *args: pytest.fail("read again"))
    np.testing.assert_array_equal(again["train_images"], arrays["train_images"])


def test_fetch_prepares_nothing_wrong(tmp_path):
    arrays = fake_archives.make_arrays()
    source = fake_archives.registered("cifar10", arrays, [])
    wrong = arrays | {"test_labels": (arrays["test_labels"] + 1) % 10}
    with pytest.raises(ValueError, match="name='tiny': test_labels of"):
        tfds_builder.fetch(source, tmp_path, lambda *args: wrong)
    assert not list(tmp_path.rglob("*.array_record*"))


def test_builder_has_the_ids_of_the_stock_builder(tmp_path):
    arrays = fake_archives.make_arrays()
    source = fake_archives.registered("cifar10", arrays, [])
    tfds_builder.fetch(source, tmp_path, lambda *args: arrays)
    builder = tfds_builder.Builder(source=source, reader=lambda *args: arrays, root=tmp_path)
    records = builder.as_data_source()["train"]
    assert {record["id"].decode() for record in records} == {f"train_{index:05d}" for index in range(20)}
    assert builder.info.features["label"].names == list(source.class_names)
