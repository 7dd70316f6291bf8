"""How much canaries get into each other's way: the squared cosines between their gradients by the last layer.

A step on one canary changes the score of another by the product of their gradients. Where all gradients are
orthogonal, a canary's score tells of its own coin alone; where they point the same way, members teach the scores of
non-members, and one training run holds fewer independent guesses than it has canaries. The paper has no such term.

The last layer, logits W x + b, gives the gradient of example i as an outer product of its input x_i and of the
loss's derivative d_i by the logits, so that no gradient is made:

    <g_i, g_j> = (<x_i, x_j> + 1) <d_i, d_j>     (+ 1 with a bias)

What the other layers would add to gradients is left out: an approximation.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from metacanary import layer_forms, layer_gradients
from metacanary.layer_gradients import Params
from metacanary.objectives import logit_margin


def interference(model: nn.Module, params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean squared cosine between the gradients of pairs of examples, by the last layer's parameters.

    Args:
      model: whose last layer is a `flax.linen.Dense` on one vector per example.
      params: its parameters.
      images: [m, height, width, channels] in [0, 1], m >= 2.
      labels: int [m], or probabilities [m, k].

    Returns:
      A scalar in [0, 1]; 0 for orthogonal gradients. Differentiable by params, images and labels
      that are probabilities.

    Raises:
      ValueError: another last layer, or less than two examples.

    Guarantees:
      Cosines are those of the cross-entropy's gradients. They are computed from the logit margin s, whose gradient lies
      on the same line, d log p = (1 - p) ds, and does not vanish as p tends to 1. With labels that are probabilities
      they are cosines of the gradients of the mean margin, which lie on lines of their own.
    """
    if len(images) < 2:
        raise ValueError(f"images: got {len(images)} of them, expected at least 2")
    layers = layer_gradients.layers(model, images.shape[1:])
    name = list(layers)[-1]

    def minus_margins(logits: jax.Array) -> jax.Array:
        return -logit_margin(logits[:, 0], labels).sum()

    taken = layer_gradients.take_apart(model, params, images[:, None], minus_margins, only=[name])
    inputs, derivatives = taken.inputs[name], taken.derivatives[name]
    if not isinstance(layers[name], layer_forms.Dense) or inputs.ndim != 3:
        raise ValueError(f"model: got {name or type(model).__name__} as its last layer, expected a Dense on vectors")
    of_inputs = inputs[:, 0] @ inputs[:, 0].T + (1.0 if "bias" in taken.params[name] else 0.0)
    squares = jnp.square(of_inputs * (derivatives[:, 0] @ derivatives[:, 0].T))
    fourth_powers = jnp.diagonal(squares)  # of the norms; 0 only without a bias
    squared_norms = jnp.sqrt(jnp.where(fourth_powers > 0, fourth_powers, 1.0))
    squared_cosines = squares / (squared_norms[:, None] * squared_norms[None, :])
    count = len(images)
    return jnp.where(jnp.eye(count, dtype=bool), 0.0, squared_cosines).sum() / (count * (count - 1))
