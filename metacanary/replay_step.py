"""The compiled pieces of a replay: a step with the checksum of its result, its pull-back, the objective.

A state is handled as two lists of leaves: those that change from step to step, and constants, which the step returns as
it got them (a data set, the data order). Only the former are copied, held and compared, packed by `replay_layout`.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from metacanary.replay_layout import Layout
from metacanary.replay_storage import Leaves

PyTree = Any
StepFn = Callable[[PyTree, PyTree, jax.Array], PyTree]
ObjectiveFn = Callable[[PyTree, PyTree], tuple[jax.Array, PyTree]]


class Problem(NamedTuple):
    """What is compiled for: hashed by the functions and the layout of the state.

    Attributes:
      changes: by leaf of the state, whether the step may return another than it got; the others are constants.
      from_metaparams: whether s[0] depends on the metaparameters, so that constants are differentiated by as well.
      layout: of the leaves that change, packed as they are held.
    """

    step_fn: StepFn
    objective_fn: ObjectiveFn
    structure: Any
    changes: tuple[bool, ...]
    from_metaparams: bool
    layout: Layout


def prepare(
    step_fn: StepFn, objective_fn: ObjectiveFn, state: PyTree | Callable[[PyTree], PyTree], metaparams: PyTree
) -> tuple[Problem, Leaves, PyTree]:
    """The problem, the leaves of s[0] that change, packed, and what is fixed: metaparameters and the other leaves."""
    # The initialiser gets the metaparameters as they are: Python numbers adapt their dtype to what they meet.
    given, metaparams, from_metaparams = metaparams, as_arrays("metaparams", metaparams), is_initializer(state)
    initial = _initial(state, given) if from_metaparams else as_arrays("state", state)
    for name, tree in (("state", initial), ("metaparams", metaparams)):
        if not jax.tree.leaves(split(tree)[0]):
            raise ValueError(f"{name}: got no floating-point leaf, expected at least one to differentiate by")
    leaves, structure = jax.tree.flatten(initial)
    traced = jax.jit(step_fn).trace(initial, metaparams, jnp.int32(0))
    _require_same_state(initial, traced.out_info)
    passed = _passed_through(traced.jaxpr.jaxpr)
    changes = tuple(passed[i] != i for i in range(len(leaves)))
    constants = [x for x, changed in zip(leaves, changes, strict=True) if not changed]
    carried = [x for x, changed in zip(leaves, changes, strict=True) if changed]
    layout = Layout.of(carried)
    problem = Problem(step_fn, objective_fn, structure, changes, from_metaparams, layout)
    return problem, layout.pack(carried), {"metaparams": metaparams, "constants": constants}


def is_initializer(state: Any) -> bool:
    """Whether a state is a function that returns it: what can be called and is no pytree, as Equinox's modules are."""
    return callable(state) and jax.tree_util.all_leaves([state])


@partial(jax.jit, static_argnums=0)
def _initial(init_fn: Callable[[PyTree], PyTree], metaparams: PyTree) -> PyTree:
    """s[0] from the metaparameters, compiled once for each function."""
    return as_arrays("state", init_fn(metaparams))


def as_arrays(name: str, tree: PyTree) -> PyTree:
    """The tree with arrays as leaves, each with a dtype of its own; ValueError names a leaf that is no number."""
    return jax.tree_util.tree_map_with_path(lambda path, x: _strong(name + jax.tree_util.keystr(path), x), tree)


def _strong(name: str, leaf: Any) -> jax.Array:
    """A leaf as an array whose dtype is its own, which Python numbers' are not."""
    try:
        if isinstance(leaf, str):  # which jnp.asarray would look up as the name of a dtype
            raise TypeError
        array = jnp.asarray(leaf)
    except (TypeError, ValueError):
        got = f"{type(leaf).__name__} {reprlib.repr(leaf)}"
        raise ValueError(f"{name}: got {got}, expected an array or a number") from None
    is_key = jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
    return array if is_key else jax.lax.convert_element_type(array, array.dtype)


