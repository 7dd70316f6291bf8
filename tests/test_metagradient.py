"""Replay: equal to plain differentiation and to finite differences, within its memory and work, in this very order."""

import itertools
import math
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metacanary import families, gradients, models, optimization, runs, steps
from metacanary.interruption import Stopped
from metacanary.metagradient import LOOK_EVERY, NotDeterministicError, measure, replay
from metacanary.objectives import SmoothAUROC
from metacanary.recipes import SGD, Schedule
from metacanary.replay_schedule import plan, work
from metacanary.replay_storage import Device, Disk, Host

NUM_STEPS = 12
INCLUDED = np.array([1, 0, 1, 1, 0, 0], bool)


def toy_step(state, z, t):
    """A contraction with memory, of a [3] state; z["shift"] acts at every step."""
    velocity = 0.9 * state["velocity"] + z["shift"] * jnp.cos(0.1 * t)
    return {"w": jnp.tanh(state["w"] + 0.3 * velocity), "velocity": velocity}


def toy_objective(state, z):
    return jnp.sum(jnp.square(state["w"])) + jnp.vdot(z["shift"], state["w"]), state["w"]


def toy():
    """Initial state and metaparameters of `toy_step`."""
    state = {"w": jnp.array([0.1, -0.2, 0.3]), "velocity": jnp.zeros(3)}
    return state, {"shift": jnp.array([0.5, 0.1, -0.4])}


def unrolled(step_fn, objective_fn, state, num_steps, objective_steps=()):
    """The objective, or its mean over steps, as a plain function of z."""

    def function(z):
        begin, after, values = 0, state, []
        for end in objective_steps or (num_steps,):
            part = jnp.arange(begin, end, dtype=jnp.int32)
            after, begin = jax.lax.scan(lambda s, t: (step_fn(s, z, t), None), after, part)[0], end
            values.append(objective_fn(after, z)[0])
        return sum(values) / len(values)

    return function


