"""What canaries are optimised for: objectives of the trained model's logits and the inclusion coins, minimised.

An objective is called as objective(logits [m, k], labels [m], included bool [m]) -> scalar, and must be
differentiable by the logits, and by labels that are probabilities, [m, k]. All but the paper's are our choice and see
the logit margins s alone, which order canaries as the losses do:

    loss_gap      what the paper minimises
    logit_gap     the same of margins, which do not saturate
    separation    the distance of the two groups in standard deviations: the mu of Gaussian scores
    smooth_auroc  how often a member's margin exceeds a non-member's
    soft_guesses  the share of right guesses among the highest and lowest margins

Without a canary in, or without one out, `separation` and `smooth_auroc` are 0, with a derivative of 0.

Another kind of objective is of the trained model itself (`ModelObjective`), and says nothing of who is told from whom:

    gradient_norm  how hard included canaries still pull at the model, after it was trained on them
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp

from metacanary import gradient_norms, soft_labels

Params = Any


class Objective(Protocol):
    """What `optimization.optimize` minimises; hashable, so that it is compiled once."""

    def __call__(self, logits: jax.Array, labels: jax.Array, included: jax.Array) -> jax.Array:
        """A differentiable scalar of logits [m, k], labels [m] or probabilities [m, k], and coins [m]."""
        ...

    def __hash__(self) -> int:
        """Equal settings, equal hash."""
        ...


@runtime_checkable
class ModelObjective(Protocol):
    """What `optimization.optimize` minimises where it takes more than logits: a function of the trained model."""

    def of_model(
        self,
        model: nn.Module,
        params: Params,
        images: jax.Array,
        labels: jax.Array,
        included: jax.Array,
        *,
        trainable: str,
    ) -> jax.Array:
        """A scalar, differentiable by params, images and labels that are probabilities.

        Args:
          model: the network, in which no example's logits depend on another example.
          params: all parameters that a run would release.
          images: [m, height, width, channels] in [0, 1], the canaries.
          labels: int [m], or probabilities [m, k].
          included: bool [m], the coins.
          trainable: of the recipe: which parameters it trains, "all" or "last".
        """
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
        loss = soft_labels.cross_entropy(logits, labels)
        return jnp.mean(jnp.where(included, loss, -loss))


def logit_margin(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The label's logit minus the log-sum-exp of the others, [m]; the differentiable twin of `scores.logit_margin`.

    Args:
      logits: [m, k].
      labels: int [m]; or probabilities p [m, k], of which it is the mean margin, sum_c p_c s_c.

    Guarantees:
      A class and its one-hot probabilities give the same bits.
    """
    if soft_labels.are_soft(labels):
        by_class = jax.vmap(lambda c: logit_margin(logits, jnp.full(len(logits), c)), out_axes=-1)
        return jnp.sum(labels * by_class(jnp.arange(logits.shape[-1])), axis=-1)
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
        _check("temperature", self.temperature, self.temperature > 0, "a number > 0")

    def __call__(self, logits: jax.Array, labels: jax.Array, included: jax.Array) -> jax.Array:
        """The objective, a scalar in [-1, 0]."""
        margin = logit_margin(logits, labels)
        pairs = jax.nn.sigmoid((margin[:, None] - margin[None, :]) / self.temperature)
        weight = (included[:, None] & ~included[None, :]).astype(pairs.dtype)
        return -(pairs * weight).sum() / jnp.maximum(weight.sum(), 1)


@dataclass(frozen=True, kw_only=True)
class LogitGap:
    """Mean margin of the excluded canaries minus that of the included ones.

    The paper's objective for log(p / (1 - p)) instead of log p, and of means by group: it goes on falling where a loss
    is near 0 and its derivative vanishes. It is linear in the margins, with a derivative of -1 / m_in or 1 / m_out by
    each: with `complement` the direct terms of a canary cancel as far as the two models agree, and a few canaries of
    huge margin can win it as they can the loss gap. A group that is empty counts as 0.
    """

    def __call__(self, logits: jax.Array, labels: jax.Array, included: jax.Array) -> jax.Array:
        """The objective, a scalar."""
        margin = logit_margin(logits, labels)
        return _mean(margin, ~included) - _mean(margin, included)


