"""Gradients inside a training step that are cheap to differentiate again.

A metagradient pulls an adjoint v back through steps that contain g(p, x) = grad_p L(p, x). Reverse-over-reverse
keeps what the inner reverse pass computed. But g is a gradient, so that its pull-back is a directional derivative,

    (dg/d(p, x))^T v = d/de grad_(p, x) L(p + e v, x)  at e = 0,

since second derivatives commute: a forward-over-reverse Hessian-vector product. It needs no residuals but p and x, and
XLA compiles it to less memory traffic. This is the mixed mode of MixFlow-MG (Kemaev et al. 2025, arXiv 2505.00793).

    gradient = mean_gradient(loss, params, images, labels)  # instead of jax.grad(loss)(params, images, labels)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.core import eval_jaxpr

from metacanary.replay_step import described, is_float_scalar

PyTree = Any
LossFn = Callable[..., jax.Array]

MODES = ("mixed", "reverse")


def grad(loss_fn: LossFn, mode: str = "mixed") -> Callable[..., PyTree]:
    """As `jax.grad` by the first argument; how it is differentiated again is chosen by `mode`.

    Args:
      loss_fn: loss_fn(params, *args) -> one floating-point scalar, nothing beside it (there is no has_aux); params has
        floating-point leaves only, args may hold any arrays.
      mode: "mixed", by a forward-over-reverse Hessian-vector product; "reverse", by reverse-over-reverse.

    Returns:
      A function (params, *args) -> tree as params, for use under jit and vmap.

    Raises:
      ValueError: unknown mode; when called, a loss that returns anything but one floating-point scalar.

    Guarantees:
      Both modes return the same gradient; their pull-backs are equal up to rounding, by params, by the
      floating-point leaves of args, and by what loss_fn closes over.
      In mixed mode nothing but params and args is kept for the pull-back. It has no forward-mode derivative.

    References:
      arXiv 2505.00793 (MixFlow-MG).
    """
    if mode not in MODES:
        raise ValueError(f"mode: got {mode!r}, expected one of {', '.join(MODES)}")
    scalar = _returning_a_scalar(loss_fn)
    if mode == "reverse":
        return jax.grad(scalar)

    def gradient(params: PyTree, *args: Any) -> PyTree:
        # All that loss_fn closes over becomes an argument: labels and keys that are traced as well as numbers.
        closed = jax.make_jaxpr(scalar)(params, *args)
        return _with_mixed_pull_back(_with_constants(closed))(params, (args, closed.consts))

    return gradient


def _returning_a_scalar(loss_fn: LossFn) -> LossFn:
    """The loss, which refuses to return anything but one floating-point scalar."""

    def loss(*args: Any) -> jax.Array:
        value = loss_fn(*args)
        # Not left to JAX: of a traced loss's results, flat as they are, the first would be taken for the loss.
        if not is_float_scalar(value):
            raise ValueError(f"loss_fn: got {described(value)}, expected one floating-point scalar (no has_aux)")
        return value

    return loss


def _with_constants(closed: Any) -> LossFn:
    """A traced loss as a function of its arguments and of what it closes over: loss(params, args, constants)."""

    def loss(params: PyTree, args: tuple[Any, ...], constants: list[Any]) -> jax.Array:
        (value,) = eval_jaxpr(closed.jaxpr, constants, *jax.tree.leaves((params, *args)))
        return value

    return loss


def mean_gradient(
    loss_fn: LossFn, params: PyTree, *batch: Any, mode: str = "mixed", microbatch: int | None = None
) -> PyTree:
    """The gradient by params of a loss that is a mean over a batch.

    Args:
      loss_fn: loss_fn(params, *batch) -> the mean loss over the batch's rows, a scalar.
      params: floating-point parameters.
      *batch: arrays, or trees of them, of one length: the batch's rows.
      mode: as in `grad`.
      microbatch: rows that are worked on at a time; None for all at once. Must divide the number of rows.

    Returns:
      A tree as params.

    Raises:
      ValueError: unknown mode, a loss that is not one floating-point scalar, a batch without one length, or a
        microbatch that does not divide it.

    Guarantees:
      Equal to the gradient over the whole batch up to rounding. Only one microbatch's activations are alive at a
      time, in the gradient and in its pull-back (each is rematerialised).
    """
    gradient = grad(loss_fn, mode)
    shapes = [jnp.shape(x) for x in jax.tree.leaves(batch)]
    if len({shape[:1] for shape in shapes}) != 1 or () in shapes:
        raise ValueError(f"batch: got arrays of shapes {shapes}, expected one number of rows for all")
    rows = shapes[0][0]
    if microbatch is None or microbatch == rows:
        return gradient(params, *batch)
    if not 0 < microbatch < rows or rows % microbatch:
        raise ValueError(f"microbatch: got {microbatch}, expected a divisor of the {rows} rows of the batch")
    count = rows // microbatch
    pieces = jax.tree.map(lambda x: x.reshape(count, microbatch, *x.shape[1:]), batch)
    one = jax.checkpoint(gradient)

    def add(total: PyTree, piece: tuple[Any, ...]) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, one(params, *piece)), None

    total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), pieces)
    return jax.tree.map(lambda x: x / count, total)


def _with_mixed_pull_back(loss_fn: LossFn) -> Callable[[PyTree, tuple[Any, ...]], PyTree]:
    """The gradient of a loss that closes over nothing to differentiate by, with the pull-back of mixed mode."""

    @jax.custom_vjp
    def gradient(params: PyTree, args: tuple[Any, ...]) -> PyTree:
        return jax.grad(loss_fn)(params, *args)

    def forward(params: PyTree, args: tuple[Any, ...]) -> tuple[PyTree, Any]:
        return gradient(params, args), (params, args)

    def pull_back(residuals: tuple[PyTree, tuple[Any, ...]], v: PyTree) -> tuple[PyTree, PyTree]:
        params, args = residuals
        leaves, structure = jax.tree.flatten(args)
        floats = [i for i, x in enumerate(leaves) if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]

        def loss(p: PyTree, chosen: list[jax.Array]) -> jax.Array:
            replaced = dict(zip(floats, chosen, strict=True))
            return loss_fn(p, *jax.tree.unflatten(structure, [replaced.get(i, x) for i, x in enumerate(leaves)]))

        both = jax.grad(loss, argnums=(0, 1))
        _, (by_params, by_args) = jax.jvp(lambda p: both(p, [leaves[i] for i in floats]), (params,), (v,))
        shares: dict[int, Any] = dict(zip(floats, by_args, strict=True))
        return by_params, jax.tree.unflatten(structure, [shares.get(i) for i in range(len(leaves))])

    gradient.defvjp(forward, pull_back)
    return cast(Callable[[PyTree, tuple[Any, ...]], PyTree], gradient)
