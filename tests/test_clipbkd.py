"""ClipBKD canaries: their directions, distances, labels."""

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

from metacanary import clipbkd, images
from metacanary.families import make


@pytest.fixture(scope="module")
def digits():
    """Pictures of digits as bytes, 8x8 as they are stored and enlarged to 16x16, and their labels."""
    data = load_digits()
    stored = (data.images[..., None] * 255 / 16).astype(np.uint8)
    return {8: stored, 16: images.resize(stored, 16)}, data.target


@pytest.fixture(scope="module")
def photos():
    """Colour images of which no direction is without variance: 600 of 6x6 pixels, smooth and noisy."""
    rng = np.random.default_rng(0)
    smooth = rng.random((600, 2, 2, 3)).repeat(3, axis=1).repeat(3, axis=2)
    noisy = smooth * 0.8 + 0.2 * rng.random((600, 6, 6, 3))
    return (255 * noisy).astype(np.uint8), rng.integers(0, 10, 600)


def flat(pixels):
    """[n, ...] uint8 or float as float64 [n, d] in [0, 1]."""
    scale = 255 if pixels.dtype == np.uint8 else 1
    return pixels.reshape(len(pixels), -1).astype(np.float64) / scale


def directions_of(table, training):
    """Unit vectors from the mean training image to the canaries."""
    away = flat(table.images) - flat(training).mean(axis=0)
    return away / np.linalg.norm(away, axis=1, keepdims=True)


def variance_along(directions, training):
    """The variance [m] of training images along each direction."""
    return (directions @ np.cov(flat(training), rowvar=False) * directions).sum(axis=1)


@pytest.mark.parametrize("num", [1, 10, 108])
def test_least_directions_are_the_last_principal_components(photos, num):
    found = clipbkd.least_directions(photos[0], num, np.random.default_rng(0))
    expected = PCA(108).fit(flat(photos[0])).components_[::-1][:num]
    np.testing.assert_allclose(np.abs((found * expected).sum(axis=1)), 1, rtol=0, atol=1e-8)


