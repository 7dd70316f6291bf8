"""Checkpoints within a replay, so that a long one survives a kill and ends with the same bits.

A checkpoint is a folder: position.npz (how many actions are done, the current state, adjoint, gradient, checksums)
and held_<t>.npz for each held state. s[t] has the same bits whenever it is computed: a file is written once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metacanary import store
from metacanary.replay_schedule import Action, held_after


class ReplayCheckpoint:
    """The checkpoint of one replay.

    Args:
      folder: its own.
      identity: plain data that tells this replay from others.

    Guarantees:
      Whenever the process is killed, the folder holds a whole checkpoint or, before the first, none.
    """

    def __init__(self, folder: Path, identity: dict[str, int]) -> None:
        self._folder, self._identity = folder, identity

    def load(self, order: Sequence[Action], run: Any) -> int:
        """Put a run where the checkpoint stands.

        Returns:
          The number of actions that are done, 0 without a checkpoint.

        Raises:
          ValueError: a checkpoint of another replay.
        """
        path = self._folder / "position.npz"
        if not path.exists():
            return 0
        saved = store.read_provenance(path)
        wrong = [name for name, value in self._identity.items() if saved.get(name) != value]
        if wrong:
            raise ValueError(f"checkpoint: {self._folder} is of a replay with another {' and '.join(wrong)}; delete it")
        position = store.read_tree(path, _position(run, 0))
        like = run.current
        run.current, run.value, run.aux = position["current"], position["value"], position["aux"]
        run.adjoint, run.gradient = position["adjoint"], position["gradient"]
        run.checksums[:] = list(position["checksums"][: position["first_runs"]])
        for t in held_after(order, position["done"]):
            run.storage.hold(t, store.read_tree(self._held(t), like))
        return int(position["done"])

    def save(self, order: Sequence[Action], done: int, run: Any) -> None:
        """Write where a run stands after `done` actions: first what is new, then the position, then delete the old."""
        held = held_after(order, done)
        for t in held:
            if not self._held(t).exists():
                store.write_tree(self._held(t), run.storage.copy(t), {})
        store.write_tree(self._folder / "position.npz", _position(run, done), self._identity)
        for path in set(self._folder.glob("held_*.npz")) - {self._held(t) for t in held}:
            path.unlink(missing_ok=True)

    def _held(self, t: int) -> Path:
        return self._folder / f"held_{t}.npz"


def _position(run: Any, done: int) -> dict[str, Any]:
    """All of a run but the states it holds, as a tree whose shapes do not depend on where it stands."""
    checksums = np.zeros(run.num_steps, np.uint32)
    checksums[: len(run.checksums)] = [int(x) for x in run.checksums]
    names = ("current", "value", "aux", "adjoint", "gradient")
    return {
        **{name: getattr(run, name) for name in names},
        "done": done,
        "first_runs": len(run.checksums),
        "checksums": checksums,
    }
