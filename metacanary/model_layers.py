"""What the networks are made of: convolutions, GroupNorm, pools, activations, written to be differentiated twice.

A metagradient takes the VJP of a gradient, DP-SGD each example's gradient. XLA's CPU backend compiles the usual forms
of both badly: it loops over a convolution inside a scan, and puts an activation into the sum of a pool, which is then
not vectorised. The forms here give the same finite values up to rounding. GPUs get `lax.conv` by `as_matmul=False`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

SHORT = 16
"""Numbers in a row of pixels, and features, up to which a convolution by rows is faster on CPUs."""
NARROW = 32
"""Channels up to which averaging by a product with a matrix is faster on CPUs."""
LEAST_SQUARE = 1e-4
"""A filter's squared norm below which standardising leaves it short."""
_GELU_SCALE = math.sqrt(2 / math.pi)  # u'(0)


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """x / 2 (1 + tanh(u)) with u = sqrt(2 / pi) (x + 0.044715 x^3): arXiv 1606.08415, Section 2, as `flax.linen.gelu`.

    Its first two derivatives are closed forms: with those that JAX derives the VJP of the demo network's gradient takes
    a fifth to a third longer on a CPU.
    """
    return 0.5 * x * (1 + _gelu_tanh(x)[0])


@jax.custom_jvp
def _gelu_slope(x: jax.Array) -> jax.Array:
    """The first derivative: (1 + t) / 2 + x / 2 (1 - t^2) u'."""
    t, slope = _gelu_tanh(x)
    return 0.5 * (1 + t) + 0.5 * x * ((1 - t * t) * slope)


def _gelu_curvature(x: jax.Array) -> jax.Array:
    """The second derivative: (1 - t^2) u' + x / 2 (1 - t^2) (u'' - 2 t u'^2), where x u'' = 2 (u' - u'(0))."""
    t, slope = _gelu_tanh(x)
    bell = (1 - t * t) * slope  # vanishes before a power of a large x overflows
    return 2 * bell - (1 - t * t) * _GELU_SCALE - x * t * (bell * slope)


def _gelu_tanh(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """t = tanh(u), and u'."""
    cube = 0.044715 * x * x
    return jnp.tanh(_GELU_SCALE * x * (1 + cube)), _GELU_SCALE * (1 + 3 * cube)


gelu.defjvp(lambda primals, tangents: (gelu(*primals), _gelu_slope(*primals) * tangents[0]))
_gelu_slope.defjvp(lambda primals, tangents: (_gelu_slope(*primals), _gelu_curvature(*primals) * tangents[0]))

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"relu": nn.relu, "gelu": gelu, "celu": nn.celu}


class Conv3x3(nn.Module):
    """A 3x3 convolution with "same" padding, written as shifted slices and one matrix product (`convolve`).

    On CPUs the per-example gradient and the VJP of the gradient of this form are two to three times faster
    than those of `lax.conv`; with `as_matmul=False` it is `flax.linen.Conv` (what a GPU's kernels are made for).
    """

    features: int
    use_bias: bool = True
    as_matmul: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (3, 3, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(in_axis=(0, 1, 2)), shape, jnp.float32)
        y = convolve(x, kernel, as_matmul=self.as_matmul)
        if not self.use_bias:
            return y
        return y + by_channel(self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32))


def convolve(x: jax.Array, kernel: jax.Array, *, stride: int = 1, as_matmul: bool) -> jax.Array:
    """Convolve [b, h, w, c] with a square kernel [k, k, c, f] of odd k under "same" padding.

    As a matrix product it is one of the pixels around each pixel with the kernel; of whole rows where these are short.
    """
    if not as_matmul or stride != 1:
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=dims)
    size, _, channels, features = kernel.shape
    half, (height, width) = size // 2, x.shape[1:3]
    if width * channels <= SHORT and features <= SHORT:
        return _convolve_rows(x, kernel)
    padded = jnp.pad(x, ((0, 0), (half, half), (half, half), (0, 0)))
    shifts = [padded[:, i : i + height, j : j + width] for i in range(size) for j in range(size)]
    return jnp.concatenate(shifts, axis=-1) @ kernel.reshape(size * size * channels, features)


