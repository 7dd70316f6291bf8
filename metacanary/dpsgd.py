"""The private part of DP-SGD: Poisson sampling, per-example clipping, Gaussian noise.

Written here and not taken from jax-privacy because metagradients go through it: jax-privacy 2.0.0's clip has a NaN
derivative at a zero gradient, and fixed-size batches with truncation would not be the sampler that is accounted.
The tests hold both against jax-privacy and against a naive loop.

References:
  Abadi et al. 2016 (arXiv 1607.00133), Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any
ExampleLoss = Callable[[PyTree, jax.Array, jax.Array], jax.Array]


def poisson_sample(key: jax.Array, sampling_prob: float, num_examples: int) -> np.ndarray:
    """Draw a batch in which every example is included on its own coin.

    Args:
      key: PRNG key of this step.
      sampling_prob: q, the chance of each example.
      num_examples: size of the training set.

    Returns:
      Sorted indices of the drawn examples; their number is Binomial(num_examples, q) and may be 0.

    Guarantees:
      No truncation and no padding: the sampler is the one that "Poisson" accounting assumes.
    """
    return np.flatnonzero(np.asarray(jax.random.bernoulli(key, sampling_prob, (num_examples,))))


def global_norm(tree: PyTree) -> jax.Array:
    """Euclidean norm over all leaves, with derivative 0 (not NaN) at 0."""
    squared = sum((jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree)), start=jnp.zeros(()))
    positive = squared > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squared, 1.0)), 0.0)


def clip(tree: PyTree, clip_norm: float) -> PyTree:
    """Scale a gradient to norm at most `clip_norm`; a shorter one is unchanged.

    Guarantees:
      Norm at most `clip_norm` up to rounding; a zero gradient stays zero and has a finite derivative.
    """
    norm = global_norm(tree)
    exceeds = norm > clip_norm
    factor = jnp.where(exceeds, clip_norm / jnp.where(exceeds, norm, 1.0), 1.0)
    return jax.tree.map(lambda x: x * factor, tree)


def clipped_gradient_sum(
    loss_fn: ExampleLoss,
    params: PyTree,
    images: jax.Array,
    labels: jax.Array,
    mask: jax.Array,
    clip_norm: float,
) -> PyTree:
    """Sum of the clipped gradients of the examples whose mask is 1.

    Args:
      loss_fn: loss of one example, loss_fn(params, image, label) -> scalar.
      params: parameter tree.
      images: [batch, height, width, channels].
      labels: [batch].
      mask: [batch] of 0 or 1; rows with 0 pad the batch to its fixed shape.
      clip_norm: C.

    Returns:
      sum_i mask_i * clip(grad loss_i, C), a tree as params.

    Guarantees:
      Sensitivity: adding or removing one example changes the sum by a vector of norm at most C.
    """

    def one(image: jax.Array, label: jax.Array, keep: jax.Array) -> PyTree:
        clipped = clip(jax.grad(loss_fn)(params, image, label), clip_norm)
        return jax.tree.map(lambda g: g * keep, clipped)

    return jax.tree.map(lambda g: g.sum(axis=0), jax.vmap(one)(images, labels, mask))


def add_noise(key: jax.Array, tree: PyTree, stddev: float | jax.Array) -> PyTree:
    """Add independent Gaussian noise of standard deviation `stddev` to every entry."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    noisy = [x + stddev * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, noisy)