def _require_same_state(initial: PyTree, returned: PyTree) -> None:
    """Refuse a step that does not return the structure, the shapes and the dtypes that it gets."""
    structures: list[Any] = [jax.tree.structure(tree) for tree in (initial, returned)]
    if structures[0] != structures[1]:
        paths = [
            {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(t)}
            for t in (initial, returned)
        ]
        lost, added = sorted(paths[0] - paths[1]), sorted(paths[1] - paths[0])
        raise ValueError(
            f"step_fn: got {type(returned).__name__} without {lost or 'nothing'} and with {added or 'nothing'} added, "
            f"expected the state's structure, a {type(initial).__name__}"
        )
    for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(initial), jax.tree.leaves(returned), strict=True):
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise ValueError(
                f"step_fn: got {new.dtype} {list(new.shape)} at state{jax.tree_util.keystr(path)}, "
                f"expected what it was given, {old.dtype} {list(old.shape)}"
            )


def _passed_through(jaxpr: Any) -> list[int | None]:
    """For each result of a jaxpr the number of the argument that it is, None if it is computed; through inner jits."""
    known = {var: i for i, var in enumerate(jaxpr.invars)}
    for equation in jaxpr.eqns:
        inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
        if equation.primitive.name not in ("jit", "pjit", "remat2", "checkpoint", "closed_call") or inner is None:
            continue
        for i, var in zip(_passed_through(getattr(inner, "jaxpr", inner)), equation.outvars, strict=True):
            source = None if i is None else equation.invars[i]
            if source is not None and not isinstance(source, Literal) and source in known:
                known[var] = known[source]
    return [None if isinstance(var, Literal) else known.get(var) for var in jaxpr.outvars]


def join(problem: Problem, carried: list[Any], constants: list[Any]) -> PyTree:
    """The state's tree from its two kinds of leaves."""
    sources = {True: iter(carried), False: iter(constants)}
    return jax.tree.unflatten(problem.structure, [next(sources[changed]) for changed in problem.changes])


def _advance(problem: Problem, carried: Leaves, fixed: PyTree, t: jax.Array) -> Leaves:
    """One step, as a function of what changes, not packed."""
    # Under jit it is traced once, for the step and its VJP: what Python draws in it (it should not) is then the same.
    new = jax.jit(problem.step_fn)(join(problem, carried, fixed["constants"]), fixed["metaparams"], t)
    return [x for x, changed in zip(jax.tree.leaves(new), problem.changes, strict=True) if changed]


@partial(jax.jit, static_argnums=0)
def step(problem: Problem, carried: Leaves, fixed: PyTree, t: jax.Array) -> tuple[Leaves, jax.Array]:
    """One step and the checksum of its result, compiled once for each problem and shapes."""
    new = problem.layout.pack(_advance(problem, problem.layout.unpack(carried), fixed, t))
    return new, checksum(new)


@partial(jax.jit, static_argnums=0)
def objective(problem: Problem, carried: Leaves, fixed: PyTree) -> tuple[Any, Any, Any, Any]:
    """The objective with its derivatives by the state (the adjoint A[T]) and by what is fixed (the direct term)."""
    (state_in, state_rest), (fixed_in, fixed_rest) = split(problem.layout.unpack(carried)), _split_fixed(problem, fixed)

    def function(state: PyTree, chosen: PyTree) -> tuple[jax.Array, PyTree]:
        merged = merge(chosen, fixed_rest)
        end = join(problem, merge(state, state_rest), merged["constants"])
        result = problem.objective_fn(end, merged["metaparams"])
        if not (isinstance(result, tuple) and len(result) == 2):
            raise ValueError("objective_fn: got no pair, expected it to return (scalar, aux), as in (value, ())")
        if not is_float_scalar(result[0]):
            raise ValueError(f"objective_fn: got {described(result[0])} as value, expected one floating-point scalar")
        if not all(_abstract(leaf) for leaf in jax.tree.leaves(result[1])):
            raise ValueError(f"objective_fn: got {described(result[1])} as aux, expected a pytree of arrays")
        return result

    (value, aux), (adjoint, gradient) = jax.value_and_grad(function, argnums=(0, 1), has_aux=True)(state_in, fixed_in)
    # Summed over all steps in float32 at least: in bfloat16 a long sum stops growing.
    wide = jax.tree.map(lambda g: g.astype(jnp.promote_types(g.dtype, jnp.float32)), gradient)
    return value, aux, adjoint, wide


