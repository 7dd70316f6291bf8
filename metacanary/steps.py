"""Training steps: SGD without privacy, and DP-SGD, each as a state and a pure function (state, canaries, t) -> state.

Canaries are their pixels, [m, height, width, channels] in [0, 1], and have the labels of the state; or they are
`soft_labels.SoftlyLabelled`, pixels and labels that both can be differentiated by.

A state holds all that a step needs beside the canaries' pixels, all randomness included: parameters, the optimiser's
state, the batches of all steps, the keys of noise and augmentation, images and labels. So `training.train` and
`metagradient.replay` run the very same steps, on the same draws, forwards and backwards.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from metacanary import augmentation, clipping, dpsgd, gradients, models, soft_labels
from metacanary.recipes import DPSGD, SGD, Augmentation
from metacanary.runs import Pool, stream, take, take_labels
from metacanary.soft_labels import CanaryInputs, SoftlyLabelled

PyTree = Any
Params = Any
StepFn = Callable[[PyTree, CanaryInputs, jax.Array], PyTree]

MAX_UNROLL = 16
"""Microbatches of DP-SGD that are written out one after the other where a loop over them is slow."""


def cross_entropy(model: nn.Module, params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy of a batch, of classes or probabilities."""
    logits = models.apply(model, params, images)
    return soft_labels.cross_entropy(logits, labels).mean()


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


def sgd_state(
    recipe: SGD, model: nn.Module, pool: Pool, included: np.ndarray, *, seed: int, initial: Params | None = None
) -> dict[str, PyTree]:
    """The state before the first step of a run, all that `sgd_step` needs beside the canaries' pixels."""
    order = data_order(stream(seed, "order"), pool.used(included), recipe.num_steps, recipe.batch_size)
    key = {"augmentation": stream(seed, "augmentation")} if recipe.augmentation.is_on else {}
    return {**_start(recipe, model, pool, seed, initial), "order": jnp.asarray(order), **key}


