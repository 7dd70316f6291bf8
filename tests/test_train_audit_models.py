"""Blocks of runs that are trained in groups: the same runs as one after the other, whatever ends a job on the way."""

import functools
import sys
from pathlib import Path

import numpy as np
import pytest
from test_config import complete, read

from metacanary import data, store
from metacanary.interruption import Stopped

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "workflow" / "scripts"))

import _family  # noqa: E402
import _job  # noqa: E402
import _stages  # noqa: E402
import train_audit_models as script  # noqa: E402

CELLS = {"sgd": {"training": "sgd", "epsilon": "inf"}, "dpsgd": {"training": "dpsgd", "epsilon": "8"}}
NUM_STEPS = 4


@pytest.fixture(scope="module")
def dataset():
    rng = np.random.default_rng(0)
    splits = {
        f"{name}_{part}": values
        for name, n in (("train", 60), ("test", 20))
        for part, values in (
            ("images", rng.integers(0, 256, (n, 8, 8, 1), np.uint8)),
            ("labels", np.arange(n, dtype=np.int32) % 10),
        )
    }
    return data.Dataset(name="digits", **splits, class_names=tuple("0123456789"))


def settings_of(algorithm, together):
    """Five runs of four steps, two audited, one surrogate, two references, in groups of `together`."""
    config = read("tests/tiny.yaml")
    recipe = config["trainings"][algorithm]
    recipe |= {"game": "independent", "num_runs": 2, "block_size": 5, "snapshots": [2, NUM_STEPS]}
    recipe["runs_together"] = together
    recipe["options"] = recipe["options"] | {"num_steps": NUM_STEPS, "momentum": 0.9}
    if algorithm == "dpsgd":
        recipe["options"] |= {"sampling_prob": 0.3, "microbatch": 8}
    cell = {"dataset": "digits", "canary": "random", **CELLS[algorithm], "block": "0"}
    return _stages.Stages(complete(config)).settings("models", **cell)


@pytest.fixture
def block(dataset, tmp_path):
    """Trains a block whose checkpoints lie in a folder of that name."""

    def train(settings, folder, **options):
        inserted = _family.canaries_of("random", settings | {"num_canaries": 10, "seed": 1}, dataset)
        return script.train_block(settings, dataset, inserted, tmp_path / folder, **options)

    return train


def require_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize("algorithm", CELLS)
def test_block_in_groups_has_the_runs_of_series(block, monkeypatch, algorithm):
    """Coins, starts and noise bit by bit, parameters to 1e-5; what is left over of a block is a group of its own."""
    together, groups = script.training_together.train_together, []

    def counted(*args, seeds, **options):
        groups.append(len(seeds))
        return together(*args, seeds=seeds, **options)

    monkeypatch.setattr(script.training_together, "train_together", counted)
    series = block(settings_of(algorithm, 1), "series")
    assert groups == []
    found = block(settings_of(algorithm, 2), "groups")
    assert groups == [2, 2]
    assert found.keys() == series.keys()
    assert found["role"] == ["audited", "audited", "surrogate", "reference", "reference"]
    assert found["included"].any(axis=1).tolist() == [True, True, True, False, False]
    for name, array in series.items():
        if not name.startswith("params/"):
            np.testing.assert_array_equal(found[name], array, err_msg=name)
            continue
        assert array.shape[:2] == (5, 2)
        assert np.allclose(found[name], array, rtol=0, atol=1e-5 * np.abs(array).max())
        np.testing.assert_array_equal(found[name][4], array[4])
        for one in range(4):  # each is another run
            assert np.abs(array[one] - array[one + 1]).max() > 1e-3


@pytest.mark.parametrize(("algorithm", "stop_at"), [("sgd", 1), ("sgd", 4), ("sgd", 6), ("sgd", 9), ("dpsgd", 6)])
def test_block_in_groups_that_is_stopped_goes_on_to_the_same_models(block, tmp_path, algorithm, stop_at):
    """In the first group, at its end, in the second, in the last; asked after each step as by SIGTERM, long before
    a checkpoint is due. No step is taken twice, and finished groups are there whatever becomes of the others.
    """
    settings = settings_of(algorithm, 2)
    expected, asked = block(settings, "undisturbed"), []

    def should_stop():
        asked.append(1)
        return len(asked) == stop_at

    with pytest.raises(Stopped):
        block(settings, "stopped", should_stop=should_stop)
    finished = (stop_at - 1) // NUM_STEPS
    done = [*(["run0.npz", "run1.npz"] if finished else []), *(["run2.npz", "run3.npz"] if finished == 2 else [])]
    under_way = ["runs0-1-training.npz", "runs2-3-training.npz", "run4-training.npz"][finished]
    assert {path.name for path in (tmp_path / "stopped").iterdir()} == {*done, under_way}
    require_same(block(settings, "stopped", should_stop=should_stop), expected)
    assert len(asked) == 3 * NUM_STEPS


