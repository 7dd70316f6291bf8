"""Families of canaries: sources, pixels, labels, errors."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from metacanary.families import FAMILIES, make


@pytest.fixture(scope="module")
def digits():
    """200 pictures of digits, 8x8, as bytes, and their labels."""
    data = load_digits()
    return (data.images[:200, ..., None] * 255 / 16).astype(np.uint8), data.target[:200]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_make_takes_each_source_once(digits, family):
    images, labels = digits
    table = make(family, images, labels, num_canaries=150, num_classes=10, seed=3)
    assert table.id.tolist() == list(range(150))
    assert len(set(table.source_index)) == 150
    assert np.allclose(table.source_images, images[table.source_index] / 255.0, rtol=0, atol=1e-7)
    assert np.array_equal(table.source_labels, labels[table.source_index])
    assert {x.dtype.name for x in (table.id, table.source_index, table.label, table.source_labels)} == {"int32"}
    assert table.images.dtype == np.float32
    assert table.images.shape == table.source_images.shape
    assert 0 <= table.images.min() < table.images.max() <= 1
    assert set(table.label) <= set(range(10))
    again = make(family, images, labels, num_canaries=150, num_classes=10, seed=3)
    assert all(np.array_equal(array, again.arrays()[name]) for name, array in table.arrays().items())


@pytest.mark.parametrize("family", ["random", "mislabeled"])
def test_make_leaves_the_pixels_of_training_images(digits, family):
    table = make(family, *digits, num_canaries=150, num_classes=10, seed=3)
    assert np.array_equal(table.images, table.source_images)


def test_make_shares_sources_among_families_of_a_seed(digits):
    tables = {f: make(f, *digits, num_canaries=50, num_classes=10, seed=3) for f in FAMILIES}
    for table in tables.values():
        assert np.array_equal(table.source_index, tables["random"].source_index)
    for family in ("random", "noise"):
        assert np.array_equal(tables[family].label, tables[family].source_labels)
    other = make("random", *digits, num_canaries=50, num_classes=10, seed=4)
    assert set(other.source_index) != set(tables["random"].source_index)


def test_make_mislabeled_draws_wrong_labels_uniformly():
    """Every label is wrong, and each of the nine shifts has its share within 5 standard errors."""
    labels = np.arange(9000) % 10
    images = np.zeros((9000, 1, 1, 1), np.uint8)
    table = make("mislabeled", images, labels, num_canaries=9000, num_classes=10, seed=0)
    shift = (table.label - table.source_labels) % 10
    counts = np.bincount(shift, minlength=10)
    assert counts[0] == 0
    assert table.label.min() == 0
    assert table.label.max() == 9
    assert np.abs(counts[1:] - 1000).max() < 5 * np.sqrt(9000 * (1 / 9) * (8 / 9))


def test_make_noise_draws_pixels_uniformly(digits):
    """Each tenth of [0, 1) has its share within 5 standard errors, and no two canaries are alike."""
    images = make("noise", *digits, num_canaries=150, num_classes=10, seed=3).images
    counts = np.histogram(images, bins=10, range=(0, 1))[0]
    assert counts.sum() == images.size
    assert np.abs(counts - images.size / 10).max() < 5 * np.sqrt(images.size * 0.1 * 0.9)
    assert len(np.unique(images.reshape(150, -1), axis=0)) == 150


@pytest.mark.parametrize(
    ("family", "num", "message"),
    [
        ("metagradient", 5, "canary family: got 'metagradient', expected one of clipbkd, mislabeled, noise, random"),
        ("random", 201, "num_canaries: got 201, expected 1 to 200, the training images"),
        ("random", 0, "num_canaries: got 0"),
    ],
)
def test_make_rejects(digits, family, num, message):
    with pytest.raises(ValueError, match=message):
        make(family, *digits, num_canaries=num, num_classes=10, seed=0)
