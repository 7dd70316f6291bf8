"""A replay that is killed goes on from its checkpoint and ends with the same bits."""

import contextlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metacanary import store
from metacanary.interruption import Stopped
from metacanary.metagradient import NotDeterministicError, replay
from metacanary.replay_schedule import Order, actions
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


@pytest.mark.parametrize("objective_steps", [(), (1, 4, 9)], ids=["last", "several"])
@pytest.mark.parametrize("branching", [2, 3, 9])
def test_replay_that_is_stopped_repeats_nothing(tmp_path, branching, objective_steps):
    """After each single action; together the attempts take as many steps as one that is not disturbed."""
    state, z = toy()
    args, calls, options = (toy_step, toy_objective, state, z, 9), [], {"objective_steps": objective_steps}
    expected = replay(*args, branching=branching, on_step=lambda *step: calls.append(step), **options)
    num_actions = len(list(actions(9, branching, objective_steps)))
    again, attempts, result = [], 0, None
    while result is None:
        attempts += 1
        with contextlib.suppress(Stopped):
            result = replay(
                *args,
                branching=branching,
                checkpoint=tmp_path,
                on_step=lambda *step: again.append(step),
                should_stop=lambda attempt=attempts: attempt <= num_actions,
                **options,
            )
    assert attempts == num_actions + 1
    assert again == calls
    assert result.gradient["shift"].tobytes() == expected.gradient["shift"].tobytes()
    assert (result.value, result.aux.tobytes()) == (expected.value, expected.aux.tobytes())


@pytest.mark.parametrize("stops", [(31, 64, 65, 99, 160), (130, 131), (400, 401, 402)], ids=str)
def test_replay_that_is_stopped_between_two_looks_knows_all_first_runs(tmp_path, stops):
    """Of 150 steps, more than have their checksums on the device; repeated steps are compared with them afterwards."""
    state, z = toy()
    args, result, actions_done = (toy_step, toy_objective, state, z, 150), None, 0
    expected = replay(*args, branching=2)

    def stopping():
        nonlocal actions_done
        actions_done += 1
        return actions_done in stops

    for _ in range(len(stops) + 1):
        with contextlib.suppress(Stopped):
            result = replay(*args, branching=2, checkpoint=tmp_path, should_stop=stopping)
    assert actions_done == len(Order(150, 2))
    assert result.gradient["shift"].tobytes() == expected.gradient["shift"].tobytes()


def test_replay_compares_with_first_runs_from_before_it_was_killed(tmp_path):
    """Of another attempt, whose checksums the checkpoint holds; here the noise comes after it."""
    noise, done = [0.0], 0

    def step(state, z, t):
        drawn = jax.pure_callback(lambda t: np.float32(noise[0]), jax.ShapeDtypeStruct((), jnp.float32), t)
        return state * z + jax.lax.stop_gradient(drawn)

    def stopping():
        nonlocal done
        done += 1
        return done == 120  # all first runs are done, and some steps repeated

    one = jnp.float32(1)
    args = (step, lambda s, z: (s, ()), one, jnp.float32(0.9), 100)
    with pytest.raises(Stopped):
        replay(*args, branching=2, checkpoint=tmp_path, should_stop=stopping)
    noise[0] = 1e-3
    with pytest.raises(NotDeterministicError, match="of 100 gave other bits when it was repeated"):
        replay(*args, branching=2, checkpoint=tmp_path)


def test_replay_begins_anew_if_another_writer_deleted_a_state(tmp_path):
    state, z = toy()
    args = (toy_step, toy_objective, state, z, 9)
    expected = replay(*args, branching=3)
    looks = iter([False] * 8 + [True])
    with pytest.raises(Stopped):
        replay(*args, branching=3, checkpoint=tmp_path, should_stop=lambda: next(looks))
    held = sorted(tmp_path.glob("held_*.npz"))
    assert len(held) > 1
    held[-1].unlink()
    result = replay(*args, branching=3, checkpoint=tmp_path)
    assert result.gradient["shift"].tobytes() == expected.gradient["shift"].tobytes()


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
    options = {"branching": 2, "checkpoint": tmp_path, "checkpoint_seconds": 0.0}
    replay(toy_step, toy_objective, state, z, 5, **options)
    with pytest.raises(ValueError, match="is of a replay with another num_steps"):
        replay(toy_step, toy_objective, state, z, 4, **options)
    with pytest.raises(ValueError, match="is of a replay with another objective_steps"):
        replay(toy_step, toy_objective, state, z, 5, **options, objective_steps=(2, 5))
    others = [({**state, "w": -state["w"]}, z), ({**state, "images": state["images"][::-1]}, z)]
    others += [(state, {"shift": z["shift"].at[1].add(1e-6)}), (state, {"shift": -z["shift"]})]
    for other_state, other_z in others:
        with pytest.raises(
            ValueError, match=r"checkpoint: .* is of a replay with another state or metaparams; use another"
        ):
            replay(toy_step, toy_objective, other_state, other_z, 5, **options)


