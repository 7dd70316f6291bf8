"""Training of audited models and of the metamodel: SGD without privacy, and DP-SGD.

One seed makes a run: `jax.random.key(seed)` is folded into named streams (`stream`), and a step folds its number into
its stream. Nothing is drawn from a chain of splits, so a resumed or replayed step draws the same numbers again.

A training set is a `Pool` (the other images, uint8) and the canaries that the run's coins included:

    pool = Pool.make(images, labels, canaries.source_index, canaries.label)
    recipe = SGD(num_steps=150, batch_size=100, learning_rate=0.3)
    included = coins(7, num_canaries=100, game="independent")
    run = train(recipe, model, pool, canaries.images, included, seed=7, snapshots=[50, 150])
    run[150]  # the parameters after 150 steps
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from metacanary import dpsgd, models, store
from metacanary.recipes import DPSGD, SGD

PyTree = Any
Params = Any

STREAMS = {"init": 0, "order": 1, "sampling": 2, "noise": 3, "coins": 4}
MICROBATCH = 64
"""Examples per compiled per-example-gradient call; a Poisson batch is cut into as many as it needs."""
CHECK_EVERY = 50
"""Steps of SGD between two looks at whether all parameters are finite; each look waits for the device."""


def stream(seed: int, name: str) -> jax.Array:
    """The PRNG key of a named stream of a run."""
    return jax.random.fold_in(jax.random.key(seed), STREAMS[name])


def coins(seed: int, num_canaries: int, game: str) -> np.ndarray:
    """Draw which canaries a run includes.

    Args:
      seed: the run's seed.
      num_canaries: m.
      game: "independent", a fair coin for each canary; "paired", a fair coin for canaries 2i and 2i + 1, of which
        exactly one is included.

    Returns:
      bool [m].

    Raises:
      ValueError: unknown game, or an odd number of canaries in the paired game.
    """
    if game == "independent":
        return np.asarray(jax.random.bernoulli(stream(seed, "coins"), 0.5, (num_canaries,)))
    if game != "paired":
        raise ValueError(f"game: got {game!r}, expected independent or paired")
    if num_canaries % 2:
        raise ValueError(f"num_canaries: got {num_canaries}, expected an even number in the paired game")
    first = np.asarray(jax.random.bernoulli(stream(seed, "coins"), 0.5, (num_canaries // 2,)))
    return np.stack([first, ~first], axis=1).reshape(-1)


@dataclass(frozen=True, kw_only=True)
class Pool:
    """The training images that are no canary's source, and the labels of all.

    Attributes:
      images: uint8 [r, height, width, channels]; the originals of canaries are not among them.
      labels: int32 [r + m]; the last m are the canaries'.
    """

    images: jax.Array
    labels: jax.Array

    @staticmethod
    def make(images: np.ndarray, labels: np.ndarray, source_index: np.ndarray, canary_labels: np.ndarray) -> Pool:
        """Take the canaries' source images out of the training set and put the canaries' labels behind it."""
        others = np.setdiff1d(np.arange(len(images)), source_index)
        both = np.concatenate([labels[others], canary_labels]).astype(np.int32)
        return Pool(images=jnp.asarray(images[others]), labels=jnp.asarray(both))

    def used(self, included: np.ndarray) -> np.ndarray:
        """Which rows a run trains on, bool [r + m]: all of the pool, and the included canaries behind it."""
        return np.concatenate([np.ones(len(self.images), bool), included])


def take(images: jax.Array, canary_images: jax.Array, rows: jax.Array) -> jax.Array:
    """Images in [0, 1] by row; rows from len(images) on are canaries, and differentiable."""
    r = len(images)
    others = images[jnp.minimum(rows, r - 1)].astype(canary_images.dtype) / 255
    is_canary = (rows >= r)[:, None, None, None]
    return jnp.where(is_canary, canary_images[jnp.maximum(rows - r, 0)], others)


def cross_entropy(model: nn.Module, params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy of a batch."""
    logits = models.apply(model, params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def data_order(key: jax.Array, used: np.ndarray, num_steps: int, batch_size: int) -> np.ndarray:
    """Rows of each batch, int32 [num_steps, batch_size]: one fresh permutation of the used rows after the other.

    Args:
      key: the run's order stream; epoch e draws from fold_in(key, e).
      used: bool [r + m], the rows that the run trains on.
      num_steps: T.
      batch_size: B.

    Guarantees:
      Within an epoch every used row comes once; a batch may straddle two epochs. All rows are shuffled and the
      unused ones left out, so that runs of one seed and different coins see the shared rows in the same order.
    """
    if batch_size > used.sum():
        raise ValueError(f"batch_size: got {batch_size}, expected at most the {used.sum()} training images")
    epochs = -(-num_steps * batch_size // int(used.sum()))
    shuffled = [np.asarray(jax.random.permutation(jax.random.fold_in(key, e), len(used))) for e in range(epochs)]
    flat = np.concatenate([rows[used[rows]] for rows in shuffled])
    return flat[: num_steps * batch_size].reshape(num_steps, batch_size).astype(np.int32)


def sgd_state(recipe: SGD, model: nn.Module, pool: Pool, included: np.ndarray, *, seed: int) -> dict[str, PyTree]:
    """The state before the first step of a run, all that `sgd_step` needs beside the canaries' pixels."""
    params = models.init(model, stream(seed, "init"), pool.images.shape[1:])
    order = data_order(stream(seed, "order"), pool.used(included), recipe.num_steps, recipe.batch_size)
    state = {"params": params, "optimizer": recipe.optimizer().init(params)}
    return {**state, "order": jnp.asarray(order), "images": pool.images, "labels": pool.labels}


@cache
def sgd_step(recipe: SGD, model: nn.Module) -> Callable[[PyTree, jax.Array, jax.Array], PyTree]:
    """The step function (state, canary_images, t) -> state of SGD; the contract of `metagradient.replay`.

    Equal arguments give the same function object, so that it is compiled once.
    """
    optimizer = recipe.optimizer()

    def step(state: PyTree, canary_images: jax.Array, t: jax.Array) -> PyTree:
        rows = state["order"][t]
        images = take(state["images"], canary_images, rows)
        gradient = jax.grad(partial(cross_entropy, model))(state["params"], images, state["labels"][rows])
        updates, opt_state = optimizer.update(gradient, state["optimizer"], state["params"])
        return {**state, "params": optax.apply_updates(state["params"], updates), "optimizer": opt_state}

    return step


def train(
    recipe: SGD | DPSGD,
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
    state, step = _prepare(recipe, model, pool, canary_images, included, seed)
    carried = {"params": state["params"], "optimizer": state["optimizer"]}
    kept = {str(s): state["params"] for s in sorted(snapshots)}
    start = 0
    identity = {"recipe": repr(recipe), "model": repr(model), "seed": seed}
    if checkpoint is not None and checkpoint.exists():
        _require_same_run(checkpoint, identity)
        saved = store.read_tree(checkpoint, {"step": np.int64(0), "carried": carried, "kept": kept})
        start, kept = int(saved["step"]), saved["kept"]
        state = {**state, **saved["carried"]}
    looks = {*snapshots, *range(0, recipe.num_steps, _check_every(recipe)), recipe.num_steps}
    first_bad = jnp.int32(0)
    written = time.monotonic()
    for t in range(start, recipe.num_steps):
        state = step(state, t)
        first_bad = _first_bad(first_bad, state["params"], t + 1)
        due = checkpoint is not None and time.monotonic() - written > checkpoint_seconds
        if due or t + 1 in looks:
            _require_finite(first_bad, recipe.num_steps)
        if t + 1 in snapshots:
            kept[str(t + 1)] = state["params"]
        if checkpoint is not None and due:
            carried = {"params": state["params"], "optimizer": state["optimizer"]}
            store.write_tree(checkpoint, {"step": np.int64(t + 1), "carried": carried, "kept": kept}, identity)
            written = time.monotonic()
        if on_step:
            on_step(t + 1)
    return {int(s): params for s, params in kept.items()}


def _prepare(
    recipe: SGD | DPSGD,
    model: nn.Module,
    pool: Pool,
    canary_images: np.ndarray,
    included: np.ndarray,
    seed: int,
) -> tuple[PyTree, Callable[[PyTree, int], PyTree]]:
    """The initial state and a step function (state, t) -> state of a run."""
    pixels = jnp.asarray(canary_images)
    if isinstance(recipe, DPSGD):
        return _prepare_dpsgd(recipe, model, pool, pixels, included, seed)
    jitted = _jitted(sgd_step(recipe, model))
    state = sgd_state(recipe, model, pool, included, seed=seed)
    return state, lambda s, t: jitted(s, pixels, jnp.int32(t))


@cache
def _jitted(function: Callable[..., Any]) -> Callable[..., Any]:
    """One jitted function for each function object, so that a second run compiles nothing."""
    return jax.jit(function)


def _prepare_dpsgd(
    recipe: DPSGD, model: nn.Module, pool: Pool, pixels: jax.Array, included: np.ndarray, seed: int
) -> tuple[PyTree, Callable[[PyTree, int], PyTree]]:
    """The initial state and the step function of DP-SGD."""
    params = models.init(model, stream(seed, "init"), pool.images.shape[1:])
    rows = np.flatnonzero(pool.used(included))
    expected_batch = recipe.sampling_prob * (len(pool.images) + len(included) / 2)
    sampling, noise = stream(seed, "sampling"), stream(seed, "noise")

    def step(state: PyTree, t: int) -> PyTree:
        drawn = rows[dpsgd.poisson_sample(jax.random.fold_in(sampling, t), recipe.sampling_prob, len(rows))]
        total = jax.tree.map(jnp.zeros_like, state["params"])
        for start in range(0, len(drawn), MICROBATCH):
            part = drawn[start : start + MICROBATCH]
            mask = np.arange(MICROBATCH) < len(part)
            padded = np.zeros(MICROBATCH, np.int32)
            padded[: len(part)] = part
            total = _add_clipped(recipe, model, state["params"], total, pool.images, pool.labels, pixels, padded, mask)
        return _private_update(recipe, state, total, jax.random.fold_in(noise, t), expected_batch)

    return {"params": params, "optimizer": recipe.optimizer().init(params)}, step


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _add_clipped(
    recipe: DPSGD,
    model: nn.Module,
    params: Params,
    total: Params,
    images: jax.Array,
    labels: jax.Array,
    pixels: jax.Array,
    rows: jax.Array,
    mask: jax.Array,
) -> Params:
    """Add the clipped gradients of one microbatch to the running sum."""

    def loss(p: Params, image: jax.Array, label: jax.Array) -> jax.Array:
        return cross_entropy(model, p, image[None], label[None])

    batch = take(images, pixels, rows)
    clipped = dpsgd.clipped_gradient_sum(loss, params, batch, labels[rows], mask, recipe.clip_norm)
    return jax.tree.map(jnp.add, total, clipped)


@partial(jax.jit, static_argnums=0)
def _private_update(
    recipe: DPSGD, state: PyTree, total: Params, key: jax.Array, expected_batch: float
) -> dict[str, PyTree]:
    """Add noise to the sum, divide by the expected batch size, and take the optimiser's step."""
    noisy = dpsgd.add_noise(key, total, recipe.noise_multiplier * recipe.clip_norm)
    gradient = jax.tree.map(lambda g: g / expected_batch, noisy)
    updates, opt_state = recipe.optimizer().update(gradient, state["optimizer"], state["params"])
    return {"params": optax.apply_updates(state["params"], updates), "optimizer": opt_state}


def _require_same_run(checkpoint: Path, identity: dict[str, Any]) -> None:
    """Refuse a checkpoint of another run."""
    saved = store.read_provenance(checkpoint)
    wrong = [name for name, value in identity.items() if saved.get(name) != value]
    if wrong:
        raise ValueError(f"checkpoint: {checkpoint} is of another {' and '.join(wrong)}, expected {identity}")


def _check_every(recipe: SGD | DPSGD) -> int:
    """Steps between two looks at the first bad step; DP-SGD waits for the device at every step anyway."""
    return 1 if isinstance(recipe, DPSGD) else CHECK_EVERY


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