@dataclass(frozen=True, kw_only=True)
class Separation:
    """Minus mu = (mean margin in - mean margin out) / pooled standard deviation.

    Fitted by moments: were the margins of the two groups Gaussian with one variance, the best test of membership by a
    margin would be that of mu-GDP, whose epsilon at a delta grows with mu. So it stands for the f-DP bound of the
    Gaussian family with one threshold for all canaries, as long as margins are near Gaussian. It does not
    change if all margins are shifted, or scaled by a positive factor. Differentiable in all margins together: one
    far from its group's mean is drawn to it, even where it tells its canary well, and a single outlier can hide all
    others, which `winsorized` prevents.

    Attributes:
      winsorized: share of the margins, at each end, that are replaced by the quantile there; below 1/2. The derivative
        goes to the quantile: to the canaries next to it, and not to those replaced.
    """

    winsorized: float = 0.0

    def __post_init__(self) -> None:
        _check("winsorized", self.winsorized, 0 <= self.winsorized < 0.5, "a number >= 0 < 0.5")

    def __call__(self, logits: jax.Array, labels: jax.Array, included: jax.Array) -> jax.Array:
        """The objective, a scalar; 0 also where all margins are equal within their groups."""
        margin = logit_margin(logits, labels)
        if self.winsorized:
            ends = jnp.asarray([self.winsorized, 1 - self.winsorized], margin.dtype)
            margin = jnp.clip(margin, *jnp.quantile(margin, ends))
        inside, outside = _mean(margin, included), _mean(margin, ~included)
        squares = jnp.square(margin - jnp.where(included, inside, outside)).sum()
        defined = (squares > 0) & included.any() & ~included.all()
        # Both branches of a `where` are differentiated: the one not taken is kept finite.
        variance = jnp.where(defined, squares, 1.0) / max(len(margin) - 2, 1)
        return jnp.where(defined, (outside - inside) / jnp.sqrt(variance), 0.0)


@dataclass(frozen=True, kw_only=True)
class SoftGuesses:
    """Minus the share of right guesses, where half of `share` m canaries are guessed IN and as many OUT, softly.

    Canary i counts as guessed IN by sigmoid((s_i - a) / temperature) and OUT by sigmoid((b - s_i) / temperature), with
    thresholds a and b at which each kind of guess adds up to share m / 2: the entropic soft top-k. As the temperature
    goes to 0 it tends to what the audit counts under protocol `fixed`. Differentiable in all margins, the thresholds
    included, so that a shift of all margins changes nothing. Margins far from both thresholds have hardly a
    derivative: canaries that are guessed anyhow, and those in the middle that are not guessed at all.

    Attributes:
      temperature: difference of margins at which the sigmoids bend.
      share: guesses of both kinds over canaries; in (0, 1], as `audit.guess_fraction`.

    References:
      Xie et al. 2020, "Differentiable Top-k with Optimal Transport", arXiv 2002.06504: with the squared distances to 0
      and 1 as costs, its transport plan is this sigmoid.
    """

    temperature: float = 2.0
    share: float = 0.5

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, self.temperature > 0, "a number > 0")
        _check("share", self.share, 0 < self.share <= 1, "a number > 0 <= 1")

    def __call__(self, logits: jax.Array, labels: jax.Array, included: jax.Array) -> jax.Array:
        """The objective, a scalar in [-1, 0]."""
        scaled = logit_margin(logits, labels) / self.temperature
        right = jnp.where(included, soft_top(scaled, self.share / 2), soft_top(-scaled, self.share / 2))
        return -right.sum() / (self.share * len(scaled))


