"""Training recipes: the settings of SGD and of DP-SGD, checked on construction, and the Optax optimiser of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import optax


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A learning-rate schedule, as a factor of the peak rate.

    name "constant", or "one_cycle": linear from `start` up to 1 at `peak_at` (fraction of the run), down to `end`.
    """

    name: str = "constant"
    start: float = 0.07
    peak_at: float = 0.5
    end: float = 0.2

    def __post_init__(self) -> None:
        if self.name not in ("constant", "one_cycle"):
            raise ValueError(f"schedule.name: got {self.name!r}, expected constant or one_cycle")
        if not 0 < self.peak_at < 1:
            raise ValueError(f"schedule.peak_at: got {self.peak_at}, expected a fraction between 0 and 1")

    def build(self, learning_rate: float, num_steps: int) -> optax.Schedule:
        """The schedule as an Optax function of the step."""
        if self.name == "constant":
            return optax.constant_schedule(learning_rate)
        points = [0.0, self.peak_at * num_steps, float(num_steps)]
        factors = [self.start, 1.0, self.end]
        return lambda t: learning_rate * jnp.interp(t, jnp.asarray(points), jnp.asarray(factors))


@dataclass(frozen=True, kw_only=True)
class SGD:
    """Minibatch SGD without privacy: shuffled epochs, (Nesterov) momentum, weight decay added to the gradient."""

    num_steps: int
    batch_size: int
    learning_rate: float
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    schedule: Schedule = Schedule()

    def __post_init__(self) -> None:
        _require_positive(self, "num_steps", "batch_size", "learning_rate")

    def optimizer(self) -> optax.GradientTransformation:
        """The Optax optimiser."""
        rate = self.schedule.build(self.learning_rate, self.num_steps)
        sgd = optax.sgd(rate, momentum=self.momentum or None, nesterov=self.nesterov)
        return optax.chain(optax.add_decayed_weights(self.weight_decay), sgd)


@dataclass(frozen=True, kw_only=True)
class DPSGD:
    """DP-SGD: Poisson sampling, per-example clipping, Gaussian noise (arXiv 1607.00133, Algorithm 1).

    The noisy sum is divided by the expected batch size `sampling_prob * expected_examples`, a constant that does not
    depend on the coins. `noise_multiplier` is the noise's standard deviation over `clip_norm`.
    """

    num_steps: int
    sampling_prob: float
    clip_norm: float
    noise_multiplier: float
    learning_rate: float
    momentum: float = 0.0
    nesterov: bool = False
    schedule: Schedule = Schedule()

    def __post_init__(self) -> None:
        _require_positive(self, "num_steps", "sampling_prob", "clip_norm", "learning_rate")
        if self.sampling_prob > 1:
            raise ValueError(f"sampling_prob: got {self.sampling_prob}, expected a probability in (0, 1]")
        if not self.noise_multiplier >= 0:  # refuses NaN as well
            raise ValueError(f"noise_multiplier: got {self.noise_multiplier}, expected a number >= 0")

    def optimizer(self) -> optax.GradientTransformation:
        """The Optax optimiser that is given the noisy mean gradient."""
        rate = self.schedule.build(self.learning_rate, self.num_steps)
        return optax.sgd(rate, momentum=self.momentum or None, nesterov=self.nesterov)


def _require_positive(recipe: Any, *names: str) -> None:
    """Refuse settings that are not positive, by name."""
    for name in names:
        if not getattr(recipe, name) > 0:
            raise ValueError(f"{name}: got {getattr(recipe, name)}, expected a number > 0")
