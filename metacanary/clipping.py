"""Clipping of examples' gradients, all layers together or each on its own, and the noise that fits it.

Two ways lead to the same sum, up to rounding. *By layer*: one backward pass to the outputs of layers, then one layer
at a time (`layer_gradients`), which holds no example's gradient of the whole network. *By example*: the gradient of
each example as a whole, for networks that do not come apart, and for metagradients, which are pulled back through it.

References:
  Abadi et al. 2016, arXiv 1607.00133 (flat); He et al. 2023, arXiv 2212.01539 (per layer, fixed and adaptive);
  Andrew et al. 2019, arXiv 1905.03871 (the quantile by noisy counts).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from metacanary import dpsgd, gradients, layer_gradients, models
from metacanary.recipes import DPSGD, Clipping

PyTree = Any
Params = Any
Thresholds = Mapping[str, jax.Array]
LogitLoss = Callable[[jax.Array, jax.Array], jax.Array]


def trained_layers(trainable: str, model: nn.Module, image_shape: Sequence[int]) -> tuple[str, ...]:
    """The layers that a recipe trains, by the path of their parameters, in the order of the forward pass.

    Args:
      trainable: Of the recipe: "all" or "last", the layer that is called last.
      model: The network.
      image_shape: [height, width, channels].

    Raises:
      ValueError: If the model does not come apart in layers (`layer_gradients.layers`).
    """
    names = tuple(layer_gradients.layers(model, tuple(image_shape)))
    return names if trainable == "all" else names[-1:]


def split(params: Params, names: Sequence[str] | None) -> tuple[Params, Params]:
    """Takes the parameters of layers, by path, out of a tree; None takes all. Returns them and the others."""
    if names is None:
        return params, {}
    flat = flatten_dict(params)
    taken = {path: leaf for path, leaf in flat.items() if "/".join(path[:-1]) in names}
    return unflatten_dict(taken), unflatten_dict({path: leaf for path, leaf in flat.items() if path not in taken})


def split_trained(
    params: Params, trainable: str, model: nn.Module, image_shape: Sequence[int]
) -> tuple[Params, Params]:
    """The parameters that a recipe with this `trainable` changes, and the others; arguments as of `trained_layers`."""
    return split(params, None if trainable == "all" else trained_layers(trainable, model, image_shape))


def merge(first: Params, second: Params) -> Params:
    """Puts together again what `split` took apart."""
    return unflatten_dict({**flatten_dict(first), **flatten_dict(second)}) if second else first


def start_thresholds(clipping: Clipping, clip_norm: float, names: Sequence[str]) -> dict[str, jax.Array]:
    """The thresholds C_k of layers before the first step, by path; none for flat clipping.

    Raises:
      ValueError: If `clipping.thresholds` names other layers than those that are trained.
    """
    if clipping.name == "flat":
        return {}
    given = dict(clipping.thresholds) or {name: clip_norm / math.sqrt(len(names)) for name in names}
    if given.keys() != set(names):
        wrong = sorted(given.keys() ^ set(names))
        raise ValueError(
            f"clipping.thresholds: {wrong} missing or unknown, expected a number for each of {list(names)}"
        )
    return {name: jnp.float32(given[name]) for name in names}


def sensitivity(clip_norm: float, thresholds: Thresholds) -> float | jax.Array:
    """The most by which one example, added or taken away, changes the sum: C, or sqrt(sum_k C_k^2)."""
    if not thresholds:
        return clip_norm
    return jnp.sqrt(sum((jnp.square(c) for c in thresholds.values()), start=jnp.zeros(())))


def noise_stddev(recipe: DPSGD, thresholds: Thresholds, params: Params) -> float | PyTree:
    """The standard deviation of the noise on the sum, one number or a tree of them as the parameters that are trained.

    Guarantees:
      The sum with this noise, and the counts with theirs where thresholds adapt, are a Gaussian mechanism with
      `recipe.noise_multiplier`: also for "equal" allocation, since sum_k |g_k|^2 / (K C_k^2) <= 1 for each example.
    """
    multiplier = recipe.clipping.gradient_noise(recipe.noise_multiplier)
    if not thresholds:
        return multiplier * recipe.clip_norm
    if recipe.clipping.allocation == "shared":
        stddev = multiplier * sensitivity(recipe.clip_norm, thresholds)
        return jax.tree.map(lambda _: stddev, params)
    scale = multiplier * math.sqrt(len(thresholds))
    return unflatten_dict({path: scale * thresholds["/".join(path[:-1])] for path in flatten_dict(params)})


def next_thresholds(
    recipe: DPSGD, thresholds: Thresholds, counts: Mapping[str, jax.Array], expected_batch: float, key: jax.Array
) -> dict[str, jax.Array]:
    """The thresholds after a step: moved towards the quantile by a geometric update on noisy counts.

    Args:
      recipe: Its clipping is "adaptive".
      thresholds: C_k of the step.
      counts: By layer, the sum over the batch's examples of 1/2 for a norm of at most C_k and -1/2 for a larger one.
      expected_batch: The batch size that is expected, which is no secret.
      key: Of the noise on the counts.

    Returns:
      C_k exp(-learning_rate (share - quantile)), the share of norms up to C_k by the noisy count.
    """
    clipping, names = recipe.clipping, sorted(thresholds)
    noise = clipping.count_noise(recipe.noise_multiplier, len(names)) * jax.random.normal(key, (len(names),))
    shares = [(counts[name] + noise[i]) / expected_batch + 0.5 for i, name in enumerate(names)]
    pairs = zip(names, shares, strict=True)
    return {k: thresholds[k] * jnp.exp(-clipping.learning_rate * (share - clipping.quantile)) for k, share in pairs}


def require_counts(recipe: DPSGD, num_layers: int, expected_batch: float) -> None:
    """Refuse thresholds that would follow noise alone.

    Args:
      recipe: Its clipping is "adaptive".
      num_layers: K, of those that are trained.
      expected_batch: As of `next_thresholds`.

    Raises:
      ValueError: The noise on a share of norms, a number in [0, 1], has a standard deviation above 1.
    """
    noise = recipe.clipping.count_noise(recipe.noise_multiplier, num_layers) / expected_batch
    if noise > 1:
        raise ValueError(
            f"clipping.budget: got {recipe.clipping.budget:g}, with which the noise on each layer's share of norms "
            f"below its threshold has standard deviation {noise:.3g}, expected at most 1: a larger budget or larger "
            "batches, or thresholds would follow noise"
        )


def clipped_sum(
    model: nn.Module,
    loss: LogitLoss,
    trained: Params,
    frozen: Params,
    copies: jax.Array,
    labels: jax.Array,
    mask: jax.Array,
    *,
    clip_norm: float,
    thresholds: Thresholds,
    by_layer: bool | None = None,
) -> tuple[Params, dict[str, jax.Array]]:
    """The sum of the clipped gradients of a microbatch.

    Args:
      model: The network; an example's logits depend on no other example.
      loss: Logits [K, classes] of an example's copies, and its label -> the example's loss.
      trained: The parameters to take gradients by, as `split` returns them.
      frozen: The others.
      copies: [batch, K, height, width, channels].
      labels: [batch], or [batch, classes] of probabilities, as the loss takes them.
      mask: bool [batch]; rows with False pad the batch to its fixed shape.
      clip_norm: C, of flat clipping.
      thresholds: C_k by layer; none for flat clipping.
      by_layer: Which way; None for by layer where the network comes apart, which is faster.

    Returns:
      sum_i mask_i clip(grad loss_i), a tree as `trained`; and for each layer the count of `next_thresholds`.

    Guarantees:
      Adding or removing an example changes the sum by at most `sensitivity`, and the part of layer k by at most C_k.
      Both ways agree up to rounding. The derivative is that of the way by example; counts have none.
    """
    names = _layer_names(trained) if thresholds else ()

    def by_example(
        params: Params, rest: Params, x: jax.Array, y: jax.Array, keep: jax.Array, bounds: Thresholds
    ) -> tuple[Params, dict[str, jax.Array]]:
        def of_example(p: Params, image: jax.Array, label: jax.Array, rest: Params) -> jax.Array:
            return loss(models.apply(model, merge(p, rest), image), label)

        if not bounds:
            total = dpsgd.clipped_gradient_sum(lambda p, a, b: of_example(p, a, b, rest), params, x, y, keep, clip_norm)
            return total, {}
        gradient = gradients.grad(of_example)

        def one(image: jax.Array, label: jax.Array, keep: jax.Array) -> tuple[Params, dict[str, jax.Array]]:
            parts = {name: split(g, [name])[0] for g in [gradient(params, image, label, rest)] for name in names}
            norms = {name: dpsgd.global_norm(part) for name, part in parts.items()}
            clipped = unflatten_dict(
                {k: v for name, part in parts.items() for k, v in flatten_dict(dpsgd.clip(part, bounds[name])).items()}
            )
            counts = {name: jnp.where(keep, jnp.where(norms[name] <= bounds[name], 0.5, -0.5), 0) for name in names}
            return jax.tree.map(lambda g: jnp.where(keep, g, 0), clipped), counts

        return jax.tree.map(lambda g: g.sum(axis=0), jax.vmap(one)(x, y, keep))

    args = (trained, frozen, copies, labels, mask, thresholds)
    if by_layer is None:
        by_layer = _comes_apart(model, copies.shape[2:])
    if not by_layer:
        return by_example(*args)
    fast = partial(_by_layer, model, loss, clip_norm)
    with_pull_back = jax.custom_vjp(fast)
    with_pull_back.defvjp(lambda *args: (fast(*args), args), partial(_pull_back, by_example))
    return with_pull_back(*args)


def _by_layer(
    model: nn.Module,
    loss: LogitLoss,
    clip_norm: float,
    trained: Params,
    frozen: Params,
    copies: jax.Array,
    labels: jax.Array,
    mask: jax.Array,
    thresholds: Thresholds,
) -> tuple[Params, dict[str, jax.Array]]:
    """`clipped_sum` without any example's gradient of the whole network."""

    def total(logits: jax.Array) -> jax.Array:
        return jax.vmap(loss)(logits, labels).sum()

    names = _layer_names(trained)
    copies = jnp.where(mask.reshape(-1, *[1] * (copies.ndim - 1)), copies, 0)  # a row of padding may be anything
    taken = layer_gradients.take_apart(model, merge(trained, frozen), copies, total, names)
    if not thresholds:
        return taken.clip_together(lambda squares: jnp.where(mask, _factor(squares, clip_norm), 0)), {}
    factor = {name: lambda square, name=name: _factor(square, thresholds[name]) for name in names}
    summed, squares = taken.clip_while_summing(factor, mask)
    within = {name: jnp.where(squares[name] <= jnp.square(thresholds[name]), 0.5, -0.5) for name in names}
    return summed, {name: jnp.where(mask, half, 0).sum() for name, half in within.items()}


def _pull_back(f: Callable[..., Any], args: tuple[Any, ...], v: Any) -> tuple[Any, ...]:
    """The pull-back of a function at its arguments; what is not floating point has none."""
    cotangents = jax.vjp(f, *args)[1](v)
    return tuple(
        jax.tree.map(lambda a, c: c if jnp.issubdtype(a.dtype, jnp.inexact) else None, arg, cotangent)
        for arg, cotangent in zip(args, cotangents, strict=True)
    )


def _factor(square: jax.Array, bound: float | jax.Array) -> jax.Array:
    """What clips a gradient of this squared norm to the bound."""
    exceeds = square > jnp.square(bound)
    return jnp.where(exceeds, bound * jax.lax.rsqrt(jnp.where(exceeds, square, 1.0)), 1.0)


def _layer_names(params: Params) -> list[str]:
    """The paths of the layers that own parameters of a tree."""
    return sorted({"/".join(path[:-1]) for path in flatten_dict(params)})


def _comes_apart(model: nn.Module, image_shape: Sequence[int]) -> bool:
    """Whether gradients can be had layer by layer."""
    try:
        layer_gradients.layers(model, tuple(image_shape))
    except ValueError:
        return False
    return True
