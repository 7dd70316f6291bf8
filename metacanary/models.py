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

from metacanary.model_layers import (
    ACTIVATIONS,
    POOLS,
    Conv3x3,
    GroupNorm,
    WeightStandardisedConv,
    activate,
    normalise,
)

Params = Any

FINAL_POOLS = ("average", "logsumexp", "max")


class ConvNet(nn.Module):
    """A small smooth network for small images: (convolution, activation, pool) per width, then linear.

    Average pooling, a smooth activation and scaled-down logits are what makes training metasmooth
    (arXiv 2503.13751, Section 3). `group_norm` > 0 puts a GroupNorm of so many groups before each activation, or
    with `norm_after_activation` behind it; `pool` is a name of `model_layers.POOLS`.
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
    bias), `norm_after_activation` moves them; `pool` halves the maps, a name of `model_layers.POOLS`; `final_pool` is
    the last pooling, "average", "logsumexp" (at temperature 0.1) or "max".
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
