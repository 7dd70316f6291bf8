"""Enlarging images."""

import jax
import numpy as np
import pytest

from metacanary import images

BYTES = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3)).astype(np.uint8)


@pytest.mark.parametrize("image_size", [8, 16, 20, 32])
def test_enlarge_matches_jax_resize(image_size):
    expected = jax.image.resize(BYTES.astype(np.float32), (5, image_size, image_size, 3), "bilinear")
    found = images.enlarge(BYTES, image_size)
    assert found.dtype == np.uint8
    # Half a byte of rounding, and a few roundings of values up to 255 in float32 (1.5e-5 each).
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.5 + 1e-4)


def test_enlarge_to_nothing_or_to_the_same_size_changes_nothing():
    assert images.enlarge(BYTES, None) is BYTES
    np.testing.assert_array_equal(images.enlarge(BYTES, 8), BYTES)


def test_enlarge_refuses_to_shrink():
    with pytest.raises(ValueError, match="image_size: got 7, expected at least the stored 8"):
        images.enlarge(BYTES, 7)
