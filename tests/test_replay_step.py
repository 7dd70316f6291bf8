"""The pieces of a replay: which leaves change, the checksum, what is differentiated by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metacanary import replay_step


def step(state, z, t):
    return {**state, "w": state["w"] * z, "count": state["count"] + 1}


def objective(state, z):
    return state["w"].sum() + z, ()


STATE = {"w": jnp.ones(2), "count": jnp.int32(0), "images": jnp.zeros((4, 2), jnp.uint8), "target": jnp.ones(3)}


def test_prepare_tells_constants_from_what_changes():
    problem, carried, fixed = replay_step.prepare(step, objective, STATE, jnp.float32(2))
    assert [x.shape for x in carried] == [(), (2,)]  # count, w
    assert [x.shape for x in fixed["constants"]] == [(4, 2), (3,)]  # images, target
    assert jax.tree.structure(replay_step.join(problem, carried, fixed["constants"])) == jax.tree.structure(STATE)
    new, _ = replay_step.step(problem, carried, fixed, jnp.int32(0))
    assert (int(new[0]), new[1].tolist()) == (1, [2.0, 2.0])


def test_prepare_counts_a_leaf_that_moves_to_another_place_as_changed():
    problem, carried, _ = replay_step.prepare(
        lambda s, z, t: {"a": s["b"], "b": s["a"], "c": s["c"]},
        objective,
        {"a": jnp.ones(2), "b": jnp.zeros(2), "c": jnp.zeros(2)},
        jnp.float32(1),
    )
    assert problem.changes == (True, True, False)
    assert len(carried) == 2


def test_prepare_gives_equal_problems_for_equal_arguments():
    """So that a second replay compiles nothing."""
    first, second = (replay_step.prepare(step, objective, STATE, jnp.float32(z))[0] for z in (1, 2))
    assert first == second
    assert hash(first) == hash(second)


def test_prepare_refuses_a_step_of_another_structure():
    with pytest.raises(ValueError, match=r"step_fn: got PyTreeDef.*expected it to return the state's structure"):
        replay_step.prepare(lambda s, z, t: {"w": s["w"]}, objective, STATE, jnp.float32(1))


CHECKED = [
    jnp.arange(6.0).reshape(2, 3),
    jnp.arange(4, dtype=jnp.bfloat16),
    jnp.arange(3),
    jnp.array([True, False]),
    jax.random.key(3),
    jnp.array([1 + 2j]),
]


def test_checksum_sees_every_change_of_one_number():
    """Of any dtype, by one bit; and -0.0 is not 0.0."""
    expected = int(replay_step.checksum(CHECKED))
    assert int(jax.jit(replay_step.checksum)(CHECKED)) == expected
    for i, leaf in enumerate(CHECKED[:3]):
        flat = np.asarray(leaf).reshape(-1)
        for j in range(flat.size):
            changed = flat.copy()
            changed.view(np.uint8)[j * flat.itemsize] ^= 1
            leaves = [*CHECKED[:i], jnp.asarray(changed).reshape(leaf.shape), *CHECKED[i + 1 :]]
            assert int(replay_step.checksum(leaves)) != expected
    for i, other in ((3, jnp.array([True, True])), (4, jax.random.key(4)), (5, jnp.array([1 + 3j]))):
        assert int(replay_step.checksum([*CHECKED[:i], other, *CHECKED[i + 1 :]])) != expected
    assert int(replay_step.checksum([jnp.array([0.0])])) != int(replay_step.checksum([jnp.array([-0.0])]))


def test_checksum_sees_exchanged_numbers_and_leaves():
    a, b = jnp.array([1.0, 2.0]), jnp.array([2.0, 1.0])
    sums = [int(replay_step.checksum(x)) for x in ([a, b], [b, a], [a, a], [b, b], [a], [])]
    assert len(set(sums)) == len(sums)


def test_checksum_of_float64_sees_both_words():
    with jax.enable_x64(True):
        one = int(replay_step.checksum([jnp.float64(1.0)]))
        assert one != int(replay_step.checksum([jnp.nextafter(jnp.float64(1.0), 2.0)]))
        assert one != int(replay_step.checksum([jnp.float64(-1.0)]))
