"""Layers, and the form in which the gradient of one example by each is cheap: products of its inputs and derivatives.

    layer = layer_of(module)
    squares = layer.squared_norms(params, x, d)  # [batch], without the gradients where that is cheaper

References:
  Goodfellow 2015, arXiv 1510.01799; Li et al. 2022, arXiv 2110.05679 (ghost norms).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from metacanary import model_layers

PyTree = Any
Params = Any
Raw = Any

SMALL = 4096
"""Parameters up to which a layer's gradients of all examples of a microbatch are made at once, and kept."""


@dataclass(frozen=True)
class Layer:
    """A module with parameters of its own, and no others below it; any that maps [batch, ...] to [batch, ...].

    Attributes:
      module: Unbound: it is given its parameters.

    Subclasses compute the gradient of one example in a raw form that is cheaper than that by the parameters; raw
    gradients can be added and scaled like gradients.
    """

    module: nn.Module

    def gradient(self, params: Params, x: jax.Array, d: jax.Array) -> Raw:
        """The raw gradient of one example, of inputs [K, ...] and derivatives by the outputs [K, ...] of its copies."""
        return jax.vjp(lambda p: self.module.apply({"params": p}, x), params)[1](d)[0]

    def gradients(self, params: Params, x: jax.Array, d: jax.Array) -> Raw:
        """The raw gradients of all examples, from [batch, K, ...] each; batch is the first axis of each leaf."""
        return jax.vmap(partial(self.gradient, params))(x, d)

    def squared_norm(self, params: Params, raw: Raw) -> jax.Array:
        """The squared norm of the gradient by the parameters whose raw form this is."""
        return _squared(raw)

    def squared_norms(self, params: Params, x: jax.Array, d: jax.Array) -> jax.Array:
        """The squared norms [batch] of the gradients of examples, from [batch, K, ...] each."""
        if is_small(params):
            return jax.vmap(partial(self.squared_norm, params))(self.gradients(params, x, d))
        return _each(lambda xi, di: self.squared_norm(params, self.gradient(params, xi, di)), x, d)

    def norms_need_gradients(self, x: Sequence[int], d: Sequence[int]) -> bool:
        """Whether `squared_norms` makes the gradients, for arrays of these shapes."""
        return True

    def pull_back(self, params: Params, raw: Raw) -> Params:
        """The gradient by the parameters."""
        return raw


@dataclass(frozen=True)
class Dense(Layer):
    """`flax.linen.Dense`: an outer product, whose norm is the product of norms where there is one copy of a vector."""

    def gradient(self, params: Params, x: jax.Array, d: jax.Array) -> Raw:
        return _with_bias(params, jnp.einsum("...i,...o->io", x, d), d)

    def squared_norms(self, params: Params, x: jax.Array, d: jax.Array) -> jax.Array:
        if self.norms_need_gradients(x.shape, d.shape):
            return super().squared_norms(params, x, d)
        total = jnp.sum(_gram(x) * _gram(d), axis=(1, 2))
        return total + _squared_sums(d) if "bias" in params else total

    def norms_need_gradients(self, x: Sequence[int], d: Sequence[int]) -> bool:
        """On pixels, of which there are many, where a product of Gram matrices would cost more."""
        return len(x) > 3


@dataclass(frozen=True)
class Convolution(Layer):
    """`model_layers.Conv3x3`: derivatives by outputs times patches of inputs; raw kernels are [features, patch].

    Where the picture has few pixels beside its channels the norm is that of two Gram matrices (the ghost norm), and no
    gradient is made at all.
    """

    size: int = 3
    stride: int = 1

    def gradient(self, params: Params, x: jax.Array, d: jax.Array) -> Raw:
        def of_copy(xi: jax.Array, di: jax.Array) -> jax.Array:
            # In this order, [features, pixels] times [pixels, patch], twice as fast on CPUs for large pictures.
            return di.reshape(-1, di.shape[-1]).T @ _patches(xi[None], self.size, self.stride)[0]

        kernel = of_copy(x[0], d[0])
        if len(x) > 1:  # one copy's patches at a time
            rest = (x[1:], d[1:])
            kernel, _ = jax.lax.scan(lambda total, xd: (total + of_copy(*xd), None), kernel, rest)
        return _with_bias(params, kernel, d)

    def gradients(self, params: Params, x: jax.Array, d: jax.Array) -> Raw:
        if not is_small(params):
            return super().gradients(params, x, d)
        kernel = jnp.einsum("bpf,bpq->bfq", _by_pixel(d), self._patches_of(x))
        return {"kernel": kernel} | ({"bias": _by_pixel(d).sum(axis=1)} if "bias" in params else {})

    def pull_back(self, params: Params, raw: Raw) -> Params:
        return {**raw, "kernel": raw["kernel"].T.reshape(params["kernel"].shape)}

    def _patches_of(self, x: jax.Array) -> jax.Array:
        """The patches of all copies of each example, [batch, K * pixels, patch]."""
        patches = _patches(x.reshape(-1, *x.shape[2:]), self.size, self.stride)
        return patches.reshape(len(x), -1, patches.shape[-1])

    def squared_norms(self, params: Params, x: jax.Array, d: jax.Array) -> jax.Array:
        if self.norms_need_gradients(x.shape, d.shape):
            return super().squared_norms(params, x, d)
        total = jnp.sum(_gram(self._patches_of(x)) * _gram(_by_pixel(d)), axis=(1, 2))
        return total + _squared_sums(_by_pixel(d)) if "bias" in params else total

    def norms_need_gradients(self, x: Sequence[int], d: Sequence[int]) -> bool:
        return not self.is_ghost_cheaper(x, d)

    def is_ghost_cheaper(self, x: Sequence[int], d: Sequence[int]) -> bool:
        """Whether Gram matrices cost fewer multiplications than the gradients, for [batch, K, height, width, c]."""
        pixels, patch, features = math.prod(d[1:-1]), self.size**2 * x[-1], d[-1]
        return pixels * (patch + features) < patch * features


