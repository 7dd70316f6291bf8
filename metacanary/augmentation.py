"""Random copies of a training image: cut out of the mirrored surroundings, and flipped.

Several copies of one image in one step are *augmentation multiplicity*: DP-SGD averages their gradients before it
clips, so that more copies cost no privacy (De et al. 2022, arXiv 2204.13650).

    augmentation = Augmentation(multiplicity=16, flip=True, crop_padding=4)
    stack = copies(augmentation, key, image)  # [height, width, channels] -> [16, height, width, channels]
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from metacanary.recipes import Augmentation


def copies(augmentation: Augmentation, key: jax.Array, image: jax.Array) -> jax.Array:
    """Draw the copies of one image.

    Each of the copies is drawn, none is the image as it is; each is cropped, then flipped. The border that the crop
    reaches into mirrors the image with its edge. All that is as in the official code of De et al. [P].

    Args:
      augmentation: how many, and how they differ.
      key: PRNG key of the image in this step.
      image: [height, width, channels].

    Returns:
      [multiplicity, height, width, channels], differentiable by the image.

    Raises:
      ValueError: a border wider than the image.

    Guarantees:
      Each pixel of a copy is a pixel of the image: values in [0, 1] stay there. Without flip and crop the copy is the
      image, bit by bit.
    """
    size = min(image.shape[:2])
    if augmentation.crop_padding > size:
        raise ValueError(f"augmentation.crop_padding: got {augmentation.crop_padding}, expected at most {size} pixels")
    if not augmentation.is_on:
        return image[None]
    keys = jax.random.split(key, augmentation.multiplicity)
    return jax.vmap(lambda k: _copy(augmentation, k, image))(keys)


def _copy(augmentation: Augmentation, key: jax.Array, image: jax.Array) -> jax.Array:
    """One copy: its pixels are looked up by row and column, so that no border need be built."""
    height, width, _ = image.shape
    place, coin = jax.random.split(key)
    most = augmentation.crop_padding
    # int32 by name: the same draws whether or not 64-bit numbers are on
    top, left = jax.random.randint(place, (2,), -most, most + 1, dtype=jnp.int32)
    rows = _mirrored(top + jnp.arange(height, dtype=jnp.int32), height)
    columns = _mirrored(left + jnp.arange(width, dtype=jnp.int32), width)
    if augmentation.flip:
        is_flipped = jax.random.randint(coin, (), 0, 2, dtype=jnp.int32) == 1
        columns = jnp.where(is_flipped, columns[::-1], columns)
    return image[rows][:, columns]


def _mirrored(index: jax.Array, size: int) -> jax.Array:
    """Indices in [-size, 2 size) mirrored into [0, size): -1 is 0, and size is size - 1."""
    index = jnp.where(index < 0, -1 - index, index)
    return jnp.where(index >= size, 2 * size - 1 - index, index)
