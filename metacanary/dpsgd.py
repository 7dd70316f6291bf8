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

from metacanary import gradients

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


def poisson_batches(
    key: jax.Array, sampling_prob: float, used: np.ndarray, num_steps: int, multiple: int
) -> np.ndarray:
    """Draw the batches of all steps of a run.

    Args:
      key: the run's sampling stream; step t draws from fold_in(key, t).
      sampling_prob: q.
      used: bool [n], the rows that the run trains on.
      num_steps: T.
      multiple: the width is a multiple of it.

    Returns:
      int32 [num_steps, width]; behind the rows of a batch stands -1.

    Guarantees:
      Nothing is truncated: each used row is in each batch on its own coin. All rows are drawn and the unused ones left
      out, so that runs of one seed and different `used` draw the shared rows alike. The width depends on n, q and
      `multiple` alone but for draws beyond six standard deviations, so that other runs need no compilation.
    """
    n = len(used)
    draws = [poisson_sample(jax.random.fold_in(key, t), sampling_prob, n) for t in range(num_steps)]
    draws = [rows[used[rows]] for rows in draws]
    likely = n * sampling_prob + 6 * np.sqrt(n * sampling_prob * (1 - sampling_prob))
    least = max(min(int(np.ceil(likely)), n), *map(len, draws))
    batches = np.full((num_steps, -(-least // multiple) * multiple), -1, np.int32)
    for batch, rows in zip(batches, draws, strict=True):
        batch[: len(rows)] = rows
    return batches


def global_norm(tree: PyTree) -> jax.Array:
    """Euclidean norm over all leaves, with derivative 0 (not NaN) at 0."""
    squared = sum((jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree)), start=jnp.zeros(()))
    positive = squared > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squared, 1.0)), 0.0)


def clip(tree: PyTree, clip_norm: float | jax.Array) -> PyTree:
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
      images: [batch, ...]; an example may be one image or its copies.
      labels: [batch], or [batch, classes] of probabilities, as the loss takes them.
      mask: [batch] of 0 or 1; rows with 0 pad the batch to its fixed shape.
      clip_norm: C.

    Returns:
      sum_i mask_i * clip(grad loss_i, C), a tree as params.

    Guarantees:
      Sensitivity: adding or removing one example changes the sum by a vector of norm at most C.
      Its pull-back is one forward-over-reverse Hessian-vector product per example, and 0 where a gradient is 0 and
      the loss is flat.
    """
    gradient = gradients.grad(loss_fn)

    def one(image: jax.Array, label: jax.Array, keep: jax.Array) -> PyTree:
        clipped = clip(gradient(params, image, label), clip_norm)
        return jax.tree.map(lambda g: jnp.where(keep, g, 0), clipped)  # a row of padding may be anything

    return jax.tree.map(lambda g: g.sum(axis=0), jax.vmap(one)(images, labels, mask))


def add_noise(key: jax.Array, tree: PyTree, stddev: float | jax.Array | PyTree) -> PyTree:
    """Add independent Gaussian noise to every entry, of one standard deviation or of one for each leaf of the tree."""
    leaves, structure = jax.tree.flatten(tree)
    each = jax.tree.leaves(stddev) if isinstance(stddev, dict) else [stddev] * len(leaves)
    drawn = zip(jax.random.split(key, len(leaves)), leaves, each, strict=True)
    noisy = [x + deviation * jax.random.normal(k, x.shape, x.dtype) for k, x, deviation in drawn]
    return jax.tree.unflatten(structure, noisy)
