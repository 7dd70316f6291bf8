"""What recipes are made of, checked on construction: schedule, copies, optimiser, average, clipping, target."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import optax

CLIPPINGS = ("flat", "per_layer", "adaptive")
ALLOCATIONS = ("shared", "equal")


def _refuse_unused(settings: Any, key: str, what: str, *names: str) -> None:
    """Refuse settings that would do nothing: they differ from their defaults, and there is no use for them."""
    defaults = {field.name: field.default for field in fields(settings)}
    for name in names:
        if getattr(settings, name) != defaults[name]:
            raise ValueError(f"{key}.{name}: got {getattr(settings, name)}, expected none: {what} has no use for it")


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
        if self.name == "constant":
            _refuse_unused(self, "schedule", "a constant schedule", "start", "peak_at", "end")

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
class Optimizer:
    """The optimiser that is given the (noisy) mean gradient: any of Optax that takes a learning rate.

    Attributes:
      name: as Optax has it: sgd, adam, adamw, lamb, ... What is differentiated by metagradients needs an epsilon inside
        the square root, `eps_root` of Adam, since the derivative of a square root at 0 is not finite.
      options: its other arguments, as pairs; a mapping is taken apart.
    """

    name: str = "sgd"
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        options = self.options.items() if isinstance(self.options, Mapping) else self.options
        object.__setattr__(self, "options", tuple(sorted((str(key), value) for key, value in options)))
        make = getattr(optax, self.name, None)
        if not callable(make) or "learning_rate" not in inspect.signature(make).parameters:
            raise ValueError(f"optimizer.name: got {self.name!r}, expected an optimiser of Optax with a learning rate")
        known = [key for key in inspect.signature(make).parameters if key != "learning_rate"]
        for key, _ in self.options:
            if key not in known:
                raise ValueError(f"optimizer.options: got {key!r}, expected some of {', '.join(known)}")
        if self.name == "noisy_sgd":
            raise ValueError("optimizer.name: got 'noisy_sgd', expected one without noise: its own is in no accountant")
        if self.name != "sgd":
            self._require_updates()

    def _require_updates(self) -> None:
        """Refuse what Optax cannot build or update from a gradient alone, by shapes: nothing is computed."""

        def update(gradient: jax.Array, params: jax.Array) -> Any:
            transformation = self.build(optax.constant_schedule(0.1), 0.0, nesterov=False)
            return transformation.update(gradient, transformation.init(params), params)

        shape = jax.ShapeDtypeStruct((2, 3), jnp.float32)
        try:
            jax.eval_shape(update, shape, shape)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"optimizer: got {self.name!r} with options {dict(self.options)}, expected one that updates by a "
                f"gradient and a scheduled rate; Optax says: {error}"
            ) from error

    def build(self, rate: optax.Schedule, momentum: float, nesterov: bool) -> optax.GradientTransformation:
        """The optimiser; momentum is a setting of its own, since sgd is the default."""
        if self.name == "sgd":
            return optax.sgd(rate, momentum=momentum or None, nesterov=nesterov)
        return getattr(optax, self.name)(rate, **dict(self.options))


@dataclass(frozen=True, kw_only=True)
class EMA:
    """The exponential moving average of the parameters, which is then what is released (arXiv 2204.13650).

    Attributes:
      decay: d of average <- d average + (1 - d) parameters after each step; 0 for no average.
      warm_up: whether d is at most (1 + t) / (10 + t) after step t = 0, 1, ..., so that the start is forgotten.
    """

    decay: float = 0.0
    warm_up: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"ema.decay: got {self.decay}, expected a number >= 0 and < 1")


@dataclass(frozen=True, kw_only=True)
class Clipping:
    """What of an example's gradient is clipped together, and to which norm (arXiv 2212.01539).

    With K layers that are trained and C = `clip_norm`, a layer's gradient is clipped to its threshold C_k. The sum over
    examples then has sensitivity S = sqrt(sum_k C_k^2), which is C for the thresholds that are the default.

    Attributes:
      name: "flat" clips the gradient of all layers together to C; "per_layer" that of each layer to a fixed threshold;
        "adaptive" to one that follows a quantile of the layer's norms, by noisy counts whose budget is part of the
        noise multiplier (see `count_noise`).
      thresholds: per_layer and adaptive: the C_k by layer, at the start if they adapt; none for C / sqrt(K) each.
      allocation: of the noise: "shared", sigma S on every parameter; "equal", sigma sqrt(K) C_k on those of layer k.
      quantile: adaptive: the share of norms that shall be below the threshold.
      learning_rate: adaptive: of the logarithm of the threshold, per step.
      budget: adaptive: share of the squared signal-to-noise ratio 1 / sigma^2 that is spent on the counts.
    """

    name: str = "flat"
    thresholds: tuple[tuple[str, float], ...] = ()
    allocation: str = "shared"
    quantile: float = 0.5
    learning_rate: float = 0.3
    budget: float = 0.01

    def __post_init__(self) -> None:
        pairs = self.thresholds.items() if isinstance(self.thresholds, Mapping) else self.thresholds
        object.__setattr__(self, "thresholds", tuple(sorted((str(name), float(value)) for name, value in pairs)))
        for key, allowed in (("name", CLIPPINGS), ("allocation", ALLOCATIONS)):
            if getattr(self, key) not in allowed:
                raise ValueError(f"clipping.{key}: got {getattr(self, key)!r}, expected one of {', '.join(allowed)}")
        for key, above in (("quantile", 0), ("budget", 0)):
            if not above < getattr(self, key) < 1:
                raise ValueError(f"clipping.{key}: got {getattr(self, key)}, expected a number between 0 and 1")
        if not self.learning_rate > 0:
            raise ValueError(f"clipping.learning_rate: got {self.learning_rate}, expected a number > 0")
        for name, value in self.thresholds:
            if not 0 < value < math.inf:
                raise ValueError(f"clipping.thresholds: got {value} for layer {name!r}, expected a number > 0")
        if self.name == "flat":
            _refuse_unused(self, "clipping", "flat clipping", "thresholds", "allocation")
        if self.name != "adaptive":
            what = "a threshold that does not adapt"
            _refuse_unused(self, "clipping", what, "quantile", "learning_rate", "budget")

    def gradient_noise(self, noise_multiplier: float) -> float:
        """The multiplier of the noise on gradients, a little above the total one where counts take their share."""
        return noise_multiplier / math.sqrt(1 - self.budget) if self.name == "adaptive" else noise_multiplier

    def count_noise(self, noise_multiplier: float, num_layers: int) -> float:
        """The standard deviation of the noise on each layer's count; an example adds -1/2 or 1/2 to each.

        Gradients over their sensitivity and counts over sqrt(K) / 2 are two Gaussian mechanisms on the same sample,
        with multipliers a and b; together they are one with 1 / sqrt(1 / a^2 + 1 / b^2) (arXiv 1905.03871, Theorem 1),
        which is the total one for a = sigma / sqrt(1 - budget), b = sigma / sqrt(budget).
        """
        return noise_multiplier / math.sqrt(self.budget) * math.sqrt(num_layers) / 2


@dataclass(frozen=True, kw_only=True)
class Target:
    """The (epsilon, delta) that a recipe's noise was calibrated to, of add/remove neighbours.

    Training a recipe with a target stops before the first step if its noise, sampling and steps spend more.
    """

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        if not self.epsilon > 0:  # refuses NaN as well
            raise ValueError(f"target.epsilon: got {self.epsilon}, expected a number > 0")
        if not 0 < self.delta < 1:
            raise ValueError(f"target.delta: got {self.delta}, expected a number between 0 and 1")
