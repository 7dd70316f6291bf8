"""A replay that is killed goes on from its checkpoint and ends with the same bits."""

import jax.numpy as jnp
import pytest

from metacanary import store
from metacanary.metagradient import replay
from metacanary.replay_storage import Disk


def toy_step(state, z, t):
    velocity = 0.9 * state["velocity"] + z["shift"] * jnp.cos(0.1 * t)
    return {"w": jnp.tanh(state["w"] + 0.3 * velocity), "velocity": velocity, "images": state["images"]}


def toy_objective(state, z):
    return jnp.sum(jnp.square(state["w"])) + jnp.vdot(z["shift"], state["w"]), state["w"]


def toy():
    """Initial state and metaparameters of `toy_step`."""
    state = {"w": jnp.array([0.1, -0.2, 0.3]), "velocity": jnp.zeros(3), "images": jnp.arange(5, dtype=jnp.uint8)}
    return state, {"shift": jnp.array([0.5, 0.1, -0.4])}


class Killed(BaseException):
    """What a test raises in the middle of a replay."""


@pytest.mark.parametrize("storage", ["device", "disk"])
@pytest.mark.parametrize("branching", [2, 3, 9])
def test_replay_resumes_bit_identical_wherever_it_is_killed(tmp_path, branching, storage):
    state, z = toy()
    calls = []
    args = (toy_step, toy_objective, state, z, 9)
    expected = replay(*args, branching=branching, on_step=lambda phase, t: calls.append(t))
    for number in range(1, len(calls) + 1):
        folder, again = tmp_path / f"{number}", []
        options = {"branching": branching, "checkpoint": folder, "checkpoint_seconds": 0.0}
        for kill_at in (number, number, 10**9):  # twice
            done = []

            def count(phase, t, done=done, kill_at=kill_at):
                done.append(t)
                if len(done) == kill_at:
                    raise Killed

            keep = Disk(tmp_path / "spill") if storage == "disk" else None
            try:
                result = replay(*args, **options, storage=keep, on_step=count)
            except Killed:
                again += done
        assert len(again) + len(done) <= len(calls) + 2  # each kill loses the call in which it came
        assert result.gradient["shift"].tobytes() == expected.gradient["shift"].tobytes()
        assert (result.value, result.aux.tobytes()) == (expected.value, expected.aux.tobytes())


def test_replay_keeps_its_result_in_a_finished_checkpoint(tmp_path):
    state, z = toy()
    options = {"branching": 3, "checkpoint": tmp_path / "replay", "checkpoint_seconds": 1e9}
    first = replay(toy_step, toy_objective, state, z, 9, **options)
    assert [path.name for path in (tmp_path / "replay").iterdir()] == ["position.npz"]
    calls = []
    second = replay(toy_step, toy_objective, state, z, 9, **options, on_step=lambda *call: calls.append(call))
    assert calls == []
    assert second.gradient["shift"].tobytes() == first.gradient["shift"].tobytes()
    assert second.aux.tobytes() == first.aux.tobytes()


def test_replay_refuses_a_checkpoint_of_another_replay(tmp_path):
    state, z = toy()
    options = {"checkpoint": tmp_path, "checkpoint_seconds": 0.0}
    replay(toy_step, toy_objective, state, z, 5, branching=2, **options)
    with pytest.raises(ValueError, match=r"checkpoint: .* is of a replay with another branching; delete it"):
        replay(toy_step, toy_objective, state, z, 5, branching=3, **options)
    with pytest.raises(ValueError, match="another num_steps"):
        replay(toy_step, toy_objective, state, z, 4, branching=2, **options)
    other = {"shift": z["shift"].at[1].add(1e-6)}
    with pytest.raises(ValueError, match="another inputs"):
        replay(toy_step, toy_objective, state, other, 5, branching=2, **options)


@pytest.mark.parametrize("nth", [1, 2, 5, 8])
def test_replay_survives_a_kill_while_it_writes_a_checkpoint(tmp_path, monkeypatch, nth):
    state, z = toy()
    options = {"branching": 2, "checkpoint": tmp_path / "replay", "checkpoint_seconds": 0.0}
    expected = replay(toy_step, toy_objective, state, z, 9, branching=2)
    written, write = [], store.write_tree

    def dying(path, tree, provenance):
        written.append(path)
        if len(written) == nth:
            raise Killed
        write(path, tree, provenance)

    monkeypatch.setattr(store, "write_tree", dying)
    with pytest.raises(Killed):
        replay(toy_step, toy_objective, state, z, 9, **options)
    monkeypatch.undo()
    result = replay(toy_step, toy_objective, state, z, 9, **options)
    assert result.gradient["shift"].tobytes() == expected.gradient["shift"].tobytes()
