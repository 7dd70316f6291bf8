"""What makes a run: its named streams of randomness, its coins, and the images it may train on.

One seed makes a run: `jax.random.key(seed)` is folded into named streams (`stream`), and a step folds its number into
its stream. Nothing is drawn from a chain of splits, so a resumed or replayed step draws the same numbers again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

STREAMS = {"init": 0, "order": 1, "sampling": 2, "noise": 3, "coins": 4, "augmentation": 5}


def stream(seed: int, name: str) -> jax.Array:
    """The PRNG key of a named stream of a run."""
    return jax.random.fold_in(jax.random.key(seed), STREAMS[name])


def coins(seed: int, num_canaries: int, game: str) -> np.ndarray:
    """Draw which canaries a run includes.

    Args:
      seed: the run's seed.
      num_canaries: m.
      game: "independent", a fair coin for each canary; "paired", a fair coin for canaries 2i and 2i + 1, of which
        exactly one is included.

    Returns:
      bool [m].

    Raises:
      ValueError: unknown game, or an odd number of canaries in the paired game.
    """
    if game == "independent":
        return np.asarray(jax.random.bernoulli(stream(seed, "coins"), 0.5, (num_canaries,)))
    if game != "paired":
        raise ValueError(f"game: got {game!r}, expected independent or paired")
    if num_canaries % 2:
        raise ValueError(f"num_canaries: got {num_canaries}, expected an even number in the paired game")
    first = np.asarray(jax.random.bernoulli(stream(seed, "coins"), 0.5, (num_canaries // 2,)))
    return np.stack([first, ~first], axis=1).reshape(-1)


@dataclass(frozen=True, kw_only=True)
class Pool:
    """The training images that are no canary's source, and the labels of all.

    Attributes:
      images: uint8 [r, height, width, channels]; the originals of canaries are not among them.
      labels: int32 [r + m]; the last m are the canaries'.
    """

    images: jax.Array
    labels: jax.Array

    @staticmethod
    def make(images: np.ndarray, labels: np.ndarray, source_index: np.ndarray, canary_labels: np.ndarray) -> Pool:
        """Take the canaries' source images out of the training set and put the canaries' labels behind it."""
        others = np.setdiff1d(np.arange(len(images)), source_index)
        both = np.concatenate([labels[others], canary_labels]).astype(np.int32)
        return Pool(images=jnp.asarray(images[others]), labels=jnp.asarray(both))

    def with_canary_labels(self, labels: np.ndarray) -> Pool:
        """The same pool with other labels of the canaries, int [m]."""
        own = jnp.asarray(labels, self.labels.dtype)
        return replace(self, labels=self.labels.at[len(self.images) :].set(own))

    def used(self, included: np.ndarray) -> np.ndarray:
        """Which rows a run trains on, bool [r + m]: all of the pool, and the included canaries behind it."""
        return np.concatenate([np.ones(len(self.images), bool), included])


def take(images: jax.Array, canary_images: jax.Array, rows: jax.Array) -> jax.Array:
    """Images in [0, 1] by row; rows from len(images) on are canaries, and differentiable."""
    r = len(images)
    others = images[jnp.minimum(rows, r - 1)].astype(canary_images.dtype) / 255
    if not len(canary_images):
        return others
    is_canary = (rows >= r)[:, None, None, None]
    return jnp.where(is_canary, canary_images[jnp.maximum(rows - r, 0)], others)


def take_labels(labels: jax.Array, canary_labels: jax.Array, rows: jax.Array) -> jax.Array:
    """Labels by row as probabilities: of canaries those given, [m, k] and differentiable; one-hot of other images.

    What `labels`, int [r + m], says of the canaries is not looked at.
    """
    r = len(labels) - len(canary_labels)
    others = jax.nn.one_hot(labels[jnp.minimum(rows, r - 1)], canary_labels.shape[-1], dtype=canary_labels.dtype)
    return jnp.where((rows >= r)[:, None], canary_labels[jnp.maximum(rows - r, 0)], others)
