"""The check of a user's own gradient passes where it is right and fails where a path is cut."""

import jax
import jax.numpy as jnp
import optax
import pytest
from test_metagradient import Model

from metacanary.gradient_check import check_gradient

OPTIMIZER = optax.adam(0.1, eps_root=1e-8)


def step(state, z, t, cut=lambda x: x):
    gradient = 2 * (state["w"] - cut(z["target"])) * z["weights"] + 0.1 * jax.random.normal(state["key"], (3,))
    updates, optimizer = OPTIMIZER.update(gradient, state["optimizer"])
    return {**state, "w": optax.apply_updates(state["w"], updates), "optimizer": optimizer}


def objective(state, z):
    return jnp.sum(jnp.sin(state["w"])), ()


def begin(z):
    return {"w": z["start"] ** 2, "optimizer": OPTIMIZER.init(jnp.zeros(3)), "key": jax.random.key(0)}


Z = {
    "target": jnp.array([1.0, -1.0, 0.5]),
    "weights": jnp.array([1.0, 2.0, 0.3]),
    "start": jnp.array([0.3, 0.4, 0.5]),
    "rows": jnp.arange(3),
}


@pytest.mark.parametrize("state", [begin, begin(Z)], ids=["from metaparams", "fixed"])
def test_check_gradient_agrees_to_the_accuracy_of_float64(state):
    for seed in range(3):
        found = check_gradient(step, objective, state, Z, 12, seed=seed)
        assert abs(found.difference) > 1e-3
        assert found.relative_error < 1e-6


def test_check_gradient_finds_a_path_that_is_cut():
    def cut(state, z, t):
        return step(state, z, t, cut=jax.lax.stop_gradient)

    assert check_gradient(cut, objective, begin, Z, 12).relative_error > 1e-2


def test_check_gradient_leaves_its_arguments_and_the_setting_alone():
    check_gradient(step, objective, begin, Z, 3)
    assert Z["target"].dtype == jnp.float32
    assert jnp.asarray(1.0).dtype == jnp.float32


def test_check_gradient_takes_a_pytree_that_can_be_called_for_a_state():
    found = check_gradient(
        lambda model, z, t: Model(model.w + model(z)),
        lambda model, z: (model(1.0).sum(), ()),
        Model(jnp.array([0.1, 0.2])),
        jnp.array([0.3, -0.4]),
        5,
    )
    assert abs(found.difference) > 1e-3
    assert found.relative_error < 1e-6


def test_check_gradient_names_a_bad_argument():
    with pytest.raises(ValueError, match=r"num_steps: got 12\.0, expected an integer >= 1"):
        check_gradient(step, objective, begin, Z, 12.0)
    with pytest.raises(ValueError, match=r"metaparams\['name'\]: got str 'a', expected an array or a number"):
        check_gradient(step, objective, begin, Z | {"name": "a"}, 12)
    with pytest.raises(ValueError, match=r"state\['name'\]: got str 'a', expected an array or a number"):
        check_gradient(step, objective, begin(Z) | {"name": "a"}, Z, 12)


def test_check_gradient_of_nothing_is_no_error():
    found = check_gradient(lambda s, z, t: s, lambda s, z: (s.sum(), ()), jnp.ones(2), jnp.ones(2), 2)
    assert found == (0.0, 0.0, 0.0)
