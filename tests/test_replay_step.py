"""The pieces of a replay: which leaves change, the checksum, what is differentiated by."""

from dataclasses import dataclass

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
    assert [(x.shape, x.dtype) for x in carried] == [((3,), jnp.uint32)]  # together
    changing = problem.layout.unpack(carried)
    assert [x.shape for x in changing] == [(), (2,)]  # count, w
    assert [x.shape for x in fixed["constants"]] == [(4, 2), (3,)]  # images, target
    assert jax.tree.structure(replay_step.join(problem, changing, fixed["constants"])) == jax.tree.structure(STATE)
    new = problem.layout.unpack(replay_step.step(problem, carried, fixed, jnp.int32(0))[0])
    assert (int(new[0]), new[1].tolist()) == (1, [2.0, 2.0])


def test_prepare_counts_a_leaf_that_moves_to_another_place_as_changed():
    problem, carried, _ = replay_step.prepare(
        lambda s, z, t: {"a": s["b"], "b": s["a"], "c": s["c"]},
        objective,
        {"a": jnp.ones(2), "b": jnp.zeros(2), "c": jnp.zeros(2)},
        jnp.float32(1),
    )
    assert problem.changes == (True, True, False)
    assert len(problem.layout.unpack(carried)) == 2


def test_prepare_gives_equal_problems_for_equal_arguments():
    """So that a second replay compiles nothing."""
    first, second = (replay_step.prepare(step, objective, STATE, jnp.float32(z))[0] for z in (1, 2))
    assert first == second
    assert hash(first) == hash(second)


def test_prepare_refuses_a_step_of_another_structure():
    with pytest.raises(ValueError, match=r"got dict without \[\"\['count'\]\".*\] and with nothing added, expected"):
        replay_step.prepare(lambda s, z, t: {"w": s["w"]}, objective, STATE, jnp.float32(1))


@jax.tree_util.register_dataclass
@dataclass
class Model:
    """A pytree that can be called, as Equinox's modules are."""

    w: jax.Array

    def __call__(self, x):
        return self.w * x


def test_prepare_takes_a_pytree_that_can_be_called_for_a_state():
    def advance(model, z, t):
        return Model(model.w + model(z))

    def ends(model, z):
        return model(z).sum(), ()

    state = Model(jnp.ones(2))
    problem, carried, _ = replay_step.prepare(advance, ends, state, jnp.float32(2))
    assert not problem.from_metaparams
    assert [x.tolist() for x in carried] == [[1.0, 1.0]]
    for function in (lambda z: Model(z * jnp.ones(2)), jax.jit(lambda z: Model(z * jnp.ones(2))), Begin()):
        problem, carried, _ = replay_step.prepare(advance, ends, function, jnp.float32(2))
        assert problem.from_metaparams
        assert [x.tolist() for x in carried] == [[2.0, 2.0]]


class Begin:
    """A function of the metaparameters that is an object, and no pytree."""

    def __call__(self, z):
        return Model(z * jnp.ones(2))


@pytest.mark.parametrize(
    ("state", "z", "message"),
    [
        ({"w": 1.0, "name": "mlp"}, 1.0, r"state\['name'\]: got str 'mlp', expected an array or a number"),
        ({"w": [1.0, np.array(["a"])]}, 1.0, r"state\['w'\]\[1\]: got ndarray array\(\['a'\].*, expected an array"),
        (
            1.0,
            {"z": 1.0, "kind": "x" * 99},
            r"metaparams\['kind'\]: got str 'x+\.\.\.x+', expected an array or a number",
        ),
        (1.0, "float32", "metaparams: got str 'float32', expected an array or a number"),
        (lambda z: {"w": z, "act": jnp.tanh}, 1.0, r"state\['act'\]: got .*, expected an array or a number"),
        (lambda z: z, {"z": 1.0, "kind": "x"}, r"metaparams\['kind'\]: got str 'x', expected an array or a number"),
    ],
)
def test_prepare_names_a_leaf_that_is_no_number(state, z, message):
    with pytest.raises(ValueError, match=message):
        replay_step.prepare(lambda s, z, t: s, lambda s, z: (1.0, ()), state, z)


def test_prepare_leaves_plain_numbers_to_the_initialiser():
    """Beside which bfloat16 stays bfloat16."""
    begin = lambda z: {"w": z * jnp.ones(2, jnp.bfloat16)}  # noqa: E731
    _, carried, fixed = replay_step.prepare(lambda s, z, t: {"w": s["w"] * 2}, objective, begin, 0.5)
    assert (carried[0].dtype, fixed["metaparams"].dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda w: (w, ()), r"objective_fn: got float32 \[2\] as value, expected one floating-point scalar"),
        (lambda w: (w.sum() > 0, ()), r"objective_fn: got bool \[\] as value"),
        (lambda w: (w.astype(int).sum(), ()), r"objective_fn: got int32 \[\] as value"),
        (lambda w: ({"loss": w.sum()}, ()), r"objective_fn: got {'loss': 'float32 \[\]'} as value"),
        (
            lambda w: (w.sum(), {"w": w, "name": "a"}),
            r"got {'name': \"str 'a'\", 'w': 'float32 \[2\]'} as aux, expected",
        ),
    ],
    ids=["vector", "truth", "integer", "dict", "text beside it"],
)
def test_objective_refuses_what_is_no_number(returned, message):
    problem, carried, fixed = replay_step.prepare(step, lambda s, z: returned(s["w"]), STATE, jnp.float32(1))
    with pytest.raises(ValueError, match=message):
        replay_step.objective(problem, carried, fixed)


