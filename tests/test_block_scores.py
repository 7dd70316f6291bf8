"""Tables of a block: scoring against one model at a time, copies of canaries, the population, the runs."""

from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from metacanary import augmentation
from metacanary.block_scores import SCORES, augmented_copies, population_block, run_table, score_block
from metacanary.recipes import Augmentation
from metacanary.scores import SCORES as PLAIN
from metacanary.scores import negative_loss


class TwoLayers(nn.Module):
    """Enough structure for nested parameter names."""

    @nn.compact
    def __call__(self, images):
        hidden = nn.relu(nn.Dense(5, name="hidden")(images.reshape(len(images), -1)))
        return nn.Dense(3, name="out")(hidden)


def make_canaries(num=6, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.random((num, 2, 2, 1)).astype(np.float32)
    return SimpleNamespace(id=np.arange(num), label=rng.integers(0, 3, size=num), images=images)


def make_block(canaries, num_runs=2, num_steps=3, seed=0):
    """Random snapshots of TwoLayers and the parameters as trees, by (run, step) and then the initial ones by run."""
    keys = jax.random.split(jax.random.key(seed), num_runs * (num_steps + 1))
    trees = [TwoLayers().init(key, canaries.images)["params"] for key in keys]
    arrays = {
        "run": np.arange(10, 10 + num_runs),
        "step": 5 * np.arange(1, 1 + num_steps),
        "canary_id": canaries.id.copy(),
        "included": np.random.default_rng(seed).random((num_runs, len(canaries.id))) < 0.5,
    }
    for layer in ("hidden", "out"):
        for leaf in ("kernel", "bias"):
            stacked = np.stack([tree[layer][leaf] for tree in trees])
            trained = stacked[: num_runs * num_steps]
            arrays[f"params/{layer}/{leaf}"] = trained.reshape(num_runs, num_steps, *stacked.shape[1:])
            arrays[f"initial/{layer}/{leaf}"] = stacked[num_runs * num_steps :]
    return arrays, trees


def test_score_block_equals_one_model_at_a_time():
    canaries = make_canaries()
    arrays, trees = make_block(canaries)
    frame = score_block(TwoLayers(), arrays, canaries)
    assert list(frame.columns) == ["run", "step", "canary_id", "included", "score", "value"]
    assert len(frame) == 2 * 3 * len(PLAIN) * 6
    by_cell = dict(iter(frame.groupby(["run", "step", "score"])))
    for i, run in enumerate(arrays["run"]):
        for j, step in enumerate(arrays["step"]):
            logits = TwoLayers().apply({"params": trees[3 * i + j]}, canaries.images)
            for name, score in PLAIN.items():
                rows = by_cell[run, step, name]
                assert rows["canary_id"].tolist() == canaries.id.tolist()
                assert rows["included"].tolist() == arrays["included"][i].astype(int).tolist()
                assert np.allclose(rows["value"], score(logits, canaries.label), rtol=1e-5)


def test_score_block_joins_by_id():
    """Guarantee: another order of canaries, or of the block's columns, changes the order of rows only."""
    canaries = make_canaries()
    arrays, _ = make_block(canaries)
    order = np.array([3, 0, 5, 1, 4, 2])
    shuffled = SimpleNamespace(id=canaries.id[order], label=canaries.label[order], images=canaries.images[order])
    columns = order[::-1]
    permuted = arrays | {
        "canary_id": arrays["canary_id"][columns],
        "included": arrays["included"][:, columns],
    }
    keys = ["run", "step", "score", "canary_id"]
    expected = score_block(TwoLayers(), arrays, canaries, names=SCORES).sort_values(keys, ignore_index=True)
    for block, table in [(arrays, shuffled), (permuted, canaries), (permuted, shuffled)]:
        frame = score_block(TwoLayers(), block, table, names=SCORES).sort_values(keys, ignore_index=True)
        pd.testing.assert_frame_equal(frame, expected, rtol=1e-5)


@pytest.mark.parametrize(("flip", "num_copies"), [(False, 9), (True, 18)])
def test_augmented_scores_are_means_over_copies(flip, num_copies):
    canaries = make_canaries()
    arrays, trees = make_block(canaries, num_runs=1, num_steps=2)
    names = ("augmented_logit_margin", "augmented_negative_loss")
    frame = score_block(TwoLayers(), arrays, canaries, names=names, flip=flip)
    assert frame["score"].drop_duplicates().tolist() == list(names)
    for tree, (_, rows) in zip(trees, frame.groupby("step"), strict=False):
        for name in names:
            expected = np.zeros(6)
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    copy = canaries.images[:, np.clip([dy, 1 + dy], 0, 1)][:, :, np.clip([dx, 1 + dx], 0, 1)]
                    for images in (copy, copy[:, :, ::-1])[: 1 + flip]:
                        logits = TwoLayers().apply({"params": tree}, images)
                        expected += PLAIN[name.removeprefix("augmented_")](logits, canaries.label) / num_copies
            np.testing.assert_allclose(rows.loc[rows["score"] == name, "value"], expected, rtol=1e-5)


@pytest.mark.parametrize(("shift", "num_copies"), [(1, 18), (2, 50)])
def test_augmented_copies_are_those_that_training_draws(shift, num_copies):
    """1,024 draws of equally likely copies: each is one of them, and none is left out (odds at most 50 e^-20)."""
    image = np.random.default_rng(0).random((4, 5, 2)).astype(np.float32)
    fixed = {copy[0].tobytes() for copy in augmented_copies(image[None], flip=True, shift=shift)}
    options = Augmentation(multiplicity=1024, flip=True, crop_padding=shift)
    drawn = np.asarray(augmentation.copies(options, jax.random.key(0), jnp.asarray(image)))
    assert len(fixed) == num_copies
    assert {copy.tobytes() for copy in drawn} == fixed
    assert image.tobytes() in fixed


def test_augmented_copies_without_shift_and_flip_are_the_images():
    images = make_canaries().images
    np.testing.assert_array_equal(augmented_copies(images, shift=0), images[None])


@pytest.mark.parametrize("shift", [-1, 3])
def test_augmented_copies_reject_a_shift_beyond_the_image(shift):
    with pytest.raises(ValueError, match=f"shift is {shift}, expected 0 to 2 pixels"):
        augmented_copies(make_canaries().images, shift=shift)


def test_relative_to_initial_subtracts_the_loss_of_the_runs_own_start():
    canaries = make_canaries()
    arrays, trees = make_block(canaries)
    frame = score_block(TwoLayers(), arrays, canaries, names=["relative_to_initial"])
    found = frame["value"].to_numpy().reshape(2, 3, 6)
    for i in range(2):
        for j in range(3):
            after, before = (
                TwoLayers().apply({"params": tree}, canaries.images) for tree in (trees[3 * i + j], trees[6 + i])
            )
            expected = negative_loss(after, canaries.label) - negative_loss(before, canaries.label)
            np.testing.assert_allclose(found[i, j], expected, rtol=1e-5, atol=1e-6)


def test_population_block_equals_one_model_at_a_time():
    rng = np.random.default_rng(3)
    images, labels = rng.integers(0, 256, size=(7, 2, 2, 1), dtype=np.uint8), rng.integers(0, 3, size=7)
    arrays, trees = make_block(make_canaries())
    found = population_block(TwoLayers(), arrays, images, labels)
    assert (found["run"].tolist(), found["step"].tolist()) == ([10, 11], [5, 10, 15])
    for i in range(2):
        for j in range(3):
            logits = TwoLayers().apply({"params": trees[3 * i + j]}, images / np.float32(255))
            expected = jax.nn.log_softmax(logits)[np.arange(7), labels]
            np.testing.assert_allclose(found["log_probability"][i, j], expected, rtol=1e-5, atol=1e-6)


def test_no_score_of_a_block_looks_at_the_coins():
    canaries = make_canaries()
    arrays, _ = make_block(canaries)
    turned = arrays | {"included": ~arrays["included"]}
    frames = [score_block(TwoLayers(), block, canaries, names=SCORES) for block in (arrays, turned)]
    assert (frames[0]["included"] != frames[1]["included"]).all()
    pd.testing.assert_series_equal(frames[0]["value"], frames[1]["value"], check_exact=True)


def test_score_block_rejects_a_name_that_is_no_score():
    canaries = make_canaries()
    with pytest.raises(ValueError, match=r"names holds \['lira'\], expected some of negative_loss, logit_margin, "):
        score_block(TwoLayers(), make_block(canaries)[0], canaries, names=["negative_loss", "lira"])


@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4, 6], [0, 1, 2, 3, 4, 4], [0, 1, 2, 3, 4]])
def test_score_block_rejects_other_canaries(ids):
    canaries = make_canaries()
    arrays, _ = make_block(canaries)
    with pytest.raises(ValueError, match="differ or repeat"):
        score_block(TwoLayers(), arrays | {"canary_id": np.array(ids)}, canaries)


