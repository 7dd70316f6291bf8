"""The compiled pieces of a replay: a step with the checksum of its result, its pull-back, the objective.

A state is handled as two lists of leaves: those that change from step to step, and constants, which the step returns as
it got them (a data set, the data order). Only the former are copied, held and compared.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metacanary.replay_storage import Leaves

PyTree = Any
StepFn = Callable[[PyTree, PyTree, jax.Array], PyTree]
ObjectiveFn = Callable[[PyTree, PyTree], tuple[jax.Array, PyTree]]


class Problem(NamedTuple):
    """What is compiled for: hashed by the functions and the layout of the state.

    Attributes:
      changes: by leaf of the state, whether the step may return another than it got; the others are constants.
      from_metaparams: whether s[0] depends on the metaparameters, so that constants are differentiated by as well.
    """

    step_fn: StepFn
    objective_fn: ObjectiveFn
    structure: Any
    changes: tuple[bool, ...]
    from_metaparams: bool


def prepare(
    step_fn: StepFn, objective_fn: ObjectiveFn, state: PyTree | Callable[[PyTree], PyTree], metaparams: PyTree
) -> tuple[Problem, Leaves, PyTree]:
    """The problem, the leaves of s[0] that change, and what is fixed: metaparameters and the other leaves."""
    initial = jax.tree.map(jnp.asarray, jax.jit(state)(metaparams) if callable(state) else state)
    for name, tree in (("state", initial), ("metaparams", metaparams)):
        if not jax.tree.leaves(split(tree)[0]):
            raise ValueError(f"{name}: got no floating-point leaf, expected at least one to differentiate by")
    leaves, structure = jax.tree.flatten(initial)
    traced = jax.jit(step_fn).trace(initial, metaparams, jnp.int32(0))
    returned: Any = jax.tree.structure(traced.out_info)
    if returned != structure:
        raise ValueError(f"step_fn: got {returned}, expected it to return the state's structure, {structure}")
    jaxpr = traced.jaxpr.jaxpr
    changes = tuple(new is not old for new, old in zip(jaxpr.outvars, jaxpr.invars, strict=False))
    problem = Problem(step_fn, objective_fn, structure, changes, callable(state))
    constants = [x for x, changed in zip(leaves, changes, strict=True) if not changed]
    carried = [x for x, changed in zip(leaves, changes, strict=True) if changed]
    return problem, carried, {"metaparams": metaparams, "constants": constants}


def join(problem: Problem, carried: list[Any], constants: list[Any]) -> PyTree:
    """The state's tree from its two kinds of leaves."""
    sources = {True: iter(carried), False: iter(constants)}
    return jax.tree.unflatten(problem.structure, [next(sources[changed]) for changed in problem.changes])


def _advance(problem: Problem, carried: Leaves, fixed: PyTree, t: jax.Array) -> Leaves:
    """One step, as a function of what changes."""
    new = problem.step_fn(join(problem, carried, fixed["constants"]), fixed["metaparams"], t)
    return [x for x, changed in zip(jax.tree.leaves(new), problem.changes, strict=True) if changed]


@partial(jax.jit, static_argnums=0)
def step(problem: Problem, carried: Leaves, fixed: PyTree, t: jax.Array) -> tuple[Leaves, jax.Array]:
    """One step and the checksum of its result, compiled once for each problem and shapes."""
    new = _advance(problem, carried, fixed, t)
    return new, checksum(new)


@partial(jax.jit, static_argnums=0)
def objective(problem: Problem, carried: Leaves, fixed: PyTree) -> tuple[Any, Any, Any, Any]:
    """The objective with its derivatives by the state (the adjoint A[T]) and by what is fixed (the direct term)."""
    (state_in, state_rest), (fixed_in, fixed_rest) = split(carried), _split_fixed(problem, fixed)

    def function(state: PyTree, chosen: PyTree) -> tuple[jax.Array, PyTree]:
        merged = merge(chosen, fixed_rest)
        end = join(problem, merge(state, state_rest), merged["constants"])
        result = problem.objective_fn(end, merged["metaparams"])
        if not (isinstance(result, tuple) and len(result) == 2):
            raise ValueError(f"objective_fn: got {type(result).__name__}, expected it to return (scalar, aux)")
        return result

    (value, aux), (adjoint, gradient) = jax.value_and_grad(function, argnums=(0, 1), has_aux=True)(state_in, fixed_in)
    return value, aux, adjoint, gradient