def test_objective_hands_on_any_aux():
    """Numbers, keys, nothing; and a value that is a plain number."""
    aux = {"n": 3, "x": 0.5, "key": jax.random.key(0), "none": None, "array": np.arange(2)}
    problem, carried, fixed = replay_step.prepare(step, lambda s, z: (0.25, aux), STATE, jnp.float32(1))
    value, found, _, _ = replay_step.objective(problem, carried, fixed)
    assert float(value) == 0.25
    assert (int(found["n"]), float(found["x"]), found["none"], found["array"].tolist()) == (3, 0.5, None, [0, 1])


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


@pytest.mark.parametrize("dtype", ["int2", "uint4", "int4", "float4_e2m1fn", "float8_e4m3fn"])
def test_checksum_sees_numbers_of_less_than_a_word(dtype):
    values = [jnp.array([a, b]).astype(dtype) for a in (0, 1) for b in (0, 1)]
    assert len({int(replay_step.checksum([x])) for x in values}) == 4


def test_checksum_of_float64_sees_both_words():
    with jax.enable_x64(True):
        one = int(replay_step.checksum([jnp.float64(1.0)]))
        assert one != int(replay_step.checksum([jnp.nextafter(jnp.float64(1.0), 2.0)]))
        assert one != int(replay_step.checksum([jnp.float64(-1.0)]))


def test_checksum_sees_what_cancels_in_a_plain_sum():
    """Turned signs, moved ones, exchanged bits: changes of high bits at several places."""
    w = jnp.arange(1.0, 9.0)
    eye = jnp.eye(512)
    pairs = [
        ([w], [-w]),
        ([eye[0]], [eye[256]]),
        ([jnp.array([True, False, False, True])], [jnp.array([False, True, True, False])]),
        ([w[:4], w[4:]], [w[:2], w[2:]]),
    ]
    for first, second in pairs[:3]:
        assert int(replay_step.checksum(first)) != int(replay_step.checksum(second))
    rng, seen = np.random.default_rng(0), set()
    for _ in range(3000):  # four of 1,000 numbers times 2, 1/2, -1, -1
        x = np.ones(1000, np.float32)
        x[rng.choice(1000, 4, replace=False)] *= np.float32([2, 0.5, -1, -1])
        seen.add((x.tobytes(), int(CHECKSUM([jnp.asarray(x)]))))
    assert len({found for _, found in seen}) == len({given for given, _ in seen})


CHECKSUM = jax.jit(replay_step.checksum)


def test_prepare_sees_constants_through_inner_jits():
    """A step that the user has jitted or rematerialised already."""

    def inner(state, z, t):
        return jax.jit(step)(state, z, t)

    for wrapped in (jax.jit(step), jax.checkpoint(step), jax.jit(inner), jax.jit(jax.checkpoint(inner))):
        problem, carried, _ = replay_step.prepare(wrapped, objective, STATE, jnp.float32(2))
        assert problem.changes == (True, False, False, True)  # count, images, target, w
        assert len(problem.layout.unpack(carried)) == 2


def test_prepare_sees_a_swap_within_an_inner_jit():
    swap = jax.jit(lambda s, z, t: {"a": s["b"], "b": s["a"], "c": s["c"]})
    state = {"a": jnp.ones(2), "b": jnp.zeros(2), "c": jnp.zeros(2)}
    assert replay_step.prepare(swap, objective, state, jnp.float32(1))[0].changes == (True, True, False)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda w: w.astype(jnp.bfloat16), r"step_fn: got bfloat16 \[2\] at state\['w'\], expected .* float32 \[2\]"),
        (lambda w: jnp.concatenate([w, w]), r"step_fn: got float32 \[4\] at state\['w'\]"),
    ],
)
def test_prepare_refuses_a_step_of_another_dtype_or_shape(returned, message):
    with pytest.raises(ValueError, match=message):
        replay_step.prepare(lambda s, z, t: {**s, "w": returned(s["w"])}, objective, STATE, jnp.float32(1))


def test_prepare_takes_python_numbers_and_numpy_arrays():
    state = {"w": 1.5, "v": np.ones(2, np.float32)}
    _, carried, fixed = replay_step.prepare(
        lambda s, z, t: {"w": s["w"] * z, "v": s["v"] + s["w"]}, lambda s, z: (s["w"], ()), state, 0.5
    )
    assert all(isinstance(x, jax.Array) and not x.weak_type for x in (*carried, fixed["metaparams"]))