def test_block_in_series_that_is_stopped_goes_on_to_the_same_models(block, tmp_path):
    """In the middle of the second run, which has files of its own."""
    settings = settings_of("sgd", 1)
    expected, asked = block(settings, "undisturbed"), []

    def should_stop():
        asked.append(1)
        return len(asked) == 6

    with pytest.raises(Stopped):
        block(settings, "stopped", should_stop=should_stop)
    assert {path.name for path in (tmp_path / "stopped").iterdir()} == {"run0.npz", "run1-training.npz"}
    require_same(block(settings, "stopped", should_stop=should_stop), expected)
    assert len(asked) == 5 * NUM_STEPS


def test_block_in_groups_that_is_killed_goes_on_from_its_checkpoint(block, tmp_path, monkeypatch):
    """And one of whose files is lost is trained again with the others of its group: another group rounds otherwise."""
    settings = settings_of("sgd", 2)
    expected, steps = block(settings, "undisturbed"), []
    together = functools.partial(script.training_together.train_together, checkpoint_seconds=-1.0)
    advance = script.advance

    def killed(bar, reached, by):
        steps.append((reached, by))
        advance(bar, reached, by=by)
        if reached == 14:
            raise KeyboardInterrupt

    monkeypatch.setattr(script.training_together, "train_together", together)
    monkeypatch.setattr(script, "advance", killed)
    with pytest.raises(KeyboardInterrupt):
        block(settings, "killed")
    monkeypatch.setattr(script, "advance", lambda bar, reached, by: steps.append((reached, by)))
    require_same(block(settings, "killed"), expected)
    assert steps == [*((2 * done, 2) for done in range(1, 9)), *((16 + done, 1) for done in range(1, 5))]
    for path in tmp_path.glob("killed/*-training.npz"):
        path.unlink()
    (tmp_path / "killed/run3.npz").unlink()
    steps.clear()
    require_same(block(settings, "killed"), expected)
    assert steps == [(8 + 2 * done, 2) for done in range(1, 5)]


def test_group_that_diverges_leaves_what_is_finished(block, tmp_path, monkeypatch):
    """Runs 2 and 3; those before it are there, and the message names the seed."""
    settings, start = settings_of("sgd", 2), script.pretraining.start

    def spoiled(model, pretrained, names, *, key, image_shape):
        params = start(model, pretrained, names, key=key, image_shape=image_shape)
        is_third = (key == script.runs.stream(settings["seeds"][2], "init")).all()
        return script.jax.tree.map(lambda x: x + 1e38, params) if is_third else params

    monkeypatch.setattr(script.pretraining, "start", spoiled)
    with pytest.raises(FloatingPointError) as error:
        block(settings, "diverges")
    message = f"parameters of seed {settings['seeds'][2]} are not finite after step 1 of {NUM_STEPS}: lower"
    assert str(error.value).startswith(message)
    assert {path.name for path in (tmp_path / "diverges").glob("run*.npz")} == {"run0.npz", "run1.npz"}


def test_advance_counts_the_steps_of_all_runs_of_a_group(capsys):
    """Of three runs that go on after their second step of four: what was done before has no part in the rate."""
    with _job.progress(24, "step", "train", initial=12) as bar:
        for done in (3, 4):
            _job.advance(bar, 12 + 3 * done, by=3)
    assert (bar.n, bar.initial) == (24, 18)
    assert capsys.readouterr().out == "train: 6 of 24 steps done in this attempt\n"


def test_files_of_finished_runs_are_those_of_series(block, tmp_path):
    """One for each run, with the same arrays."""
    block(settings_of("sgd", 1), "series")
    block(settings_of("sgd", 5), "groups")
    for run in range(5):
        series, groups = (store.read_npz(tmp_path / name / f"run{run}.npz")[0] for name in ("series", "groups"))
        assert {k: (v.shape, v.dtype) for k, v in series.items()} == {k: (v.shape, v.dtype) for k, v in groups.items()}