def test_least_directions_are_orthonormal_where_images_do_not_vary(digits):
    """Enlarged digits leave a hundred directions without variance, of which any basis serves; it is drawn."""
    training = digits[0][16]
    found = [clipbkd.least_directions(training, 256, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    np.testing.assert_allclose(found[0] @ found[0].T, np.eye(256), rtol=0, atol=1e-10)
    np.testing.assert_array_equal(found[0], found[1])
    variance = variance_along(found[0], training)
    assert (variance > 1e-10).sum() <= 256 - 100
    assert np.diff(variance).min() > -1e-9
    assert np.abs((found[0] * found[2]).sum(axis=1))[:100].max() < 0.5


def test_least_directions_beyond_the_pixels_lie_in_the_span_of_the_first_half(photos):
    found = clipbkd.least_directions(photos[0], 150, np.random.default_rng(0))
    assert found.shape == (150, 108)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=0, atol=1e-12)
    assert np.abs(found[108:] @ found[54:108].T).max() < 1e-12
    assert np.abs(found[108:] @ found[108:].T - np.eye(42)).max() < 0.9


@pytest.mark.parametrize("num", [1, 20])
def test_clipbkd_points_where_training_images_vary_least(digits, photos, num):
    """Shares of the variance along random directions and random canaries: at most 0.12 and 0.01 when written."""
    for training, labels in ((digits[0][16], digits[1]), photos):
        table = make("clipbkd", training, labels, num_canaries=num, num_classes=10, seed=5)
        along = variance_along(directions_of(table, training), training).mean()
        rng = np.random.default_rng(0)
        drawn = rng.standard_normal((200, flat(training).shape[1]))
        drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
        assert along < 0.2 * variance_along(drawn, training).mean()
        others = make("random", training, labels, num_canaries=100, num_classes=10, seed=5)
        assert along < 0.02 * variance_along(directions_of(others, training), training).mean()


@pytest.mark.parametrize("num", [20, 100, 300])
def test_clipbkd_is_as_far_from_the_mean_as_training_images(digits, photos, num):
    """Guarantee, with as many canaries as pixels and more; all are different, and valid."""
    for training, labels in ((digits[0][16], digits[1]), photos):
        table = make("clipbkd", training, labels, num_canaries=num, num_classes=10, seed=5)
        mean = flat(training).mean(axis=0)
        away = np.linalg.norm(flat(table.images) - mean, axis=1)
        typical = np.linalg.norm(flat(training) - mean, axis=1).mean()
        np.testing.assert_allclose(away, typical, rtol=1e-5)
        assert 0 <= table.images.min() < table.images.max() <= 1
        between = np.linalg.norm(flat(table.images)[:, None] - flat(table.images)[None], axis=2)
        assert between[np.triu_indices(num, 1)].min() > 0.1 * typical


def test_clipbkd_goes_as_far_as_pixels_let_it(digits):
    """Three corner pixels of 8x8 digits are always 0: along these alone 1 is the end, and no canary is the mean."""
    training, labels = digits[0][8], digits[1]
    table = make("clipbkd", training, labels, num_canaries=64, num_classes=10, seed=5)
    mean = flat(training).mean(axis=0)
    away = np.linalg.norm(flat(table.images) - mean, axis=1)
    typical = np.linalg.norm(flat(training) - mean, axis=1).mean()
    assert (flat(training).max(axis=0) == 0).sum() == 3
    assert (away[:3] >= 1 - 1e-6).all()
    np.testing.assert_allclose(away[3:], typical, rtol=1e-5)
    assert len(np.unique(table.images.reshape(64, -1), axis=0)) == 64


def test_clipbkd_takes_the_label_whose_mean_points_away_most(digits):
    training, labels = digits[0][16], digits[1]
    table = make("clipbkd", training, labels, num_canaries=30, num_classes=10, seed=5)
    mean = flat(training).mean(axis=0)
    for pixels, label in zip(flat(table.images), table.label, strict=True):
        products = [(pixels - mean) @ (flat(training)[labels == c].mean(axis=0) - mean) for c in range(10)]
        assert products[label] < np.sort(products)[0] + 1e-6  # pixels are stored in float32


def test_clipbkd_label_is_least_likely_after_a_step_of_logistic_regression(digits):
    """From zero, on classes of one size; the step's size does not matter."""
    training, labels = digits[0][16], digits[1]
    rows = np.concatenate([np.flatnonzero(labels == c)[:170] for c in range(10)])
    training, labels = training[rows], labels[rows]
    table = make("clipbkd", training, labels, num_canaries=30, num_classes=10, seed=5)
    centred = flat(training) - flat(training).mean(axis=0)
    weights = centred.T @ (np.eye(10)[labels] - 0.1)  # minus the gradient of the summed cross-entropy
    logits = (flat(table.images) - flat(training).mean(axis=0)) @ weights
    assert np.array_equal(logits.argmin(axis=1), table.label)


def test_clipbkd_takes_a_class_without_images(photos):
    """It is neither likely nor unlikely; nothing is divided by zero."""
    table = make("clipbkd", *photos, num_canaries=10, num_classes=11, seed=5)
    assert set(table.label) <= set(range(10))


def test_clipbkd_does_not_depend_on_how_images_are_cut(photos, monkeypatch):
    """Guarantee: sums are exact."""
    expected = make("clipbkd", *photos, num_canaries=10, num_classes=10, seed=5)
    monkeypatch.setattr(clipbkd, "_CHUNK", 7)
    found = make("clipbkd", *photos, num_canaries=10, num_classes=10, seed=5)
    np.testing.assert_allclose(found.images, expected.images, rtol=0, atol=1e-6)
    a, b = (clipbkd.least_directions(photos[0], 10, np.random.default_rng(0)) for _ in range(2))
    monkeypatch.undo()
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(a, clipbkd.least_directions(photos[0], 10, np.random.default_rng(0)))
