"""Gradients of examples, layer by layer, in one backward pass: their norms, and sums in which each has a factor.

A per-example gradient of a whole model is what makes DP-SGD slow and large, and it is never needed: clipping needs its
norm, and then a weighted sum. The backward pass to the layers' outputs gives for each layer what went in, x, and the
derivative of the loss by what came out, d; from these two the gradient of example i by the layer's own parameters is a
product of small matrices. So that one layer's gradient of one example (on GPUs, and of small layers: of one microbatch)
is all that is held.

    taken = take_apart(model, params, copies, loss)  # one forward and one backward pass
    squares = taken.squared_norms()  # {layer: [batch]}
    total = taken.weighted_sum({layer: factors for layer in squares})  # a tree as params

`clip_while_summing` of the same object does both at once, for factors that depend on the layer's own norm alone.

References:
  Goodfellow 2015, arXiv 1510.01799; Li et al. 2022, arXiv 2110.05679 (ghost norms); Bu et al. 2023, arXiv 2210.00038
  (book-keeping: one backward pass); He et al. 2023, arXiv 2212.01539 (per-layer clipping during the backward pass).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from metacanary import models
from metacanary.layer_forms import Layer, Raw, is_small, layer_of

PyTree = Any
Params = Any
LossFn = Callable[[jax.Array], jax.Array]


@cache
def layers(model: nn.Module, image_shape: tuple[int, ...]) -> dict[str, Layer]:
    """The layers of a model by the path of their parameters, in the order in which they are called.

    Args:
      model: The network.
      image_shape: [height, width, channels].

    Raises:
      ValueError: If the model's gradients cannot be had layer by layer: parameters that belong to no single call of a
        module with one argument, or a layer that does not keep the batch as the first axis of what it returns.
    """
    found: dict[str, Layer] = {}
    called: list[str] = []
    batch = 4099  # No array is made; a prime that no other axis has.

    def look(next_fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
        module, name, is_call = context.module, "/".join(context.module.path), context.method_name == "__call__"
        if is_call:
            called.append(name)
        y = next_fun(*args, **kwargs)
        own = module.scope is not None and any(hasattr(v, "shape") for v in module.variables.get("params", {}).values())
        # Another method may use the parameters as a part of the call, and nowhere else.
        if own and (is_call or (context.method_name != "setup" and name not in called)):
            shapes = [getattr(v, "shape", ())[:1] for v in (*args, y)]
            once = is_call and name not in found and not kwargs and shapes == [(batch,), (batch,)]
            if not once or any(isinstance(v, Mapping) for v in module.variables["params"].values()):
                what = f"model {type(model).__name__}: layer {name!r}"
                raise ValueError(f"{what} is no function of one batch that is called once")
            found[name] = layer_of(module.clone(parent=None, name=None))
        if is_call:
            called.remove(name)
        return y

    shape = jax.ShapeDtypeStruct((batch, *image_shape), jnp.float32)
    params = jax.eval_shape(partial(models.init, model, image_shape=image_shape), jax.random.key(0))
    with nn.intercept_methods(look):
        jax.eval_shape(partial(models.apply, model), params, shape)
    missing = {"/".join(path[:-1]) for path in flatten_dict(params)} - found.keys()
    if missing:
        raise ValueError(f"model {type(model).__name__}: parameters of {sorted(missing)} belong to no layer")
    return found


@dataclass(frozen=True)
class Taken:
    """What one forward and one backward pass leave of each layer.

    Attributes:
      layers: By path.
      params: Of each layer.
      inputs: Of each layer, [batch, K, ...].
      derivatives: Of the loss by each layer's outputs, [batch, K, ...].
    """

    layers: Mapping[str, Layer]
    params: Mapping[str, Params]
    inputs: Mapping[str, jax.Array]
    derivatives: Mapping[str, jax.Array]

    def squared_norms(self) -> dict[str, jax.Array]:
        """The squared norms [batch] of the examples' gradients by the parameters of each layer."""
        return {name: layer.squared_norms(*self._of(name)) for name, layer in self.layers.items()}

    def weighted_sum(self, factors: Mapping[str, jax.Array]) -> Params:
        """The sum of the examples' gradients, each times its factor of the layer.

        Args:
          factors: [batch] for each layer.

        Returns:
          A tree as the model's parameters, of the layers that were taken.
        """
        return _as_tree({name: self._weighted(name, factors[name]) for name in self.layers})

    def clip_together(self, factor: Callable[[jax.Array], jax.Array]) -> Params:
        """As `weighted_sum`, by factors that are a function of the norm over all layers.

        Gradients of small layers whose norms need them are made once, for the norm and for the sum.

        Args:
          factor: Squared norms [batch] -> factors [batch].
        """
        raws = {
            name: layer.gradients(*self._of(name))
            for name, layer in self.layers.items()
            if is_small(self.params[name])
            and layer.norms_need_gradients(self.inputs[name].shape, self.derivatives[name].shape)
        }
        squares = jnp.zeros(())
        for name, layer in self.layers.items():
            if name in raws:
                squares = squares + jax.vmap(partial(layer.squared_norm, self.params[name]))(raws[name])
            else:
                squares = squares + layer.squared_norms(*self._of(name))
        factors = factor(squares)
        sums = {
            name: self._weighted_raws(name, raws[name], factors) if name in raws else self._weighted(name, factors)
            for name in self.layers
        }
        return _as_tree(sums)

    def clip_while_summing(
        self, factor: Mapping[str, Callable[[jax.Array], jax.Array]], mask: jax.Array
    ) -> tuple[Params, dict[str, jax.Array]]:
        """As `weighted_sum`, by factors that are functions of the layer's own squared norm.

        Args:
          factor: For each layer, squared norm [] -> factor [].
          mask: bool [batch]; other examples are left out, whatever their gradients are.

        Returns:
          The sum, and the squared norms [batch] of each layer.
        """
        sums, squares = {}, {}
        for name, layer in self.layers.items():
            params, x, d = self._of(name)
            if not layer.norms_need_gradients(x.shape, d.shape):
                squares[name] = layer.squared_norms(params, x, d)
                sums[name] = self._weighted(name, jnp.where(mask, factor[name](squares[name]), 0), mask)
                continue
            if is_small(self.params[name]):
                raws = layer.gradients(params, x, d)
                squares[name] = jax.vmap(partial(layer.squared_norm, params))(raws)
                raws = jax.tree.map(lambda g: jnp.where(mask.reshape(-1, *[1] * (g.ndim - 1)), g, 0), raws)
                sums[name] = self._weighted_raws(name, raws, jnp.where(mask, factor[name](squares[name]), 0))
                continue

            def scaled(
                xi: jax.Array,
                di: jax.Array,
                keep: jax.Array,
                layer: Layer = layer,
                params: Params = params,
                name: str = name,
            ) -> tuple[Raw, jax.Array]:
                raw = layer.gradient(params, xi, di)
                square = layer.squared_norm(params, raw)
                return jax.tree.map(lambda g: jnp.where(keep, g * factor[name](square), 0), raw), square

            raw, squares[name] = _sum_each(scaled, x, d, mask)
            sums[name] = layer.pull_back(params, raw)
        return _as_tree(sums), squares

    def _weighted(self, name: str, factors: jax.Array, mask: jax.Array | None = None) -> Params:
        """The weighted sum of the gradients by a layer, of all examples or those of a mask, as one pull-back."""
        params, x, d = self._of(name)
        if mask is not None:
            x, d = (jnp.where(mask.reshape(-1, *[1] * (y.ndim - 1)), y, 0) for y in (x, d))
        scaled = d * factors.reshape(-1, *[1] * (d.ndim - 1))
        x, scaled = (y.reshape(-1, *y.shape[2:]) for y in (x, scaled))
        return jax.vjp(lambda p: self.layers[name].module.apply({"params": p}, x), params)[1](scaled)[0]

    def _weighted_raws(self, name: str, raws: Raw, factors: jax.Array) -> Params:
        """The same of raw gradients that are there."""
        summed = jax.tree.map(lambda g: jnp.tensordot(factors, g, axes=1), raws)
        return self.layers[name].pull_back(self.params[name], summed)

    def _of(self, name: str) -> tuple[Params, jax.Array, jax.Array]:
        return self.params[name], self.inputs[name], self.derivatives[name]


