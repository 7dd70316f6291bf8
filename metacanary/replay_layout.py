"""How a replay holds a state: its small arrays together in one.

An array of JAX's takes a kilobyte or two beside its numbers, and time with each call that it is handed to. A network
has many biases and scales; of hundreds of held states these would take more memory than their numbers do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metacanary.replay_storage import Leaves

SMALL = 2**14
"""Numbers in an array up to which it is put together with others: copying so many costs nothing beside a step."""
_DTYPES = (jnp.float32, jnp.int32, jnp.uint32)


class Layout(NamedTuple):
    """Shapes and dtypes of the leaves of a state that change; hashable, so that calls are compiled for it.

    Attributes:
      leaves: in their order.
      together: by leaf, whether it is put together with others: small, of 32-bit numbers, on one device.

    Guarantees:
      unpack(pack(leaves)) are the leaves, bit by bit. With no leaf to put together, or one, both do nothing.
    """

    leaves: tuple[jax.ShapeDtypeStruct, ...]
    together: tuple[bool, ...]

    @classmethod
    def of(cls, leaves: Sequence[jax.Array]) -> Layout:
        """That of these arrays."""
        small = tuple(x.size <= SMALL and x.dtype in _DTYPES and len(x.sharding.device_set) == 1 for x in leaves)
        together = small if sum(small) > 1 else (False,) * len(small)
        return cls(tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves), together)

    def pack(self, leaves: Leaves) -> Leaves:
        """The leaves that are put together as one vector of their bits, and behind it the others."""
        if not any(self.together):
            return leaves
        chosen = [*zip(leaves, self.together, strict=True)]
        bits = [jax.lax.bitcast_convert_type(x, jnp.uint32).ravel() for x, together in chosen if together]
        return [jnp.concatenate(bits), *(x for x, together in chosen if not together)]

    def unpack(self, packed: Leaves) -> Leaves:
        """The leaves in their order."""
        if not any(self.together):
            return packed
        chosen = [*zip(self.leaves, self.together, strict=True)]
        ends = np.cumsum([leaf.size for leaf, together in chosen if together])
        parts, others = iter(jnp.split(packed[0], ends[:-1])), iter(packed[1:])
        return [
            jax.lax.bitcast_convert_type(next(parts), leaf.dtype).reshape(leaf.shape) if together else next(others)
            for leaf, together in chosen
        ]
