"""Exact metagradients: the derivative of an objective of the trained model through the whole training run.

REPLAY (Engstrom et al. 2025, arXiv 2503.13751, Section 2). Training is s[t+1] = step(s[t], z, t) for t = 0..T-1, an
objective phi(s[T], z) is to be differentiated by the metaparameters z. With the adjoint A[T] = dphi/ds[T] and
A[t] = (dstep_t/ds)^T A[t+1] the metagradient is

    dphi/dz = sum_t (dstep_t/dz)^T A[t+1]  +  dphi/dz at fixed s[T]  +  (ds[0]/dz)^T A[0].

An objective of several states on the way, the mean of phi(s[t], z) over some t, adds dphi/ds[t] to A[t] as it passes.
The states are needed in reverse order. They are not all kept: a lazy k-ary tree (`replay_schedule`) holds O(k log_k T)
of them, on the device or elsewhere (`replay_storage`), and recomputes the others from the nearest one that is held.

    costs = measure(step_fn, objective_fn, state, metaparams)
    chosen = plan(num_steps, costs, {"device": 8 * 2**30})
    result = replay(step_fn, objective_fn, state, metaparams, num_steps, branching=chosen.branching)

docs/metagradients.md is the guide for a project of your own.
"""

from __future__ import annotations

import time
import timeit
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metacanary import replay_step
from metacanary.interruption import ShouldStop, Stopped
from metacanary.replay_checkpoint import ReplayCheckpoint, identity
from metacanary.replay_schedule import Costs, Order, check_objective_steps, check_tree
from metacanary.replay_step import ObjectiveFn, StepFn
from metacanary.replay_storage import Device, Leaves, Storage

PyTree = Any
LOOK_EVERY = 64
"""Steps whose checksums may be on the device: then the older half is fetched, while the newer half is computed."""
_POSITION = ("current", "value", "aux", "adjoint", "gradient")  # of a run, what a checkpoint keeps as it is


class Replay(NamedTuple):
    """What `replay` returns.

    Attributes:
      value: the objective phi(s[T], z), a scalar; or its mean over the states after `objective_steps`.
      aux: what the objective returned beside its value, at s[T].
      gradient: d value / d metaparams, a tree as metaparams with None at leaves that are not floating point.
    """

    value: jax.Array
    aux: PyTree
    gradient: PyTree


class NotDeterministicError(RuntimeError):
    """A repeated step gave other bits than in its first run, so that a gradient through it would be of no training."""


