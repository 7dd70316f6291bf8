"""Labels of canaries that are optimised with their pixels: probabilities of classes, which are hardened in the end.

A label is a class, an int, or the probabilities of all k classes, k floats. Steps and objectives take both, so that a
label can be a metaparameter; what is audited has classes only. The paper keeps the labels that canaries start with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

PyTree = Any


class SoftlyLabelled(NamedTuple):
    """Canaries whose labels are probabilities; steps take them in the place of pixels.

    Attributes:
      images: [m, height, width, channels] in [0, 1].
      labels: [m, k], probabilities.
    """

    images: jax.Array
    labels: jax.Array


CanaryInputs = jax.Array | SoftlyLabelled
"""What a step trains on of canaries: their pixels, with labels that are the pool's, or pixels and labels."""


def are_soft(labels: jax.Array) -> bool:
    """Whether labels are probabilities, not classes."""
    return bool(jnp.issubdtype(jnp.result_type(labels), jnp.floating))


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The cross-entropy of each label, sum_c p_c (-log softmax(z)_c).

    Args:
      logits: z, [..., k].
      labels: int [...], or probabilities p, [..., k].

    Returns:
      [...]; differentiable by logits, and by labels that are probabilities.

    Guarantees:
      A class and its one-hot probabilities give the same bits.
    """
    if not are_soft(labels):
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    by_class = jax.nn.logsumexp(logits, axis=-1, keepdims=True) - logits
    return jnp.sum(labels * by_class, axis=-1)


class LabelState(NamedTuple):
    """Where the labels of an optimisation stand.

    Attributes:
      logits: float32 [m, k], of which probabilities are the softmax.
      optimizer: the state of what moves them.
    """

    logits: np.ndarray
    optimizer: PyTree

    @property
    def probabilities(self) -> jax.Array:
        """What canaries are trained with until labels are hardened, [m, k]."""
        return jax.nn.softmax(jnp.asarray(self.logits), axis=-1)

    @property
    def classes(self) -> np.ndarray:
        """The likeliest classes, int32 [m]: the labels once they are hardened; of equal ones the first."""
        return self.logits.argmax(axis=-1).astype(np.int32)


@dataclass(frozen=True, kw_only=True)
class LabelUpdate:
    """Adam on the logits of labels, for the first metasteps of an optimisation.

    Attributes:
      learning_rate: of Adam: about the most by which a metastep moves a logit.
      harden_after: metasteps in which labels move. From then on a label is its likeliest class and pixels alone move,
        so that the rest of the optimisation sees the labels that the audit will use.
      scale: logit of the start's label before the first metastep, where all others are 0: its probability is then
        1 / (1 + (k - 1) exp(-scale)), 0.69 of ten classes at 3.
    """

    learning_rate: float
    harden_after: int
    scale: float = 3.0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "scale"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ValueError(f"labels.{name}: got {value}, expected a finite number > 0")
        if self.harden_after < 1:
            raise ValueError(f"labels.harden_after: got {self.harden_after}, expected an integer >= 1")

    def start(self, labels: np.ndarray, num_classes: int) -> LabelState:
        """The state before the first metastep, from the start's labels, int [m]."""
        logits = self.scale * np.eye(num_classes, dtype=np.float32)[labels]
        return LabelState(logits=logits, optimizer=self._optimizer().init(jnp.asarray(logits)))

    def update(self, state: LabelState, gradient: jax.Array) -> LabelState:
        """The state after a metastep, from the objective's gradient by the probabilities, [m, k]."""
        logits = jnp.asarray(state.logits)
        by_logits = jax.vjp(jax.nn.softmax, logits)[1](gradient)[0]
        updates, optimizer = self._optimizer().update(by_logits, state.optimizer)
        return LabelState(logits=np.asarray(logits + updates), optimizer=optimizer)

    def _optimizer(self) -> optax.GradientTransformation:
        return optax.adam(self.learning_rate)