def test_replay_refuses_a_checkpoint_of_another_step_or_objective(tmp_path):
    """Of one that closes over another number, too."""

    def run(rate, target, folder):
        def step(s, z, t):
            return s + rate * z

        def objective(s, z):
            return jnp.square(s - target), ()

        return replay(step, objective, jnp.float32(1), jnp.float32(1), 4, branching=2, checkpoint=folder)

    assert float(run(0.1, 0.0, tmp_path).value) == pytest.approx(1.4**2)
    assert float(run(0.1, 0.0, tmp_path).value) == pytest.approx(1.4**2)  # other function objects, the same functions
    for other in ((0.5, 0.0), (0.1, 1.0)):
        with pytest.raises(ValueError, match="another step_fn or objective_fn"):
            run(*other, tmp_path)


def test_replay_goes_on_in_the_order_of_its_checkpoint(tmp_path):
    """A plan that was made anew may have another branching, which changes no bit."""
    state, z = toy()
    expected = replay(toy_step, toy_objective, state, z, 9, branching=2)
    done = []

    def killing(phase, t):
        done.append(t)
        if len(done) == 14:
            raise Killed

    options = {"checkpoint": tmp_path / "replay", "checkpoint_seconds": 0.0}
    with pytest.raises(Killed):
        replay(toy_step, toy_objective, state, z, 9, branching=2, **options, on_step=killing)
    again = []
    result = replay(
        toy_step, toy_objective, state, z, 9, branching=9, **options, on_step=lambda *step: again.append(step)
    )
    assert len(again) < 18
    assert result.gradient["shift"].tobytes() == expected.gradient["shift"].tobytes()


def test_replay_with_a_checkpoint_refuses_a_bad_branching(tmp_path):
    """Although the checkpoint's would be gone on with."""
    args = (toy_step, toy_objective, *toy(), 5)
    replay(*args, branching=2, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="branching: got 1, expected an integer >= 2"):
        replay(*args, branching=1, checkpoint=tmp_path)


def test_replay_ignores_what_a_kill_before_the_first_position_left(tmp_path, monkeypatch):
    """Held states of unknown origin must not become those of another replay."""
    state, z = toy()
    other = {**state, "w": state["w"] + 1}
    expected = replay(toy_step, toy_objective, other, z, 9, branching=9)
    folder, write = tmp_path / "replay", store.write_tree

    def dying(path, tree, provenance):
        if path.name == "position.npz":
            raise Killed
        write(path, tree, provenance)

    monkeypatch.setattr(store, "write_tree", dying)
    options = {"branching": 9, "checkpoint": folder, "checkpoint_seconds": 0.0}
    with pytest.raises(Killed):
        replay(toy_step, toy_objective, state, z, 9, **options)
    monkeypatch.undo()
    assert list(folder.glob("held_*.npz"))
    (folder / ".held_3.npz.1.ab.tmp").write_bytes(b"half")
    done = []

    def killing(phase, t):
        done.append(t)
        if len(done) == 14:
            raise Killed

    with pytest.raises(Killed):
        replay(toy_step, toy_objective, other, z, 9, **options, on_step=killing)
    result = replay(toy_step, toy_objective, other, z, 9, **options)
    assert result.gradient["shift"].tobytes() == expected.gradient["shift"].tobytes()
    assert [path.name for path in folder.iterdir()] == ["position.npz"]


def test_replay_refuses_a_damaged_checkpoint(tmp_path):
    state, z = toy()
    replay(toy_step, toy_objective, state, z, 5, branching=2, checkpoint=tmp_path)
    (tmp_path / "position.npz").write_bytes(b"PK" + b"0" * 100)
    with pytest.raises(ValueError, match=r"checkpoint: .*position.npz is damaged .*; delete its folder"):
        replay(toy_step, toy_objective, state, z, 5, branching=2, checkpoint=tmp_path)


@pytest.mark.parametrize("kill_at", range(4, 26, 3))
def test_replay_writes_a_checkpoint_when_its_time_has_come(tmp_path, monkeypatch, kill_at):
    """Every third action or so, by a clock that ticks once a look; what is repeated is less than that."""
    state, z = toy()
    steps = []
    expected = replay(toy_step, toy_objective, state, z, 9, branching=3, on_step=lambda *step: steps.append(step))
    clock = itertools.count()
    monkeypatch.setattr("metacanary.metagradient.time.monotonic", lambda: next(clock))
    positions, write = [], store.write_tree

    def counting(path, tree, provenance):
        positions.append(path.name == "position.npz")
        write(path, tree, provenance)

    monkeypatch.setattr(store, "write_tree", counting)
    options = {"branching": 3, "checkpoint": tmp_path / "replay", "checkpoint_seconds": 3.0}
    done = []

    def killing(phase, t):
        done.append(t)
        if len(done) == kill_at:
            raise Killed

    with contextlib.suppress(Killed):
        replay(toy_step, toy_objective, state, z, 9, **options, on_step=killing)
    again = []
    result = replay(toy_step, toy_objective, state, z, 9, **options, on_step=lambda *step: again.append(step))
    assert result.gradient["shift"].tobytes() == expected.gradient["shift"].tobytes()
    assert len(steps) <= len(done) + len(again) <= len(steps) + 5
    assert sum(positions) <= len(steps) / 2 + 2


@pytest.mark.parametrize("nth", range(1, 34, 2))
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
