"""Exact metagradients: the derivative of an objective of the trained model through the whole training run.

REPLAY (Engstrom et al. 2025, arXiv 2503.13751, Section 2). Training is s[t+1] = step(s[t], z, t) for t = 0..T-1, an
objective phi(s[T], z) is to be differentiated by the metaparameters z. With the adjoint A[T] = dphi/ds[T] and
A[t] = (dstep_t/ds)^T A[t+1] the metagradient is

    dphi/dz = sum_t (dstep_t/dz)^T A[t+1]  +  (the direct term) dphi/dz at fixed s[T].

The states are needed in reverse order. They are not all kept: a lazy k-ary tree holds O(k log_k T) of them and
recomputes the others from the nearest one that is held, which replays training about log_k T times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PyTree = Any
StepFn = Callable[[PyTree, PyTree, jax.Array], PyTree]
ObjectiveFn = Callable[[PyTree, PyTree], tuple[jax.Array, PyTree]]


class Replay(NamedTuple):
    """What `replay` returns.

    Attributes:
      value: the objective phi(s[T], z), a scalar.
      aux: what the objective returned beside its value.
      gradient: d value / d metaparams, a tree as metaparams with None at leaves that are not floating point.
    """

    value: jax.Array
    aux: PyTree
    gradient: PyTree


def replay(
    step_fn: StepFn,
    objective_fn: ObjectiveFn,
    state: PyTree,
    metaparams: PyTree,
    num_steps: int,
    *,
    branching: int,
    on_step: Callable[[str, int], None] | None = None,
) -> Replay:
    """Differentiate an objective of the state after `num_steps` steps by the metaparameters.

    Leaves of `state` and `metaparams` that are not floating point (data order, labels, uint8 images, PRNG keys) are
    carried along and not differentiated. Pass the same function objects again and nothing is compiled again.

    Args:
      step_fn: step_fn(state, metaparams, t) -> state; pure, deterministic, jittable; t is an int32 scalar.
      objective_fn: objective_fn(state, metaparams) -> (scalar, aux), jittable.
      state: s[0], a pytree of arrays.
      metaparams: z, a pytree of arrays.
      num_steps: T >= 1.
      branching: k >= 2, the arity of the tree; k >= T keeps all states and recomputes none.
      on_step: called with ("forward" or "backward", t) after each step, to show progress.

    Returns:
      Replay(value, aux, gradient).

    Raises:
      ValueError: num_steps < 1, branching < 2, no floating-point leaf, or an objective that returns no pair.
      FloatingPointError: the objective is not finite (the message names the first step after which the state is
        not finite), or the gradient is not.

    Guarantees:
      Exact: the gradient equals that of plain reverse-mode differentiation through all steps, up to rounding.
      Memory: at most 1 + branching * depth states are alive at a time, depth = max(1, ceil(log_branching(num_steps))).
      Work: num_steps VJPs and at most num_steps * depth step calls.

    References:
      arXiv 2503.13751, Section 2 (REPLAY, the lazy k-ary tree).
    """
    if num_steps < 1:
        raise ValueError(f"num_steps: got {num_steps}, expected an integer >= 1")
    if branching < 2:
        raise ValueError(f"branching: got {branching}, expected an integer >= 2")
    notify = on_step or (lambda phase, t: None)

    def forward(s: PyTree, t: int) -> PyTree:
        s = _step(step_fn, s, metaparams, jnp.int32(t))
        notify("forward", t)
        return s

    held = _expand(forward, state, 0, num_steps, branching)
    last, final = held[-1]
    for t in range(last, num_steps):
        final = forward(final, t)
    value, aux, adjoint, gradient = _objective(objective_fn, final, metaparams)
    if not bool(jnp.isfinite(value)):
        raise FloatingPointError(_first_non_finite(forward, state, num_steps))
    del final
    for t, s in _reversed_states(forward, held, num_steps, branching):
        adjoint, gradient = _step_vjp(step_fn, s, metaparams, jnp.int32(t), adjoint, gradient)
        notify("backward", t)
    if not _is_finite(gradient):
        raise FloatingPointError("the metagradient is not finite although the objective is: see the step's derivative")
    return Replay(value, aux, _merge(gradient, jax.tree.map(lambda _: None, metaparams)))


def _expand(
    forward: Callable[[PyTree, int], PyTree], state: PyTree, low: int, high: int, branching: int
) -> list[tuple[int, PyTree]]:
    """Cut [low, high) into at most `branching` parts; return the (step, state) at the start of each."""
    starts = range(low, high, -(-(high - low) // branching))
    held = [(low, state)]
    for t in range(low, starts[-1]):
        state = forward(state, t)
        if t + 1 in starts:
            held.append((t + 1, state))
    return held


def _reversed_states(
    forward: Callable[[PyTree, int], PyTree], held: list[tuple[int, PyTree]], high: int, branching: int
) -> Iterator[tuple[int, PyTree]]:
    """Yield (t, s[t]) from high - 1 down, expanding one part at a time and dropping each state once used."""
    while held:
        low, state = held.pop()
        if high - low == 1:
            yield low, state
        else:
            part = _expand(forward, state, low, high, branching)
            del state
            yield from _reversed_states(forward, part, high, branching)
        high = low


@partial(jax.jit, static_argnums=0)
def _step(step_fn: StepFn, state: PyTree, metaparams: PyTree, t: jax.Array) -> PyTree:
    """One step, compiled once for each step function and shapes."""
    return step_fn(state, metaparams, t)


@partial(jax.jit, static_argnums=0)
def _objective(objective_fn: ObjectiveFn, state: PyTree, metaparams: PyTree) -> tuple[Any, Any, Any, Any]:
    """The objective with its derivatives by the state (the adjoint A[T]) and by z (the direct term)."""
    (state_in, state_rest), (meta_in, meta_rest) = _split(state), _split(metaparams)
    for name, floats in (("state", state_in), ("metaparams", meta_in)):
        if not jax.tree.leaves(floats):
            raise ValueError(f"{name}: got no floating-point leaf, expected at least one to differentiate by")

    def function(s: PyTree, z: PyTree) -> tuple[jax.Array, PyTree]:
        result = objective_fn(_merge(s, state_rest), _merge(z, meta_rest))
        if not (isinstance(result, tuple) and len(result) == 2):
            raise ValueError(f"objective_fn: got {type(result).__name__}, expected it to return (scalar, aux)")
        return result

    (value, aux), (adjoint, gradient) = jax.value_and_grad(function, argnums=(0, 1), has_aux=True)(state_in, meta_in)
    return value, aux, adjoint, gradient


@partial(jax.jit, static_argnums=0, donate_argnums=(4, 5))
def _step_vjp(
    step_fn: StepFn, state: PyTree, metaparams: PyTree, t: jax.Array, adjoint: PyTree, gradient: PyTree
) -> tuple[PyTree, PyTree]:
    """Pull the adjoint back through one step and add the step's share to the gradient."""
    (state_in, state_rest), (meta_in, meta_rest) = _split(state), _split(metaparams)

    def function(s: PyTree, z: PyTree) -> PyTree:
        return _split(step_fn(_merge(s, state_rest), _merge(z, meta_rest), t))[0]

    _, pull_back = jax.vjp(function, state_in, meta_in)
    adjoint, share = pull_back(adjoint)
    return adjoint, jax.tree.map(jnp.add, gradient, share)


def _split(tree: PyTree) -> tuple[PyTree, PyTree]:
    """The tree with its floating-point leaves only, and with the others only; None where a leaf was taken out."""

    def is_float(x: Any) -> bool:
        return jnp.issubdtype(jnp.result_type(x) if not hasattr(x, "dtype") else x.dtype, jnp.inexact)

    floats = jax.tree.map(lambda x: x if is_float(x) else None, tree)
    return floats, jax.tree.map(lambda x: None if is_float(x) else x, tree)


def _merge(first: PyTree, second: PyTree) -> PyTree:
    """The inverse of `_split`."""
    return jax.tree.map(lambda a, b: b if a is None else a, first, second, is_leaf=lambda x: x is None)


def _is_finite(tree: PyTree) -> bool:
    """Whether all floating-point leaves are finite."""
    return all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(_split(tree)[0]))


def _first_non_finite(forward: Callable[[PyTree, int], PyTree], state: PyTree, num_steps: int) -> str:
    """Run again from the start to name the step at which the state stopped being finite."""
    for t in range(num_steps):
        state = forward(state, t)
        if not _is_finite(state):
            return f"training state is not finite after step {t} of {num_steps}: lower the learning rate"
    return f"the objective is not finite although the state after all {num_steps} steps is"
