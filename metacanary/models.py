"""The audited and the meta-trained networks, as Flax Linen modules used as pure functions.

Every model maps images in the pixel domain [0, 1] to logits. The normalisation of the pixels is part of the
model, so that projecting a canary to [0, 1] always means projecting it to valid pixels. No model carries running
statistics: a parameter tree is all there is, and no example's output depends on another's (DP-SGD needs that).

    model = build("convnet", num_classes=10, widths=(16, 32))
    params = init(model, jax.random.key(0), image_shape=(16, 16, 1))
    logits = apply(model, params, images)  # [batch, height, width, channels] -> [batch, 10]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

Params = Any

FINAL_POOLS = ("average", "logsumexp", "max")
LEAST_SQUARE = 1e-4
"""A filter's squared norm below which standardising leaves it short."""

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"relu": nn.relu, "gelu": nn.gelu, "celu": nn.celu}


class Conv3x3(nn.Module):
    """A 3x3 convolution with "same" padding, written as nine shifted slices and one matrix product.

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
    """Convolve [b, h, w, c] with a square kernel [k, k, c, f] under "same" padding."""
    if not as_matmul or stride != 1:
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=dims)
    size, _, channels, features = kernel.shape
    half, (height, width) = size // 2, x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (half, half), (half, half), (0, 0)))
    shifts = [padded[:, i : i + height, j : j + width] for i in range(size) for j in range(size)]
    return jnp.concatenate(shifts, axis=-1) @ kernel.reshape(size * size * channels, features)


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
    """Halve height and width by averaging 2x2 squares; an odd last row or column is dropped."""
    return _squares(x).mean(axis=(2, 4))


def max_pool(x: jax.Array) -> jax.Array:
    """Halve height and width by the largest value of 2x2 squares; an odd last row or column is dropped.

    Its derivative is shared evenly by values that are equally large. Written as `average_pool` is: the gradient and
    the VJP of the gradient of `lax.reduce_window` take about three times as long on CPUs.
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


class ConvNet(nn.Module):
    """A small smooth network for small images: (convolution, activation, pool) per width, then linear.

    Average pooling, a smooth activation and scaled-down logits are what makes training metasmooth
    (arXiv 2503.13751, Section 3). `group_norm` > 0 puts a GroupNorm of so many groups before each activation, or
    with `norm_after_activation` behind it; `pool` is a name of POOLS.
    """

    num_classes: int
    widths: Sequence[int] = (16, 32)
    activation: str = "gelu"
    logit_scale: float = 1.0
    group_norm: int = 0
    norm_after_activation: bool = False
    pool: str = "average"
    mean: Sequence[float] = (0.5,)
    std: Sequence[float] = (0.5,)
    as_matmul: bool = True

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = normalise(images, self.mean, self.std)
        for width in self.widths:
            x = Conv3x3(width, as_matmul=self.as_matmul)(x)
            x = POOLS[self.pool](activate(x, self.activation, self.group_norm, self.norm_after_activation))
        x = x.reshape(x.shape[0], -1)
        return self.logit_scale * nn.Dense(self.num_classes)(x)


class ResNet9(nn.Module):
    """ResNet-9 in the metasmooth form of arXiv 2503.13751: normalisation before the activation, average pooling.

    Base widths 64, 128, 256, 512 are multiplied by `width`. GroupNorm stands in for batch normalisation.
    # Deviation: the paper's normalisation is not known to us; GroupNorm keeps each example's output its own.
    Each change that made it smooth can be undone: `group_norm` 0 takes the normalisations out (convolutions then have a
    bias), `norm_after_activation` moves them; `pool` halves the maps, a name of POOLS; `final_pool` is the last
    pooling, "average", "logsumexp" (at temperature 0.1) or "max".
    """

    num_classes: int
    width: float = 2.0
    activation: str = "gelu"
    logit_scale: float = 0.125
    group_norm: int = 8
    norm_after_activation: bool = False
    pool: str = "average"
    final_pool: str = "average"
    mean: Sequence[float] = (0.4914, 0.4822, 0.4465)
    std: Sequence[float] = (0.247, 0.2435, 0.2616)
    as_matmul: bool = False

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        pool = POOLS[self.pool]

        def block(x: jax.Array, features: float) -> jax.Array:
            x = Conv3x3(int(features), use_bias=not self.group_norm, as_matmul=self.as_matmul)(x)
            return activate(x, self.activation, self.group_norm, self.norm_after_activation)

        x = block(normalise(images, self.mean, self.std), 64 * self.width)
        x = pool(block(x, 128 * self.width))
        x = x + block(block(x, 128 * self.width), 128 * self.width)
        x = pool(block(x, 256 * self.width))
        x = pool(block(x, 512 * self.width))
        x = x + block(block(x, 512 * self.width), 512 * self.width)
        return self.logit_scale * nn.Dense(self.num_classes)(self._final_pool(x))

    def _final_pool(self, x: jax.Array) -> jax.Array:
        """[b, h, w, c] to [b, c]."""
        if self.final_pool == "average":
            return x.mean(axis=(1, 2))
        if self.final_pool == "max":
            return x.max(axis=(1, 2))
        return 0.1 * (jax.nn.logsumexp(x / 0.1, axis=(1, 2)) - jnp.log(x.shape[1] * x.shape[2]))


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