def replay(
    step_fn: StepFn,
    objective_fn: ObjectiveFn,
    state: PyTree | Callable[[PyTree], PyTree],
    metaparams: PyTree,
    num_steps: int,
    *,
    branching: int,
    objective_steps: Sequence[int] = (),
    storage: Storage | None = None,
    on_step: Callable[[str, int], None] | None = None,
    checkpoint: Path | str | None = None,
    checkpoint_seconds: float = 120.0,
    should_stop: ShouldStop | None = None,
) -> Replay:
    """Differentiate an objective of the state after `num_steps` steps by the metaparameters.

    Leaves of `state` and `metaparams` that are not floating point (data order, labels, uint8 images, PRNG keys) are
    carried along and not differentiated. Leaves of `state` that the step returns as it got them (a data set, say) are
    neither copied nor held. Pass the same function objects again and nothing is compiled again; JAX keeps them, with
    what they close over, until `jax.clear_caches()`, so that large arrays belong into `state`.

    Args:
      step_fn: step_fn(state, metaparams, t) -> state; pure, deterministic, jittable; t is an int32 scalar. Write its
        gradient with `gradients.grad` or `gradients.mean_gradient`, which are cheaper to differentiate again. Optax's
        Adam needs `eps_root` > 0: with its epsilon outside the square root only, a zero gradient gives NaN.
      objective_fn: objective_fn(state, metaparams) -> (floating-point scalar, aux, a pytree of arrays), jittable.
      state: s[0], a pytree of arrays; or a jittable function of the metaparameters that returns it, if it depends on
        them (initial weights as metaparameters). What can be called but is a pytree itself, as an Equinox module or a
        `jax.tree_util.Partial`, is a state.
      metaparams: z, a pytree of arrays.
      num_steps: T >= 1.
      branching: k >= 2, the arity of the tree, as `replay_schedule.plan` chooses it; ceil(sqrt(T)) replays training
        once, k >= T keeps all states and replays nothing.
      objective_steps: steps after which the objective is taken, ascending, the last of them num_steps; the mean over
        them is differentiated. None for num_steps alone. Each costs one more gradient of the objective, no step.
      storage: where held states live; on the device if None.
      on_step: called with ("forward" or "backward", t) after each step, to show progress.
      checkpoint: a folder of its own to resume from and to write to; None writes nothing. It also keeps the finished
        result: delete the folder once that is in safety.
      checkpoint_seconds: time between two checkpoints.
      should_stop: asked after each action whether to write the checkpoint and raise `Stopped`; needs `checkpoint`.

    Returns:
      Replay(value, aux, gradient).

    Raises:
      ValueError: num_steps < 1, branching < 2, other objective_steps, a leaf that is no number, no floating-point leaf,
        a step or an objective that returns something else than it should, or a checkpoint of another replay.
      NotDeterministicError: a repeated step gave other bits; the message names it.
      FloatingPointError: the objective is not finite (the message names the first step after which the state is
        not finite), or the gradient is not.
      Stopped: `should_stop` said so, and the checkpoint is written.

    Guarantees:
      Exact: the gradient equals that of plain reverse-mode differentiation through all steps, up to rounding. Its
      bits depend neither on branching nor on storage.
      Memory and work: those of `replay_schedule.work`; one VJP a step. Of each step the host keeps a checksum, 4 bytes.
      On a CPU one call is computed at a time, so that no two have their temporaries at once.
      Deterministic: what a repeated step returns is compared with what its first run returned by
      `replay_step.checksum`, which misses a difference with a chance of about 2**-32.
      Resume: a replay that was killed and is called again with the same arguments, JAX version and XLA_FLAGS on the
      same kind of device ends with the same bits; what differs in these is refused, but that another model of CPU
      is not seen. `storage` and `branching` may be others: the checkpoint's branching is gone on with.

    References:
      arXiv 2503.13751, Section 2 (REPLAY, the lazy k-ary tree).
    """
    check_tree(num_steps, branching)
    taken_after = check_objective_steps(num_steps, objective_steps)
    if should_stop is not None and checkpoint is None:
        raise ValueError("checkpoint: got None, expected a folder, since should_stop is given")
    problem, carried, fixed = replay_step.prepare(step_fn, objective_fn, state, metaparams)
    files = None
    if checkpoint is not None:
        files = ReplayCheckpoint(checkpoint, identity(problem, num_steps, taken_after, carried, fixed))
        branching = files.branching(branching)
    order = Order(num_steps, branching, taken_after)
    total = len(order)
    run = _Run(problem, carried, fixed, num_steps, storage or Device(), on_step)
    del carried  # s[0] is held, or not, as any other state
    written = time.monotonic()
    try:
        begun = files.load(order, run) if files else 0
        for done, action in enumerate(islice(order, begun, None), start=begun + 1):
            getattr(run, action.name)(action.t)
            if should_stop is not None:
                run.keep_up()
            stopping = should_stop is not None and should_stop()
            due = stopping or done == total or time.monotonic() - written > checkpoint_seconds
            if files and due:
                run.require_deterministic()
                files.save(order, done, run, branching)
                written = time.monotonic()
            if stopping:
                raise Stopped(f"stopped after {done} of {total} actions of a replay of {num_steps} steps")
        run.require_deterministic()
    finally:
        run.storage.clear()
    return run.result(state, metaparams, len(taken_after))