@dataclass(frozen=True, kw_only=True)
class GradientNorm:
    """Minus the mean over included canaries of log |g_i|, with g_i the gradient of its loss at the model.

    The gradient is that by the parameters that the recipe trains, of the image as it is: what DP-SGD would clip at the
    canary's next visit. A canary that was learnt has hardly any left. Excluded canaries are left out: theirs is the
    gradient at a model that never saw them, which `gradient_max` makes large, and by their own pixels it has no path
    through training.

    The logarithm lets no canary outweigh the others. With a logit margin s and the label's probability p it is
    log(1 - p) + log |grad s|, whose slope by s alone is -p and does not fade as the loss does: the loss is computed as
    log(1 + exp(-s)), so that float32 keeps the digits of 1 - p. A gradient that is 0 (in float32 one below 1e-19)
    counts as log |g| = 0 with a derivative of 0. With no canary in, the objective is 0.

    Attributes:
      microbatch: canaries that are worked on at a time; less memory, the same result up to rounding.
    """

    microbatch: int = 64

    def __post_init__(self) -> None:
        _check("microbatch", self.microbatch, self.microbatch >= 1, "an integer >= 1")

    def of_model(
        self,
        model: nn.Module,
        params: Params,
        images: jax.Array,
        labels: jax.Array,
        included: jax.Array,
        *,
        trainable: str,
    ) -> jax.Array:
        """The objective, a scalar."""
        options: dict[str, Any] = {"trainable": trainable, "microbatch": self.microbatch}
        logs, _ = gradient_norms.log_norms(model, _loss, params, images, labels, **options)
        return -_mean(logs, included)


def _loss(logits: jax.Array, label: jax.Array) -> jax.Array:
    """The cross-entropy of one example; of a class as log(1 + exp(-margin)), for its gradient's sake."""
    if soft_labels.are_soft(label):
        return soft_labels.cross_entropy(logits, label)
    return jax.nn.softplus(-logit_margin(logits[None], label[None])[0])


def soft_top(values: jax.Array, share: float) -> jax.Array:
    """Soft membership in the highest `share` of values: sigmoid(values - a), with a such that its mean is `share`.

    Args:
      values: [m], over the temperature.
      share: in (0, 1).

    Returns:
      [m] in [0, 1], of mean `share` up to rounding. The derivative is that of the exact solution a(values), by the
      theorem on implicit functions: da/dv_i is proportional to the sigmoid's slope at i.
    """
    fixed = jax.lax.stop_gradient(values)
    shift = math.log(share / (1 - share))  # if all values were v, a would be v - shift

    def halve(_: int, bracket: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bracket
        middle = (low + high) / 2
        too_many = jax.nn.sigmoid(fixed - middle).mean() > share
        return jnp.where(too_many, middle, low), jnp.where(too_many, high, middle)

    low, high = jax.lax.fori_loop(0, _HALVINGS, halve, (fixed.min() - shift, fixed.max() - shift))
    threshold = (low + high) / 2
    soft = jax.nn.sigmoid(fixed - threshold)
    slopes = soft * (1 - soft)
    # Where no value is near the threshold all slopes round to 0, and so does the derivative.
    weights = slopes / jnp.maximum(slopes.sum(), jnp.finfo(values.dtype).tiny)
    # Adds 0 to the threshold, and its derivative: a Newton step from the solution.
    return jax.nn.sigmoid(values - (threshold + (weights * (values - fixed)).sum()))


_HALVINGS = 64  # to rounding, in double precision too


def _mean(values: jax.Array, chosen: jax.Array) -> jax.Array:
    """The mean of the chosen values, 0 of none."""
    return jnp.where(chosen, values, 0).sum() / jnp.maximum(chosen.sum(), 1)


def _check(name: str, value: float, is_valid: bool, expected: str) -> None:
    """Raises the ValueError of an option."""
    if not is_valid:
        raise ValueError(f"objective.{name}: got {value}, expected {expected}")


OBJECTIVES = {
    "loss_gap": LossGap,
    "logit_gap": LogitGap,
    "separation": Separation,
    "smooth_auroc": SmoothAUROC,
    "soft_guesses": SoftGuesses,
    "gradient_norm": GradientNorm,
}
