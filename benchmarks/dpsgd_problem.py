"""The one step that all contenders of `benchmarks.dpsgd` take: networks, batches and copies, and its naive result.

All is drawn from one seed, so that each contender's process makes the same problem for itself. Images are random: what
they show does not change what a step costs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from metacanary import augmentation, models, runs, steps
from metacanary.recipes import Augmentation

PyTree = Any
SEED = 1
NUM_CLASSES = 10
CLIP_NORM, NOISE_MULTIPLIER, LEARNING_RATE = 1.0, 1.0, 0.1
NUM_CANARIES = 2
CHECK_ROWS, CHECK_MICROBATCH = 8, 4


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A network and its images.

    Attributes:
      model, options: for `models.build`.
      image_shape: [height, width, channels].
      crop_padding: pixels of the border out of which copies are cut.
      typical_norm: by number of copies, about the median norm of an example's gradient at the initial parameters:
        agreement is checked there, where some gradients are clipped and some are not.
    """

    model: str
    options: dict[str, Any]
    image_shape: tuple[int, int, int]
    crop_padding: int
    typical_norm: dict[int, float]


SETTINGS = {
    "digits": Setting(
        model="convnet",
        options={"widths": (8, 16)},
        image_shape=(16, 16, 1),
        crop_padding=2,
        typical_norm={1: 3.2, 4: 3.06, 16: 3.0},
    ),
    "wrn16_4": Setting(
        model="wrn16_4",
        options={},
        image_shape=(32, 32, 3),
        crop_padding=4,
        typical_norm={1: 13.2, 4: 6.8, 16: 4.36},
    ),
}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A batch, and how a step treats it.

    Attributes:
      setting: a name of SETTINGS.
      batch: B, the examples of the step; also the divisor of the noisy sum.
      copies: K, the augmented copies of each example; their gradients are averaged before clipping. With one copy it is
        the image itself.
      microbatch: examples that are worked on at a time.
      clip_norm, noise_multiplier, learning_rate: of the step.
      dtype: of parameters and images.
    """

    setting: str
    batch: int
    copies: int
    microbatch: int
    clip_norm: float = CLIP_NORM
    noise_multiplier: float = NOISE_MULTIPLIER
    learning_rate: float = LEARNING_RATE
    dtype: type[np.floating] = np.float32

    @property
    def check(self) -> Problem:
        """A small one without noise, whose step changes the parameters by minus the sum of clipped gradients.

        In float64, for which JAX must be told so: in float32 rounding changes the sum of the large network by up to
        0.3%, probably since it turns single ReLUs on or off.
        """
        return replace(
            self,
            batch=CHECK_ROWS,
            microbatch=CHECK_MICROBATCH,
            clip_norm=SETTINGS[self.setting].typical_norm[self.copies],
            noise_multiplier=0.0,
            learning_rate=float(CHECK_ROWS),
            dtype=np.float64,
        )

    @cached_property
    def model(self) -> nn.Module:
        """The network."""
        setting = SETTINGS[self.setting]
        return models.build(setting.model, num_classes=NUM_CLASSES, **setting.options)

    @property
    def flax_model(self) -> nn.Module:
        """The same function of the same parameters with `flax.linen.Conv`, where the network has another form of it."""
        return self.model.clone(as_matmul=False) if self.has_own_convolutions else self.model

    @property
    def has_own_convolutions(self) -> bool:
        """Whether the network's convolutions are of a form of metacanary's (`model_layers.Conv3x3`)."""
        return getattr(self.model, "as_matmul", False)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """[height, width, channels]."""
        return SETTINGS[self.setting].image_shape

    @property
    def augmentation(self) -> Augmentation:
        """How copies are drawn."""
        if self.copies == 1:
            return Augmentation()
        return Augmentation(multiplicity=self.copies, flip=True, crop_padding=SETTINGS[self.setting].crop_padding)

    @property
    def sampling_prob(self) -> float:
        """q, such that q (r + m / 2) is the batch."""
        return self.batch / (self._pool_size + NUM_CANARIES // 2)

    @property
    def _pool_size(self) -> int:
        """r: four batches, since a larger pool would change nothing but the resident memory."""
        return 4 * self.batch - NUM_CANARIES // 2

    @cached_property
    def pool(self) -> runs.Pool:
        """The images that rows refer to."""
        rng = np.random.default_rng(SEED)
        images = rng.integers(0, 256, (self._pool_size, *self.image_shape), np.uint8)
        labels = rng.integers(0, NUM_CLASSES, self._pool_size + NUM_CANARIES).astype(np.int32)
        return runs.Pool(images=jnp.asarray(images), labels=jnp.asarray(labels))

    @cached_property
    def rows(self) -> np.ndarray:
        """int32 [B], the rows of the batch."""
        chosen = np.random.default_rng(SEED + 1).choice(self._pool_size, self.batch, replace=False)
        return np.sort(chosen).astype(np.int32)

    @property
    def labels(self) -> np.ndarray:
        """int32 [B]."""
        return np.asarray(self.pool.labels)[self.rows]

    @property
    def canary_images(self) -> jax.Array:
        """[m, height, width, channels], of which none is in the batch."""
        return jnp.zeros((NUM_CANARIES, *self.image_shape), self.dtype)

    def params(self) -> PyTree:
        """Initial parameters, those of `training.initial_state`."""
        return self.cast(models.init(self.model, runs.stream(SEED, "init"), self.image_shape))

    def cast(self, tree: PyTree) -> PyTree:
        """Floating-point leaves in the problem's precision, the others as they are."""
        return jax.tree.map(lambda x: x.astype(self.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)

    def stacks(self) -> np.ndarray:
        """The copies that the package's step 0 draws, [B, K, height, width, channels]."""
        key, rows = jax.random.fold_in(runs.stream(SEED, "augmentation"), 0), jnp.asarray(self.rows)
        keys = jax.vmap(partial(jax.random.fold_in, key))(rows)
        taken = runs.take(self.pool.images, self.canary_images, rows)
        return np.asarray(jax.jit(jax.vmap(partial(augmentation.copies, self.augmentation)))(keys, taken))

    def loss(self, params: PyTree, copies: jax.Array, label: jax.Array, *, model: nn.Module | None = None) -> jax.Array:
        """Mean loss of the copies of one example, by the network or by another form of it."""
        return steps.cross_entropy(model or self.model, params, copies, jnp.broadcast_to(label, len(copies)))


def naive_gradients(problem: Problem) -> list[list[np.ndarray]]:
    """For each example the gradients by its layers as vectors, in the order of the parameters' leaves."""
    params, gradient = problem.params(), jax.jit(jax.grad(problem.loss))
    found = [gradient(params, *example) for example in zip(problem.stacks(), problem.labels, strict=True)]
    return [[np.asarray(ravel_pytree(layers[name])[0]) for name in sorted(layers)] for layers in found]


def naive_sum(gradients: list[list[np.ndarray]], clip_norm: float, *, per_layer: bool) -> np.ndarray:
    """The sum of clipped gradients, one example after the other.

    Args:
      gradients: what `naive_gradients` returns.
      clip_norm: C.
      per_layer: whether each of the k layers is clipped on its own, to C / sqrt(k).
    """
    total = np.zeros(sum(map(len, gradients[0])))
    for parts in gradients:
        norms = np.array([np.linalg.norm(part) for part in parts])
        if per_layer:
            factors = np.minimum(1.0, clip_norm / np.sqrt(len(parts)) / norms)
        else:
            factors = np.full(len(parts), min(1.0, clip_norm / np.linalg.norm(norms)))
        total += np.concatenate([factor * part for factor, part in zip(factors, parts, strict=True)])
    return total
