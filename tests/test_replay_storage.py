"""Storages bring back the bits that were put away, and move no more than they must."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metacanary.replay_storage import Device, Disk, Host


def state_of(t):
    """Leaves of all kinds: floats, bfloat16, a count, a PRNG key, nothing at all."""
    return [
        jnp.full((3,), t + 0.1),
        jnp.full((2, 2), t, jnp.bfloat16),
        jnp.int32(t),
        jax.random.key(t),
        jnp.zeros((0,)),
    ]


def assert_same_bits(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture(params=["device", "host", "disk"])
def storage(request, tmp_path):
    return {"device": Device, "host": Host, "disk": lambda: Disk(tmp_path / "spill")}[request.param]()


def test_storage_brings_back_the_same_bits(storage):
    for t in range(4):
        storage.hold(t, state_of(t))
    for t in (3, 2):
        assert_same_bits(storage.copy(t), state_of(t))
        assert_same_bits(storage.copy(t), state_of(t))
        assert_same_bits(storage.take(t), state_of(t))
    storage.hold(7, state_of(7))
    for t in (7, 1, 0):
        assert_same_bits(storage.take(t), state_of(t))


def test_storage_forgets_what_is_taken_and_cleared(storage):
    storage.hold(0, state_of(0))
    storage.hold(1, state_of(1))
    storage.take(0)
    with pytest.raises(KeyError):
        storage.copy(0)
    storage.clear()
    with pytest.raises(KeyError):
        storage.copy(1)


def test_storage_works_on_what_a_step_computes(storage):
    """What comes back lies where the step that goes on from it expects it."""
    step = jax.jit(lambda x: 2 * x)
    x = step(jnp.ones(3))
    storage.hold(0, [x])
    storage.hold(1, [step(x)])
    back = storage.take(0)[0]
    assert back.sharding == x.sharding
    assert np.array_equal(step(back), [4, 4, 4])


def test_device_holds_small_arrays_of_a_cpu_without_what_jax_has_beside_them():
    """But none that is large, a key, or bound to a device, where it must come back."""
    bound = jax.device_put(jnp.ones(3), jax.devices("cpu")[0])
    storage, state = Device(), [jnp.ones(3), jnp.ones(2**16 + 1), jax.random.key(0), bound]
    storage.hold(0, state)
    small, *others = storage._states[0]
    assert isinstance(small, np.ndarray)
    assert not np.shares_memory(small, np.asarray(state[0]))
    assert all(held is x for held, x in zip(others, state[1:], strict=True))
    back = storage.take(0)
    assert isinstance(back[0], jax.Array)
    assert not back[0].committed
    assert back[3].committed


def test_host_keeps_states_in_page_locked_memory():
    storage = Host()
    storage.hold(0, [jnp.ones(3)])
    storage.hold(1, [jnp.ones(3)])
    moved = [x.sharding.memory_kind for x, _ in storage._moved[0]]
    assert moved == ["pinned_host"]


def test_disk_writes_a_file_for_each_state_but_the_newest_and_deletes_it(tmp_path):
    storage = Disk(tmp_path)
    for t in range(3):
        storage.hold(t, state_of(t))
    storage.copy(1)  # waits for the writer
    assert sorted(p.name for p in tmp_path.iterdir()) == ["state_0.npz", "state_1.npz"]
    storage.take(2)
    storage.take(1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["state_0.npz"]
    storage.clear()
    assert list(tmp_path.iterdir()) == []


def test_disk_deletes_what_a_killed_process_left(tmp_path):
    (tmp_path / "state_9.npz").write_bytes(b"half")
    (tmp_path / "mine.txt").write_text("kept")
    Disk(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


@pytest.fixture
def failing(tmp_path):
    """A disk whose folder went away (or that is full, say), with a state on its way there."""
    storage = Disk(tmp_path / "spill")
    (tmp_path / "spill").rmdir()
    storage.hold(0, state_of(0))
    storage.hold(1, state_of(1))
    return storage


def test_disk_raises_the_error_of_its_writer(failing):
    with pytest.raises(FileNotFoundError):
        failing.hold(2, state_of(2))


def test_disk_is_usable_after_an_error(failing, tmp_path):
    with pytest.raises(FileNotFoundError):
        failing.hold(2, state_of(2))
    failing.clear()
    (tmp_path / "spill").mkdir()
    failing.hold(0, state_of(0))
    failing.hold(1, state_of(1))
    assert_same_bits(failing.take(0), state_of(0))
