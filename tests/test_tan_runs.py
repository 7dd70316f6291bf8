"""Runs without canaries: what they are trained on, how they are described, and what a kill leaves."""

import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from metacanary import accounting, models, tan, training
from metacanary.recipes import DPSGD
from metacanary.runs import Pool
from metacanary.tan_runs import COLUMNS, MEASURED, SETTINGS, choose, describe, split, train_runs

RECIPE = DPSGD(num_steps=6, sampling_prob=0.3, clip_norm=1.0, noise_multiplier=0.5, learning_rate=1.0, microbatch=8)
MODEL = models.build("convnet", num_classes=3, widths=(2,))


def make_images(num, seed=0):
    """Images of three classes, each bright in a row of its own."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(num) % 3).astype(np.int32)
    images = rng.integers(0, 60, (num, 6, 6, 1), dtype=np.uint8)
    images[np.arange(num), 2 * labels] += 150
    return images, labels


def run(recipe=RECIPE, seeds=(5, 6), **options):
    return list(train_runs(recipe, MODEL, *make_images(40), make_images(30, 1), seeds=seeds, **options))


def test_train_runs_train_without_canaries():
    """The same as `training.train` with none, and on all images: the expected batch is q N."""
    rows = run()
    assert [tuple(row) for row in rows] == [MEASURED] * 2
    assert [(row["run"], row["seed"]) for row in rows] == [(0, 5), (1, 6)]
    images, labels = make_images(40)
    pool = Pool.make(images, labels, np.zeros(0, int), np.zeros(0, int))
    assert len(pool.images) == 40
    params = training.train(
        RECIPE, MODEL, pool, np.zeros((0, 6, 6, 1), np.float32), np.zeros(0, bool), seed=6, snapshots=[6]
    )[6]
    assert rows[1]["accuracy"] == training.accuracy(MODEL, params, *make_images(30, 1))


def test_train_runs_learn():
    """Rows of pixels tell the classes apart: without noise they are learnt, with much noise they are not."""
    longer = replace(RECIPE, num_steps=40, learning_rate=2.0)
    assert run(replace(longer, noise_multiplier=0.0), seeds=[1])[0]["accuracy"] > 0.9
    assert run(replace(longer, noise_multiplier=50.0), seeds=[1])[0]["accuracy"] < 0.8


def test_train_runs_report_steps_and_seconds():
    seen = []
    rows = run(on_step=seen.append)
    assert seen == list(range(1, 13))
    assert all(row["seconds_per_step"] > 0 for row in rows)
    assert run(replace(RECIPE, num_steps=1), seeds=[5])[0]["seconds_per_step"] is None


class Interrupted(Exception):
    """What ends a run in its middle."""


def test_train_runs_go_on_after_a_kill(tmp_path):
    """In the second run; the first is not trained again, and accuracies are those of runs in one go."""

    def stop(done):
        if done == 9:
            raise Interrupted

    with pytest.raises(Interrupted):
        run(checkpoints=tmp_path, on_step=stop)
    assert [path.name for path in tmp_path.glob("*.json")] == ["run0.json"]
    seen = []
    resumed = run(checkpoints=tmp_path, on_step=seen.append)
    assert seen == list(range(7, 13))
    assert [row["accuracy"] for row in resumed] == [row["accuracy"] for row in run()]


def test_split_holds_out_as_many_of_every_class():
    labels = make_images(40)[1]
    trained, held_out = split(labels, 3, 9)
    assert np.bincount(labels[held_out]).tolist() == [3, 3, 3]
    assert sorted([*trained, *held_out]) == list(range(40))


@pytest.mark.parametrize("num_validation", [0, 40])
def test_split_rejects(num_validation):
    message = f"num_validation: got {num_validation}, expected 1 to 39 of 40"
    with pytest.raises(ValueError, match=re.escape(message)):
        split(make_images(40)[1], 3, num_validation)


def make_rows(*accuracies, num_gradients=100.0):
    return pd.DataFrame({"accuracy": accuracies, "num_gradients": num_gradients})


def test_choose_takes_the_highest_mean():
    assert choose([make_rows(0.9, 0.5), make_rows(0.71, 0.72), make_rows(0.6, 0.8)]) == 1


def test_choose_takes_the_cheapest_of_equals_then_the_first():
    dear, cheap = make_rows(0.5, 0.75, num_gradients=200.0), make_rows(0.75, 0.5)
    assert choose([dear, cheap, cheap]) == 1


@pytest.mark.parametrize("searched", [[], [make_rows()], [make_rows(0.5), make_rows(0.5, np.nan)]])
def test_choose_rejects(searched):
    with pytest.raises(ValueError, match=f"searched: got {len(searched)} settings, expected at least one"):
        choose(searched)


def test_describe_says_what_is_run_and_what_it_stands_for():
    """A simulation on fewer images: its own batch and noise, and the full run's total noise and epsilon."""
    reference = replace(RECIPE, noise_multiplier=3.0, num_steps=100)
    small = tan.simulate(reference, 20, num_examples=1000, num_simulated=800)
    sizes = {"full_batch": 300.0, "num_full": 1000, "num_trained": 800, "delta": 1e-5, "accountant": "pld"}
    found = describe(small, **sizes)
    assert tuple(found) == SETTINGS
    assert (*SETTINGS, *MEASURED) == COLUMNS
    assert found["batch_size"] == pytest.approx(20)
    assert found["sampling_prob"] == pytest.approx(20 / 800)
    assert found["noise_multiplier"] == pytest.approx(3 * 20 / 300)
    assert found["num_gradients"] == pytest.approx(20 * 100)
    assert found["eta"] == pytest.approx(tan.total_noise(3.0, 0.3, 100), rel=1e-12)
    assert found["epsilon_approximate"] == tan.approximate_epsilon(found["eta"], 1e-5)
    mechanism = {"num_steps": 100, "delta": 1e-5}
    exact = accounting.epsilon(noise_multiplier=3.0, sampling_prob=0.3, **mechanism)
    assert found["epsilon_full"] == pytest.approx(exact, rel=1e-6)
    own = accounting.epsilon(noise_multiplier=0.2, sampling_prob=0.025, accountant="rdp", **mechanism)
    assert found["epsilon_spent"] == pytest.approx(own, rel=1e-6)
    assert found["epsilon_spent"] > 10 * found["epsilon_full"]
