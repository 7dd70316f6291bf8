"""How canaries move: updates of their pixels, and the state of an optimisation between two of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import optax

from metacanary.canaries import Canaries
from metacanary.soft_labels import LabelState

PyTree = Any


@dataclass(frozen=True, kw_only=True)
class SignedUpdate:
    """Move every pixel by `step_size` against the sign of its gradient (the paper's update)."""

    step_size: float

    def optimizer(self) -> optax.GradientTransformation:
        """The Optax transformation."""
        return optax.sign_sgd(self.step_size)


@dataclass(frozen=True, kw_only=True)
class AdamUpdate:
    """Adam on the pixels."""

    learning_rate: float
    b1: float = 0.9
    b2: float = 0.999

    def optimizer(self) -> optax.GradientTransformation:
        """The Optax transformation."""
        return optax.adam(self.learning_rate, b1=self.b1, b2=self.b2)


UPDATES = {"signed": SignedUpdate, "adam": AdamUpdate}


@dataclass(frozen=True, kw_only=True)
class MetaState:
    """Where an optimisation stands after `step` metasteps: all that is needed to go on."""

    step: int
    images: np.ndarray
    optimizer: PyTree
    labels: LabelState | None = None

    def canaries(self, start: Canaries) -> Canaries:
        """The canaries that are reached from `start`, with labels that are hardened."""
        label = start.label if self.labels is None else self.labels.classes
        return replace(start, images=self.images, label=label)
