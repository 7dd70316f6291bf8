"""JAX contenders of `benchmarks.dpsgd`: metacanary's steps, private and not, and jax-privacy's `clipped_grad`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from benchmarks.dpsgd_problem import NUM_CANARIES, SEED, Problem
from metacanary import dpsgd, runs, training
from metacanary.recipes import DPSGD, SGD, Clipping

NUM_IMAGES = 50_000
"""Of CIFAR-10: how many rows of padding a run has depends on it."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A training step, ready to run; each one goes on from the parameters that the last one left.

    Attributes:
      step: starts one step.
      wait: returns when all steps are done.
      vector: the parameters as one vector, in the order of Flax's leaves.
    """

    step: Callable[[], None]
    wait: Callable[[], object]
    vector: Callable[[], np.ndarray]


def of_recipe(recipe: DPSGD | SGD, problem: Problem, batches: dict[str, np.ndarray]) -> Contender:
    """The step of a recipe as `training.train` compiles it, on the batch of the problem at every step."""
    included = np.zeros(NUM_CANARIES, bool)
    state = problem.cast(training.initial_state(recipe, problem.model, problem.pool, included, seed=SEED))
    state |= {name: jnp.asarray(rows) for name, rows in batches.items()}
    pixels, compiled = problem.canary_images, training.compiled_step(recipe, problem.model)

    def step() -> None:
        state.update(compiled(state, pixels, np.int32(0)))

    return Contender(
        step=step,
        wait=lambda: jax.block_until_ready(state["params"]),
        vector=lambda: np.asarray(ravel_pytree(state["params"])[0]),
    )


def private(problem: Problem, *, padded: bool = False, **fields: Any) -> Contender:
    """metacanary's DP-SGD step, with further fields of its recipe.

    Args:
      problem: the batch.
      padded: with as many rows of padding as a run on `NUM_IMAGES` images has, instead of a batch that fills its rows.
      **fields: of `DPSGD`.
    """
    recipe = DPSGD(
        num_steps=1,
        sampling_prob=problem.sampling_prob,
        clip_norm=problem.clip_norm,
        noise_multiplier=problem.noise_multiplier,
        learning_rate=problem.learning_rate,
        microbatch=problem.microbatch,
        augmentation=problem.augmentation,
        **fields,
    )
    rows = problem.rows
    if padded:
        everyone = np.ones(NUM_IMAGES, bool)
        chance = problem.batch / NUM_IMAGES
        wide = dpsgd.poisson_batches(runs.stream(SEED, "sampling"), chance, everyone, 1, problem.microbatch)
        rows = np.pad(rows, (0, wide.shape[1] - len(rows)), constant_values=-1)
    return of_recipe(recipe, problem, {"samples": rows[None]})


def not_private(problem: Problem) -> Contender:
    """metacanary's SGD step on the same copies."""
    recipe = SGD(
        num_steps=1,
        batch_size=problem.batch,
        learning_rate=problem.learning_rate,
        microbatch=problem.microbatch,
        augmentation=problem.augmentation,
    )
    return of_recipe(recipe, problem, {"order": problem.rows[None]})


def jax_privacy(problem: Problem, *, same_layers: bool = False) -> Contender:
    """jax-privacy's clipped gradients and noise, then Optax's SGD, in one compiled step.

    The copies are drawn beforehand, and its pass that replaces NaNs is off: both in its favour.

    Args:
      problem: the batch.
      same_layers: with metacanary's form of convolutions instead of Flax's own, which its users have.
    """
    from jax_privacy import clipped_grad, noise_addition

    clipped = clipped_grad(
        partial(problem.loss, model=problem.model if same_layers else problem.flax_model),
        l2_clip_norm=problem.clip_norm,
        normalize_by=problem.batch,
        batch_argnums=(1, 2),
        keep_batch_dim=False,
        # Without a loop over microbatches where there is one alone: XLA on CPUs is slow in it.
        microbatch_size=None if problem.microbatch == problem.batch else problem.microbatch,
        nan_safe=False,
    )
    privatizer = noise_addition.gaussian_privatizer(
        stddev=problem.noise_multiplier * clipped.sensitivity(), prng_key=runs.stream(SEED, "noise")
    )
    optimizer = optax.chain(privatizer, optax.sgd(problem.learning_rate))
    params = problem.params()
    state = {"params": params, "optimizer": optimizer.init(params)}
    batch = jnp.asarray(problem.stacks()), jnp.asarray(problem.labels)

    @jax.jit
    def advance(state: dict[str, Any], copies: jax.Array, labels: jax.Array) -> dict[str, Any]:
        gradient = clipped(state["params"], copies, labels)
        updates, new = optimizer.update(gradient, state["optimizer"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "optimizer": new}

    return Contender(
        step=lambda: state.update(advance(state, *batch)),
        wait=lambda: jax.block_until_ready(state["params"]),
        vector=lambda: np.asarray(ravel_pytree(state["params"])[0]),
    )


CONTENDERS: dict[str, Callable[[Problem], Contender]] = {
    "sgd": not_private,
    "metacanary_flat": private,
    "metacanary_flat_padded": partial(private, padded=True),
    "metacanary_per_layer": partial(private, clipping=Clipping(name="per_layer")),
    "metacanary_adaptive": partial(private, clipping=Clipping(name="adaptive")),
    "jax_privacy": jax_privacy,
    "jax_privacy_same_layers": partial(jax_privacy, same_layers=True),
}
