"""Where REPLAY keeps the states it holds: on the device, in the host's memory, or in a folder.

Each storage keeps states by the number of their step. Away from the device the newest state stays there until the next
one comes, so that a state that is wanted back at once is not moved, and copies go on while the device computes.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from metacanary import store

Leaves = list[jax.Array]
"""The part of a state that changes from step to step, as a list of arrays."""
SMALL_BYTES = 2**18
"""Of an array up to which `Device` holds a copy of NumPy's on a CPU."""
_Written = tuple[Future[None], list[jax.ShapeDtypeStruct]]


class Storage(Protocol):
    """Keeps states by step; what is brought back has the bits that were put away."""

    name: str

    def hold(self, t: int, state: Leaves) -> None:
        """Keep s[t]."""

    def copy(self, t: int) -> Leaves:
        """Bring s[t] back, keeping it here as well."""

    def take(self, t: int) -> Leaves:
        """Bring s[t] back and forget it."""

    def clear(self) -> None:
        """Forget all states."""


class Device:
    """Keeps states where they are; on a CPU small arrays as NumPy's, which take no more than their numbers."""

    name = "device"

    def __init__(self) -> None:
        self._states: dict[int, list[jax.Array | np.ndarray]] = {}

    def hold(self, t: int, state: Leaves) -> None:
        self._states[t] = [np.array(x) if _is_small_on_cpu(x) else x for x in state]

    def copy(self, t: int) -> Leaves:
        return [jnp.asarray(x) for x in self._states[t]]

    def take(self, t: int) -> Leaves:
        state = self.copy(t)
        del self._states[t]
        return state

    def clear(self) -> None:
        self._states.clear()


def _is_small_on_cpu(x: jax.Array) -> bool:
    """Whether an array of JAX's, kilobytes beside its numbers, had better be held as one of NumPy's.

    Not one that is bound to a device, which it would forget; nor a large one, of which the copy would count.
    """
    on_cpu = all(device.platform == "cpu" for device in x.devices())
    is_number = not jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended)
    return on_cpu and is_number and not x.committed and x.nbytes <= SMALL_BYTES


class _Away:
    """Keeps the newest state on the device and all others elsewhere."""

    def __init__(self) -> None:
        self._newest: tuple[int, Leaves] | None = None
        self._moved: dict[int, Any] = {}

    def hold(self, t: int, state: Leaves) -> None:
        if self._newest is not None:
            self._moved[self._newest[0]] = self._put(*self._newest)
        self._newest = (t, state)

    def copy(self, t: int) -> Leaves:
        if self._newest is not None and self._newest[0] == t:
            return self._newest[1]
        return self._get(t, self._moved[t])

    def take(self, t: int) -> Leaves:
        state = self.copy(t)
        if self._newest is not None and self._newest[0] == t:
            self._newest = None
        else:
            self._forget(t, self._moved.pop(t))
        return state

    def clear(self) -> None:
        self._newest = None
        for t in list(self._moved):
            self._forget(t, self._moved.pop(t))

    def _put(self, t: int, state: Leaves) -> Any:
        raise NotImplementedError

    def _get(self, t: int, kept: Any) -> Leaves:
        raise NotImplementedError

    def _forget(self, t: int, kept: Any) -> None:
        """Nothing is left to do where memory is freed with its last reference."""


class Host(_Away):
    """Keeps states in the host's page-locked memory; on a GPU the copies are asynchronous.

    On the CPU backend this is a copy within the same memory: of use in tests only.
    """

    name = "host"

    def _put(self, t: int, state: Leaves) -> Any:
        return [(jax.device_put(x, x.sharding.with_memory_kind("pinned_host")), x.sharding) for x in state]

    def _get(self, t: int, kept: Any) -> Leaves:
        return [jax.device_put(x, sharding) for x, sharding in kept]


class Disk(_Away):
    """Keeps states in a folder of its own, one file each; a thread writes them while training goes on.

    Files that a killed process left are deleted; they are no checkpoint. Two processes may not share a folder.
    """

    name = "disk"

    def __init__(self, folder: Path | str) -> None:
        super().__init__()
        self._folder = Path(folder)
        self._last: Future[None] | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="replay-spill")
        self._folder.mkdir(parents=True, exist_ok=True)
        for left in self._folder.glob("state_*.npz"):
            left.unlink()

    def _put(self, t: int, state: Leaves) -> _Written:
        if self._last is not None:
            self._last.result()  # not more than one state is on its way, however slow the disk
        self._last = self._writer.submit(_write, self._path(t), state)
        return self._last, [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in state]

    def _get(self, t: int, kept: _Written) -> Leaves:
        kept[0].result()
        with np.load(self._path(t), allow_pickle=False) as arrays:
            return [store.from_bits(arrays[f"arr_{i}"], like) for i, like in enumerate(kept[1])]

    def _forget(self, t: int, kept: _Written) -> None:
        wait([kept[0]])  # an error of the writer has been, or will be, raised where the state is wanted
        self._path(t).unlink(missing_ok=True)

    def clear(self) -> None:
        super().clear()
        self._last = None  # with its error, if it had one: the next replay begins anew

    def _path(self, t: int) -> Path:
        return self._folder / f"state_{t}.npz"


def _write(path: Path, state: Leaves) -> None:
    """Write a state; the arrays wait here, in the writer's thread, until the device has computed them."""
    np.savez(path, *[store.to_bits(x) for x in state])
