"""Metasmoothness: its definition by closed forms and by hand, what it does not depend on, and what it refuses."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from metacanary import families, metasmoothness, runs, training
from metacanary.metasmoothness import metasmoothness as measure
from metacanary.metasmoothness import of_canaries, of_trained, random_signs, relative_change
from metacanary.models import build
from metacanary.recipes import DPSGD, SGD


def rng():
    return np.random.default_rng(0)


def test_metasmoothness_of_a_linear_training_is_one():
    """Several leaves of parameters and of metaparameters, and a Python number."""
    a, b = rng().normal(size=(2, 5, 3))

    def train_fn(z):
        return {"w": a @ z["x"], "b": [b @ z["x"] - z["y"], 3 * z["y"]]}

    z, v = {"x": np.ones(3), "y": 0.5}, {"x": rng().normal(size=3), "y": -1.0}
    assert measure(train_fn, z, v, 0.1) == 1.0


@pytest.mark.parametrize(("minimum", "expected"), [(-0.5, 1.0), (0.75, -1.0), (1.25, -1.0), (2.5, 1.0)])
def test_metasmoothness_of_a_parabola_is_known(minimum, expected):
    """theta = (z - minimum)^2 on the way from 0 by 1 to 2: it turns back where the minimum lies on the way."""
    assert measure(lambda z: (z - minimum) ** 2, 0.0, 1.0, 1.0) == expected


def test_metasmoothness_of_three_parameters_by_hand():
    """d = (3, 1, 1); the first goes on, the second turns back, the third stands still: (3 - 1 + 0) / 5."""
    path = {0.0: (0.0, 0.0, 0.0), 0.5: (1.0, 2.0, -1.0), 1.0: (3.0, 1.0, -1.0)}
    assert measure(lambda z: np.array(path[float(z)]), 0.0, 1.0, 0.5) == pytest.approx(0.4, abs=1e-15)


def test_metasmoothness_trains_at_z_and_one_and_two_steps():
    """In the dtype of z; leaves that are not floating point do not move."""
    seen = []

    def train_fn(z):
        seen.append(z)
        return z["x"]

    z = {"x": np.array([0.5, 1.0], np.float32), "labels": np.array([3, 4])}
    measure(train_fn, z, {"x": np.array([1.0, -1.0]), "labels": None}, 0.25)
    assert [np.asarray(at["x"]).tolist() for at in seen] == [[0.5, 1.0], [0.75, 0.75], [1.0, 0.5]]
    assert {at["x"].dtype for at in seen} == {np.dtype(np.float32)}
    assert all(at["labels"] is z["labels"] for at in seen)


def wiggly(z):
    """A training that is neither straight nor hopeless."""
    x = np.linspace(0.1, 3.0, 40)
    return {"a": np.sin(4 * x * z), "b": [z * x[:7], np.cos(5 * x * z) - x]}


@pytest.mark.parametrize(
    ("train_fn", "direction", "step"),
    [
        (wiggly, 0.5, 0.4),
        (wiggly, 2.0, 0.1),
        (lambda z: {name: scaled(tree, -3.0) for name, tree in wiggly(z).items()}, 1.0, 0.2),
        (lambda z: (wiggly(z)["b"][::-1], wiggly(z)["a"][::-1]), 1.0, 0.2),
        (lambda z: {**wiggly(z), "step": np.int32(100 * z), "done": z > 0.5}, 1.0, 0.2),
    ],
    ids=["short direction", "long direction", "scaled parameters", "another order", "leaves that are no parameters"],
)
def test_metasmoothness_does_not_depend_on(train_fn, direction, step):
    value = measure(wiggly, 0.3, 1.0, 0.2)
    assert -0.9 < value < 0.9
    assert measure(train_fn, 0.3, direction, step) == pytest.approx(value, abs=1e-12)


def scaled(tree, factor):
    return [factor * leaf for leaf in tree] if isinstance(tree, list) else factor * tree


def test_metasmoothness_lies_between_minus_one_and_one():
    """Of trained parameters at random, to the last bit; float32 parameters too."""
    for seed in range(200):
        a, b, c = np.random.default_rng(seed).normal(size=(3, 3)).astype(np.float32 if seed % 2 else np.float64)
        assert -1 <= of_trained(a, b, c) <= 1
        assert of_trained(a, (a + c) / 2, c) == 1


def test_of_trained_is_the_definition():
    """A naive twin in one line, on a tree of two leaves."""
    trees = rng().normal(size=(3, 30))
    a, b, c = trees
    d = np.abs(c - a)
    expected = np.sum(d / d.sum() * np.sign(b - a) * np.sign(c - b))
    assert of_trained(*([t[:11], {"x": t[11:]}] for t in trees)) == pytest.approx(expected, abs=1e-12)


def test_relative_change_is_the_distance_over_the_size():
    assert relative_change([np.array([1.0, -2.0])], [np.array([2.0, 0.0])]) == 1.0
    with pytest.raises(ValueError, match="zero everywhere"):
        relative_change(np.zeros(2), np.ones(2))


@pytest.mark.parametrize(
    ("metaparams", "direction", "step", "message"),
    [
        (1.0, 1.0, 0.0, "step: got 0.0, expected a finite number > 0"),
        (1.0, 1.0, float("nan"), "step: got nan"),
        ({"x": 1.0}, {"y": 1.0}, 1.0, "direction: got another tree than metaparams"),
        ([1.0, 2.0], [1.0], 1.0, "direction: got another tree than metaparams"),
        (np.ones(3), np.ones(2), 1.0, r"direction: got shape \(2,\), expected the shape of metaparams, \(3,\)"),
        ([1.0, 2.0], [1.0, None], 1.0, r"direction: got None, expected the shape of metaparams, \(\)"),
        ([1.0, 2], [1.0, 1.0], 1.0, "direction: got 1.0 where metaparams is not floating point, expected None"),
        (1.0, float("inf"), 1.0, "direction: got numbers that are not finite"),
        (np.ones(3), np.zeros(3), 1.0, "direction: got zeros alone"),
        ([2], [None], 1.0, "direction: got zeros alone"),
    ],
)
def test_metasmoothness_rejects(metaparams, direction, step, message):
    with pytest.raises(ValueError, match=message):
        measure(lambda z: z, metaparams, direction, step)


@pytest.mark.parametrize(
    ("train_fn", "error", "message"),
    [
        (lambda z: np.ones(3), ValueError, "theta_2h equals theta_0 everywhere"),
        (lambda z: np.arange(3), ValueError, "got no floating-point leaf"),
        (lambda z: [z] if z > 0 else [z, z], ValueError, "expected one and the same"),
        (lambda z: np.ones(2 if z > 0 else 3), ValueError, "expected one shape"),
        (lambda z: np.array([z, np.log(0.15 - z)]), FloatingPointError, "the training diverged"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_metasmoothness_refuses_trainings_that_say_nothing(train_fn, error, message):
    with pytest.raises(error, match=message):
        measure(train_fn, 0.0, 1.0, 0.1)


@pytest.fixture(scope="module")
def problem():
    """A data set at random, a small network and canaries."""
    images = rng().integers(0, 256, (60, 4, 4, 1), dtype=np.uint8)
    labels = rng().integers(0, 3, 60)
    start = families.make("mislabeled", images, labels, num_canaries=12, num_classes=3, seed=0)
    pool = runs.Pool.make(images, labels, start.source_index, start.label)
    return build("convnet", num_classes=3, widths=(4,)), pool, start


RECIPE = SGD(num_steps=4, batch_size=10, learning_rate=0.1)


def test_of_canaries_measures_the_definition_on_its_draws(problem):
    """A row per seed, each that of three trainings by hand; steps are counted."""
    model, pool, start = problem
    steps = []
    chosen = {"seeds": [5, 6], "game": "independent", "step": 0.05}
    rows = list(of_canaries(RECIPE, model, pool, start, **chosen, on_step=steps.append))
    assert steps == [1, 2, 3, 4] * 6
    for number, row in enumerate(rows):
        assert tuple(row) == metasmoothness.COLUMNS
        seed = chosen["seeds"][number]
        assert (row["direction"], row["seed"], row["step"]) == (number, seed, 0.05)

        def train_fn(pixels, seed=seed):
            included = runs.coins(seed, 12, "independent")
            return training.train(RECIPE, model, pool, pixels, included, seed=seed, snapshots=[4])[4]

        expected = measure(train_fn, start.images, random_signs(seed, start.images.shape), 0.05)
        assert row["metasmoothness"] == expected
        assert 0 < row["relative_change"] < 0.5
    assert rows[0]["metasmoothness"] != rows[1]["metasmoothness"]


def test_of_canaries_shares_all_randomness_within_a_direction(problem, monkeypatch):
    """Coins and seed are the same in its three trainings, others in the next; the pixels are not clipped."""
    model, pool, start = problem
    calls, train = [], training.train

    def recorded(recipe, model, pool, pixels, included, **options):
        calls.append((options["seed"], included.tolist(), pixels))
        return train(recipe, model, pool, pixels, included, **options)

    monkeypatch.setattr(training, "train", recorded)
    list(of_canaries(RECIPE, model, pool, start, seeds=[5, 6], game="paired", step=0.4))
    assert [seed for seed, _, _ in calls] == [5] * 3 + [6] * 3
    assert calls[0][1] == calls[1][1] == calls[2][1] != calls[3][1]
    assert calls[0][1][::2] == [not coin for coin in calls[0][1][1::2]]
    for place in (0, 3):
        first, middle, last = (pixels for _, _, pixels in calls[place : place + 3])
        np.testing.assert_array_equal(first, start.images)
        np.testing.assert_allclose(np.abs(middle - first), 0.4, atol=1e-6)
        np.testing.assert_allclose(last - middle, middle - first, atol=1e-6)
    assert min(pixels.min() for _, _, pixels in calls) < -0.5
    assert max(pixels.max() for _, _, pixels in calls) > 1.5


def test_of_canaries_draws_the_same_noise_within_a_direction(problem):
    """DP-SGD under heavy noise: a small change of the pixels is a small change of the parameters."""
    model, pool, start = problem
    noise = {"sampling_prob": 0.3, "clip_norm": 1.0, "noise_multiplier": 5.0}
    recipe = DPSGD(num_steps=3, learning_rate=0.5, **noise)
    rows = list(of_canaries(recipe, model, pool, start, seeds=[5, 6], game="independent", step=1e-3))
    assert all(0 < row["relative_change"] < 1e-2 for row in rows)
    assert rows[0]["relative_change"] != rows[1]["relative_change"]


def test_of_canaries_gives_the_same_bits_again(problem):
    model, pool, start = problem
    chosen = {"seeds": [7], "game": "independent", "step": 0.05}
    assert list(of_canaries(RECIPE, model, pool, start, **chosen)) == list(
        of_canaries(RECIPE, model, pool, start, **chosen)
    )


def test_random_signs_are_fair_and_of_their_seed():
    """Of 10,000 signs the mean is within 4 standard errors of 0."""
    signs = random_signs(3, (100, 10, 10, 1))
    assert set(np.unique(signs)) == {-1.0, 1.0}
    assert signs.dtype == np.float32
    assert abs(signs.mean()) < 0.04
    np.testing.assert_array_equal(signs, random_signs(3, (100, 10, 10, 1)))
    assert abs((signs * random_signs(4, signs.shape)).mean()) < 0.04


@pytest.mark.parametrize("column", metasmoothness.COLUMNS)
def test_columns_are_explained_in_the_docs(column):
    text = (Path(__file__).parent.parent / "docs" / "output.md").read_text(encoding="utf-8")
    assert f"`{column}`" in text.split("## Columns of metasmoothness")[1]


def test_metasmoothness_takes_jax_arrays():
    assert measure(lambda z: jnp.stack([z, z**2]), jnp.float32(1.0), jnp.float32(1.0), 0.1) == 1.0