def relative_error(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def central_differences(function, z, pixels, step):
    """Derivatives of `function` by single pixels, with an error of order step^2."""
    bumps = [jnp.zeros(z.size).at[i].set(step).reshape(z.shape) for i in pixels]
    return np.array([float(function(z + e) - function(z - e)) / (2 * step) for e in bumps])


@pytest.fixture(scope="module")
def audit():
    """Canaries through a real run: convnet, Nesterov momentum, weight decay, one cycle; all in float64."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, size=(30, 4, 4, 1), dtype=np.uint8), rng.integers(0, 3, size=30)
    table = families.make("mislabeled", images, labels, num_canaries=6, num_classes=3, seed=0)
    pool = runs.Pool.make(images, labels, table.source_index, table.label)
    model = models.build("convnet", num_classes=3, widths=[4])
    recipe = SGD(
        num_steps=NUM_STEPS,
        batch_size=8,
        learning_rate=0.5,
        momentum=0.9,
        nesterov=True,
        weight_decay=1e-3,
        schedule=Schedule(name="one_cycle"),
    )
    step_fn = steps.sgd_step(recipe, model)
    objective_fn = optimization._objective_fn(SmoothAUROC(temperature=1.0), recipe, model)
    state = steps.sgd_state(recipe, model, pool, INCLUDED, seed=3) | {"included": jnp.asarray(INCLUDED)}

    def detached(state, pixels, t):  # trap 1: the path through training is dropped
        return step_fn(state, jax.lax.stop_gradient(pixels), t)

    with jax.enable_x64(True):
        state = jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, state)
        z = jnp.asarray(table.images, jnp.float64)
        function = unrolled(step_fn, objective_fn, state, NUM_STEPS)
        value, plain = jax.jit(jax.value_and_grad(function))(z)
        pixels = rng.choice(16, size=(6, 3)) + 16 * np.arange(6)[:, None]  # three of each canary, in and out
        return SimpleNamespace(
            replay=replay(step_fn, objective_fn, state, z, NUM_STEPS, branching=3),
            detached=np.asarray(replay(detached, objective_fn, state, z, NUM_STEPS, branching=3).gradient),
            value=float(value),
            plain=np.asarray(plain),
            pixels=pixels,
            differences=central_differences(jax.jit(function), z, pixels.ravel(), 1e-4).reshape(6, 3),
            after=jax.eval_shape(step_fn, state, z, jnp.int32(0)),
            before=state,
        )


def test_replay_equals_plain_autodiff(audit):
    """Guarantee: exact. Both in float64."""
    assert audit.replay.gradient.dtype == audit.plain.dtype == np.float64
    assert relative_error(np.asarray(audit.replay.gradient), audit.plain) < 1e-10
    assert float(audit.replay.value) == pytest.approx(audit.value, rel=1e-12)


def test_replay_equals_finite_differences(audit):
    """For pixels of included and of excluded canaries; the differences are good to 1e-8 of the largest one."""
    found = np.asarray(audit.replay.gradient).ravel()[audit.pixels]
    scale = np.abs(audit.differences).max(axis=1, keepdims=True)
    assert (scale > 1e-4).all()  # no canary's gradient is so small that anything would pass
    assert np.allclose(found / scale, audit.differences / scale, rtol=0, atol=1e-6)


def test_replay_without_the_path_through_training_is_told_apart(audit):
    """Trap 1: a mutant whose steps detach the pixels differs, for included canaries only."""
    assert relative_error(audit.detached, audit.plain) > 1e-2
    per_canary = [relative_error(audit.detached[i], audit.plain[i]) for i in range(6)]
    assert min(np.array(per_canary)[INCLUDED]) > 1e-2
    assert max(np.array(per_canary)[~INCLUDED]) < 1e-10
    found, scale = audit.detached.ravel()[audit.pixels], np.abs(audit.differences).max(axis=1, keepdims=True)
    assert not np.allclose(found / scale, audit.differences / scale, rtol=0, atol=1e-2)


def test_replay_step_keeps_float64(audit):
    """The comparison above would be void if some part of the step fell back to float32."""
    assert jax.tree.map(lambda x: x.dtype, audit.after) == jax.tree.map(lambda x: x.dtype, audit.before)
    floats = jax.tree.leaves((audit.after["params"], audit.after["optimizer"]))
    assert {str(x.dtype) for x in floats} == {"float64", "int32"}  # int32: the schedule's count
    assert audit.replay.aux.dtype == np.float64


def test_replay_of_a_linear_recursion_has_its_closed_form():
    """s' = a s + z: ds[T]/dz = (1 - a^T) / (1 - a), ds[T]/da = sum_t a^(T-1-t) s[t]."""
    a, z, steps = 0.8, 0.3, 9
    result = replay(
        lambda s, m, t: m["a"] * s + m["z"],
        lambda s, m: (s, None),
        jnp.float32(1.5),
        {"a": jnp.float32(a), "z": jnp.float32(z)},
        steps,
        branching=2,
    )
    states = list(itertools.accumulate(range(steps - 1), lambda s, _: a * s + z, initial=1.5))
    assert float(result.gradient["z"]) == pytest.approx((1 - a**steps) / (1 - a), rel=1e-5)
    by_a = sum(a ** (steps - 1 - t) * s for t, s in enumerate(states))
    assert float(result.gradient["a"]) == pytest.approx(by_a, rel=1e-5)
    assert float(result.value) == pytest.approx(a * states[-1] + z, rel=1e-5)


def test_replay_gives_the_same_bits_for_every_branching_and_storage(tmp_path):
    state, z = toy()
    results = [replay(toy_step, toy_objective, state, z, 11, branching=k) for k in (2, 3, 8, 11, 50)]
    for storage in (Host(), Disk(tmp_path)):
        results += [replay(toy_step, toy_objective, state, z, 11, branching=k, storage=storage) for k in (2, 11)]
    assert list(tmp_path.iterdir()) == []
    expected = results[0].gradient["shift"]
    assert np.abs(expected).max() > 0.1
    for result in results:
        assert result.gradient["shift"].tobytes() == expected.tobytes()
        assert (result.value, result.aux.tobytes()) == (results[0].value, results[0].aux.tobytes())


@pytest.mark.parametrize("objective_steps", [(1, 4, 11), (10, 11), tuple(range(1, 12))], ids=str)
def test_replay_of_objectives_on_the_way_equals_plain_autodiff(objective_steps):
    """The mean over states, in float64; aux is that of the last one."""
    with jax.enable_x64(True):
        state, z = jax.tree.map(lambda x: x.astype(jnp.float64), toy())
        expected, gradient = jax.value_and_grad(unrolled(toy_step, toy_objective, state, 11, objective_steps))(z)
        found = replay(toy_step, toy_objective, state, z, 11, branching=3, objective_steps=objective_steps)
        last = replay(toy_step, toy_objective, state, z, 11, branching=3)
    assert float(found.value) == pytest.approx(float(expected), rel=1e-12)
    assert relative_error(found.gradient["shift"], gradient["shift"]) < 1e-12
    assert relative_error(last.gradient["shift"], gradient["shift"]) > 1e-2
    assert found.aux.tobytes() == last.aux.tobytes()


def test_replay_of_objectives_on_the_way_gives_the_same_bits_for_every_branching_and_storage(tmp_path):
    state, z = toy()
    args, options = (toy_step, toy_objective, state, z, 11), {"objective_steps": (2, 7, 11)}
    results = [replay(*args, branching=k, **options) for k in (2, 3, 11)]
    results.append(replay(*args, branching=2, storage=Disk(tmp_path), **options))
    assert len({(float(r.value), r.gradient["shift"].tobytes()) for r in results}) == 1
    plain = replay(*args, branching=3)
    named = replay(*args, branching=3, objective_steps=(11,))
    assert (named.value, named.gradient["shift"].tobytes()) == (plain.value, plain.gradient["shift"].tobytes())


def test_replay_of_objectives_on_the_way_differentiates_a_state_from_metaparameters():
    """s[t] = 2^-t z^2, and a part of s[0] that no step changes: both shares are of the mean."""
    z = {"w": jnp.float32(2.0), "target": jnp.float32(0.5)}
    result = replay(
        lambda s, z, t: {**s, "w": 0.5 * s["w"]},
        lambda s, z: (s["w"] * s["target"], ()),
        lambda z: {"w": z["w"] ** 2, "target": 3 * z["target"]},
        z,
        3,
        branching=2,
        objective_steps=(1, 3),
    )
    mean = (0.5 + 0.125) / 2
    assert float(result.value) == pytest.approx(mean * 4 * 1.5)
    assert float(result.gradient["w"]) == pytest.approx(mean * 4 * 1.5)  # d(w^2) = 2 w = 4
    assert float(result.gradient["target"]) == pytest.approx(mean * 4 * 3)


@pytest.mark.parametrize("branching", [2, 4, 10, 64])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 64])
def test_replay_memory_and_work(num_steps, branching):
    """Guarantees: what `work` counts, in arrays that are alive; every VJP once and backwards."""
    calls, peak = {"forward": [], "backward": []}, 0

    def look(phase, t):
        nonlocal peak
        calls[phase].append(t)
        put_away = [x for held in storage._states.values() for x in held if isinstance(x, np.ndarray)]
        peak = max(peak, sum(x.shape == (11, 13) for x in [*jax.live_arrays(), *put_away]))

    storage = Device()

    state = {"w": jnp.full((11, 13), 0.5), "images": jnp.zeros((50, 11, 13))}
    step = lambda s, z, t: {**s, "w": s["w"] * z + s["images"][t]}  # noqa: E731
    args = (step, lambda s, z: (s["w"].sum(), ()), state, jnp.float32(0.9), num_steps)
    replay(*args, branching=branching, storage=storage, on_step=look)
    expected = work(num_steps, branching)
    assert calls["backward"] == list(reversed(range(num_steps)))
    assert len(calls["forward"]) == expected.step_calls
    assert peak <= expected.states_held + 3  # the current state, the next one, the adjoint
    assert peak >= min(num_steps, branching)


