"""Training steps: SGD without privacy, and DP-SGD, each as a state and a pure function (state, pixels, t) -> state.

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

from metacanary import augmentation, dpsgd, gradients, models
from metacanary.recipes import DPSGD, SGD
from metacanary.runs import Pool, stream, take

PyTree = Any
Params = Any
StepFn = Callable[[PyTree, jax.Array, jax.Array], PyTree]

MAX_UNROLL = 16
"""Microbatches of DP-SGD that are written out one after the other where a loop over them is slow."""


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
    order = data_order(stream(seed, "order"), pool.used(included), recipe.num_steps, recipe.batch_size)
    return {**_start(recipe, model, pool, seed), "order": jnp.asarray(order)}


@cache
def sgd_step(recipe: SGD, model: nn.Module) -> StepFn:
    """The step function (state, canary_images, t) -> state of SGD; the contract of `metagradient.replay`.

    Equal arguments give the same function object, so that it is compiled once.
    """
    loss = partial(cross_entropy, model)

    def step(state: PyTree, canary_images: jax.Array, t: jax.Array) -> PyTree:
        rows = state["order"][t]
        images, labels = take(state["images"], canary_images, rows), state["labels"][rows]
        gradient = gradients.mean_gradient(loss, state["params"], images, labels, microbatch=recipe.microbatch)
        return _updated(recipe, state, gradient)

    return step


def dpsgd_state(recipe: DPSGD, model: nn.Module, pool: Pool, included: np.ndarray, *, seed: int) -> dict[str, PyTree]:
    """The state before the first step of a private run: the Poisson batches of all steps, and the keys of the rest."""
    samples = dpsgd.poisson_batches(
        stream(seed, "sampling"), recipe.sampling_prob, pool.used(included), recipe.num_steps, recipe.microbatch
    )
    keys = {name: stream(seed, name) for name in ("noise", "augmentation")}
    return {**_start(recipe, model, pool, seed), "samples": jnp.asarray(samples), **keys}


@cache
def dpsgd_step(recipe: DPSGD, model: nn.Module) -> StepFn:
    """The step function (state, canary_images, t) -> state of DP-SGD; the contract of `metagradient.replay`.

    Sampling, noise and augmentation are frozen: functions of the state's keys and of t. The derivative goes through
    the clipping of each example's gradient and through its augmented copies. Equal arguments give the same function
    object, so that it is compiled once.
    """

    def step(state: PyTree, canary_images: jax.Array, t: jax.Array) -> PyTree:
        total = clipped_sum(recipe, model, state, canary_images, t)
        noisy = dpsgd.add_noise(
            jax.random.fold_in(state["noise"], t), total, recipe.noise_multiplier * recipe.clip_norm
        )
        # r + m / 2 examples are expected, whatever the coins: a divisor that depends on them would not be accounted.
        expected_batch = recipe.sampling_prob * (len(state["images"]) + len(canary_images) / 2)
        return _updated(recipe, state, jax.tree.map(lambda g: g / expected_batch, noisy))

    return step


def clipped_sum(
    recipe: DPSGD,
    model: nn.Module,
    state: PyTree,
    canary_images: jax.Array,
    t: jax.Array,
    *,
    unroll: int | None = None,
) -> Params:
    """Sum of the clipped gradients of the batch of step t, one microbatch after the other.

    Args:
      recipe: of the run.
      model: the network.
      state: as `dpsgd_state` makes it.
      canary_images: [m, height, width, channels] in [0, 1].
      t: the step.
      unroll: microbatches to write out without a loop; None for what suits the device.

    Returns:
      A tree as the parameters.

    Guarantees:
      The gradients of one microbatch only are alive at a time, in the sum and in its pull-back (each is
      rematerialised). How the batch is cut and padded changes nothing but rounding.
    """
    parts = state["samples"][t].reshape(-1, recipe.microbatch)
    key = jax.random.fold_in(state["augmentation"], t)

    @jax.checkpoint
    def one(params: Params, pixels: jax.Array, rows: jax.Array) -> Params:
        real = jnp.maximum(rows, 0)
        images = take(state["images"], pixels, real)
        # Folded with the row, not with the place in the batch: other coins change no other example's copies.
        keys = jax.vmap(partial(jax.random.fold_in, key))(real)
        copies = jax.vmap(partial(augmentation.copies, recipe.augmentation))(keys, images)
        loss = partial(_loss_of_copies, model)
        return dpsgd.clipped_gradient_sum(loss, params, copies, state["labels"][real], rows >= 0, recipe.clip_norm)

    unroll = unroll or _unroll(model)

    def add(total: Params, rows: jax.Array) -> tuple[Params, None]:
        def added() -> Params:
            return jax.tree.map(jnp.add, total, one(state["params"], canary_images, rows))

        # A loop passes over what is padding alone; a branch is as slow as a loop where those are slow.
        return (jax.lax.cond(rows[0] >= 0, added, lambda: total) if unroll == 1 else added()), None

    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, state["params"]), parts, unroll=min(unroll, len(parts)))[0]


def _unroll(model: nn.Module) -> int:
    """How many microbatches to write out: XLA on CPUs runs `lax.conv` four times slower in a loop, and nothing else."""
    is_slow = jax.default_backend() == "cpu" and not getattr(model, "as_matmul", False)
    return MAX_UNROLL if is_slow else 1


def _loss_of_copies(model: nn.Module, params: Params, copies: jax.Array, label: jax.Array) -> jax.Array:
    """Mean loss of the copies of one example: its gradient is the mean of theirs."""
    return cross_entropy(model, params, copies, jnp.broadcast_to(label, len(copies)))


def _start(recipe: SGD | DPSGD, model: nn.Module, pool: Pool, seed: int) -> dict[str, PyTree]:
    """What the states of both algorithms share."""
    params = models.init(model, stream(seed, "init"), pool.images.shape[1:])
    optimizer = recipe.optimizer().init(params)
    return {"params": params, "optimizer": optimizer, "images": pool.images, "labels": pool.labels}


def _updated(recipe: SGD | DPSGD, state: PyTree, gradient: Params) -> dict[str, PyTree]:
    """The state after the optimiser's step."""
    updates, optimizer = recipe.optimizer().update(gradient, state["optimizer"], state["params"])
    return {**state, "params": optax.apply_updates(state["params"], updates), "optimizer": optimizer}
