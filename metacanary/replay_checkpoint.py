"""Checkpoints within a replay, so that a long one survives a kill and ends with the same bits.

A checkpoint is a folder: position.npz (how many actions are done, the current state, adjoint, gradient, checksums)
and held_<t>.npz for each held state. s[t] has the same bits whenever it is computed: a file is written once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol
from zipfile import BadZipFile

import jax
import numpy as np

from metacanary import replay_step, store
from metacanary.replay_schedule import Action, held_after
from metacanary.replay_storage import Leaves, Storage


class Run(Protocol):
    """A replay on its way, which a checkpoint is taken of."""

    storage: Storage

    def position(self) -> dict[str, Any]:
        """All but the states it holds, as a tree whose shapes do not depend on where it stands."""

    def restore(self, position: dict[str, Any], held: Iterable[tuple[int, Leaves]]) -> None:
        """Stand where `position` was taken, with these states held, each with its number, from the stack's bottom."""


def identity(
    problem: replay_step.Problem, num_steps: int, objective_steps: Sequence[int], carried: Leaves, fixed: Any
) -> dict[str, Any]:
    """What a checkpoint belongs to: the compiled functions, a checksum of all that goes in, what computes.

    Args:
      problem, carried, fixed: as `replay_step.prepare` returns them.
      num_steps: T.
      objective_steps: those after which the objective is taken, T among them.

    Returns:
      Plain data by the name of what is at fault where it differs.
    """
    leaves, structure = jax.tree.flatten((carried, fixed))
    given = [str(structure), *(f"{x.dtype}{x.shape}" for x in leaves), int(jax.jit(replay_step.checksum)(leaves))]
    texts = [replay_step.step.lower(problem, carried, fixed, np.int32(0)).as_text()]
    texts += [replay_step.objective.lower(problem, carried, fixed).as_text()]
    device = jax.tree.leaves(carried)[0].devices() if carried else jax.devices()[:1]
    computed_by = [jax.__version__, *sorted(f"{d.platform} {d.device_kind}" for d in device)]
    flags = [os.environ.get(name, "") for name in ("XLA_FLAGS", "NPROC")]
    return {
        "num_steps": num_steps,
        "objective_steps": list(objective_steps),
        "state or metaparams": store.digest(given),
        "step_fn or objective_fn": store.digest(texts),
        "device or version": store.digest([computed_by, flags]),
    }


class ReplayCheckpoint:
    """The checkpoint of one replay.

    Args:
      folder: its own.
      identity: as `identity` makes it.

    Guarantees:
      Whenever the process is killed, the folder holds a whole checkpoint of this replay, or none that is taken up.
    """

    def __init__(self, folder: Path | str, identity: dict[str, Any]) -> None:
        self._folder, self._identity = Path(folder), identity
        self._path = self._folder / "position.npz"
        for left in self._folder.glob(".*.tmp"):
            left.unlink(missing_ok=True)
        if not self._path.exists():  # killed before the first position: whose these are is not known
            for held in self._folder.glob("held_*.npz"):
                held.unlink()

    def branching(self, default: int) -> int:
        """That of the checkpoint, which is gone on with, or the default without one.

        Raises:
          ValueError: a checkpoint of another replay, or a damaged one.
        """
        if not self._path.exists():
            return default
        try:
            saved = store.read_provenance(self._path)
        except (OSError, ValueError, KeyError, BadZipFile) as error:
            raise ValueError(f"checkpoint: {self._path} is damaged ({error}); delete its folder") from None
        wrong = [name for name, value in self._identity.items() if saved.get(name) != value]
        if wrong:
            raise ValueError(
                f"checkpoint: {self._folder} is of a replay with another {', another '.join(wrong)}; "
                "use another folder, or delete it"
            )
        return int(saved["branching"])

    def load(self, order: Iterable[Action], run: Run) -> int:
        """Put a run where the checkpoint stands; return the number of actions that are done, 0 without one.

        Begin anew if a second writer, as SLURM starts one when a node is cut off, deleted a state that is needed.
        """
        if not self._path.exists():
            return 0
        position = store.read_tree(self._path, {**run.position(), "done": 0})
        done, like = int(position.pop("done")), position["current"]
        held = held_after(order, done)
        if not all(self._held(t).exists() for t in held):
            return 0
        run.restore(position, ((t, store.read_tree(self._held(t), like)) for t in held))
        return done

    def save(self, order: Iterable[Action], done: int, run: Run, branching: int) -> None:
        """Write where a run stands after `done` actions: first what is new, then the position, then delete the old."""
        held = held_after(order, done)
        for t in held:
            if not self._held(t).exists():
                store.write_tree(self._held(t), run.storage.copy(t), {})
        store.write_tree(self._path, {**run.position(), "done": done}, {**self._identity, "branching": branching})
        for path in set(self._folder.glob("held_*.npz")) - {self._held(t) for t in held}:
            path.unlink(missing_ok=True)

    def _held(self, t: int) -> Path:
        return self._folder / f"held_{t}.npz"