@pytest.mark.parametrize(
    ("num_steps", "branching", "expected"),
    [
        (8, 2, "f0 f1 f2 f3 f4 f5 f6 f7 b7 b6 | f4 b5 b4 | f0 f1 f2 b3 b2 | f0 b1 b0"),  # held: s0, s4, s6, s7
        (7, 3, "f0 f1 f2 f3 f4 f5 f6 b6 | f3 f4 b5 b4 b3 | f0 f1 b2 b1 b0"),  # held: s0, s3, s6
        (3, 3, "f0 f1 f2 | b2 b1 b0"),
    ],
)
def test_replay_recomputes_in_this_order(num_steps, branching, expected):
    """Forward steps (f) and VJPs (b): parts are of ceil(n / k) steps, and a state is recomputed when it is needed."""
    calls = []

    def record(phase, t):
        calls.append(f"{phase[0]}{t}")

    replay(toy_step, toy_objective, *toy(), num_steps, branching=branching, on_step=record)
    assert calls == expected.replace("| ", "").split()


def test_replay_differentiates_float_leaves_only():
    """Learning rate and initial weights as metaparameters; uint8, labels and PRNG keys are carried along."""

    def step(state, z, t):
        w = jnp.where(t == 0, z["weights"], state["w"])
        noise = jax.random.normal(jax.random.fold_in(state["key"], t), w.shape)
        inputs = z["images"][t].astype(jnp.float32) / 255 + z["offset"]
        gradient = jax.grad(lambda v: jnp.square(jnp.vdot(v, inputs) - z["labels"][t]))(w)
        return {**state, "w": w - z["rate"] * (gradient + 0.1 * noise)}

    def objective(state, z):
        return jnp.sum(jnp.square(state["w"] - state["target"])), ()

    rng = np.random.default_rng(0)
    z = {
        "weights": jnp.asarray(rng.normal(size=4), jnp.float32),
        "rate": jnp.float32(0.05),
        "offset": jnp.asarray(rng.normal(size=4), jnp.float32),
        "images": jnp.asarray(rng.integers(0, 256, size=(6, 4)), jnp.uint8),
        "labels": jnp.arange(6),
        "nothing": None,
    }
    state = {"w": jnp.zeros(4), "key": jax.random.key(0), "target": jnp.ones(4), "flag": jnp.array(True)}
    gradient = replay(step, objective, state, z, 6, branching=2).gradient
    assert gradient["images"] is gradient["labels"] is gradient["nothing"] is None
    floats = {name: z[name] for name in ("weights", "rate", "offset")}
    expected = jax.grad(lambda leaves: unrolled(step, objective, state, 6)(z | leaves))(floats)
    for name in floats:
        assert gradient[name].shape == z[name].shape
        assert np.linalg.norm(gradient[name]) > 0.1
        assert relative_error(gradient[name], expected[name]) < 1e-5


