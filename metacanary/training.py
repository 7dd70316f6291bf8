"""Training of audited models and of the metamodel: SGD without privacy, and DP-SGD.

A training set is a `Pool` (the other images, uint8) and the canaries that the run's coins included:

    pool = Pool.make(images, labels, canaries.source_index, canaries.label)
    recipe = SGD(num_steps=150, batch_size=100, learning_rate=0.3)
    included = runs.coins(7, num_canaries=100, game="independent")
    run = train(recipe, model, pool, canaries.images, included, seed=7, snapshots=[50, 150])
    run[150]  # the parameters after 150 steps
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from metacanary import accounting, clipping, layer_gradients, models, steps, training_loop
from metacanary.interruption import ShouldStop
from metacanary.recipes import DPSGD, SGD
from metacanary.runs import Pool
from metacanary.steps import StepFn

PyTree = Any
Params = Any
Recipe = SGD | DPSGD


def initial_state(
    recipe: Recipe,
    model: nn.Module,
    pool: Pool,
    included: np.ndarray,
    *,
    seed: int,
    initial: Params | None = None,
) -> dict[str, PyTree]:
    """The state of a run before its first step.

    Args:
      recipe: what to train with.
      model: the network.
      pool: the other images, and all labels.
      included: bool [m], the run's coins.
      seed: the run's seed.
      initial: parameters to start from, as of a model that was trained before; None to draw them.

    Returns:
      What `step_function` of the same recipe needs beside the canaries' pixels.
    """
    if isinstance(recipe, DPSGD):
        return steps.dpsgd_state(recipe, model, pool, included, seed=seed, initial=initial)
    return steps.sgd_state(recipe, model, pool, included, seed=seed, initial=initial)


def step_function(recipe: Recipe, model: nn.Module) -> StepFn:
    """The step (state, canary_images, t) -> state of a recipe; the same object for equal arguments."""
    return steps.dpsgd_step(recipe, model) if isinstance(recipe, DPSGD) else steps.sgd_step(recipe, model)


def train(
    recipe: Recipe,
    model: nn.Module,
    pool: Pool,
    canary_images: np.ndarray,
    included: np.ndarray,
    *,
    seed: int,
    snapshots: Sequence[int],
    initial: Params | None = None,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 60.0,
    on_step: Callable[[int], None] | None = None,
    should_stop: ShouldStop | None = None,
) -> dict[int, Params]:
    """Train one model and keep its parameters after some steps.

    Args:
      recipe: what to train with.
      model: the network.
      pool: the other images, and all labels.
      canary_images: float32 [m, height, width, channels] in [0, 1].
      included: bool [m], the run's coins.
      seed: the run's seed.
      snapshots: steps after which parameters are kept, in 1..num_steps; their moving average, if the recipe has one.
      initial: parameters to start from, as of a model that was trained before; None to draw them.
      checkpoint: file to resume from and to write to; None writes nothing.
      checkpoint_seconds: time between two checkpoints.
      on_step: called with the number of finished steps, to show progress.
      should_stop: asked after each step whether to write the checkpoint and raise `Stopped`; needs `checkpoint`.

    Returns:
      Parameters by step.

    Raises:
      ValueError: a snapshot beyond num_steps, a checkpoint of another recipe, model, start, seed, data set, canaries or
        coins, or of a private recipe what `require_private` refuses; before the first step.
      FloatingPointError: parameters that are not finite, with the first step after which they were not.
      Stopped: `should_stop` said so, and the checkpoint is written.

    Guarantees:
      A run that was killed and resumed from its checkpoint ends bit-identical to an undisturbed one.
      One that is stopped loses no step, and waits for two steps of the device at most before it writes.
      No checkpoint holds parameters that are not finite.
    """
    if isinstance(recipe, DPSGD):
        require_private(recipe, model, pool, included)
    pixels, step = jnp.asarray(canary_images), compiled_step(recipe, model)
    identity = {"recipe": repr(recipe), "model": repr(model), "seed": seed, "initial": training_loop.digest(initial)}
    if checkpoint is not None:
        identity |= training_loop.data_identity(pool, canary_images, included)
    return training_loop.follow(
        lambda state, t: step(state, pixels, t),
        initial_state(recipe, model, pool, included, seed=seed, initial=initial),
        num_steps=recipe.num_steps,
        snapshots=snapshots,
        released=partial(steps.released, recipe),
        identity=identity,
        checkpoint=checkpoint,
        checkpoint_seconds=checkpoint_seconds,
        on_step=on_step,
        should_stop=should_stop,
    )


def compiled_step(recipe: Recipe, model: nn.Module) -> Callable[[PyTree, jax.Array, np.integer], dict[str, PyTree]]:
    """What a step of a run changes in the state, (state, canary_images, t) -> part of the state; compiled once.

    What it only reads, the data set above all, is not returned, since XLA would copy it at every step.
    """
    if isinstance(recipe, DPSGD) and steps.is_loop_slow(model):
        return _in_microbatches(recipe, model)
    return _compiled(step_function(recipe, model))


@cache
def _compiled(step_fn: StepFn) -> Callable[[PyTree, jax.Array, np.integer], dict[str, PyTree]]:
    """A step as one program; equal functions share it."""
    return jax.jit(lambda state, pixels, t: training_loop.carried(step_fn(state, pixels, t)))


@cache
def _in_microbatches(recipe: DPSGD, model: nn.Module) -> Callable[[PyTree, jax.Array, np.integer], dict[str, PyTree]]:
    """A step of DP-SGD as one program for a microbatch, called in a loop, and one for the update.

    Where XLA's own loop is slow the alternative is to write all microbatches out, minutes of compilation.
    """

    def add(total: PyTree, state: PyTree, pixels: jax.Array, rows: jax.Array, t: jax.Array) -> PyTree:
        return jax.tree.map(jnp.add, total, steps.microbatch_sum(recipe, model, state, pixels, rows, t))

    zeros = jax.jit(partial(steps.zero_sum, recipe, model))
    added = jax.jit(add, donate_argnums=0)
    update = jax.jit(
        lambda state, summed, t: training_loop.carried(steps.private_update(recipe, model, state, summed, t))
    )

    def step(state: PyTree, pixels: jax.Array, t: np.integer) -> dict[str, PyTree]:
        parts = np.asarray(state["samples"][t]).reshape(-1, recipe.microbatch)
        summed = zeros(state)
        for rows in parts:
            if rows[0] >= 0:
                summed = added(summed, state, pixels, rows, t)
        return update(state, summed, t)

    return step


def require_private(recipe: DPSGD, model: nn.Module, pool: Pool, included: np.ndarray) -> None:
    """Refuse a training that would not have the privacy that is claimed for it.

    Args:
      recipe: what to train with.
      model: the network.
      pool: the other images, and all labels.
      included: bool [m], the run's coins.

    Raises:
      ValueError: a model in which an example's logits depend on other examples, as with batch normalisation, or that
        keeps statistics of its inputs; noise, sampling and steps that spend more than `recipe.target`; a target delta
        of 1 / N or more, which allows to publish one of N examples as it is; thresholds that would follow noise.
    """
    require_independent(model, pool.images.shape[1:])
    if recipe.clipping.name == "adaptive":
        num_layers = len(clipping.trained_layers(recipe.trainable, model, pool.images.shape[1:]))
        clipping.require_counts(recipe, num_layers, recipe.expected_batch(len(pool.images), len(included)))
    if recipe.target is None:
        return
    num_examples, delta = int(pool.used(included).sum()), recipe.target.delta
    if not delta < 1 / num_examples:
        raise ValueError(f"delta: got {delta}, expected a number below 1 / {num_examples}, the training examples")
    spent = accounting.cross_checked_epsilon(
        noise_multiplier=recipe.noise_multiplier,
        sampling_prob=recipe.sampling_prob,
        num_steps=recipe.num_steps,
        delta=delta,
    )
    if spent > recipe.target.epsilon:
        raise ValueError(
            f"noise_multiplier: got {recipe.noise_multiplier:.5g}, with which {recipe.num_steps} steps at "
            f"sampling_prob {recipe.sampling_prob:g} spend epsilon {spent:.4g}, expected at most "
            f"{recipe.target.epsilon:g}"
        )


@cache
def require_independent(model: nn.Module, image_shape: tuple[int, ...]) -> None:
    """Refuse a model in which one example's logits depend on another example, or that is not its parameters alone.

    In a model that comes apart in layers the same is asked of what each layer returns: rows that are turned round
    before a layer and turned back behind it would be clipped as those of another example.

    Args:
      model: the network.
      image_shape: [height, width, channels].

    Raises:
      ValueError: an example has no gradient of its own in it.
    """
    kept = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((2, *image_shape)))
    others = sorted(kept.keys() - {"params"})
    if others:
        raise ValueError(
            f"model {type(model).__name__}: keeps {', '.join(others)}, expected parameters alone under DP-SGD: "
            "statistics of batches are not private; GroupNorm has none"
        )
    images = jax.random.uniform(jax.random.key(1), (3, *image_shape))
    params = models.init(model, jax.random.key(2), image_shape)
    try:
        names = ["", *layer_gradients.layers(model, image_shape)]
    except ValueError:
        names = [""]  # Clipped example by example.
    run = jax.jit(partial(model.apply, capture_intermediates=True, mutable=["intermediates"]))

    def outputs(batch: jax.Array) -> dict[str, np.ndarray]:
        found = flatten_dict(run({"params": params}, batch)[1])
        return {"/".join(path[1:-1]): np.asarray(y[0]) for path, y in found.items()}

    def is_touched(before: np.ndarray, after: np.ndarray) -> bool:
        return not np.allclose(before, after, rtol=1e-3, atol=1e-5)

    # What is no number shows the least part of one image in another's output; a huge one, what comparisons hide.
    before = outputs(images)
    after = [(row, outputs(images.at[row].set(other))) for row in (0, 2) for other in (images[1], jnp.nan, 1e30)]
    for name in names:
        if any(is_touched(np.delete(before[name], row, 0), np.delete(y[name], row, 0)) for row, y in after):
            what = f"output of {name} for one image depends" if name else "logits of one image depend"
            raise ValueError(
                f"model {type(model).__name__}: the {what} on the others of its batch, expected on it alone under "
                "DP-SGD: clipping one example would not bound its influence"
            )


def predict(model: nn.Module, params: Params, images: np.ndarray, batch_size: int = 512) -> np.ndarray:
    """Logits [n, num_classes] of images: uint8, or float in [0, 1]."""
    parts = [images[i : i + batch_size] for i in range(0, len(images), batch_size)]
    return np.concatenate([np.asarray(_predict(model, params, jnp.asarray(p))) for p in parts])


@partial(jax.jit, static_argnums=0)
def _predict(model: nn.Module, params: Params, images: jax.Array) -> jax.Array:
    """Logits of one batch."""
    images = images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images
    return models.apply(model, params, images)


def accuracy(model: nn.Module, params: Params, images: np.ndarray, labels: np.ndarray) -> float:
    """Fraction of images that are classified as labelled."""
    return float((predict(model, params, images).argmax(axis=1) == labels).mean())
