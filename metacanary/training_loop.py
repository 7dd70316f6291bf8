"""The loop of a training: steps, snapshots, a checkpoint once a minute, and whether parameters are finite.

It knows no recipe and no network, only a step and a state, of one run or of several that are stacked:

    kept = follow(step, state, num_steps=200, snapshots=[100, 200], released=lambda state: state["params"],
                  identity={"seed": 7}, checkpoint=Path("run.npz"))
    kept[100]  # what is released after 100 steps
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metacanary import store
from metacanary.interruption import ShouldStop, Stopped
from metacanary.runs import Pool

PyTree = Any
Params = Any

CHECK_EVERY = 50
"""Steps between two looks at whether all parameters are finite; each look waits for the device."""


def follow(
    step: Callable[[PyTree, np.integer], dict[str, PyTree]],
    state: dict[str, PyTree],
    *,
    num_steps: int,
    snapshots: Sequence[int],
    released: Callable[[PyTree], Params],
    identity: Mapping[str, Any],
    seeds: Sequence[int] | None = None,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 60.0,
    on_step: Callable[[int], None] | None = None,
    should_stop: ShouldStop | None = None,
) -> dict[int, Params]:
    """Take all steps of a training, from its checkpoint on if there is one.

    Args:
      step: (state, t) -> what changes in the state, all that `carried` takes of it.
      state: before the first step.
      num_steps: T.
      snapshots: steps after which something is kept, in 1..num_steps.
      released: what is kept of a state, a tree of the shapes of its "params".
      identity: plain data that says whose checkpoint it is.
      seeds: of several runs whose parameters are stacked along the first axis, so that messages can name one; None
        for one run, whose parameters have no such axis.
      checkpoint: file to resume from and to write to; None writes nothing.
      checkpoint_seconds: time between two checkpoints.
      on_step: called with the number of finished steps, to show progress.
      should_stop: asked after each step whether to write the checkpoint and raise `Stopped`; needs `checkpoint`.

    Returns:
      What was kept, by step.

    Raises:
      ValueError: a snapshot beyond num_steps, `should_stop` without `checkpoint`, or a checkpoint of another identity.
      FloatingPointError: parameters that are not finite, with the first step after which they were not.
      Stopped: `should_stop` said so, and the checkpoint is written.

    Guarantees:
      One that was killed and resumed from its checkpoint ends bit-identical to an undisturbed one.
      One that is stopped loses no step, and waits for two steps of the device at most before it writes.
      No checkpoint holds parameters that are not finite.
    """
    wrong = [s for s in snapshots if not 1 <= s <= num_steps]
    if wrong:
        raise ValueError(f"snapshots: got {wrong}, expected steps between 1 and num_steps = {num_steps}")
    if should_stop is not None and checkpoint is None:
        raise ValueError("checkpoint: got None, expected a file, since should_stop is given")
    kept = {str(s): state["params"] for s in sorted(snapshots)}
    start = 0
    if checkpoint is not None and checkpoint.exists():
        _require_same_run(checkpoint, identity)
        saved = store.read_tree(checkpoint, {"step": np.int64(0), "carried": carried(state), "kept": kept})
        start, kept = int(saved["step"]), saved["kept"]
        state = state | saved["carried"]
    looks = {*snapshots, *range(0, num_steps, CHECK_EVERY), num_steps}
    look, first_bad = (_first_bad, np.int32(0)) if seeds is None else (_first_bad_of_each, np.zeros(len(seeds), "i4"))
    written = time.monotonic()
    for t in range(start, num_steps):
        state = state | step(state, np.int32(t))
        before, first_bad = first_bad, look(first_bad, state["params"], t + 1)
        if should_stop is not None:
            jax.block_until_ready(before)  # or the device would have many steps to finish when it is asked to stop
        stopping = should_stop is not None and should_stop()
        due = checkpoint is not None and (stopping or time.monotonic() - written > checkpoint_seconds)
        if due or t + 1 in looks:
            _require_finite(first_bad, num_steps, seeds)
        if t + 1 in snapshots:
            kept[str(t + 1)] = released(state)
        if checkpoint is not None and due:
            tree = {"step": np.int64(t + 1), "carried": carried(state), "kept": kept}
            store.write_tree(checkpoint, tree, identity)
            written = time.monotonic()
        if on_step:
            on_step(t + 1)
        if stopping:
            raise Stopped(f"stopped after step {t + 1} of {num_steps}")
    return {int(s): params for s, params in kept.items()}


def carried(state: PyTree) -> dict[str, PyTree]:
    """What of a state changes from step to step."""
    return {name: state[name] for name in ("params", "optimizer", "ema", "thresholds") if name in state}


def data_identity(pool: Pool, canary_images: np.ndarray, included: np.ndarray) -> dict[str, str]:
    """What identifies the data of runs: one that is resumed on other coins would be audited by the wrong ones."""
    return {
        "images": digest([pool.images, canary_images]),
        "labels": digest(pool.labels),
        "included": digest(included),
    }


def digest(tree: PyTree | None) -> str:
    """What identifies arrays, parameters for one, or none."""
    if tree is None:
        return ""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()


def _require_same_run(checkpoint: Path, identity: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another run."""
    saved = store.read_provenance(checkpoint)
    wrong = [name for name, value in identity.items() if saved.get(name) != value]
    if wrong:
        raise ValueError(f"checkpoint: {checkpoint} is of another {' and '.join(wrong)}, expected {identity}")


@jax.jit
def _first_bad(first_bad: jax.Array, params: Params, step: int) -> jax.Array:
    """The first step after which parameters were not finite, 0 for none.

    It stays on the device until it is looked at. A function of its own: compiled into the step it could change how
    that is rounded.
    """
    finite = jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(params)]).all()
    return jnp.where((first_bad == 0) & ~finite, step, first_bad)


_first_bad_of_each = jax.jit(jax.vmap(_first_bad, in_axes=(0, 0, None)))


def _require_finite(first_bad: jax.Array, num_steps: int, seeds: Sequence[int] | None) -> None:
    """Stop a training whose parameters are not finite, and say which run's."""
    names = [""] if seeds is None else [f" of seed {seed}" for seed in seeds]
    found = [
        f"parameters{name} are not finite after step {step} of {num_steps}"
        for name, step in zip(names, np.atleast_1d(first_bad).tolist(), strict=True)
        if step
    ]
    if found:
        raise FloatingPointError(f"{'; '.join(found)}: lower learning_rate")