def test_replay_leaves_its_arguments_usable():
    """Adjoint and gradient are donated to the next VJP; nothing of the caller's is."""
    state, z = toy()
    result = replay(toy_step, toy_objective, state, z, 4, branching=4)
    assert not any(x.is_deleted() for x in jax.tree.leaves((state, z, result)))
    scalar, factor = jnp.float32(2.0), jnp.float32(3.0)  # the objective's derivatives are its very inputs
    result = replay(lambda s, m, t: s, lambda s, m: (s * m, s), scalar, factor, 2, branching=2)
    assert (float(result.value), float(result.gradient), float(result.aux)) == (6.0, 2.0, 2.0)
    assert (float(scalar), float(factor)) == (2.0, 3.0)


def test_replay_compiles_nothing_the_second_time():
    traces = []

    def step(state, z, t):
        traces.append("step")
        return toy_step(state, z, t)

    def objective(state, z):
        traces.append("objective")
        return toy_objective(state, z)

    state, z = toy()
    first = replay(step, objective, state, z, 5, branching=2)
    traced = len(traces)
    assert traced == 2  # the step, for itself and its VJP, and the objective
    second = replay(step, objective, state, {"shift": 2 * z["shift"]}, 7, branching=3, objective_steps=(3, 7))
    assert len(traces) == traced
    assert float(first.value) != float(second.value)


@pytest.mark.parametrize(
    ("num_steps", "branching", "message"),
    [
        (0, 2, "num_steps: got 0"),
        (-1, 2, "num_steps: got -1"),
        (3, 1, "branching: got 1"),
        (3.0, 2, r"num_steps: got 3\.0, expected an integer >= 1"),
        (30, 30**0.5, r"branching: got 5\.47\d*, expected an integer >= 2"),
    ],
)
def test_replay_rejects_bad_numbers(num_steps, branching, message):
    with pytest.raises(ValueError, match=message):
        replay(toy_step, toy_objective, *toy(), num_steps, branching=branching)


@jax.tree_util.register_dataclass
@dataclass
class Model:
    """A pytree that can be called, as Equinox's modules are."""

    w: jax.Array

    def __call__(self, x):
        return jnp.tanh(self.w * x)


def test_replay_takes_a_pytree_that_can_be_called_for_a_state():
    """As a state and not as a function that makes one; s[0] does not depend on the metaparameters."""
    step, objective = (lambda model, z, t: Model(model.w + model(z))), (lambda model, z: (model(1.0).sum(), ()))
    state, z = Model(jnp.array([0.1, 0.2])), jnp.array([0.3, -0.4])
    found = replay(step, objective, state, z, 5, branching=2)
    assert relative_error(found.gradient, jax.grad(unrolled(step, objective, state, 5))(z)) < 1e-5
    begun = replay(step, objective, lambda z: Model(z), z, 5, branching=2)
    assert float(begun.value) != float(found.value)