class WideResNet(nn.Module):
    """The wide residual network of De et al. 2022 (arXiv 2204.13650): WRN-`depth`-`width`.

    Weight-standardised convolutions, GroupNorm of 16 groups, and the order activation -> norm -> convolution.
    """

    num_classes: int
    depth: int = 16
    width: int = 4
    groups: int = 16
    logit_scale: float = 1.0
    mean: Sequence[float] = (0.5, 0.5, 0.5)
    std: Sequence[float] = (0.25, 0.25, 0.25)

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = WeightStandardisedConv(16)(normalise(images, self.mean, self.std))
        for stage, features in enumerate((16 * self.width, 32 * self.width, 64 * self.width)):
            for index in range((self.depth - 4) // 6):
                x = self._block(x, features, stride=2 if stage > 0 and index == 0 else 1)
        x = GroupNorm(self.groups)(nn.relu(x))
        return self.logit_scale * nn.Dense(self.num_classes)(x.mean(axis=(1, 2)))

    def _block(self, x: jax.Array, features: int, stride: int) -> jax.Array:
        """Two convolutions and a skip; the skip is a 1x1 convolution where the shape changes."""
        y = GroupNorm(self.groups)(nn.relu(x))
        changes = stride != 1 or x.shape[-1] != features
        skip = WeightStandardisedConv(features, kernel_size=1, stride=stride)(y) if changes else x
        y = WeightStandardisedConv(features, stride=stride)(y)
        y = GroupNorm(self.groups)(nn.relu(y))
        return WeightStandardisedConv(features)(y) + skip


_MODELS: dict[str, Callable[..., nn.Module]] = {
    "convnet": ConvNet,
    "resnet9": ResNet9,
    "wrn10_1": lambda **options: WideResNet(depth=10, width=1, **options),  # no paper's: for small machines
    "wrn16_4": lambda **options: WideResNet(depth=16, width=4, **options),
    "wrn40_4": lambda **options: WideResNet(depth=40, width=4, **options),
}


def names() -> list[str]:
    """The names that `build` knows."""
    return sorted(_MODELS)


def build(name: str, *, num_classes: int, **options: Any) -> nn.Module:
    """Build a model by name.

    Args:
      name: one of `names()`.
      num_classes: number of logits.
      **options: fields of the model's class; lists become tuples.

    Returns:
      A Flax Linen module: images [batch, height, width, channels] in [0, 1] -> logits [batch, num_classes].

    Raises:
      ValueError: unknown name, option, activation, pool or final pool.
    """
    if name not in _MODELS:
        raise ValueError(f"model name: got {name!r}, expected one of {', '.join(names())}")
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    for key, allowed in (("activation", ACTIVATIONS), ("pool", POOLS), ("final_pool", FINAL_POOLS)):
        if key in fields and fields[key] not in allowed:
            raise ValueError(f"{key}: got {fields[key]!r}, expected one of {', '.join(allowed)}")
    try:
        return _MODELS[name](num_classes=num_classes, **fields)
    except TypeError as error:
        raise ValueError(f"options of model {name}: {error}") from None


def init(model: nn.Module, key: jax.Array, image_shape: Sequence[int]) -> Params:
    """Draw initial float32 parameters for images of shape [height, width, channels]."""
    return _init(model, key, tuple(image_shape))


@partial(jax.jit, static_argnums=(0, 2))
def _init(model: nn.Module, key: jax.Array, image_shape: tuple[int, ...]) -> Params:
    """Compiled, so that the forward pass, of which only the shapes matter, is not run."""
    return model.init(key, jnp.zeros((1, *image_shape), jnp.float32))["params"]


def apply(model: nn.Module, params: Params, images: jax.Array) -> jax.Array:
    """Logits [batch, num_classes] of images [batch, height, width, channels] in [0, 1]."""
    return cast(jax.Array, model.apply({"params": params}, images))
