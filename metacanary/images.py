"""Enlarging and reducing images, in NumPy: its elementwise arithmetic is the same on every machine and device."""

from __future__ import annotations

import numpy as np


def resize(images: np.ndarray, image_size: int | None) -> np.ndarray:
    """Enlarges images by bilinear interpolation, or reduces them by averaging squares of pixels.

    Args:
      images: uint8 [n, height, width, channels].
      image_size: height and width of the result, at least the stored ones or a divisor of both; None for the images
        as they are.

    Returns:
      uint8 [n, image_size, image_size, channels]. Enlarged: pixel centres at half-integers, edges repeated (as
      `jax.image.resize` does), rounded to whole bytes. Reduced: means of squares, in integers, halves rounded up.

    Raises:
      ValueError: an image_size below the stored one that does not divide it.

    Guarantees:
      The same bytes on every machine. An image does not depend on the others.
    """
    if image_size is None:
        return images
    stored = images.shape[1:3]
    if not can_resize(stored, image_size):
        raise ValueError(
            f"image_size: got {image_size}, expected at least the stored {max(stored)} or a divisor of {stored}"
        )
    if image_size < max(stored):
        return _reduce(images, image_size)
    enlarged = _interpolate(_interpolate(images.astype(np.float32), 1, image_size), 2, image_size)
    return np.rint(enlarged.clip(0, 255)).astype(np.uint8)


def recolour(images: np.ndarray, channels: int | None) -> np.ndarray:
    """Repeats the one channel of grey images.

    Args:
      images: uint8 [n, height, width, c].
      channels: of the result; None for the images as they are.

    Returns:
      uint8 [n, height, width, channels]; images that have as many already, as they are.

    Raises:
      ValueError: images of neither 1 nor so many channels.
    """
    if channels is None or images.shape[-1] == channels:
        return images
    if images.shape[-1] != 1:
        raise ValueError(f"channels: got {channels} for images that have {images.shape[-1]}, expected 1 of them")
    return np.repeat(images, channels, axis=-1)


def can_resize(stored: tuple[int, ...], image_size: int) -> bool:
    """Whether `resize` brings images of the stored height and width to a size."""
    return image_size >= max(stored) or all(size % image_size == 0 for size in stored)


def _reduce(images: np.ndarray, size: int) -> np.ndarray:
    """Averages rectangles of pixels, square ones if the images are."""
    n, height, width, channels = images.shape
    rows, columns = height // size, width // size
    cells = images.reshape(n, size, rows, size, columns, channels)
    total = np.full((n, size, size, channels), rows * columns // 2, np.uint32)
    for row in range(rows):
        for column in range(columns):
            total += cells[:, :, row, :, column]
    return (total // (rows * columns)).astype(np.uint8)


def _interpolate(images: np.ndarray, axis: int, size: int) -> np.ndarray:
    """Interpolate linearly along an axis."""
    stored = images.shape[axis]
    position = np.clip((np.arange(size) + 0.5) * stored / size - 0.5, 0, stored - 1)
    low = np.floor(position).astype(np.intp)
    shape = [size if i == axis else 1 for i in range(images.ndim)]
    weight = (position - low).astype(np.float32).reshape(shape)
    high = np.minimum(low + 1, stored - 1)
    return images.take(low, axis) * (1 - weight) + images.take(high, axis) * weight
