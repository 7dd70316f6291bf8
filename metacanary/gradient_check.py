"""Checks the metagradient of a training of your own against finite differences, in float64."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metacanary import replay_step
from metacanary.metagradient import replay
from metacanary.replay_schedule import check_tree
from metacanary.replay_step import ObjectiveFn, StepFn

PyTree = Any


class GradientCheck(NamedTuple):
    """What `check_gradient` returns.

    Attributes:
      derivative: along a random direction v, from the metagradient g: the inner product of g and v.
      difference: the same by central differences of the objective.
      relative_error: |derivative - difference| / max of both.
    """

    derivative: float
    difference: float
    relative_error: float


def check_gradient(
    step_fn: StepFn,
    objective_fn: ObjectiveFn,
    state: Any,
    metaparams: PyTree,
    num_steps: int,
    *,
    seed: int = 0,
    step: float = 1e-5,
) -> GradientCheck:
    """Compare a metagradient with central differences along a random direction, all in float64.

    A few steps will do: a path that is cut (a stop_gradient, a cast to integers, a rounding) is cut in each.

    Args:
      step_fn, objective_fn, state, metaparams, num_steps: as of `metagradient.replay`. Floating-point leaves of state
        and metaparams become float64; arrays that the functions close over stay what they are, and belong into the
        state if they are to be float64 as well.
      seed: of the direction, standard normal at each floating-point number of metaparams.
      step: h, in units of the metaparameters.

    Returns:
      GradientCheck; where all is float64 and smooth, a relative_error of 1e-6 or less is to be expected.

    Raises:
      ValueError: as of `metagradient.replay`.
    """
    check_tree(num_steps, 2)
    with jax.enable_x64(True):
        z = _in_float64("metaparams", metaparams)
        from_metaparams = replay_step.is_initializer(state)
        begin = (lambda z: _in_float64("state", state(z))) if from_metaparams else _in_float64("state", state)
        rng = np.random.default_rng(seed)
        floats, rest = replay_step.split(z)
        v = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), floats)
        gradient = replay(
            step_fn, objective_fn, begin, z, num_steps, branching=max(2, math.isqrt(num_steps) + 1)
        ).gradient
        derivative = sum(float(jnp.vdot(g, w)) for g, w in zip(*map(jax.tree.leaves, (gradient, v)), strict=True))

        def value(distance: float) -> float:
            moved = replay_step.merge(jax.tree.map(lambda x, w: x + distance * w, floats, v), rest)
            current, advance = begin(moved) if from_metaparams else begin, jax.jit(step_fn)
            for t in range(num_steps):
                current = advance(current, moved, np.int32(t))
            return float(objective_fn(current, moved)[0])

        difference = (value(step) - value(-step)) / (2 * step)
    largest = max(abs(derivative), abs(difference))
    return GradientCheck(derivative, difference, abs(derivative - difference) / largest if largest else 0.0)


def _in_float64(name: str, tree: PyTree) -> PyTree:
    """The tree with its floating-point leaves in float64."""
    floats, rest = replay_step.split(replay_step.as_arrays(name, tree))
    return replay_step.merge(jax.tree.map(lambda x: x.astype(jnp.float64), floats), rest)
