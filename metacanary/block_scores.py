"""Tables of a block of runs: scores of the canaries, the runs, and what the models say of a population.

The scores are of each run by itself and never look at its coins; `reference_scores` compares them with other models.
"""

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import pandas as pd

from metacanary import scores
from metacanary.canaries import Canaries

Logits = Callable[[np.ndarray], np.ndarray]  # images [m, h, w, c] in [0, 1] -> logits [m, k]

AUGMENTED = {f"augmented_{name}": score for name, score in scores.SCORES.items()}
RELATIVE_TO_INITIAL = "relative_to_initial"
SCORES = (*scores.SCORES, *AUGMENTED, RELATIVE_TO_INITIAL)


def score_block(
    model: Any,
    arrays: Mapping[str, np.ndarray],
    canaries: Canaries,
    *,
    names: Collection[str] = tuple(scores.SCORES),
    flip: bool = False,
    shift: int = 1,
    on_model: Callable[[], object] | None = None,
) -> pd.DataFrame:
    """Scores of all canaries under all snapshots of a block of runs.

    Beside the scores of `scores.SCORES`: "augmented_<score>", its mean over the `augmented_copies` of the canary; and
    "relative_to_initial", the negative loss minus that under the run's own initial model.

    Args:
      model: Flax module, images [m, h, w, c] in [0, 1] -> logits [m, k].
      arrays: A block of K runs with S snapshots: run [K], step [S], canary_id [m], included [K, m], parameters
        "params/<path>" [K, S, ...] and, for relative_to_initial, "initial/<path>" [K, ...].
      canaries: The canaries of these runs, in any order.
      names: Which of `SCORES`.
      flip: As in `augmented_copies`.
      shift: As in `augmented_copies`.
      on_model: Called after each snapshot, to show progress.

    Returns:
      Long table with columns run, step, canary_id, included (0 or 1), score (name), value (higher: rather a member);
      rows are ordered by run, step, score as in `names`, and canary as in `canaries`.

    Raises:
      ValueError: If a name is no score, or the ids of block and canaries differ.
      FloatingPointError: If a logit is not finite.

    Guarantees:
      - Coins and scores are joined by canary id: another order of `canaries` changes the order of rows only.
      - Values do not depend on the coins.
    """
    if unknown := [name for name in names if name not in SCORES]:
        raise ValueError(f"names holds {unknown}, expected some of {', '.join(SCORES)}")
    ids, labels = np.asarray(canaries.id), np.asarray(canaries.label)
    included = np.asarray(arrays["included"])[:, _columns(np.asarray(arrays["canary_id"]), ids)].astype(int)
    copies = augmented_copies(canaries.images, flip=flip, shift=shift) if {*names} & {*AUGMENTED} else ()
    before = _initial_losses(model, arrays, canaries) if RELATIVE_TO_INITIAL in names else None
    frames = []
    for i, run, step, logits_of in _snapshots(model, arrays):
        values = _plain_scores(logits_of(canaries.images), labels) | _augmented_scores(logits_of, copies, labels)
        if before is not None:
            values[RELATIVE_TO_INITIAL] = values["negative_loss"] - before[i]
        columns = {"run": run, "step": step, "canary_id": ids, "included": included[i]}
        frames += [pd.DataFrame(columns | {"score": name, "value": values[name]}) for name in names]
        if on_model:
            on_model()
    return pd.concat(frames, ignore_index=True)


def population_block(
    model: Any,
    arrays: Mapping[str, np.ndarray],
    images: np.ndarray,
    labels: np.ndarray,
    *,
    on_model: Callable[[], object] | None = None,
) -> dict[str, np.ndarray]:
    """What all snapshots of a block say of images that no run was trained on, for `reference_scores.rmia`.

    Args:
      model: Flax module, images [z, h, w, c] in [0, 1] -> logits [z, k].
      arrays: As for `score_block`; the coins are not read.
      images: uint8 [z, h, w, c].
      labels: Integers [z].
      on_model: Called after each snapshot, to show progress.

    Returns:
      run [K], step [S], log_probability [K, S, z] of the true labels.

    Raises:
      FloatingPointError: If a logit is not finite.
    """
    pixels = images.astype(np.float32) / 255
    found = np.empty((len(arrays["run"]), len(arrays["step"]), len(labels)))
    rows = iter(found.reshape(-1, len(labels)))
    for (_, _, _, logits_of), row in zip(_snapshots(model, arrays), rows, strict=True):
        row[:] = scores.negative_loss(logits_of(pixels), labels)
        if on_model:
            on_model()
    return {"run": np.asarray(arrays["run"]), "step": np.asarray(arrays["step"]), "log_probability": found}