@pytest.mark.parametrize("storage", ["device", "host", "disk"])
def test_replay_carries_numbers_of_four_bits(tmp_path, storage):
    """In a leaf that changes, repeated, put away, and written to a checkpoint."""

    def step(state, z, t):
        return {"w": state["w"] * z + state["q"].astype(jnp.float32), "q": -state["q"]}

    args = (step, lambda s, z: (s["w"], s["q"]), {"w": jnp.float32(1), "q": jnp.array(3, jnp.int4)}, jnp.float32(0.5))
    keep = {"device": lambda: None, "host": Host, "disk": lambda: Disk(tmp_path / "spill")}[storage]()
    expected = jax.grad(unrolled(*args[:3], 9))(args[3])
    looks = iter([False] * 12 + [True])
    options = {"branching": 2, "storage": keep, "checkpoint": tmp_path / "replay"}
    with pytest.raises(Stopped):
        replay(*args, 9, **options, should_stop=lambda: next(looks))
    found = replay(*args, 9, **options)
    assert float(found.gradient) == pytest.approx(float(expected), rel=1e-5)
    assert (found.aux.dtype, int(found.aux)) == (jnp.int4, -3)


@pytest.mark.parametrize("branching", [2, 1000])
def test_replay_keeps_no_array_of_a_step(branching):
    """Memory: checksums that have been looked at are numbers; a JAX array for each took 4 kB of the host."""
    counts = []

    def look(phase, t):
        if t % 50 == 0:
            counts.append(sum(x.dtype == jnp.uint32 for x in jax.live_arrays()))

    one = jnp.float32(1)
    look("before", 0)  # what other tests have left
    replay(lambda s, z, t: s * z, lambda s, z: (s, ()), one, one, 1000, branching=branching, on_step=look)
    assert len(counts) > 20
    assert max(counts) <= counts[0] + LOOK_EVERY


def test_replay_names_the_step_that_diverged():
    def step(state, z, t):
        return state * jnp.where(t == 3, jnp.inf, 1.0) * z

    with pytest.raises(FloatingPointError, match="not finite after step 3 of 6"):
        replay(step, lambda s, z: (s, ()), jnp.float32(1), jnp.float32(1), 6, branching=2)


def test_replay_tells_a_diverged_objective_or_gradient_from_a_diverged_state():
    one = jnp.float32(1)
    with pytest.raises(FloatingPointError, match="the objective is not finite although the state after all 4 steps"):
        replay(lambda s, z, t: s * z, lambda s, z: (jnp.log(s - 1), ()), one, one, 4, branching=2)
    on_the_way = {"branching": 2, "objective_steps": (2, 4)}
    with pytest.raises(FloatingPointError, match="the objective is not finite although the state after 2 of 4 steps"):
        replay(lambda s, z, t: s + z, lambda s, z: (jnp.log(s - 3.5), ()), one, one, 4, **on_the_way)
    with pytest.raises(FloatingPointError, match="the metagradient is not finite although the objective is"):
        replay(lambda s, z, t: jnp.sqrt(z - 1), lambda s, z: (s, ()), one, one, 4, branching=2)


def test_replay_refuses_what_it_cannot_differentiate():
    step, objective = (lambda s, z, t: s + z), (lambda s, z: (s, s))
    with pytest.raises(ValueError, match="metaparams: got no floating-point leaf"):
        replay(step, objective, jnp.float32(0), jnp.int32(1), 3, branching=2)
    with pytest.raises(ValueError, match="state: got no floating-point leaf"):
        replay(lambda s, z, t: s, lambda s, z: (z, s), jnp.int32(0), jnp.float32(1), 3, branching=2)
    with pytest.raises(ValueError, match=r"objective_fn: got no pair, expected it to return \(scalar, aux\)"):
        replay(step, lambda s, z: s, jnp.float32(0), jnp.float32(1), 3, branching=2)


def network_loss(weights, x, targets, example_weights):
    """Weighted cross-entropy with soft targets of a small smooth network."""
    logits = jnp.tanh(x @ weights["hidden"]) @ weights["out"]
    return (example_weights * optax.softmax_cross_entropy(logits, targets)).mean()