def take_apart(
    model: nn.Module, params: Params, copies: jax.Array, loss: LossFn, only: Sequence[str] | None = None
) -> Taken:
    """Run a model forwards and backwards to the outputs of its layers.

    Args:
      model: The network; an example's logits depend on no other example.
      params: Its parameters.
      copies: [batch, K, height, width, channels], the K copies of each example.
      loss: Logits [batch, K, classes] -> the sum of the examples' losses.
      only: The paths of layers that are wanted; None for all.

    Returns:
      What their gradients are made of.

    Raises:
      ValueError: As `layers`.
    """
    every = layers(model, copies.shape[2:])
    chosen = {name: every[name] for name in (every if only is None else only)}
    flat = copies.reshape(-1, *copies.shape[2:])

    def run(taps: dict[str, jax.Array] | None) -> tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]:
        """Logits, and inputs and outputs by layer; a tap is added to the output of its layer."""
        inputs, outputs = {}, {}

        def tap(next_fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
            y, name = next_fun(*args, **kwargs), "/".join(context.module.path)
            if context.method_name != "__call__" or name not in chosen:
                return y
            y = y if taps is None else y + taps[name]
            inputs[name], outputs[name] = args[0], y
            return y

        with nn.intercept_methods(tap):
            return models.apply(model, params, flat), inputs, outputs

    def total(taps: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        logits, inputs, _ = run(taps)
        return loss(logits.reshape(*copies.shape[:2], -1)), inputs

    zeros = jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), jax.eval_shape(partial(run, None))[2])
    derivatives, inputs = jax.grad(total, has_aux=True)(zeros)
    split = partial(jax.tree.map, lambda y: y.reshape(*copies.shape[:2], *y.shape[1:]))
    own: dict[str, Params] = {name: {} for name in chosen}
    for path, leaf in flatten_dict(params).items():
        own.get("/".join(path[:-1]), {})[path[-1]] = leaf
    return Taken(layers=chosen, params=own, inputs=split(inputs), derivatives=split(derivatives))


def _as_tree(by_layer: Mapping[str, Params]) -> Params:
    """Layers' gradients by path as a tree."""
    leaves = {(*name.split("/"), key): leaf for name, own in by_layer.items() for key, leaf in own.items()}
    # The layer "" is the model itself.
    return unflatten_dict({path if path[0] else path[1:]: leaf for path, leaf in leaves.items()})


def _sum_each(f: Callable[..., tuple[Raw, jax.Array]], *rows: jax.Array) -> tuple[Raw, jax.Array]:
    """The sum over rows of the first thing that f returns, and the second of each row."""
    if jax.default_backend() != "cpu":
        first, second = jax.vmap(f)(*rows)
        return jax.tree.map(lambda x: x.sum(axis=0), first), second
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(f, *(r[0] for r in rows))[0])

    def add(total: Raw, row: tuple[jax.Array, ...]) -> tuple[Raw, jax.Array]:
        first, second = f(*row)
        return jax.tree.map(jnp.add, total, first), second

    return jax.lax.scan(add, zeros, rows)