def test_score_block_names_run_and_step_of_a_diverged_model():
    canaries = make_canaries()
    arrays, _ = make_block(canaries)
    arrays["params/out/bias"][1, 2] = np.nan
    with pytest.raises(FloatingPointError, match="not finite at run 11, step 15"):
        score_block(TwoLayers(), arrays, canaries)
    with pytest.raises(FloatingPointError, match="not finite at run 11, step 15"):
        population_block(TwoLayers(), arrays, np.zeros((1, 2, 2, 1), np.uint8), np.zeros(1, int))
    arrays["initial/out/bias"][0] = np.inf
    with pytest.raises(FloatingPointError, match="not finite at run 10, step 0"):
        score_block(TwoLayers(), arrays, canaries, names=["relative_to_initial"])


def test_run_table_lists_runs_and_snapshots():
    arrays = {"run": np.array([4, 5]), "step": np.array([10, 20]), "noise_multiplier": np.array([1.5, 1.5])}
    arrays |= {"role": np.array(["audited", "reference"]), "test_accuracy": np.array([[0.1, 0.2], [0.3, 0.4]])}
    expected = {
        "run": [4, 4, 5, 5],
        "role": ["audited", "audited", "reference", "reference"],
        "step": [10, 20, 10, 20],
        "test_accuracy": [0.1, 0.2, 0.3, 0.4],
        "noise_multiplier": 1.5,
    }
    pd.testing.assert_frame_equal(run_table(arrays), pd.DataFrame(expected))