@dataclass(frozen=True)
class StandardisedConvolution(Convolution):
    """`model_layers.WeightStandardisedConv`; raw is the gradient by the standardised kernel.

    The gradient by the kernel itself is, filter by filter, the raw one without its mean and without its part along the
    standardised filter, scaled: so its norm needs no second array of the kernel's size for each example. The parts are
    taken out before squares are summed, since differences of sums of squares would lose what is small.
    """

    def squared_norm(self, params: Params, raw: Raw) -> jax.Array:
        g, kernel = raw["kernel"], params["kernel"].reshape(-1, params["kernel"].shape[-1]).T
        mean, total = (partial(f, axis=1, keepdims=True) for f in (jnp.mean, jnp.sum))
        centred = kernel - mean(kernel)
        squares = total(jnp.square(centred))
        scale = jax.lax.rsqrt(jnp.maximum(squares, model_layers.LEAST_SQUARE))
        unit = centred * scale
        along = total(g * unit)
        # Where the clamp holds the scale does not depend on the kernel, and nothing is taken out.
        rest = g - mean(g) - jnp.where(squares > model_layers.LEAST_SQUARE, along, 0.0) * unit
        by_kernel = jnp.sum(jnp.square(params["gain"][:, None] * scale * rest))
        return by_kernel + jnp.sum(jnp.square(along)) + jnp.sum(jnp.square(raw["bias"]))

    def pull_back(self, params: Params, raw: Raw) -> Params:
        _, pull = jax.vjp(model_layers.standardise, params["kernel"], params["gain"])
        by_kernel, by_gain = pull(super().pull_back(params, raw)["kernel"])
        return {"kernel": by_kernel, "gain": by_gain, "bias": raw["bias"]}

    def is_ghost_cheaper(self, x: Sequence[int], d: Sequence[int]) -> bool:
        """Never: what a filter loses along its mean and itself is not seen in Gram matrices."""
        return False


def layer_of(module: nn.Module) -> Layer:
    """What is known of a module: its gradients' form, or that of any module."""
    if type(module) is nn.Dense:
        return Dense(module)
    if type(module) is model_layers.Conv3x3:
        return Convolution(module)
    if type(module) is model_layers.WeightStandardisedConv:
        return StandardisedConvolution(module, size=module.kernel_size, stride=module.stride)
    return Layer(module)


def is_small(params: Params) -> bool:
    """Whether a layer's raw gradients of all examples of a microbatch are kept, since they stay in cache."""
    return sum(x.size for x in jax.tree.leaves(params)) <= SMALL


def _each(f: Callable[..., Any], *rows: jax.Array) -> Any:
    """What f returns for each row: at once on GPUs, one after the other on CPUs."""
    return jax.vmap(f)(*rows) if jax.default_backend() != "cpu" else jax.lax.map(lambda row: f(*row), rows)


def _squared(tree: PyTree) -> jax.Array:
    """Squared norm over all leaves."""
    return sum((jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree)), start=jnp.zeros(()))


def _by_pixel(d: jax.Array) -> jax.Array:
    """[batch, K, height, width, c] as [batch, K * pixels, c]."""
    return d.reshape(len(d), -1, d.shape[-1])


def _squared_sums(d: jax.Array) -> jax.Array:
    """Squared norm [batch] of the gradient by a bias, from [batch, rows, features]."""
    return jnp.sum(jnp.square(d.sum(axis=1)), axis=1)


def _gram(y: jax.Array) -> jax.Array:
    """Products of all pairs of rows, [batch, rows, features] -> [batch, rows, rows]."""
    return jnp.einsum("bsf,btf->bst", y, y)


def _with_bias(params: Params, kernel: jax.Array, d: jax.Array) -> Raw:
    """The gradient by a kernel, and by a bias if there is one."""
    bias = {"bias": d.sum(axis=tuple(range(d.ndim - 1)))} if "bias" in params else {}
    return {"kernel": kernel, **bias}


def _patches(x: jax.Array, size: int, stride: int) -> jax.Array:
    """The inputs of each output pixel under "same" padding, [n, h, w, c] -> [n, pixels, size * size * c]."""
    n, height, width, channels = x.shape
    pads = jax.lax.padtype_to_pads((height, width), (size, size), (stride, stride), "SAME")
    padded = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    rows, columns = -(-height // stride), -(-width // stride)
    shifts = [
        padded[:, i : i + (rows - 1) * stride + 1 : stride, j : j + (columns - 1) * stride + 1 : stride]
        for i in range(size)
        for j in range(size)
    ]
    return jnp.concatenate(shifts, axis=-1).reshape(n, rows * columns, size * size * channels)
