"""The layout of held states: what was packed comes back with its bits, and small arrays become one."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metacanary.replay_layout import SMALL, Layout

LEAVES = [
    jnp.float32(-0.0),
    jnp.array([[1, -2], [3, 2**31 - 1]], jnp.int32),
    jnp.arange(SMALL + 1, dtype=jnp.float32),
    jnp.array([1.5, -2], jnp.bfloat16),
    jnp.array([2**32 - 1], jnp.uint32),
    jax.random.key(3),
    jnp.array([jnp.nan, jnp.inf, 1e-45], jnp.float32),
    jnp.zeros((0, 3)),
    jnp.array([True, False]),
]


def bits(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return leaf.dtype, leaf.shape, np.asarray(leaf).tobytes()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("leaves", [LEAVES, LEAVES[::-1], LEAVES[:1], LEAVES[2:4], []])
def test_unpack_gives_the_bits_that_were_packed(leaves, compiled):
    layout = Layout.of(leaves)
    packed = (jax.jit(layout.pack) if compiled else layout.pack)(leaves)
    found = (jax.jit(layout.unpack) if compiled else layout.unpack)(packed)
    assert [bits(x) for x in found] == [bits(x) for x in leaves]


def test_pack_puts_small_numbers_together_and_leaves_the_rest():
    """Too long, of another width, a key: these stay arrays of their own; so does the only small one."""
    packed = Layout.of(LEAVES).pack(LEAVES)
    assert (packed[0].shape, packed[0].dtype) == ((1 + 4 + 1 + 3,), jnp.uint32)
    assert [id(x) for x in packed[1:]] == [id(LEAVES[i]) for i in (2, 3, 5, 8)]
    alone = [LEAVES[1], LEAVES[2]]
    assert Layout.of(alone).pack(alone) is alone


def test_layouts_of_equal_shapes_are_equal():
    """So that nothing is compiled again."""
    first, second = (Layout.of([jnp.zeros(3), jnp.full(2, x)]) for x in (1.0, 2.0))
    assert (first, hash(first)) == (second, hash(second))
    assert first != Layout.of([jnp.zeros(3), jnp.zeros(2, jnp.int32)])


SHARDED = """
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from metacanary.metagradient import replay
mesh = jax.make_mesh((2,), ("x",))
put = lambda x, *p: jax.device_put(x, NamedSharding(mesh, P(*p)))
step = lambda s, z, t: {"w": s["w"] * z, "b": s["b"] * 0.9, "n": s["n"] + 1}
objective = lambda s, z: (jnp.sin(s["w"]).sum() + s["b"].sum(), ())
state = {"w": put(jnp.ones(4), "x"), "b": put(jnp.ones(4)), "n": put(jnp.int32(0))}
print(float(replay(step, objective, state, put(jnp.float32(0.5)), 5, branching=3).gradient))
"""


def test_replay_leaves_what_lies_on_several_devices_as_it_is():
    """Small leaves with shardings that differ cannot be put into one; d/dz 4 sin(z^5) = 20 z^4 cos(z^5)."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    found = subprocess.run(
        [sys.executable, "-c", SHARDED], env=os.environ | flags, capture_output=True, text=True, check=True
    )
    assert float(found.stdout) == pytest.approx(20 * 0.5**4 * np.cos(0.5**5), rel=1e-6)
