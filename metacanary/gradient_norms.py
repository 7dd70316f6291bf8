"""Norms of examples' own gradients, by the parameters that a recipe trains: what DP-SGD clips, before it is clipped.

With augmentation it is not quite that: the gradient here is that of the image as it is, where DP-SGD has the mean over
altered copies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from metacanary import clipping, dpsgd, gradients, models, steps

Params = Any
OfLogits = Callable[[jax.Array, jax.Array], jax.Array]
"""A differentiable scalar of the logits [k] and the label of one example."""


def log_norm_function(
    model: nn.Module, of_logits: OfLogits
) -> Callable[[jax.Array, jax.Array, Params, Params], tuple[jax.Array, jax.Array]]:
    """The norm of one example's gradient, as a function that can be differentiated by its image and the parameters.

    Args:
      model: the network, in which no example's logits depend on another example.
      of_logits: what the gradient is taken of.

    Returns:
      (image [height, width, channels], label, trained, frozen) -> (log |g|, |g|) with g the gradient by `trained`.

    Guarantees:
      The logarithm of a norm of 0 is given as 0, with a derivative of 0 and not NaN. The derivative is a
      forward-over-reverse Hessian-vector product (`gradients.grad`).
    """

    def function(trained: Params, image: jax.Array, label: jax.Array, frozen: Params) -> jax.Array:
        return of_logits(models.apply(model, clipping.merge(trained, frozen), image[None])[0], label)

    gradient = gradients.grad(function)

    def log_norm(image: jax.Array, label: jax.Array, trained: Params, frozen: Params) -> tuple[jax.Array, jax.Array]:
        norm = dpsgd.global_norm(gradient(trained, image, label, frozen))
        return jnp.log(jnp.where(norm > 0, norm, 1.0)), norm

    return log_norm


def log_norms(
    model: nn.Module,
    of_logits: OfLogits,
    params: Params,
    images: jax.Array,
    labels: jax.Array,
    *,
    trainable: str,
    microbatch: int,
) -> tuple[jax.Array, jax.Array]:
    """As `log_norm_function`, of many examples.

    Args:
      model, of_logits: as there.
      params: all parameters.
      images: [m, height, width, channels].
      labels: [m].
      trainable: of the recipe: "all" or "last".
      microbatch: examples that are worked on at a time; less memory, the same result up to rounding.

    Returns:
      Logarithms of norms, and norms, [m] each.

    Guarantees:
      One microbatch's gradients are alive at a time, in the result and in its pull-back (each is rematerialised).
    """
    trained, frozen = clipping.split_trained(params, trainable, model, images.shape[1:])
    of_one, count, size = log_norm_function(model, of_logits), len(images), min(microbatch, len(images))
    # All pieces have one size: the last is filled up with the first examples, whose second results are left out.
    pieces = np.resize(np.arange(count), (-(-count // size), size))

    @jax.checkpoint
    def piece(trained: Params, frozen: Params, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.vmap(lambda x, y: of_one(x, y, trained, frozen))(images, labels)

    def next_piece(_: None, rows: jax.Array) -> tuple[None, tuple[jax.Array, jax.Array]]:
        return None, piece(trained, frozen, images[rows], labels[rows])

    unroll = min(len(pieces), steps.MAX_UNROLL) if steps.is_loop_slow(model) else 1
    _, (logs, norms) = jax.lax.scan(next_piece, None, jnp.asarray(pieces), unroll=unroll)
    return logs.ravel()[:count], norms.ravel()[:count]
