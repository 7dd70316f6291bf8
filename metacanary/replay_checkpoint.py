"""Checkpoints within a replay, so that a long one survives a kill and ends with the same bits.

A checkpoint is a folder: position.npz (how many actions are done, the current state, adjoint, gradient, checksums)
and held_<t>.npz for each held state. s[t] has the same bits whenever it is computed: a file is written once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from metacanary import store
from metacanary.replay_schedule import Action, held_after


class ReplayCheckpoint:
    """The checkpoint of one replay.

    Args:
      folder: its own.
      identity: plain data that tells this replay from others.

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

    def load(self, order: Sequence[Action], run: Any) -> int:
        """Put a run where the checkpoint stands; return the number of actions that are done, 0 without one."""
        if not self._path.exists():
            return 0
        position, like = store.read_tree(self._path, _position(run, 0)), run.current
        run.current, run.value, run.aux = position["current"], position["value"], position["aux"]
        run.adjoint, run.gradient = position["adjoint"], position["gradient"]
        run.checksums[:] = list(position["checksums"][: position["first_runs"]])
        for t in held_after(order, position["done"]):
            run.storage.hold(t, store.read_tree(self._held(t), like))
        return int(position["done"])

    def save(self, order: Sequence[Action], done: int, run: Any, branching: int) -> None:
        """Write where a run stands after `done` actions: first what is new, then the position, then delete the old."""
        held = held_after(order, done)
        for t in held:
            if not self._held(t).exists():
                store.write_tree(self._held(t), run.storage.copy(t), {})
        store.write_tree(self._path, _position(run, done), {**self._identity, "branching": branching})
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
