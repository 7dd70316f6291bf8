"""What canaries are optimised for: objectives of the trained model's logits and the inclusion coins, minimised.

An objective is called as objective(logits [m, k], labels [m], included bool [m]) -> scalar, and must be
differentiable.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
import optax


class Objective(Protocol):
    """What `optimization.optimize` minimises; hashable, so that it is compiled once."""

    def __call__(self, logits: jax.Array, labels: jax.Array, included: jax.Array) -> jax.Array:
        """A differentiable scalar of logits [m, k], labels [m] and coins [m]."""
        ...

    def __hash__(self) -> int:
        """Equal settings, equal hash."""
        ...


@dataclass(frozen=True, kw_only=True)
class LossGap:
    """The paper's objective over m: (sum of included losses - sum of excluded losses) / m, minimised.

    The paper does not divide by m, a constant factor that a signed update does not see.
    """

    def __call__(self, logits: jax.Array, labels: jax.Array, included: jax.Array) -> jax.Array:
        """The objective, a scalar."""
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(jnp.where(included, loss, -loss))


def logit_margin(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The label's logit minus the log-sum-exp of the others, [m]; the differentiable twin of `scores.logit_margin`."""
    is_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    others = jnp.where(is_label, -jnp.inf, logits)
    return jnp.sum(jnp.where(is_label, logits, 0), axis=-1) - jax.nn.logsumexp(others, axis=-1)


@dataclass(frozen=True, kw_only=True)
class SmoothAUROC:
    """Minus a smooth AUROC of the logit margin: the mean of sigmoid((s_in - s_out) / temperature) over all pairs.

    Unlike the loss gap it cannot be won by a few canaries of huge loss.
    """

    temperature: float = 2.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"objective.temperature: got {self.temperature}, expected a number > 0")

    def __call__(self, logits: jax.Array, labels: jax.Array, included: jax.Array) -> jax.Array:
        """The objective, a scalar in [-1, 0]."""
        margin = logit_margin(logits, labels)
        pairs = jax.nn.sigmoid((margin[:, None] - margin[None, :]) / self.temperature)
        weight = (included[:, None] & ~included[None, :]).astype(pairs.dtype)
        return -(pairs * weight).sum() / jnp.maximum(weight.sum(), 1)


OBJECTIVES = {"loss_gap": LossGap, "smooth_auroc": SmoothAUROC}
