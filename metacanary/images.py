"""Enlarging images, in NumPy: its elementwise arithmetic is the same on every machine and device."""

from __future__ import annotations

import numpy as np


def enlarge(images: np.ndarray, image_size: int | None) -> np.ndarray:
    """Enlarge images by bilinear interpolation.

    Args:
      images: uint8 [n, height, width, channels].
      image_size: height and width of the result; None for the images as they are.

    Returns:
      uint8 [n, image_size, image_size, channels]: pixel centres at half-integers, edges repeated (as
      `jax.image.resize` does), rounded to whole bytes.

    Raises:
      ValueError: an image_size below the stored one.
    """
    if image_size is None:
        return images
    if image_size < max(images.shape[1:3]):
        raise ValueError(f"image_size: got {image_size}, expected at least the stored {max(images.shape[1:3])}")
    enlarged = _interpolate(_interpolate(images.astype(np.float32), 1, image_size), 2, image_size)
    return np.rint(enlarged.clip(0, 255)).astype(np.uint8)


def _interpolate(images: np.ndarray, axis: int, size: int) -> np.ndarray:
    """Interpolate linearly along an axis."""
    stored = images.shape[axis]
    position = np.clip((np.arange(size) + 0.5) * stored / size - 0.5, 0, stored - 1)
    low = np.floor(position).astype(np.intp)
    shape = [size if i == axis else 1 for i in range(images.ndim)]
    weight = (position - low).astype(np.float32).reshape(shape)
    high = np.minimum(low + 1, stored - 1)
    return images.take(low, axis) * (1 - weight) + images.take(high, axis) * weight