def measure(
    step_fn: StepFn,
    objective_fn: ObjectiveFn,
    state: PyTree | Callable[[PyTree], PyTree],
    metaparams: PyTree,
    *,
    objective_steps: Sequence[int] = (),
    storages: Sequence[Storage] = (),
    repeats: int = 5,
) -> Costs:
    """Find out what a step costs, for `replay_schedule.plan`; takes about 3 * repeats steps and the compilation.

    Args:
      step_fn, objective_fn, state, metaparams: as of `replay`, which will not compile them again.
      objective_steps: as of `replay`; with more than one the adjoint and the gradient are in memory beside the
        objective. Its time is not in the costs, since no schedule changes it.
      storages: storages beside the device whose transfers are to be timed.
      repeats: calls timed; the median counts.

    Returns:
      Costs; its working_bytes are XLA's own account of the step's VJP or of the objective with its derivatives,
      whichever takes more, and one state beside it.
    """
    problem, carried, fixed = replay_step.prepare(step_fn, objective_fn, state, metaparams)
    t = np.int32(0)
    pulled = replay_step.objective(problem, carried, fixed)[2:]  # the adjoint and the gradient

    def pull() -> PyTree:
        nonlocal pulled
        pulled = replay_step.step_vjp(problem, carried, fixed, t, *pulled)  # which are donated
        return pulled

    def transfer(storage: Storage) -> None:
        for number in (0, 1):  # only the newest state stays on the device
            storage.hold(number, carried)
        jax.block_until_ready(storage.take(0))
        storage.clear()

    step_vjp = replay_step.step_vjp.lower(problem, carried, fixed, t, *pulled)
    objective = replay_step.objective.lower(problem, carried, fixed)
    analyses: list[Any] = [call.compile().memory_analysis() for call in (step_vjp, objective)]
    sizes = [x.temp_size_in_bytes + x.argument_size_in_bytes + x.output_size_in_bytes for x in analyses]
    if len(objective_steps) > 1:
        sizes[1] += sum(x.nbytes for x in jax.tree.leaves(pulled))
    working, state_bytes = max(sizes), sum(x.size * x.dtype.itemsize for x in carried)
    return Costs(
        step_seconds=_median_seconds(lambda: replay_step.step(problem, carried, fixed, t), repeats),
        vjp_seconds=_median_seconds(pull, repeats),
        state_bytes=state_bytes,
        working_bytes=int(working + state_bytes),
        transfer_seconds={s.name: _median_seconds(partial(transfer, s), repeats) / 2 for s in storages},
    )


