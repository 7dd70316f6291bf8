"""JAX contenders: metacanary's schedules, `jax.grad` through `lax.scan`, and Equinox's checkpointed loop.

The peers differentiate the step as one writes it by hand, except where a name ends in "mixed": that one is given the
package's step, to tell what the schedule adds from what mixed-mode differentiation adds.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.contender import Contender
from benchmarks.problem import Problem
from metacanary import metagradient, replay_schedule, replay_storage

PyTree = Any
Loop = Callable[[Callable[[PyTree, jax.Array], PyTree], PyTree, int], PyTree]
"""(step, carry, T) -> carry after T steps."""

STORAGES: dict[str, Callable[[Path], replay_storage.Storage]] = {
    "device": lambda folder: replay_storage.Device(),
    "host": lambda folder: replay_storage.Host(),
    "disk": replay_storage.Disk,
}


def replay(problem: Problem, *, branching: Callable[[int], int], storage: str = "device") -> Contender:
    """`metacanary.metagradient.replay`: a Python loop over a compiled step."""
    num_steps = problem.num_steps
    arity = max(2, branching(num_steps))
    jitted = jax.jit(problem.step)

    def plain() -> None:
        state = problem.state
        for t in range(num_steps):
            state = jitted(state, problem.pixels, np.int32(t))
        jax.block_until_ready(state["params"])

    def run(steps: int) -> np.ndarray:
        with tempfile.TemporaryDirectory() as folder:
            result = metagradient.replay(
                problem.step,
                problem.objective,
                problem.state,
                problem.pixels,
                steps,
                branching=arity,
                storage=STORAGES[storage](Path(folder)),
            )
            return np.asarray(result.gradient)

    return Contender(
        plain=plain,
        metagradient=partial(run, num_steps),
        warm_up=partial(run, min(num_steps, 6)),
        states_held=replay_schedule.work(num_steps, arity).states_held,
    )


def planned(problem: Problem, *, room: float) -> Contender:
    """The same with what `replay_schedule.plan` chooses for so many times what is needed beside held states."""
    costs = metagradient.measure(problem.step, problem.objective, problem.state, problem.pixels)
    chosen = replay_schedule.plan(problem.num_steps, costs, {"device": int(room * costs.working_bytes)})
    return replay(problem, branching=lambda steps: chosen.branching)


def compiled(problem: Problem, *, loop: Loop, states_held: int, mixed: bool = False) -> Contender:
    """`jax.grad` through the whole training as one compiled loop. The data are closed over, not carried."""
    step_fn = problem.step if mixed else problem.reverse_step
    carried = {name: problem.state[name] for name in ("params", "optimizer")}
    fixed = {name: x for name, x in problem.state.items() if name not in carried}

    def train(carry: PyTree, fixed: PyTree, pixels: jax.Array) -> PyTree:
        def step(carry: PyTree, t: jax.Array) -> PyTree:
            state = step_fn({**fixed, **carry}, pixels, t)
            return {name: state[name] for name in carry}

        return loop(step, carry, problem.num_steps)

    def objective(pixels: jax.Array, carry: PyTree, fixed: PyTree) -> jax.Array:
        return problem.objective({**fixed, **train(carry, fixed, pixels)}, pixels)[0]

    plain = jax.jit(train)
    arguments = (problem.pixels, carried, fixed)
    executable: list[Any] = []
    return Contender(
        plain=lambda: jax.block_until_ready(plain(carried, fixed, problem.pixels)) and None,
        metagradient=lambda: np.asarray(executable[0](*arguments)),
        warm_up=lambda: executable.append(jax.jit(jax.grad(objective)).lower(*arguments).compile()),
        states_held=states_held,
    )


def scan(step: Callable[[PyTree, jax.Array], PyTree], carry: PyTree, num_steps: int) -> PyTree:
    """`lax.scan`; all that the steps' derivatives need is kept."""
    return jax.lax.scan(lambda c, t: (step(c, t), None), carry, jnp.arange(num_steps, dtype=jnp.int32))[0]


def scan_checkpoint(step: Callable[[PyTree, jax.Array], PyTree], carry: PyTree, num_steps: int) -> PyTree:
    """`lax.scan` over a step under `jax.checkpoint`: every state is kept, each step computed twice."""
    return scan(jax.checkpoint(step), carry, num_steps)


def scan_nested(step: Callable[[PyTree, jax.Array], PyTree], carry: PyTree, num_steps: int) -> PyTree:
    """Checkpointed scans over checkpointed steps: about 2 sqrt(T) states, each step computed three times."""
    inner = math.isqrt(num_steps)

    @jax.checkpoint
    def block(carry: PyTree, first: jax.Array) -> PyTree:
        return scan_checkpoint(lambda c, t: step(c, first + t), carry, inner)

    blocks = num_steps // inner
    carry = scan(lambda c, b: block(c, b * inner), carry, blocks)
    return scan_checkpoint(lambda c, t: step(c, blocks * inner + t), carry, num_steps - blocks * inner)


def equinox_loop(
    step: Callable[[PyTree, jax.Array], PyTree], carry: PyTree, num_steps: int, *, checkpoints: int
) -> PyTree:
    """Equinox's checkpointed scan: the treeverse schedule for a given number of states."""
    import equinox.internal as eqxi

    def body(c: PyTree, t: jax.Array) -> tuple[PyTree, None]:
        return step(c, t), None

    steps = jnp.arange(num_steps, dtype=jnp.int32)
    return eqxi.scan(body, carry, steps, kind="checkpointed", checkpoints=checkpoints)[0]


def equinox(problem: Problem, *, checkpoints: Callable[[int], int]) -> Contender:
    """Equinox's loop with a number of states that depends on T."""
    count = checkpoints(problem.num_steps)
    return compiled(problem, loop=partial(equinox_loop, checkpoints=count), states_held=count)


def sqrt(num_steps: int) -> int:
    """ceil(sqrt(T))."""
    return math.isqrt(num_steps - 1) + 1


def doubled_log(num_steps: int) -> int:
    """2 ceil(log2 T): as many states as a binary tree holds."""
    return 2 * max(1, math.ceil(math.log2(num_steps)))


CONTENDERS: dict[str, Callable[[Problem], Contender]] = {
    "metacanary_all": partial(replay, branching=lambda steps: steps),
    "metacanary_sqrt": partial(replay, branching=sqrt),
    "metacanary_plan": partial(planned, room=1.25),
    "metacanary_tree8": partial(replay, branching=lambda steps: 8),
    "metacanary_tree2": partial(replay, branching=lambda steps: 2),
    "metacanary_sqrt_host": partial(replay, branching=sqrt, storage="host"),
    "metacanary_sqrt_disk": partial(replay, branching=sqrt, storage="disk"),
    "jax_scan": lambda p: compiled(p, loop=scan, states_held=p.num_steps),
    "jax_scan_checkpoint": lambda p: compiled(p, loop=scan_checkpoint, states_held=p.num_steps),
    "jax_scan_nested": lambda p: compiled(p, loop=scan_nested, states_held=2 * math.isqrt(p.num_steps)),
    "jax_scan_nested_mixed": lambda p: compiled(
        p, loop=scan_nested, states_held=2 * math.isqrt(p.num_steps), mixed=True
    ),
    "equinox_sqrt": partial(equinox, checkpoints=sqrt),
    "equinox_log": partial(equinox, checkpoints=doubled_log),
}