def run_table(arrays: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Lists the runs of a block, a row per run and snapshot.

    Args:
      arrays: A block of K runs with S snapshots: run [K], role [K], step [S], test_accuracy [K, S],
        noise_multiplier [K].

    Returns:
      Columns run, role, step, test_accuracy, noise_multiplier.
    """
    num_runs, num_steps = np.shape(arrays["test_accuracy"])
    return pd.DataFrame(
        {
            "run": np.repeat(arrays["run"], num_steps),
            "role": np.repeat(arrays["role"], num_steps),
            "step": np.tile(arrays["step"], num_runs),
            "test_accuracy": np.ravel(arrays["test_accuracy"]),
            "noise_multiplier": np.repeat(arrays["noise_multiplier"], num_steps),
        }
    )


def augmented_copies(images: np.ndarray, *, flip: bool = False, shift: int = 1) -> np.ndarray:
    """All shifts of images by up to some pixels, and their mirror images: the copies that training may draw.

    Args:
      images: [m, h, w, c].
      flip: Whether each copy comes a second time, mirrored left to right.
      shift: Most pixels, up, down, left and right; what comes in is the image mirrored with its edge.

    Returns:
      [n, m, h, w, c], n = (2 shift + 1)^2 copies or twice as many, among them the images as they are.

    Raises:
      ValueError: If the shift is negative or wider than the image.

    Guarantees:
      Each is a copy that `augmentation.copies` draws with `crop_padding` = shift and the same `flip`, and these are
      all that it draws.
    """
    height, width = images.shape[1:3]
    if not 0 <= shift <= min(height, width):
        raise ValueError(f"shift is {shift}, expected 0 to {min(height, width)} pixels")
    padded = np.pad(images, [(0, 0), (shift, shift), (shift, shift), (0, 0)], mode="symmetric")
    places = range(2 * shift + 1)
    copies = np.stack([padded[:, y : y + height, x : x + width] for y in places for x in places])
    return np.concatenate([copies, copies[..., ::-1, :]]) if flip else copies


def _snapshots(model: Any, arrays: Mapping[str, np.ndarray]) -> Iterator[tuple[int, int, int, Logits]]:
    """Yields place and number of the run, step and the logits' function of each model of a block."""
    for i, run in enumerate(np.asarray(arrays["run"])):
        for j, step in enumerate(np.asarray(arrays["step"])):
            params = _tree(arrays, "params/", (i, j))
            yield i, int(run), int(step), functools.partial(_logits, model, params, f"run {run}, step {step}")


def _initial_losses(model: Any, arrays: Mapping[str, np.ndarray], canaries: Canaries) -> list[np.ndarray]:
    """Negative losses [m] of the canaries before the first step of each run."""
    trees = [_tree(arrays, "initial/", (i,)) for i in range(len(arrays["run"]))]
    where = [f"run {run}, step 0" for run in arrays["run"]]
    logits = [_logits(model, *known, canaries.images) for known in zip(trees, where, strict=True)]
    return [scores.negative_loss(values, canaries.label) for values in logits]


def _plain_scores(logits: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Scores [m] of the images as they are, by name."""
    return {name: score(logits, labels) for name, score in scores.SCORES.items()}


def _augmented_scores(logits_of: Logits, copies: Collection[np.ndarray], labels: np.ndarray) -> dict[str, np.ndarray]:
    """Means [m] of scores over copies of the images, by name; nothing of no copies."""
    logits = [logits_of(images) for images in copies]
    named = AUGMENTED.items() if logits else ()
    return {name: np.mean([score(values, labels) for values in logits], axis=0) for name, score in named}


def _logits(model: Any, params: dict[str, Any], where: str, images: np.ndarray) -> np.ndarray:
    """Logits of images under one model; it is an error if they are not finite."""
    logits = np.asarray(_apply(model, params, images))
    if not np.isfinite(logits).all():
        raise FloatingPointError(f"logits are not finite at {where}")
    return logits


@functools.partial(jax.jit, static_argnums=0)
def _apply(model: Any, params: dict[str, Any], images: jax.Array) -> jax.Array:
    """Logits of images, compiled once for all models of a block."""
    return model.apply({"params": params}, images)


def _columns(block_ids: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Positions of `ids` in `block_ids`; both must hold the same ids, each once."""
    order = np.argsort(block_ids)
    same = block_ids.shape == ids.shape and np.array_equal(block_ids[order], np.sort(ids))
    if not same or len(np.unique(ids)) != len(ids):
        raise ValueError(
            f"canary_id of the block ({len(block_ids)} ids) and of the canaries ({len(ids)} ids) differ "
            "or repeat, expected the same ids, each once"
        )
    return order[np.searchsorted(block_ids[order], ids)]


def _tree(arrays: Mapping[str, np.ndarray], prefix: str, place: tuple[int, ...]) -> dict[str, Any]:
    """Parameters of one model as a nested dict, from the keys "<prefix>a/b"."""
    tree: dict[str, Any] = {}
    for key, leaves in arrays.items():
        if key.startswith(prefix):
            *path, leaf = key.removeprefix(prefix).split("/")
            node = tree
            for name in path:
                node = node.setdefault(name, {})
            node[leaf] = leaves[place]
    return tree