OPTIMIZERS = {
    "momentum": optax.sgd(1.0, momentum=0.9, nesterov=True),
    "adam": optax.adam(0.3, eps_root=1e-8),
    "clipped_adamw": optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.3, eps_root=1e-8, weight_decay=0.01)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_replay_by_every_kind_of_metaparameter_equals_finite_differences(name):
    """Pixels, example weights, label logits, a learning-rate schedule, initial weights; float64, Optax inside."""
    optimizer, steps = OPTIMIZERS[name], 7

    def initial(z):
        return {"params": z["weights"], "optimizer": optimizer.init(z["weights"])}

    def step(state, z, t):
        rows = (5 * t + jnp.arange(4)) % 8
        batch = z["pixels"][rows], jax.nn.softmax(z["labels"][rows]), jax.nn.softplus(z["example_weights"][rows])
        gradient = gradients.mean_gradient(network_loss, state["params"], *batch)
        updates, opt_state = optimizer.update(gradient, state["optimizer"], state["params"])
        scaled = jax.tree.map(lambda u: z["schedule"][t] * u, updates)
        return {"params": optax.apply_updates(state["params"], scaled), "optimizer": opt_state}

    def objective(state, z):
        return network_loss(state["params"], z["pixels"][:3] ** 2, jnp.eye(2)[jnp.array([0, 1, 1])], jnp.ones(3)), ()

    rng = np.random.default_rng(1)
    shapes = {"pixels": (8, 3), "labels": (8, 2), "example_weights": (8,)}
    with jax.enable_x64(True):
        z = {key: jnp.asarray(rng.normal(size=shape)) for key, shape in shapes.items()}
        z["schedule"] = jnp.linspace(0.5, 0.1, steps)
        z["weights"] = {"hidden": jnp.asarray(rng.normal(size=(3, 4))), "out": jnp.asarray(rng.normal(size=(4, 2)))}
        found = replay(step, objective, initial, z, steps, branching=2).gradient

        @jax.jit
        def function(z):
            state = initial(z)
            for t in range(steps):
                state = step(state, z, t)
            return objective(state, z)[0]

        leaves, structure = jax.tree.flatten(z)
        for i, gradient in enumerate(jax.tree.leaves(found)):
            direction = jnp.asarray(rng.normal(size=gradient.shape))
            ahead, behind = (
                jax.tree.unflatten(structure, [*leaves[:i], leaves[i] + h * direction, *leaves[i + 1 :]])
                for h in (1e-5, -1e-5)
            )
            expected = float(function(ahead) - function(behind)) / 2e-5
            assert abs(expected) > 1e-4
            assert float(jnp.vdot(gradient, direction)) == pytest.approx(expected, rel=1e-5)


def test_replay_says_where_adam_falls():
    """Trap 12: with epsilon outside the square root only, a zero gradient has a derivative of infinity times zero."""

    def run(optimizer):
        def step(state, z, t):
            updates, opt_state = optimizer.update(z * jnp.array([1.0, 0.0]), state["optimizer"])
            return {"w": optax.apply_updates(state["w"], updates), "optimizer": opt_state}

        state = {"w": jnp.zeros(2), "optimizer": optimizer.init(jnp.zeros(2))}
        return replay(step, lambda s, z: (s["w"].sum(), ()), state, jnp.float32(2), 3, branching=2)

    with pytest.raises(FloatingPointError, match="Optax's Adam needs eps_root > 0"):
        run(optax.adam(0.1))
    assert np.isfinite(run(optax.adam(0.1, eps_root=1e-8)).gradient)


def test_replay_of_a_state_from_metaparameters_differentiates_what_stays_constant():
    """A part of s[0] that no step changes, but the objective reads, and a part that neither does."""
    z = {"w": jnp.float32(2.0), "target": jnp.float32(0.5)}
    result = replay(
        lambda s, z, t: {**s, "w": 0.5 * s["w"]},
        lambda s, z: (s["w"] * s["target"] ** 2, ()),
        lambda z: {"w": z["w"] ** 2, "target": 3 * z["target"], "count": jnp.int32(0)},
        z,
        3,
        branching=2,
    )
    assert float(result.value) == pytest.approx(0.125 * 4 * 1.5**2)
    assert float(result.gradient["w"]) == pytest.approx(0.125 * 4 * 1.5**2)  # d(w^2) = 2 w = 4
    assert float(result.gradient["target"]) == pytest.approx(0.125 * 4 * 2 * 1.5 * 3)


