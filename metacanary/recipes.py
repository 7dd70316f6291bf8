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
class Augmentation:
    """Random copies of a training image; as it stands, none but the image itself.

    Attributes:
      multiplicity: K, the copies of an image in a step.
      flip: whether each copy is mirrored left to right on a fair coin.
      crop_padding: pixels of the border out of which a copy is cut at a uniform place; 0 for no crop.
    """

    multiplicity: int = 1
    flip: bool = False
    crop_padding: int = 0

    def __post_init__(self) -> None:
        for name, least in (("multiplicity", 1), ("crop_padding", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"augmentation.{name}: got {getattr(self, name)}, expected an integer >= {least}")
        if self.multiplicity > 1 and not self.is_on:
            expected = "1 without flip and crop_padding, since all copies would be equal"
            raise ValueError(f"augmentation.multiplicity: got {self.multiplicity}, expected {expected}")

    @property
    def is_on(self) -> bool:
        """Whether copies are drawn at all."""
        return self.flip or self.crop_padding > 0


@dataclass(frozen=True, kw_only=True)
class SGD:
    """Minibatch SGD without privacy: shuffled epochs, (Nesterov) momentum, weight decay added to the gradient.

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
    schedule: Schedule = Schedule()

    def __post_init__(self) -> None:
        _require_positive(self, "num_steps", "batch_size", "learning_rate")
        if self.microbatch is not None and (self.microbatch < 1 or self.batch_size % self.microbatch):
            raise ValueError(f"microbatch: got {self.microbatch}, expected a divisor of batch_size = {self.batch_size}")

    def optimizer(self) -> optax.GradientTransformation:
        """The Optax optimiser."""
        rate = self.schedule.build(self.learning_rate, self.num_steps)
        sgd = optax.sgd(rate, momentum=self.momentum or None, nesterov=self.nesterov)
        return optax.chain(optax.add_decayed_weights(self.weight_decay), sgd)


@dataclass(frozen=True, kw_only=True)
class DPSGD:
    """DP-SGD: Poisson sampling, per-example clipping, Gaussian noise (arXiv 1607.00133, Algorithm 1).

    The noisy sum is divided by the batch size that is expected before the coins are tossed, q (r + m / 2) with
    q = `sampling_prob`, r other images and m canaries. `noise_multiplier` is the noise's standard deviation over
    `clip_norm`. `microbatch` is the number of examples whose gradients are held at a time. The gradients of an
    example's augmented copies are averaged before they are clipped (arXiv 2204.13650).
    """

    num_steps: int
    sampling_prob: float
    clip_norm: float
    noise_multiplier: float
    learning_rate: float
    momentum: float = 0.0
    nesterov: bool = False
    microbatch: int = 64
    augmentation: Augmentation = Augmentation()
    schedule: Schedule = Schedule()

    def __post_init__(self) -> None:
        _require_positive(self, "num_steps", "sampling_prob", "clip_norm", "learning_rate", "microbatch")
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
