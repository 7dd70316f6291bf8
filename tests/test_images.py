"""Enlarging and reducing images."""

import jax
import numpy as np
import pytest

from metacanary import data, images

BYTES = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3)).astype(np.uint8)


@pytest.mark.parametrize("image_size", [8, 16, 20, 32])
def test_resize_enlarges_as_jax_does(image_size):
    expected = jax.image.resize(BYTES.astype(np.float32), (5, image_size, image_size, 3), "bilinear")
    found = images.resize(BYTES, image_size)
    assert found.dtype == np.uint8
    # Half a byte of rounding, and a few roundings of values up to 255 in float32 (1.5e-5 each).
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.5 + 1e-4)


def test_resize_enlarges_to_the_same_bytes_as_ever():
    """A golden number of the function before it could reduce: published results depend on it."""
    ramp = (np.arange(2 * 8 * 8 * 3).reshape(2, 8, 8, 3) * 37 % 256).astype(np.uint8)
    assert data.sha256(images.resize(ramp, 16)) == "e969d8ad315ba89bcccd13dbbc6af9e672eea7dfa8f1b4c843dae4d4d876273d"


@pytest.mark.parametrize(("shape", "image_size"), [((8, 8), 4), ((8, 8), 2), ((8, 8), 1), ((12, 12), 4), ((6, 4), 2)])
def test_resize_reduces_to_means_of_squares(shape, image_size):
    pixels = np.random.default_rng(1).integers(0, 256, (4, *shape, 3)).astype(np.uint8)
    found = images.resize(pixels, image_size)
    assert found.shape == (4, image_size, image_size, 3)
    assert found.dtype == np.uint8
    rows, columns = shape[0] // image_size, shape[1] // image_size
    for index in np.ndindex(found.shape):
        n, row, column, channel = index
        square = pixels[n, row * rows : (row + 1) * rows, column * columns : (column + 1) * columns, channel]
        total = sum(int(value) for value in square.ravel())
        # The nearest whole byte, halves up, in exact integers.
        assert found[index] == (2 * total + square.size) // (2 * square.size)


@pytest.mark.parametrize(
    ("values", "mean"), [([0, 1, 0, 1], 1), ([0, 0, 0, 1], 0), ([255] * 4, 255), ([1, 2, 1, 2], 2)]
)
def test_resize_rounds_halves_up(values, mean):
    square = np.array(values, np.uint8).reshape(1, 2, 2, 1)
    assert images.resize(square, 1).item() == mean


def test_resize_reduces_what_is_mapped_from_disk(tmp_path):
    np.save(tmp_path / "images.npy", BYTES)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    np.testing.assert_array_equal(images.resize(mapped, 4), images.resize(BYTES, 4))


def test_resize_to_nothing_or_to_the_same_size_changes_nothing():
    assert images.resize(BYTES, None) is BYTES
    np.testing.assert_array_equal(images.resize(BYTES, 8), BYTES)


@pytest.mark.parametrize("image_size", [7, 3, 5])
def test_resize_refuses_a_smaller_size_that_does_not_divide(image_size):
    with pytest.raises(ValueError, match=rf"image_size: got {image_size}, expected at least the stored 8 or a divisor"):
        images.resize(BYTES, image_size)


def test_recolour_repeats_the_channel_of_grey_images():
    grey = BYTES[..., :1]
    found = images.recolour(grey, 3)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, np.concatenate([grey] * 3, axis=-1))
    assert images.recolour(grey, None) is grey
    assert images.recolour(BYTES, 3) is BYTES


def test_recolour_makes_no_other_number_of_channels():
    with pytest.raises(ValueError, match="channels: got 1 for images that have 3"):
        images.recolour(BYTES, 1)