def test_replay_leaves_nothing_in_a_storage_after_an_error(tmp_path):
    def stop(phase, t):
        if (phase, t) == ("backward", 6):
            raise KeyboardInterrupt

    state, z = toy()
    storage = Disk(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        replay(toy_step, toy_objective, state, z, 9, branching=9, storage=storage, on_step=stop)
    assert list(tmp_path.iterdir()) == []
    expected = replay(toy_step, toy_objective, state, z, 9, branching=9).gradient["shift"]
    found = replay(toy_step, toy_objective, state, z, 9, branching=9, storage=storage).gradient["shift"]
    assert found.tobytes() == expected.tobytes()


def backends():
    """A parameter for each backend that a test would like to see."""
    return [pytest.param("cpu"), pytest.param("gpu", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("backend", backends())
def test_replay_recomputes_the_same_bits(backend):
    """Guarantee, of a convolutional network's real training; the replay itself compares each repeated step."""
    try:
        device = jax.devices(backend)[0]
    except RuntimeError as error:
        pytest.skip(str(error))
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, size=(40, 8, 8, 1), dtype=np.uint8), rng.integers(0, 3, size=40)
    with jax.default_device(device):
        table = families.make("random", images, labels, num_canaries=6, num_classes=3, seed=0)
        pool = runs.Pool.make(images, labels, table.source_index, table.label)
        model = models.build("convnet", num_classes=3, widths=[4], as_matmul=False)
        recipe = SGD(num_steps=9, batch_size=8, learning_rate=0.1, momentum=0.9)
        state = steps.sgd_state(recipe, model, pool, INCLUDED, seed=3) | {"included": jnp.asarray(INCLUDED)}
        objective_fn = optimization._objective_fn(SmoothAUROC(temperature=1.0), recipe, model)
        results = [
            replay(steps.sgd_step(recipe, model), objective_fn, state, jnp.asarray(table.images), 9, branching=k)
            for k in (2, 9)
        ]
    assert results[0].gradient.tobytes() == results[1].gradient.tobytes()
    assert float(jnp.abs(results[0].gradient).max()) > 0


@pytest.mark.parametrize(("branching", "parts"), [(2, True), (4, True), (12, False)])
def test_replay_refuses_a_step_that_is_not_deterministic(branching, parts):
    """From its second run on, step 4 of 12 gives other bits; stored states are not recomputed, nor does it part."""
    runs = []

    def noise(t):
        runs.append(int(t))
        return np.float32(1e-7 if t == 4 and runs.count(4) > 1 else 0)

    def step(state, z, t):
        return state * z + jax.pure_callback(noise, jax.ShapeDtypeStruct((), jnp.float32), jax.lax.stop_gradient(t))

    def run():
        return replay(step, lambda s, z: (s, ()), jnp.float32(1), jnp.float32(0.9), 12, branching=branching)

    if parts:
        with pytest.raises(NotDeterministicError, match="step 4 of 12 gave other bits when it was repeated"):
            run()
    else:
        assert np.isfinite(run().value)


def test_replay_sums_the_gradient_of_bfloat16_in_float32():
    """2,000 shares of 0.001, whose sum stops growing at 0.5 in bfloat16."""
    z = jnp.bfloat16(1)
    step = lambda s, z, t: s + 0.001 * z.astype(jnp.float32)  # noqa: E731
    found = replay(step, lambda s, z: (s, ()), jnp.float32(0), z, 2000, branching=50).gradient
    assert found.dtype == jnp.bfloat16
    assert float(found) == pytest.approx(2.0, rel=1e-2)


def test_replay_says_that_it_began_with_numbers_that_are_not_finite():
    with pytest.raises(FloatingPointError, match="neither are the initial state and the metaparameters"):
        replay(lambda s, z, t: s * z, lambda s, z: (s, ()), jnp.float32(jnp.nan), jnp.float32(1), 3, branching=2)


def test_replay_traces_a_step_once():
    """So that what Python draws in it, which it should not, is the same in the step and in its VJP."""
    rng, traces = np.random.default_rng(0), []

    def step(state, z, t):
        traces.append(t)
        return jnp.tanh(state + z * rng.normal())

    def run(z):
        return replay(step, lambda s, z: (s, ()), jnp.float32(0.1), jnp.float32(z), 4, branching=2)

    gradient, ahead, behind = float(run(0.3).gradient), float(run(0.301).value), float(run(0.299).value)
    assert len(traces) == 1
    assert gradient == pytest.approx((ahead - behind) / 0.002, rel=1e-2)


def test_replay_looks_at_repeated_steps_on_its_way():
    """Not only at the end: of 1,000 steps it stops within 64 repeated ones of the one that parted."""
    runs, repeated = [], 0

    def noise(t):
        runs.append(int(t))
        return np.float32(1e-3 if runs.count(int(t)) > 1 else 0)

    def step(state, z, t):
        return state * z + jax.pure_callback(noise, jax.ShapeDtypeStruct((), jnp.float32), jax.lax.stop_gradient(t))

    def look(phase, t):
        nonlocal repeated
        repeated += phase == "forward"

    one = jnp.float32(1)
    with pytest.raises(NotDeterministicError, match="gave other bits"):
        replay(step, lambda s, z: (s, ()), one, one, 300, branching=20, on_step=look)
    assert 300 < repeated <= 300 + 64


def test_measure_counts_the_objectives_memory():
    """A validation set that is larger than the step's batch."""
    state = {"w": jnp.ones((100, 10))}
    data = jnp.ones((20_000, 100))
    small = lambda s, z: ((s["w"] ** 2).sum(), ())  # noqa: E731
    large = lambda s, z: (jnp.square(jnp.tanh(data @ s["w"])).sum(), ())  # noqa: E731
    step = lambda s, z, t: {"w": s["w"] * z}  # noqa: E731
    least, most = (measure(step, f, state, jnp.float32(1), repeats=1).working_bytes for f in (small, large))
    assert most > least + 20_000 * 10 * 4


def test_measure_counts_what_is_beside_a_second_objective():
    """The adjoint and the gradient, 8 and 16 kB."""
    state, z = {"w": jnp.ones(2000)}, jnp.ones(4000)
    step = lambda s, z, t: {"w": s["w"] * z[:2000]}  # noqa: E731
    large = lambda s, z: (jnp.square(jnp.tanh(jnp.outer(s["w"], z[:100]))).sum(), ())  # noqa: E731
    once, twice = (
        measure(step, large, state, z, repeats=1, objective_steps=steps).working_bytes for steps in ((5,), (2, 5))
    )
    assert 24_000 <= twice - once <= 24_100


def test_measure_finds_the_costs_that_a_plan_needs(tmp_path):
    """Bytes are those of what changes: 100 float32 and a count; not of the constant images."""
    state = {"w": jnp.ones(100), "count": jnp.int32(0), "images": jnp.zeros((1000, 8))}

    def step(state, z, t):
        w = jnp.tanh(state["w"] * z + state["images"][t].sum())
        return {**state, "w": w, "count": state["count"] + 1}

    storages = [Host(), Disk(tmp_path)]
    costs = measure(step, lambda s, z: (s["w"].sum(), ()), state, jnp.float32(1), storages=storages)
    assert costs.state_bytes == 404
    assert costs.working_bytes > 404 + 32_000
    assert 0 < costs.step_seconds < 1
    assert 0 < costs.vjp_seconds < 1
    assert set(costs.transfer_seconds) == {"host", "disk"}
    assert min(costs.transfer_seconds.values()) > 0
    budget = costs.working_bytes + 20 * 404
    assert plan(1000, costs, {"device": budget}).states_held <= 20
    assert list(tmp_path.iterdir()) == []


GUIDE = (Path(__file__).parent.parent / "docs" / "metagradients.md").read_text(encoding="utf-8")


def test_guide_example_finds_mislabelled_digits(capsys):
    """Thirty lines that run as they stand."""
    example = re.search(r"```python\n(.*?)```", GUIDE, re.DOTALL)[1]
    assert len(example.splitlines()) <= 30
    exec(compile(example, "docs/metagradients.md", "exec"), {})
    share = int(re.search(r"(\d+)% of the 100 most harmful examples are mislabelled", capsys.readouterr().out)[1])
    assert share > 50  # by chance 10
    assert abs(share - int(re.search(r"`(\d+)% of the 100 most harmful", GUIDE)[1])) <= 3  # what the guide says


def test_guide_counts_states_and_steps_as_they_are():
    rows = re.findall(r"^\| (2|8|ceil\(sqrt\(T\)\)|T or more) \|.*\| (.*) \| (.*) \|$", GUIDE, re.MULTILINE)
    assert len(rows) == 4
    for name, *cells in rows:
        for num_steps, cell in zip((600, 10_000), cells, strict=True):
            sqrt = {"ceil(sqrt(T))": math.isqrt(num_steps - 1) + 1, "T or more": num_steps}
            found = work(num_steps, sqrt.get(name) or int(name))
            assert cell == f"{found.states_held} states, {found.step_calls / num_steps:.2f} trainings"


class Watched(Device):
    """Storage on the device that notes whether each state that it is given has been computed."""

    def __init__(self):
        super().__init__()
        self.ready = []

    def hold(self, t, state):
        self.ready.append(all(x.is_ready() for x in state))
        super().hold(t, state)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="GPUs share the temporaries of calls that follow each other")
def test_replay_computes_one_call_at_a_time_on_a_cpu():
    """Guarantee: no two calls have their temporaries at once. A step takes milliseconds, a call to it far less."""

    def step(state, z, t):
        return jax.lax.fori_loop(0, 200, lambda i, s: jnp.tanh(s @ s) * z, state)

    storage = Watched()
    replay(step, lambda s, z: (s.sum(), ()), jnp.eye(128), 0.5, 6, branching=6, storage=storage)
    assert len(storage.ready) == 6
    assert all(storage.ready)
