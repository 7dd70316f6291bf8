"""Training of several runs of one recipe at once, by `jax.vmap` of the step that a single run takes.

For small networks on a device that one of them leaves idle, as on a GPU. Runs differ in seed, coins and start; images,
labels and canaries are shared and held once.

    included = np.stack([runs.coins(seed, num_canaries=100, game="independent") for seed in (7, 8)])
    first, second = train_together(recipe, model, pool, canaries.images, included, seeds=[7, 8], snapshots=[50, 150])
    first[150]  # the parameters of the run of seed 7 after 150 steps
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

from metacanary import steps, training, training_loop
from metacanary.interruption import ShouldStop
from metacanary.recipes import DPSGD
from metacanary.runs import Pool

PyTree = Any
Params = Any

SHARED = ("images", "labels", "is_used")
"""What of a state is of all runs."""


def train_together(
    recipe: training.Recipe,
    model: nn.Module,
    pool: Pool,
    canary_images: np.ndarray,
    included: np.ndarray,
    *,
    seeds: Sequence[int],
    snapshots: Sequence[int],
    initial: Sequence[Params] | None = None,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 60.0,
    on_step: Callable[[int], None] | None = None,
    should_stop: ShouldStop | None = None,
) -> list[dict[int, Params]]:
    """Train R models at once and keep their parameters after some steps.

    Args:
      recipe: what to train each with.
      model: the network.
      pool: the other images, and all labels.
      canary_images: float32 [m, height, width, channels] in [0, 1].
      included: bool [R, m], the coins of each run.
      seeds: of each run.
      snapshots: steps after which parameters are kept, as of `training.train`.
      initial: parameters that each run starts from; None to draw them.
      checkpoint: one file for all runs, to resume from and to write to; None writes nothing.
      checkpoint_seconds: time between two checkpoints.
      on_step: called with the number of steps that each run has finished.
      should_stop: as of `training.train`.

    Returns:
      Parameters by step, for each run.

    Raises:
      ValueError: coins, seeds and starts of other numbers of runs, or what `training.train` refuses for one of them.
      FloatingPointError: parameters that are not finite, with the seed of the run and the first step after which they
        were not.
      Stopped: `should_stop` said so, and the checkpoint is written.

    Guarantees:
      Each run has the coins, batches, augmented copies, noise and start that `training.train` gives to its seed, and
      its parameters but for rounding: XLA adds up stacked products in another order.
      No run depends on the coins of the others.
      Killed and resumed they end bit-identical to an undisturbed training of the same runs together; as in
      `training.train`, one that is stopped loses no step, and no checkpoint holds parameters that are not finite.
    """
    seeds = list(seeds)
    given = {"included": len(included)} | ({} if initial is None else {"initial": len(initial)})
    for name, count in given.items():
        if count != len(seeds):
            raise ValueError(f"{name}: got {count} runs, expected the {len(seeds)} of seeds")
    if isinstance(recipe, DPSGD):
        for own in included:
            training.require_private(recipe, model, pool, own)
    starts = [None] * len(seeds) if initial is None else list(initial)
    pixels, step = jnp.asarray(canary_images), compiled_step(recipe, model)
    identity = {
        "recipe": repr(recipe),
        "model": repr(model),
        "seeds": seeds,
        "initial": list(map(training_loop.digest, starts)),
    }
    if checkpoint is not None:
        identity |= training_loop.data_identity(pool, canary_images, included)
    kept = training_loop.follow(
        lambda state, t: step(state, pixels, t),
        initial_state(recipe, model, pool, included, seeds=seeds, initial=starts),
        num_steps=recipe.num_steps,
        snapshots=snapshots,
        released=partial(steps.released, recipe),
        identity=identity,
        seeds=seeds,
        checkpoint=checkpoint,
        checkpoint_seconds=checkpoint_seconds,
        on_step=on_step,
        should_stop=should_stop,
    )
    return [{s: jax.tree.map(lambda x, i=i: x[i], params) for s, params in kept.items()} for i in range(len(seeds))]


def initial_state(
    recipe: training.Recipe,
    model: nn.Module,
    pool: Pool,
    included: np.ndarray,
    *,
    seeds: Sequence[int],
    initial: Sequence[Params | None],
) -> dict[str, PyTree]:
    """The states of runs before their first step, as one.

    Args:
      recipe: what to train with.
      model: the network.
      pool: the other images, and all labels.
      included: bool [R, m].
      seeds: of each run.
      initial: parameters that each run starts from; None draws them.

    Returns:
      What `training.initial_state` returns, stacked along a first axis but for what is `SHARED`. Poisson samples are
      padded to one width, and `is_used`, bool [num_steps, microbatches], says where any run's hold more than padding.
    """
    triples = zip(included, seeds, initial, strict=True)
    states = [
        training.initial_state(recipe, model, pool, own, seed=seed, initial=start) for own, seed, start in triples
    ]
    shared = {name: states[0][name] for name in SHARED if name in states[0]}
    if isinstance(recipe, DPSGD):
        width = max(state["samples"].shape[1] for state in states)
        samples = [np.asarray(state["samples"]) for state in states]
        samples = [np.pad(s, ((0, 0), (0, width - s.shape[1])), constant_values=-1) for s in samples]
        for state, padded in zip(states, samples, strict=True):
            state["samples"] = jnp.asarray(padded)
        # A branch that runs take apart would be taken by all of them, and twice: XLA computes both and selects.
        shared["is_used"] = jnp.asarray((np.stack(samples)[:, :, :: recipe.microbatch] >= 0).any(axis=0))
    own = [{name: leaf for name, leaf in state.items() if name not in SHARED} for state in states]
    return {**jax.tree.map(lambda *leaves: jnp.stack(leaves), *own), **shared}


@cache
def compiled_step(
    recipe: training.Recipe, model: nn.Module
) -> Callable[[PyTree, jax.Array, np.integer], dict[str, PyTree]]:
    """What a step of all runs changes in their state, (state, canary_images, t) -> part of the state; compiled once.

    One program for any network: where `training.compiled_step` has a loop in Python over microbatches, for `lax.conv`
    under DP-SGD on CPUs, this one has `steps.MAX_UNROLL` of them written out and takes minutes to compile.
    """
    function = training.step_function(recipe, model)

    def step(state: PyTree, pixels: jax.Array, t: jax.Array) -> dict[str, PyTree]:
        axes = {name: None if name in SHARED else 0 for name in state}
        return jax.vmap(lambda own: training_loop.carried(function(own, pixels, t)), in_axes=(axes,))(state)

    return jax.jit(step)
