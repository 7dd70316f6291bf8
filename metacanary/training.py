"""Training of audited models and of the metamodel: SGD without privacy, and DP-SGD.

A training set is a `Pool` (the other images, uint8) and the canaries that the run's coins included:

    pool = Pool.make(images, labels, canaries.source_index, canaries.label)
    recipe = SGD(num_steps=150, batch_size=100, learning_rate=0.3)
    included = runs.coins(7, num_canaries=100, game="independent")
    run = train(recipe, model, pool, canaries.images, included, seed=7, snapshots=[50, 150])
    run[150]  # the parameters after 150 steps
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from metacanary import models, store
from metacanary.recipes import DPSGD, SGD
from metacanary.runs import Pool
from metacanary.steps import StepFn, dpsgd_state, dpsgd_step, sgd_state, sgd_step

PyTree = Any
Params = Any
Recipe = SGD | DPSGD

CHECK_EVERY = 50
"""Steps between two looks at whether all parameters are finite; each look waits for the device."""


def initial_state(
    recipe: Recipe, model: nn.Module, pool: Pool, included: np.ndarray, *, seed: int
) -> dict[str, PyTree]:
    """The state of a run before its first step.

    Args:
      recipe: what to train with.
      model: the network.
      pool: the other images, and all labels.
      included: bool [m], the run's coins.
      seed: the run's seed.

    Returns:
      What `step_function` of the same recipe needs beside the canaries' pixels.
    """
    if isinstance(recipe, DPSGD):
        return dpsgd_state(recipe, model, pool, included, seed=seed)
    return sgd_state(recipe, model, pool, included, seed=seed)


def step_function(recipe: Recipe, model: nn.Module) -> StepFn:
    """The step (state, canary_images, t) -> state of a recipe; the same object for equal arguments."""
    return dpsgd_step(recipe, model) if isinstance(recipe, DPSGD) else sgd_step(recipe, model)


def train(
    recipe: Recipe,
    model: nn.Module,
    pool: Pool,
    canary_images: np.ndarray,
    included: np.ndarray,
    *,
    seed: int,
    snapshots: Sequence[int],
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 60.0,
    on_step: Callable[[int], None] | None = None,
) -> dict[int, Params]:
    """Train one model and keep its parameters after some steps.

    Args:
      recipe: what to train with.
      model: the network.
      pool: the other images, and all labels.
      canary_images: float32 [m, height, width, channels] in [0, 1].
      included: bool [m], the run's coins.
      seed: the run's seed.
      snapshots: steps after which parameters are kept, in 1..num_steps.
      checkpoint: file to resume from and to write to; None writes nothing.
      checkpoint_seconds: time between two checkpoints.
      on_step: called with the number of finished steps, to show progress.

    Returns:
      Parameters by step.

    Raises:
      ValueError: a snapshot beyond num_steps, or a checkpoint of another recipe, model or seed.
      FloatingPointError: parameters that are not finite, with the first step after which they were not.

    Guarantees:
      A run that was killed and resumed from its checkpoint ends bit-identical to an undisturbed one.
      No checkpoint holds parameters that are not finite.
    """
    wrong = [s for s in snapshots if not 1 <= s <= recipe.num_steps]
    if wrong:
        raise ValueError(f"snapshots: got {wrong}, expected steps between 1 and num_steps = {recipe.num_steps}")
    pixels, step = jnp.asarray(canary_images), _compiled(step_function(recipe, model))
    state = initial_state(recipe, model, pool, included, seed=seed)
    kept = {str(s): state["params"] for s in sorted(snapshots)}
    start = 0
    identity = {"recipe": repr(recipe), "model": repr(model), "seed": seed}
    if checkpoint is not None and checkpoint.exists():
        _require_same_run(checkpoint, identity)
        saved = store.read_tree(checkpoint, {"step": np.int64(0), "carried": _carried(state), "kept": kept})
        start, kept = int(saved["step"]), saved["kept"]
        state |= saved["carried"]
    looks = {*snapshots, *range(0, recipe.num_steps, CHECK_EVERY), recipe.num_steps}
    first_bad = np.int32(0)
    written = time.monotonic()
    for t in range(start, recipe.num_steps):
        state |= step(state, pixels, np.int32(t))
        first_bad = _first_bad(first_bad, state["params"], t + 1)
        due = checkpoint is not None and time.monotonic() - written > checkpoint_seconds
        if due or t + 1 in looks:
            _require_finite(first_bad, recipe.num_steps)
        if t + 1 in snapshots:
            kept[str(t + 1)] = state["params"]
        if checkpoint is not None and due:
            tree = {"step": np.int64(t + 1), "carried": _carried(state), "kept": kept}
            store.write_tree(checkpoint, tree, identity)
            written = time.monotonic()
        if on_step:
            on_step(t + 1)
    return {int(s): params for s, params in kept.items()}


@cache
def _compiled(step_fn: StepFn) -> Callable[[PyTree, jax.Array, np.integer], dict[str, PyTree]]:
    """What a step changes in the state, compiled once for each step function.

    What it only reads, the data set above all, is not returned, since XLA would copy it at every step.
    """
    return jax.jit(lambda state, pixels, t: _carried(step_fn(state, pixels, t)))


def _carried(state: PyTree) -> dict[str, PyTree]:
    """What of a state changes from step to step."""
    return {name: state[name] for name in ("params", "optimizer")}


def _require_same_run(checkpoint: Path, identity: dict[str, Any]) -> None:
    """Refuse a checkpoint of another run."""
    saved = store.read_provenance(checkpoint)
    wrong = [name for name, value in identity.items() if saved.get(name) != value]
    if wrong:
        raise ValueError(f"checkpoint: {checkpoint} is of another {' and '.join(wrong)}, expected {identity}")


@jax.jit
def _first_bad(first_bad: jax.Array, params: Params, step: int) -> jax.Array:
    """The first step after which parameters were not finite, 0 for none.

    It stays on the device until it is looked at. A function of its own: compiled into the step it could change how
    that is rounded.
    """
    finite = jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(params)]).all()
    return jnp.where((first_bad == 0) & ~finite, step, first_bad)


def _require_finite(first_bad: jax.Array, num_steps: int) -> None:
    """Stop a run whose parameters are not finite."""
    if step := int(first_bad):
        raise FloatingPointError(f"parameters are not finite after step {step} of {num_steps}: lower learning_rate")


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