@partial(jax.jit, static_argnums=0, donate_argnums=(4, 5))
def step_vjp(
    problem: Problem, carried: Leaves, fixed: PyTree, t: jax.Array, adjoint: PyTree, gradient: PyTree
) -> tuple[PyTree, PyTree]:
    """Pull the adjoint back through one step and add the step's share to the gradient."""
    (state_in, state_rest), (fixed_in, fixed_rest) = split(carried), _split_fixed(problem, fixed)

    def function(state: PyTree, chosen: PyTree) -> PyTree:
        return split(_advance(problem, merge(state, state_rest), merge(chosen, fixed_rest), t))[0]

    _, pull_back = jax.vjp(function, state_in, fixed_in)
    adjoint, share = pull_back(adjoint)
    return adjoint, jax.tree.map(jnp.add, gradient, share)


@partial(jax.jit, static_argnums=0)
def initial_vjp(init_fn: Callable[[PyTree], PyTree], metaparams: PyTree, adjoint: PyTree, gradient: PyTree) -> PyTree:
    """Add what the initial state contributes to the gradient."""
    floats, rest = split(metaparams)
    _, pull_back = jax.vjp(lambda chosen: split(init_fn(merge(chosen, rest)))[0], floats)
    return jax.tree.map(jnp.add, gradient, pull_back(adjoint)[0])


def checksum(leaves: Leaves) -> jax.Array:
    """A uint32 of all bits: each word times an odd number of its own, so that a change of one word is always seen."""
    total = jnp.uint32(0)
    for leaf in leaves:
        words = _words(leaf)
        odd = 2 * jnp.arange(words.size, dtype=jnp.uint32) + 1
        total = total * jnp.uint32(0x9E3779B1) + jnp.sum(words * odd, dtype=jnp.uint32)
    return total


def _words(leaf: jax.Array) -> jax.Array:
    """The bits of an array as a vector of uint32, a word or two for each number."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    if jnp.iscomplexobj(leaf):
        leaf = jnp.stack([leaf.real, leaf.imag])
    width = min(32, 8 * leaf.dtype.itemsize)
    return jax.lax.bitcast_convert_type(leaf, f"uint{width}").astype(jnp.uint32).ravel()


def _split_fixed(problem: Problem, fixed: PyTree) -> tuple[PyTree, PyTree]:
    """As `split`; constants are differentiated by only if they come from the metaparameters."""
    floats, rest = split(fixed)
    if problem.from_metaparams:
        return floats, rest
    return {**floats, "constants": [None] * len(fixed["constants"])}, {**rest, "constants": fixed["constants"]}


def split(tree: PyTree) -> tuple[PyTree, PyTree]:
    """The tree with its floating-point leaves only, and with the others only; None where a leaf was taken out."""

    def is_float(x: Any) -> bool:
        return jnp.issubdtype(jnp.result_type(x) if not hasattr(x, "dtype") else x.dtype, jnp.inexact)

    floats = jax.tree.map(lambda x: x if is_float(x) else None, tree)
    return floats, jax.tree.map(lambda x: None if is_float(x) else x, tree)


def merge(first: PyTree, second: PyTree) -> PyTree:
    """The inverse of `split`."""
    return jax.tree.map(lambda a, b: b if a is None else a, first, second, is_leaf=lambda x: x is None)


def is_finite(tree: PyTree) -> bool:
    """Whether all floating-point leaves are finite."""
    return all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(split(tree)[0]))
