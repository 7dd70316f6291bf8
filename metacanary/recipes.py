"""Training recipes: the settings of SGD and of DP-SGD, checked on construction, and the Optax optimiser of each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import optax

from metacanary.recipe_settings import EMA, Augmentation, Clipping, Optimizer, Schedule, Target

__all__ = ["DPSGD", "EMA", "SGD", "Augmentation", "Clipping", "Optimizer", "Schedule", "Target"]

TRAINABLE = ("all", "last")


@dataclass(frozen=True, kw_only=True)
class SGD:
    """Minibatch SGD without privacy: shuffled epochs, (Nesterov) momentum, weight decay added to the gradient.

    The losses of `augmentation`'s copies are averaged; `ema`, `optimizer` and `trainable` are as those of `DPSGD`.
    `microbatch` is the number of images that a step works on at a time, None for the whole batch: less memory, the
    same gradient up to rounding.
    """

    num_steps: int
    batch_size: int
    learning_rate: float
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    microbatch: int | None = None
    augmentation: Augmentation = Augmentation()
    ema: EMA = EMA()
    optimizer: Optimizer = Optimizer()
    trainable: str = "all"
    schedule: Schedule = Schedule()

    def __post_init__(self) -> None:
        _require_positive(self, "num_steps", "batch_size", "learning_rate")
        _require_integer(self, "num_steps", "batch_size", *(["microbatch"] if self.microbatch is not None else []))
        _require_shared(self)
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay: got {self.weight_decay}, expected a number >= 0")
        if self.microbatch is not None and (self.microbatch < 1 or self.batch_size % self.microbatch):
            raise ValueError(f"microbatch: got {self.microbatch}, expected a divisor of batch_size = {self.batch_size}")

    def build_optimizer(self) -> optax.GradientTransformation:
        """The Optax optimiser, weight decay included."""
        rate = self.schedule.build(self.learning_rate, self.num_steps)
        update = self.optimizer.build(rate, self.momentum, self.nesterov)
        return optax.chain(optax.add_decayed_weights(self.weight_decay), update)


@dataclass(frozen=True, kw_only=True)
class DPSGD:
    """DP-SGD: Poisson sampling, per-example clipping, Gaussian noise (arXiv 1607.00133, Algorithm 1).

    The noisy sum is divided by `expected_batch`. `microbatch` is the number of examples that are worked on at a
    time. The gradients of an example's augmented copies are averaged before they are clipped (arXiv 2204.13650).

    Attributes:
      num_steps: T.
      sampling_prob: q, the chance of each example to be in a batch.
      clip_norm: C, the norm that an example's gradient is clipped to; see `Clipping` where layers are clipped apart.
      noise_multiplier: sigma, the noise's standard deviation over the sensitivity of what it is added to.
      learning_rate: At the peak of the schedule.
      rescale_to_unit_norm: Whether the noisy mean is divided by the sensitivity, so that the learning rate need not
        follow the clip norm (De et al.).
      trainable: "all" or "last", the last layer only; others stay as they start.
      target: What the noise was calibrated to, if it was.
    """

    num_steps: int
    sampling_prob: float
    clip_norm: float
    noise_multiplier: float
    learning_rate: float
    momentum: float = 0.0
    nesterov: bool = False
    microbatch: int = 64
    clipping: Clipping = Clipping()
    rescale_to_unit_norm: bool = False
    augmentation: Augmentation = Augmentation()
    ema: EMA = EMA()
    optimizer: Optimizer = Optimizer()
    trainable: str = "all"
    target: Target | None = None
    schedule: Schedule = Schedule()

    def __post_init__(self) -> None:
        _require_positive(self, "num_steps", "sampling_prob", "clip_norm", "learning_rate", "microbatch")
        _require_integer(self, "num_steps", "microbatch")
        _require_shared(self)
        if self.clip_norm == math.inf:
            raise ValueError("clip_norm: got inf, expected a number: what is not clipped has no bounded influence")
        if self.sampling_prob > 1:
            raise ValueError(f"sampling_prob: got {self.sampling_prob}, expected a probability in (0, 1]")
        if not self.noise_multiplier >= 0:  # refuses NaN as well
            raise ValueError(f"noise_multiplier: got {self.noise_multiplier}, expected a number >= 0")

    def expected_batch(self, num_others: int, num_canaries: int) -> float:
        """The batch size that is expected before the coins are tossed, q (r + m / 2)."""
        return self.sampling_prob * (num_others + num_canaries / 2)

    def build_optimizer(self) -> optax.GradientTransformation:
        """The Optax optimiser that is given the noisy mean gradient."""
        rate = self.schedule.build(self.learning_rate, self.num_steps)
        return self.optimizer.build(rate, self.momentum, self.nesterov)


def _require_shared(recipe: SGD | DPSGD) -> None:
    """Refuse what both algorithms refuse."""
    if recipe.trainable not in TRAINABLE:
        raise ValueError(f"trainable: got {recipe.trainable!r}, expected one of {', '.join(TRAINABLE)}")
    if not recipe.momentum >= 0:  # refuses NaN as well
        raise ValueError(f"momentum: got {recipe.momentum}, expected a number >= 0")
    if recipe.nesterov and not recipe.momentum:
        raise ValueError("nesterov: got True, expected False without momentum, of which it is a form")
    if recipe.optimizer.name != "sgd" and recipe.momentum:
        raise ValueError(f"momentum: got {recipe.momentum}, expected 0 with optimizer {recipe.optimizer.name!r}")
    if recipe.optimizer.name == "sgd" and recipe.optimizer.options:
        raise ValueError("optimizer.options: got some, expected none for sgd, whose momentum is a setting of its own")


def _require_positive(recipe: Any, *names: str) -> None:
    """Refuse settings that are not positive, by name."""
    for name in names:
        if not getattr(recipe, name) > 0:
            raise ValueError(f"{name}: got {getattr(recipe, name)}, expected a number > 0")


def _require_integer(recipe: Any, *names: str) -> None:
    """Refuse settings that are no whole numbers, by name."""
    for name in names:
        if not isinstance(getattr(recipe, name), Integral):
            raise ValueError(f"{name}: got {getattr(recipe, name)}, expected an integer")
