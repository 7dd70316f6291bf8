"""Replay: equal to plain differentiation and to finite differences, within its memory and work, in this very order."""

import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metacanary import families, metagradient, models, optimization, training
from metacanary.metagradient import replay
from metacanary.objectives import SmoothAUROC
from metacanary.recipes import SGD, Schedule

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


def unrolled(step_fn, objective_fn, state, num_steps):
    """The objective as a plain function of z."""

    def function(z):
        end = jax.lax.scan(lambda s, t: (step_fn(s, z, t), None), state, jnp.arange(num_steps, dtype=jnp.int32))[0]
        return objective_fn(end, z)[0]

    return function


def relative_error(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def depth_of(num_steps, branching):
    """max(1, ceil(log_branching(num_steps))) in integers."""
    return next(d for d in itertools.count(1) if branching**d >= num_steps)


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
    pool = training.Pool.make(images, labels, table.source_index, table.label)
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
    step_fn = training.sgd_step(recipe, model)
    objective_fn = optimization._objective_fn(SmoothAUROC(temperature=1.0), model)
    state = training.sgd_state(recipe, model, pool, INCLUDED, seed=3) | {"included": jnp.asarray(INCLUDED)}

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


def test_replay_gives_the_same_bits_for_every_branching():
    state, z = toy()
    results = [replay(toy_step, toy_objective, state, z, 11, branching=k) for k in (2, 3, 8, 11, 50)]
    expected = results[0].gradient["shift"]
    assert np.abs(expected).max() > 0.1
    for result in results:
        assert result.gradient["shift"].tobytes() == expected.tobytes()
        assert (result.value, result.aux.tobytes()) == (results[0].value, results[0].aux.tobytes())


class Tracked:
    """A state that counts how many of its kind are alive."""

    alive = peak = 0

    def __init__(self, t):
        self.t = t
        Tracked.alive += 1
        Tracked.peak = max(Tracked.peak, Tracked.alive)

    def __del__(self):
        Tracked.alive -= 1


@pytest.fixture
def counted(monkeypatch):
    """Replaces the compiled functions by ones that only count, check the order and make `Tracked` states."""
    calls = {"step": 0, "vjp": []}

    def step(step_fn, state, metaparams, t):
        assert state.t == t
        calls["step"] += 1
        return Tracked(state.t + 1)

    def step_vjp(step_fn, state, metaparams, t, adjoint, gradient):
        assert state.t == t
        calls["vjp"].append(state.t)
        return adjoint, gradient

    monkeypatch.setattr(metagradient, "_step", step)
    monkeypatch.setattr(metagradient, "_step_vjp", step_vjp)
    monkeypatch.setattr(metagradient, "_objective", lambda f, s, z: (np.float32(s.t), None, None, None))
    Tracked.alive = Tracked.peak = 0
    return calls


@pytest.mark.parametrize("branching", [2, 4, 10])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 64, 100, 1000])
def test_replay_memory_and_work(counted, num_steps, branching):
    """Guarantees: states alive, the caller's s[0] among them, and step calls; every VJP once and backwards."""
    result = replay(None, None, Tracked(0), None, num_steps, branching=branching)
    depth = depth_of(num_steps, branching)
    assert result.value == num_steps
    assert counted["vjp"] == list(reversed(range(num_steps)))
    assert num_steps <= counted["step"] <= num_steps * depth
    assert min(num_steps, branching) <= Tracked.peak <= 1 + branching * depth
    assert Tracked.alive == 0


@pytest.mark.parametrize(("num_steps", "branching"), [(64, 64), (7, 1000)])
def test_replay_with_enough_memory_recomputes_nothing(counted, num_steps, branching):
    replay(None, None, Tracked(0), None, num_steps, branching=branching)
    assert (counted["step"], Tracked.peak) == (num_steps, num_steps + 1)


@pytest.mark.parametrize(
    ("num_steps", "branching", "expected"),
    [
        (8, 2, "f0 f1 f2 f3 f4 f5 f6 f7 | f4 f5 f6 b7 b6 | f4 b5 b4 | f0 f1 f2 b3 b2 | f0 b1 b0"),  # held: s0, s4
        (7, 3, "f0 f1 f2 f3 f4 f5 f6 | b6 | f3 f4 b5 b4 b3 | f0 f1 b2 b1 b0"),  # held: s0, s3, s6
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
    assert traced >= 3  # step, its VJP, the objective
    second = replay(step, objective, state, {"shift": 2 * z["shift"]}, 7, branching=3)
    assert len(traces) == traced
    assert float(first.value) != float(second.value)


@pytest.mark.parametrize(
    ("num_steps", "branching", "message"),
    [(0, 2, "num_steps: got 0"), (-1, 2, "num_steps: got -1"), (3, 1, "branching: got 1")],
)
def test_replay_rejects_bad_numbers(num_steps, branching, message):
    with pytest.raises(ValueError, match=message):
        replay(toy_step, toy_objective, *toy(), num_steps, branching=branching)


def test_replay_names_the_step_that_diverged():
    def step(state, z, t):
        return state * jnp.where(t == 3, jnp.inf, 1.0) * z

    with pytest.raises(FloatingPointError, match="not finite after step 3 of 6"):
        replay(step, lambda s, z: (s, ()), jnp.float32(1), jnp.float32(1), 6, branching=2)


def test_replay_tells_a_diverged_objective_or_gradient_from_a_diverged_state():
    one = jnp.float32(1)
    with pytest.raises(FloatingPointError, match="the objective is not finite although the state after all 4 steps"):
        replay(lambda s, z, t: s * z, lambda s, z: (jnp.log(s - 1), ()), one, one, 4, branching=2)
    with pytest.raises(FloatingPointError, match="the metagradient is not finite although the objective is"):
        replay(lambda s, z, t: jnp.sqrt(z - 1), lambda s, z: (s, ()), one, one, 4, branching=2)


def test_replay_refuses_what_it_cannot_differentiate():
    step, objective = (lambda s, z, t: s + z), (lambda s, z: (s, s))
    with pytest.raises(ValueError, match="metaparams: got no floating-point leaf"):
        replay(step, objective, jnp.float32(0), jnp.int32(1), 3, branching=2)
    with pytest.raises(ValueError, match="state: got no floating-point leaf"):
        replay(lambda s, z, t: s, lambda s, z: (z, s), jnp.int32(0), jnp.float32(1), 3, branching=2)
    with pytest.raises(ValueError, match=r"objective_fn: got \w+, expected it to return \(scalar, aux\)"):
        replay(step, lambda s, z: s, jnp.float32(0), jnp.float32(1), 3, branching=2)