@cache
def sgd_step(recipe: SGD, model: nn.Module) -> StepFn:
    """The step function (state, canaries, t) -> state of SGD; the contract of `metagradient.replay`.

    Equal arguments give the same function object, so that it is compiled once.
    """

    def step(state: PyTree, canaries: CanaryInputs, t: jax.Array) -> PyTree:
        rows = state["order"][t]
        images, labels = _examples(state, canaries, rows)
        of_label = labels.shape[1:]  # () of a class, (k,) of probabilities
        if recipe.augmentation.is_on:
            copies = _copies(recipe.augmentation, state["augmentation"], t, rows, images)
            images, labels = copies, jnp.broadcast_to(labels[:, None], (*copies.shape[:2], *of_label))
        trained, frozen = _split(recipe, model, state)

        def loss(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
            flat = images.reshape(-1, *state["images"].shape[1:])
            return cross_entropy(model, clipping.merge(params, frozen), flat, labels.reshape(-1, *of_label))

        gradient = gradients.mean_gradient(loss, trained, images, labels, microbatch=recipe.microbatch)
        return _updated(recipe, model, state, gradient, t)

    return step


def dpsgd_state(
    recipe: DPSGD, model: nn.Module, pool: Pool, included: np.ndarray, *, seed: int, initial: Params | None = None
) -> dict[str, PyTree]:
    """The state before the first step of a private run: the Poisson batches of all steps, and the keys of the rest."""
    samples = dpsgd.poisson_batches(
        stream(seed, "sampling"), recipe.sampling_prob, pool.used(included), recipe.num_steps, recipe.microbatch
    )
    keys = {name: stream(seed, name) for name in ("noise", "augmentation")}
    state = {**_start(recipe, model, pool, seed, initial), "samples": jnp.asarray(samples), **keys}
    if recipe.clipping.name != "flat":
        names = clipping.trained_layers(recipe.trainable, model, pool.images.shape[1:])
        state["thresholds"] = clipping.start_thresholds(recipe.clipping, recipe.clip_norm, names)
    return state


@cache
def dpsgd_step(recipe: DPSGD, model: nn.Module) -> StepFn:
    """The step function (state, canaries, t) -> state of DP-SGD; the contract of `metagradient.replay`.

    Sampling, noise and augmentation are frozen: functions of the state's keys and of t. The derivative goes through
    the clipping of each example's gradient and through its augmented copies. Equal arguments give the same function
    object, so that it is compiled once.
    """

    def step(state: PyTree, canaries: CanaryInputs, t: jax.Array) -> PyTree:
        return private_update(recipe, model, state, clipped_sum(recipe, model, state, canaries, t), t)

    return step


def private_update(
    recipe: DPSGD, model: nn.Module, state: PyTree, summed: tuple[Params, dict[str, jax.Array]], t: jax.Array
) -> dict[str, PyTree]:
    """The state after a step of DP-SGD, from what `clipped_sum` returns: noise, mean, optimiser, next thresholds."""
    total, counts = summed
    thresholds, key = state.get("thresholds", {}), jax.random.fold_in(state["noise"], t)
    noisy = dpsgd.add_noise(key, total, clipping.noise_stddev(recipe, thresholds, total))
    # r + m / 2 examples are expected, whatever the coins: a divisor that depends on them would not be accounted.
    num_others = len(state["images"])
    expected_batch = recipe.expected_batch(num_others, len(state["labels"]) - num_others)
    unit = clipping.sensitivity(recipe.clip_norm, thresholds) if recipe.rescale_to_unit_norm else 1.0
    divisor = expected_batch * unit
    after = _updated(recipe, model, state, jax.tree.map(lambda g: g / divisor, noisy), t)
    if recipe.clipping.name == "adaptive":
        # A key of no other step. fold_in(key, i) is the i-th key that `add_noise` splits off: the same noise twice.
        of_counts = jax.random.fold_in(state["noise"], recipe.num_steps + t)
        after["thresholds"] = clipping.next_thresholds(recipe, thresholds, counts, expected_batch, of_counts)
    return after


def clipped_sum(
    recipe: DPSGD,
    model: nn.Module,
    state: PyTree,
    canaries: CanaryInputs,
    t: jax.Array,
    *,
    unroll: int | None = None,
) -> tuple[Params, dict[str, jax.Array]]:
    """Sum of the clipped gradients of the batch of step t, one microbatch after the other.

    Args:
      recipe: of the run.
      model: the network.
      state: as `dpsgd_state` makes it; of runs that are trained together with "is_used", bool [num_steps,
        microbatches], which says where any of them has more than padding.
      canaries: their pixels, or pixels and labels.
      t: the step.
      unroll: microbatches to write out without a loop; None for what suits the device.

    Returns:
      A tree as the parameters that are trained, and the counts of `clipping.clipped_sum`.

    Guarantees:
      What is made of one microbatch only is alive at a time, in the sum and in its pull-back (each is
      rematerialised). How the batch is cut and padded changes nothing but rounding.
    """
    parts = state["samples"][t].reshape(-1, recipe.microbatch)
    is_used = state["is_used"][t] if "is_used" in state else parts[:, 0] >= 0
    trained = _split(recipe, model, state)[0]
    thresholds = state.get("thresholds", {})

    @jax.checkpoint
    def one(params: Params, inputs: CanaryInputs, bounds: clipping.Thresholds, rows: jax.Array) -> PyTree:
        parted = {**state, "params": clipping.merge(params, _split(recipe, model, state)[1]), "thresholds": bounds}
        return microbatch_sum(recipe, model, parted, inputs, rows, t)

    unroll = unroll or (MAX_UNROLL if is_loop_slow(model) else 1)

    def add(total: PyTree, part: tuple[jax.Array, jax.Array]) -> tuple[PyTree, None]:
        rows, used = part

        def added() -> PyTree:
            return jax.tree.map(jnp.add, total, one(trained, canaries, thresholds, rows))

        # A loop passes over what is padding alone; a branch is as slow as a loop where those are slow.
        return (jax.lax.cond(used, added, lambda: total) if unroll == 1 else added()), None

    start = zero_sum(recipe, model, state)
    return jax.lax.scan(add, start, (parts, is_used), unroll=min(unroll, len(parts)))[0]


def zero_sum(recipe: DPSGD, model: nn.Module, state: PyTree) -> tuple[Params, dict[str, jax.Array]]:
    """What `clipped_sum` returns of an empty batch."""
    return jax.tree.map(jnp.zeros_like, (_split(recipe, model, state)[0], dict(state.get("thresholds", {}))))


def microbatch_sum(
    recipe: DPSGD, model: nn.Module, state: PyTree, canaries: CanaryInputs, rows: jax.Array, t: jax.Array
) -> tuple[Params, dict[str, jax.Array]]:
    """The part of `clipped_sum` of some rows, int32 [microbatch], of which -1 is padding."""
    trained, frozen = _split(recipe, model, state)
    real = jnp.maximum(rows, 0)
    images, labels = _examples(state, canaries, real)
    return clipping.clipped_sum(
        model,
        _loss_of_copies,
        trained,
        frozen,
        _copies(recipe.augmentation, state["augmentation"], t, real, images),
        labels,
        rows >= 0,
        clip_norm=recipe.clip_norm,
        thresholds=state.get("thresholds", {}),
    )


def canaries_of(state: PyTree, canaries: CanaryInputs) -> tuple[jax.Array, jax.Array]:
    """The images of canaries and the labels that they are trained with: int [m], or probabilities [m, k]."""
    if isinstance(canaries, SoftlyLabelled):
        return canaries.images, canaries.labels
    return canaries, state["labels"][-len(canaries) :]


def _examples(state: PyTree, canaries: CanaryInputs, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Images and labels by row; labels of all rows are probabilities if those of canaries are."""
    if isinstance(canaries, SoftlyLabelled):
        return take(state["images"], canaries.images, rows), take_labels(state["labels"], canaries.labels, rows)
    return take(state["images"], canaries, rows), state["labels"][rows]


def is_loop_slow(model: nn.Module) -> bool:
    """Whether XLA had better not loop over microbatches: on CPUs `lax.conv` is many times slower in its loops."""
    return jax.default_backend() == "cpu" and not getattr(model, "as_matmul", False)


def _copies(settings: Augmentation, key: jax.Array, t: jax.Array, rows: jax.Array, images: jax.Array) -> jax.Array:
    """The copies [batch, K, ...] of the images of a step."""
    # Folded with the row, not with the place in the batch: other coins change no other example's copies.
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.fold_in(key, t)))(rows)
    return jax.vmap(partial(augmentation.copies, settings))(keys, images)


def _loss_of_copies(logits: jax.Array, label: jax.Array) -> jax.Array:
    """Mean loss of the copies of one example: its gradient is the mean of theirs."""
    labels = jnp.broadcast_to(label, (len(logits), *label.shape))
    return soft_labels.cross_entropy(logits, labels).mean()


def released(recipe: SGD | DPSGD, state: PyTree) -> Params:
    """The parameters that a run would release in a state: their moving average, if the recipe has one."""
    return state["ema"] if recipe.ema.decay else state["params"]


def _start(recipe: SGD | DPSGD, model: nn.Module, pool: Pool, seed: int, initial: Params | None) -> dict[str, PyTree]:
    """What the states of both algorithms share."""
    params = initial
    if params is None:
        params = models.init(model, stream(seed, "init"), pool.images.shape[1:])
    state = {"params": params, "images": pool.images, "labels": pool.labels}
    state["optimizer"] = recipe.build_optimizer().init(_split(recipe, model, state)[0])
    return state | ({"ema": params} if recipe.ema.decay else {})


def _split(recipe: SGD | DPSGD, model: nn.Module, state: PyTree) -> tuple[Params, Params]:
    """The parameters that are trained, and the others."""
    return clipping.split_trained(state["params"], recipe.trainable, model, state["images"].shape[1:])


def _updated(recipe: SGD | DPSGD, model: nn.Module, state: PyTree, gradient: Params, t: jax.Array) -> dict[str, PyTree]:
    """The state after the optimiser's step."""
    trained, frozen = _split(recipe, model, state)
    updates, optimizer = recipe.build_optimizer().update(gradient, state["optimizer"], trained)
    params = clipping.merge(optax.apply_updates(trained, updates), frozen)
    after = {**state, "params": params, "optimizer": optimizer}
    if recipe.ema.decay:
        decay = jnp.float32(recipe.ema.decay)
        if recipe.ema.warm_up:
            decay = jnp.minimum(decay, (1.0 + t) / (10.0 + t))
        after["ema"] = jax.tree.map(lambda mean, new: decay * mean + (1 - decay) * new, state["ema"], params)
    return after