class _Run:
    """A replay on its way: the current state, the adjoint and the gradient so far; a method for each action."""

    def __init__(
        self,
        problem: replay_step.Problem,
        carried: Leaves,
        fixed: PyTree,
        num_steps: int,
        storage: Storage,
        on_step: Callable[[str, int], None] | None,
    ) -> None:
        self.problem, self.fixed, self.num_steps, self.storage = problem, fixed, num_steps, storage
        self.current = carried
        shapes = jax.eval_shape(partial(replay_step.objective, problem), carried, fixed)
        self.value, self.aux, self.adjoint, self.gradient = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        self.first_runs = 0  # steps, from 0 on, whose first run's checksum has been looked at
        self.checksums = np.zeros(num_steps, np.uint32)  # of those; an array of JAX's for each takes kilobytes
        self._unseen: list[tuple[int, jax.Array]] = []  # the newest checksums, in the order in which they are computed
        self._notify = on_step or (lambda phase, t: None)
        # Calls that overlap need temporaries each: on a CPU, whose calls overlap only in memory, twice what is planned.
        self._wait = jax.block_until_ready if jax.default_backend() == "cpu" else lambda arrays: None

    def hold(self, t: int) -> None:
        self.storage.hold(t, self.current)

    def copy(self, t: int) -> None:
        self.current = self.storage.copy(t)

    def take(self, t: int) -> None:
        self.current = self.storage.take(t)

    def step(self, t: int) -> None:
        self.current, checksum = replay_step.step(self.problem, self.current, self.fixed, np.int32(t))
        self._wait(self.current)
        self._unseen.append((t, checksum))
        if len(self._unseen) >= LOOK_EVERY:
            self.require_deterministic(LOOK_EVERY // 2)
        self._notify("forward", t)

    def keep_up(self) -> None:
        """Wait for the step before the last one, so that the device has not many to finish when it is asked to stop."""
        jax.block_until_ready([checksum for _, checksum in self._unseen[-2:-1]])

    def objective(self, t: int) -> None:
        value, aux, adjoint, gradient = replay_step.objective(self.problem, self.current, self.fixed)
        if not bool(jnp.isfinite(value)):
            raise FloatingPointError(self._first_non_finite(t))
        if t == self.num_steps:
            self.value, self.aux, self.adjoint, self.gradient = value, aux, adjoint, gradient
        else:
            so_far = (self.value, self.adjoint, self.gradient)
            self.value, self.adjoint, self.gradient = replay_step.add(so_far, (value, adjoint, gradient))

    def pull(self, t: int) -> None:
        self.adjoint, self.gradient = replay_step.step_vjp(
            self.problem, self.current, self.fixed, np.int32(t), self.adjoint, self.gradient
        )
        self._wait(self.adjoint)
        self._notify("backward", t)

    def position(self) -> dict[str, Any]:
        """All but the states it holds, as a tree whose shapes do not depend on where it stands."""
        now = {name: getattr(self, name) for name in _POSITION}
        return {**now, "first_runs": self.first_runs, "checksums": self.checksums}

    def restore(self, position: dict[str, Any], held: Iterable[tuple[int, Leaves]]) -> None:
        """Stand where `position` was taken, with these states held, each with its number, from the stack's bottom."""
        for name in _POSITION:
            setattr(self, name, position[name])
        self.first_runs, self.checksums = position["first_runs"], np.array(position["checksums"])
        for t, state in held:
            self.storage.hold(t, state)

    def require_deterministic(self, newest: int = 0) -> None:
        """Compare the steps repeated since the last look with their first run, all but the `newest` ones."""
        looked_at = self._unseen[: len(self._unseen) - newest]
        found = jax.device_get([checksum for _, checksum in looked_at])
        for (t, _), checksum in zip(looked_at, found, strict=True):
            if t == self.first_runs:
                self.checksums[t], self.first_runs = checksum, t + 1
            elif checksum != self.checksums[t]:
                raise NotDeterministicError(
                    f"step {t} of {self.num_steps} gave other bits when it was repeated: expected a step function "
                    "that is a function of its arguments, and on a GPU XLA_FLAGS=--xla_gpu_deterministic_ops=true"
                )
        del self._unseen[: len(looked_at)]

    def _first_non_finite(self, taken_after: int) -> str:
        """Run again from the start to name the step at which the state stopped being finite."""
        state = self.storage.copy(0)
        if not replay_step.is_finite((self.problem.layout.unpack(state), self.fixed)):
            return "the objective is not finite, and neither are the initial state and the metaparameters"
        for t in range(taken_after):
            state, _ = replay_step.step(self.problem, state, self.fixed, np.int32(t))
            if not replay_step.is_finite(self.problem.layout.unpack(state)):
                return f"training state is not finite after step {t} of {self.num_steps}: lower the learning rate"
        after = "all" if taken_after == self.num_steps else f"{taken_after} of"
        return f"the objective is not finite although the state after {after} {self.num_steps} steps is"

    def result(self, state: PyTree | Callable[[PyTree], PyTree], metaparams: PyTree, num_objectives: int) -> Replay:
        """What the replay was for: the mean over the objectives."""
        gradient = self.gradient["metaparams"]
        if self.problem.from_metaparams:
            shares = replay_step.join(self.problem, self.adjoint, self.gradient["constants"])
            gradient = replay_step.initial_vjp(state, metaparams, shares, gradient)
        if not replay_step.is_finite(gradient):
            raise FloatingPointError(
                "the metagradient is not finite although the objective is: see the derivative of the step, "
                "as at a square root or a norm at zero; Optax's Adam needs eps_root > 0"
            )
        value, gradient = jax.tree.map(lambda x: x / num_objectives, (self.value, gradient))
        return Replay(value, self.aux, replay_step.as_metaparams(gradient, metaparams))


def _median_seconds(function: Callable[[], Any], repeats: int) -> float:
    """The median time of a call, after one that is not counted."""
    seconds = timeit.repeat(lambda: jax.block_until_ready(function()), number=1, repeat=1 + repeats)
    return float(np.median(seconds[1:]))
