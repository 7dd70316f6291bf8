"""The loop of a training, with a step that is one line: snapshots, checkpoints, and who is not finite."""

import jax.numpy as jnp
import numpy as np
import pytest

from metacanary.interruption import Stopped
from metacanary.training_loop import CHECK_EVERY, carried, digest, follow


def halve(state, t):
    """w <- w / 2 + t, and a count of steps beside it."""
    return {"params": {"w": state["params"]["w"] / 2 + t}, "optimizer": state["optimizer"] + 1}


def start(*shape):
    return {"params": {"w": jnp.ones((*shape, 3))}, "optimizer": jnp.int32(0), "images": jnp.zeros(2)}


def run(step=halve, state=None, *, num_steps=8, snapshots=(3, 8), identity=None, **options):
    options = {"released": lambda state: state["params"], "identity": identity or {"seed": 7}} | options
    return follow(step, state or start(), num_steps=num_steps, snapshots=snapshots, **options)


def value(num_steps):
    """w after some steps."""
    w = 1.0
    for t in range(num_steps):
        w = w / 2 + t
    return w


def test_follow_keeps_what_is_released_after_each_snapshot():
    found = run(snapshots=[8, 3], released=lambda state: {"w": -state["params"]["w"]})
    assert list(found) == [3, 8]
    for step, kept in found.items():
        np.testing.assert_array_equal(kept["w"], np.full(3, -value(step), np.float32))


@pytest.mark.parametrize("killed_at", [1, 3, 7])
@pytest.mark.parametrize("is_stopped", [True, False], ids=["stopped", "killed"])
def test_follow_goes_on_from_its_checkpoint(tmp_path, killed_at, is_stopped):
    """Guarantees: the same end, and no step is taken twice; what is stopped is written long before it is due."""
    steps, options = [], {"checkpoint": tmp_path / "run.npz"}

    def record(t):
        steps.append(t)
        if not is_stopped and t == killed_at:
            raise KeyboardInterrupt

    due = {"should_stop": lambda: len(steps) == killed_at - 1} if is_stopped else {"checkpoint_seconds": 0.0}
    with pytest.raises(Stopped if is_stopped else KeyboardInterrupt):
        run(on_step=record, **options, **due)
    resumed = run(on_step=steps.append, **options)
    assert steps == list(range(1, 9))
    assert {s: kept["w"].tolist() for s, kept in resumed.items()} == {s: [value(s)] * 3 for s in (3, 8)}


def test_follow_refuses_a_checkpoint_of_another_identity(tmp_path):
    options = {"checkpoint": tmp_path / "run.npz", "checkpoint_seconds": 0.0}
    run(identity={"seeds": [7, 8], "model": "a"}, **options)
    run(identity={"seeds": [7, 8], "model": "a"}, **options)
    for other, name in (([8, 7], "seeds"), ([7], "seeds")):
        with pytest.raises(ValueError, match=f"is of another {name}, expected"):
            run(identity={"seeds": other, "model": "a"}, **options)


def test_follow_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match=r"snapshots: got \[0, 9\], expected steps between 1 and num_steps = 8"):
        run(snapshots=[0, 4, 9])
    with pytest.raises(ValueError, match="checkpoint: got None, expected a file, since should_stop is given"):
        run(should_stop=lambda: False)


def spoil(at):
    """A step after which w of run i is not finite from step at[i] on."""

    def step(state, t):
        after = halve(state, t)
        bad = jnp.asarray(at) <= t + 1
        after["params"]["w"] = jnp.where(bad[..., None], jnp.nan, after["params"]["w"])
        return after

    return step


def test_follow_names_the_step_that_is_not_finite():
    with pytest.raises(FloatingPointError) as error:
        run(spoil(5), snapshots=[8])
    assert str(error.value) == "parameters are not finite after step 5 of 8: lower learning_rate"


def test_follow_names_each_run_that_is_not_finite():
    """Of stacked ones, each with its own step, and no other."""
    with pytest.raises(FloatingPointError) as error:
        run(spoil([99, 5, 99, 2]), start(4), snapshots=[8], seeds=[11, 12, 13, 14])
    expected = (
        "parameters of seed 12 are not finite after step 5 of 8; parameters of seed 14 are not finite after step 2"
    )
    assert str(error.value) == f"{expected} of 8: lower learning_rate"


def test_follow_looks_before_the_end(tmp_path):
    """Every `CHECK_EVERY` steps, and before each checkpoint, which then holds what was finite."""
    steps, num_steps = [], 3 * CHECK_EVERY
    with pytest.raises(FloatingPointError):
        run(spoil([99, 5]), start(2), num_steps=num_steps, snapshots=[num_steps], seeds=[1, 2], on_step=steps.append)
    assert len(steps) + 1 == CHECK_EVERY
    options = {"checkpoint": tmp_path / "run.npz", "checkpoint_seconds": 0.0, "seeds": [1, 2]}
    with pytest.raises(FloatingPointError):
        run(spoil([99, 5]), start(2), **options)
    again = []
    assert run(state=start(2), on_step=again.append, **options)[8]["w"].tolist() == [[value(8)] * 3] * 2
    assert again == [5, 6, 7, 8]


def test_carried_leaves_out_what_stays():
    changing = {"params", "optimizer", "thresholds", "ema"}
    assert carried(start() | {"thresholds": 1, "ema": 2, "noise": 3}).keys() == changing


def test_digest_knows_every_leaf_and_no_parameters():
    trees = [None, {"a": np.zeros(2, "f4"), "b": np.zeros(1)}, {"a": np.zeros(2, "f4"), "b": np.ones(1)}]
    assert len({digest(tree) for tree in trees}) == 3
    assert digest(trees[1]) == digest(trees[1] | {"a": jnp.zeros(2)})
