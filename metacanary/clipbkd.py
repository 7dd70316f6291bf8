"""ClipBKD canaries: images along the directions in which the training images vary least (arXiv 2006.07709).

Jagielski, Ullman and Oprea insert k copies of one poison: the right singular vector of the training inputs with the
least singular value, at the inputs' typical norm, with the label that a logistic regression finds least likely.
Clipping takes little of what such a poison does, since other examples' gradients are small where it points.

Here one poison for many runs becomes m different canaries for one run, and pixels stay valid (docs/deviations.md).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_FLAT = 1e-12  # share of the largest variance below which a variance is rounding
_CHUNK = 4096  # images whose pixels are held as float64 at a time


def make(
    images: np.ndarray, labels: np.ndarray, *, num_canaries: int, num_classes: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Make m canaries from a training set.

    With the mean image x_0 and the typical distance D, the mean of |x - x_0| over training images x, canary j is
    clip(x_0 + a_j u_j, 0, 1): u_j is its direction, and a_j takes it as far from x_0 as D.

    Args:
      images: uint8 [n, height, width, channels], the training set.
      labels: int [n].
      num_canaries: m.
      num_classes: number of labels.
      rng: see `least_directions`.

    Returns:
      Pixels float32 [m, height, width, channels], and labels int32 [m]: of canary x the class k that minimises
      <x - x_0, x_k - x_0>, with x_k its mean image. If classes are equally frequent, this is the class that a logistic
      regression, by which the paper chooses, finds least likely after a first step from zero.

    Guarantees:
      Pixels are in [0, 1]. Each canary is D away from the mean image, or as far as [0, 1] lets it go in its direction.

    References:
      arXiv 2006.07709, Section 4 (ClipBKD); its official code centres inputs, as here.
    """
    mean = _mean(images)
    typical = _distances(images, mean).mean()
    # Deviation: around the mean image, not from zero as the poison. At zero a direction would lose its negative half,
    # and what is left of it is a brightness, along which images vary much.
    directions = _with_room(least_directions(images, num_canaries, rng), mean, typical)
    pixels = _at_distance(directions, mean, typical)
    by_class = np.stack([_mean(images[labels == c]) if (labels == c).any() else mean for c in range(num_classes)])
    least_likely = ((pixels - mean) @ (by_class - mean).T).argmin(axis=1)
    return pixels.reshape(-1, *images.shape[1:]).astype(np.float32), least_likely.astype(np.int32)


def least_directions(images: np.ndarray, num: int, rng: np.random.Generator) -> np.ndarray:
    """The directions in pixel space along which images vary least.

    Args:
      images: uint8 [n, height, width, channels].
      num: how many.
      rng: draws the basis of directions along which images do not vary at all, which is not determined, as in images
        that were enlarged; and the directions beyond the number d of pixels.

    Returns:
      Unit vectors [num, d]: the right singular vectors of the centred images with the least singular values, that of
      the least first. Behind all d of them stand random unit vectors in the span of the d // 2 first.

    Guarantees:
      The first d are orthonormal. Of uint8 images, up to 370,000 of them, the matrix that is taken apart is exact,
      whatever the machine and its threads.
    """
    count, total, squares = len(images), 0.0, 0.0
    for part in _chunks(images):
        total = total + part.sum(axis=0)
        squares = squares + part.T @ part  # integers below 2^53
    values, vectors = np.linalg.eigh(count * squares - np.outer(total, total))
    flat = int((values <= _FLAT * values[-1]).sum())
    drawn = rng.standard_normal((len(vectors), flat))
    basis, upper = np.linalg.qr(vectors[:, :flat] @ (vectors[:, :flat].T @ drawn))
    vectors[:, :flat] = basis * np.sign(np.diag(upper))
    directions = vectors.T[:num]
    if num > len(vectors):
        mixed = rng.standard_normal((num - len(vectors), len(vectors) // 2)) @ directions[: len(vectors) // 2]
        directions = np.concatenate([directions, mixed / np.linalg.norm(mixed, axis=1, keepdims=True)])
    return directions


def _with_room(directions: np.ndarray, mean: np.ndarray, distance: float) -> np.ndarray:
    """Directions, each turned to the side on which more of it lies within [0, 1]."""
    up, down = (
        np.linalg.norm(np.clip(mean + sign * distance * directions, 0, 1) - mean, axis=1, keepdims=True)
        for sign in (1, -1)
    )
    return np.where(up >= down, directions, -directions)


def _at_distance(directions: np.ndarray, mean: np.ndarray, distance: float) -> np.ndarray:
    """Points in [0, 1] at a distance from the mean image along directions, which are cut off at 0 and 1."""
    low, high = np.zeros((len(directions), 1)), np.full((len(directions), 1), 1e6 * distance)
    for _ in range(80):  # bisection: the distance never falls as the scale grows
        middle = (low + high) / 2
        reached = np.linalg.norm(np.clip(mean + middle * directions, 0, 1) - mean, axis=1, keepdims=True)
        low, high = np.where(reached < distance, middle, low), np.where(reached < distance, high, middle)
    return np.clip(mean + high * directions, 0, 1)


def _mean(images: np.ndarray) -> np.ndarray:
    """The mean image [d], pixels in [0, 1]."""
    total = sum((part.sum(axis=0) for part in _chunks(images)), start=np.zeros(()))
    return total / (255 * len(images))


def _distances(images: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """The distance [n] of each image to an image [d], pixels in [0, 1]."""
    return np.concatenate([np.linalg.norm(part / 255 - mean, axis=1) for part in _chunks(images)])


def _chunks(images: np.ndarray) -> Iterator[np.ndarray]:
    """Some images at a time, as float64 [count, d] of whole numbers."""
    for first in range(0, len(images), _CHUNK):
        part = images[first : first + _CHUNK]
        yield part.reshape(len(part), -1).astype(np.float64)