@partial(jax.jit, donate_argnums=0)
def add(first: PyTree, second: PyTree) -> PyTree:
    """The sum of two trees: of what one objective gives and what those after it gave."""
    return jax.tree.map(jnp.add, first, second)


@partial(jax.jit, static_argnums=0, donate_argnums=(4, 5))
def step_vjp(
    problem: Problem, carried: Leaves, fixed: PyTree, t: jax.Array, adjoint: PyTree, gradient: PyTree
) -> tuple[PyTree, PyTree]:
    """Pull the adjoint back through one step and add the step's share to the gradient."""
    (state_in, state_rest), (fixed_in, fixed_rest) = split(problem.layout.unpack(carried)), _split_fixed(problem, fixed)

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


def as_metaparams(gradient: PyTree, metaparams: PyTree) -> PyTree:
    """The gradient in the dtypes of the metaparameters, None where they are not floating point."""
    floats, _ = split(metaparams)
    return jax.tree.map(
        lambda z, g: None if z is None else g.astype(jnp.result_type(z)), floats, gradient, is_leaf=lambda x: x is None
    )


def checksum(leaves: Leaves) -> jax.Array:
    """A uint32 of all bits of all leaves, in their order.

    A change of one 32-bit word is always seen, since each step of mixing is one to one; any other is missed with a
    chance of about 2**-32.
    """
    total = jnp.uint32(0)
    for leaf in leaves:
        words = _words(leaf)
        place = _mixed(jnp.arange(words.size, dtype=jnp.uint32) + jnp.uint32(0x9E3779B1))
        total = _mixed(total) + jnp.sum(_mixed(words ^ place), dtype=jnp.uint32)
    return total


def _mixed(x: jax.Array) -> jax.Array:
    """The finaliser of MurmurHash3: one to one, and every bit of the result depends on every bit of x."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _words(leaf: jax.Array) -> jax.Array:
    """The bits of an array as a vector of uint32, a word or two for each number."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    if jnp.iscomplexobj(leaf):
        leaf = jnp.stack([leaf.real, leaf.imag])
    is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
    info: Any = jnp.finfo(leaf.dtype) if is_float else jnp.iinfo(leaf.dtype)
    width = min(32, info.bits)  # 4 of int4, whose itemsize is a byte
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


def is_float_scalar(value: Any) -> bool:
    """Whether something can be differentiated: one floating-point number, and in no container."""
    found = _abstract(value)
    return found is not None and found.shape == () and bool(jnp.issubdtype(found.dtype, jnp.floating))


def described(tree: PyTree) -> str:
    """A tree with the dtype and shape of each leaf for an error, as in ('float32 [3]', None)."""

    def one(leaf: Any) -> str:
        found = _abstract(leaf)
        return f"{found.dtype} {list(found.shape)}" if found else f"{type(leaf).__name__} {reprlib.repr(leaf)}"

    return str(jax.tree.map(one, tree))


def _abstract(leaf: Any) -> Any:
    """Dtype and shape of what JAX computes with, None for anything else."""
    try:
        return jax.typeof(leaf)
    except TypeError:
        return None


def is_finite(tree: PyTree) -> bool:
    """Whether all floating-point leaves are finite."""
    return all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(split(tree)[0]))