def _convolve_rows(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The same, of whole rows: a row of the result is a product of k rows of pixels with a matrix of bands.

    Slices of a picture of one channel are copied number by number, which takes longer than the matrix's zeros.
    """
    size, _, channels, features = kernel.shape
    (batch, height, width, _), half = x.shape, size // 2
    rows = jnp.pad(x, ((0, 0), (half, half), (0, 0), (0, 0)))
    rows = rows.reshape(batch, height + 2 * half, width * channels)
    rows = jnp.concatenate([rows[:, i : i + height] for i in range(size)], axis=-1)
    bands = jnp.stack([jnp.eye(width, k=half - j, dtype=kernel.dtype) for j in range(size)])
    matrix = jnp.einsum("juv,ijcf->iucvf", bands, kernel, precision=jax.lax.Precision.HIGHEST)
    return (rows @ matrix.reshape(-1, width * features)).reshape(batch, height, width, features)


class WeightStandardisedConv(nn.Module):
    """A convolution whose kernel has zero mean and unit variance over its fan-in, times a learnt gain."""

    features: int
    kernel_size: int = 3
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(in_axis=(0, 1, 2)), shape, jnp.float32)
        gain = self.param("gain", nn.initializers.ones, (self.features,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        kernel = standardise(kernel, gain)
        return convolve(x, kernel, stride=self.stride, as_matmul=False) + by_channel(bias)


def standardise(kernel: jax.Array, gain: jax.Array) -> jax.Array:
    """A kernel [k, k, c, f] with zero mean and, up to tiny kernels, unit norm over its fan-in, times the gain [f]."""
    mean, variance = (f(kernel, axis=(0, 1, 2), keepdims=True) for f in (jnp.mean, jnp.var))
    fan_in = kernel.size // kernel.shape[-1]
    return (kernel - mean) * by_channel(gain) * jax.lax.rsqrt(jnp.maximum(variance * fan_in, LEAST_SQUARE))


class GroupNorm(nn.Module):
    """Group normalisation (arXiv 1803.08494), with flax's parameters and epsilon and, up to rounding, its results.

    Written so that its second derivatives are fast on CPUs: the mean and variance of each group are sums over the
    picture and one product with a matrix that averages within groups, instead of reshapes of the whole feature map.
    """

    num_groups: int
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        _, height, width, channels = x.shape
        size, rest = divmod(channels, self.num_groups)
        if rest:
            raise ValueError(f"groups: got {self.num_groups}, expected a divisor of the {channels} channels")
        scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        same_group = jnp.kron(jnp.eye(self.num_groups, dtype=x.dtype), jnp.ones((size, size), x.dtype))

        def average(y: jax.Array) -> jax.Array:
            total = jnp.matmul(y.sum(axis=(1, 2)), same_group, precision=jax.lax.Precision.HIGHEST)
            return (total / (height * width * size))[:, None, None, :]

        centred = x - average(x)
        factor = jax.lax.rsqrt(average(jnp.square(centred)) + self.epsilon) * by_channel(scale)
        return centred * factor + by_channel(bias)


def average_pool(x: jax.Array) -> jax.Array:
    """Halve height and width by averaging 2x2 squares; an odd last row or column is dropped.

    Of few channels by a product, so that XLA computes the activation before it once and vectorised, and not in the sum.
    """
    squares = _squares(x)
    channels = x.shape[-1]
    if channels > NARROW:
        return squares.mean(axis=(2, 4))
    columns = (squares[:, :, 0] + squares[:, :, 1]).reshape(*squares.shape[:2], squares.shape[3], 2 * channels)
    average = jnp.tile(jnp.eye(channels, dtype=x.dtype), (2, 1)) / 4
    return jnp.matmul(columns, average, precision=jax.lax.Precision.HIGHEST)


def max_pool(x: jax.Array) -> jax.Array:
    """Halve height and width by the largest value of 2x2 squares; an odd last row or column is dropped.

    Its derivative is shared evenly by values that are equally large. By squares, not by `lax.reduce_window`, whose
    gradient and VJP of the gradient take about three times as long on CPUs.
    """
    return _squares(x).max(axis=(2, 4))


def _squares(x: jax.Array) -> jax.Array:
    """Cut [b, h, w, c] into 2x2 squares, [b, h // 2, 2, w // 2, 2, c]."""
    b, h, w, c = x.shape
    if min(h, w) < 2:
        raise ValueError(f"image size: got a {h}x{w} feature map to halve, expected larger images or fewer layers")
    return x[:, : h // 2 * 2, : w // 2 * 2].reshape(b, h // 2, 2, w // 2, 2, c)


POOLS: dict[str, Callable[[jax.Array], jax.Array]] = {"average": average_pool, "max": max_pool}


def activate(x: jax.Array, activation: str, group_norm: int, norm_after_activation: bool) -> jax.Array:
    """An activation with GroupNorm before or after it, or without if `group_norm` is 0; within a compact module."""
    act, norm = ACTIVATIONS[activation], GroupNorm(group_norm) if group_norm else lambda y: y
    return norm(act(x)) if norm_after_activation else act(norm(x))


def normalise(x: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Pixels in [0, 1] to zero mean and unit deviation by channel."""
    return (x - by_channel(jnp.asarray(mean, x.dtype))) / by_channel(jnp.asarray(std, x.dtype))


def by_channel(vector: jax.Array) -> jax.Array:
    """A vector over channels as [1, 1, 1, c]; ranks are never promoted silently."""
    return vector.reshape(1, 1, 1, -1)
