"""Membership scores of models, and what they are worth: AUROC and ROC."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import special, stats

from metacanary.canaries import Canaries

_PARAMS = "params/"


def negative_loss(logits: npt.ArrayLike, labels: npt.ArrayLike) -> np.ndarray:
    """Log-probability of the label, minus the cross-entropy.

    Computed as -log(1 + e^-margin) from `logit_margin`, so that it keeps the order of margins: no ties where
    a probability rounds to 1.

    Args:
      logits: Shape [m, k], k >= 2 classes.
      labels: Shape [m], integers.

    Returns:
      Float64 [m], <= 0; higher for an example that was trained on.

    Raises:
      ValueError: If the shapes do not fit or a label is no class.
    """
    return -np.logaddexp(0.0, -logit_margin(logits, labels))


def logit_margin(logits: npt.ArrayLike, labels: npt.ArrayLike) -> np.ndarray:
    """Logit of the label minus the log-sum-exp of the other logits: log(p / (1 - p)).

    Args:
      logits: Shape [m, k], k >= 2 classes.
      labels: Shape [m], integers.

    Returns:
      Float64 [m]; higher for an example that was trained on.

    Raises:
      ValueError: If the shapes do not fit or a label is no class.

    References:
      Carlini et al. 2022, "Membership Inference Attacks From First Principles", arXiv 2112.03570.
    """
    values, classes = np.array(logits, np.float64), np.asarray(labels)
    if values.ndim != 2 or values.shape[1] < 2 or classes.shape != values.shape[:1]:
        raise ValueError(
            f"logits and labels have shapes {values.shape} and {classes.shape}, expected [m, k >= 2] and [m]"
        )
    if classes.size and not (classes.min() >= 0 and classes.max() < values.shape[1]):
        raise ValueError(f"labels span {classes.min()} .. {classes.max()}, expected classes 0 .. {values.shape[1] - 1}")
    rows = np.arange(len(values))
    of_label = values[rows, classes]
    values[rows, classes] = -np.inf
    return of_label - special.logsumexp(values, axis=1)


SCORES: dict[str, Callable[[npt.ArrayLike, npt.ArrayLike], np.ndarray]] = {
    "negative_loss": negative_loss,
    "logit_margin": logit_margin,
}


def auroc(scores: npt.ArrayLike, included: npt.ArrayLike) -> float:
    """Probability that an IN score exceeds an OUT score, ties counted 1/2 (Mann-Whitney).

    Args:
      scores: Shape [m], finite.
      included: Shape [m], 0 or 1, both present.

    Returns:
      In [0, 1]; 1/2 for identical scores.

    Raises:
      ValueError: If shapes differ, scores are not finite, or one of the groups is empty.

    Guarantees:
      - Not the area under the concave hull of the ROC curve, which is never below 1/2 and biased upwards.
    """
    values, coins = _check_groups(scores, included)
    num_in, num_out = int(coins.sum()), int((~coins).sum())
    rank_sum = float(stats.rankdata(values)[coins].sum())
    return (rank_sum - num_in * (num_in + 1) / 2) / (num_in * num_out)


def roc(scores: npt.ArrayLike, included: npt.ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """ROC curve of the rule "IN if the score is at least a threshold".

    Args:
      scores: Shape [m], finite.
      included: Shape [m], 0 or 1, both present.

    Returns:
      (false positive rates, true positive rates), from (0, 0) to (1, 1), one point per distinct score.

    Raises:
      ValueError: If shapes differ, scores are not finite, or one of the groups is empty.
    """
    values, coins = _check_groups(scores, included)
    order = np.argsort(-values, kind="stable")
    last_of_ties = np.append(np.diff(values[order]) != 0, True)
    hits, misses = np.cumsum(coins[order])[last_of_ties], np.cumsum(~coins[order])[last_of_ties]
    return np.append(0.0, misses / misses[-1]), np.append(0.0, hits / hits[-1])


def tpr_at_fpr(scores: npt.ArrayLike, included: npt.ArrayLike, fpr: float) -> float:
    """Largest true positive rate of a threshold whose false positive rate is at most `fpr`; no interpolation.

    Args:
      scores: Shape [m], finite.
      included: Shape [m], 0 or 1, both present.
      fpr: In [0, 1].

    Returns:
      In [0, 1].

    Raises:
      ValueError: If fpr is out of range, or as `roc`.
    """
    if not 0 <= fpr <= 1:
        raise ValueError(f"fpr is {fpr}, expected a number in [0, 1]")
    false_positive, true_positive = roc(scores, included)
    return float(true_positive[false_positive <= fpr].max())


def score_block(
    model: Any,
    arrays: Mapping[str, np.ndarray],
    canaries: Canaries,
    *,
    on_model: Callable[[], object] | None = None,
) -> pd.DataFrame:
    """Scores of all canaries under all snapshots of a block of runs.

    Args:
      model: Flax module, images [m, h, w, c] in [0, 1] -> logits [m, k].
      arrays: A block of K runs with S snapshots: run [K], step [S], canary_id [m], included [K, m], and
        parameters "params/<path>" [K, S, ...].
      canaries: The canaries of these runs, in any order.
      on_model: Called after each snapshot, to show progress.

    Returns:
      Long table with columns run, step, canary_id, included (0 or 1), score (name), value; rows are ordered
      by run, step, score, and canary as in `canaries`.

    Raises:
      ValueError: If the ids of block and canaries differ.
      FloatingPointError: If a logit is not finite.

    Guarantees:
      - Coins and scores are joined by canary id: another order of `canaries` changes the order of rows only.
    """
    ids = np.asarray(canaries.id)
    included = np.asarray(arrays["included"])[:, _columns(np.asarray(arrays["canary_id"]), ids)]
    apply = jax.jit(lambda params, images: model.apply({"params": params}, images))
    frames = []
    for i, run in enumerate(np.asarray(arrays["run"])):
        for j, step in enumerate(np.asarray(arrays["step"])):
            logits = apply(_params(arrays, i, j), canaries.images)
            columns = {
                "run": int(run),
                "step": int(step),
                "canary_id": ids,
                "included": included[i].astype(int),
            }
            frames += _score_frames(columns, np.asarray(logits), canaries.label)
            if on_model:
                on_model()
    return pd.concat(frames, ignore_index=True)


def _score_frames(columns: dict[str, Any], logits: np.ndarray, labels: np.ndarray) -> list[pd.DataFrame]:
    """One table per score of one snapshot."""
    if not np.isfinite(logits).all():
        raise FloatingPointError(f"logits are not finite at run {columns['run']}, step {columns['step']}")
    return [pd.DataFrame(columns | {"score": name, "value": score(logits, labels)}) for name, score in SCORES.items()]


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


def _params(arrays: Mapping[str, np.ndarray], run: int, snapshot: int) -> dict[str, Any]:
    """Parameters of one snapshot as a nested dict, from the keys "params/a/b"."""
    tree: dict[str, Any] = {}
    for key, leaves in arrays.items():
        if key.startswith(_PARAMS):
            *path, leaf = key.removeprefix(_PARAMS).split("/")
            node = tree
            for name in path:
                node = node.setdefault(name, {})
            node[leaf] = leaves[run, snapshot]
    return tree


def _check_groups(scores: npt.ArrayLike, included: npt.ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Scores as float64 [m] and coins as bool [m], both groups present."""
    values, coins = np.asarray(scores, np.float64), np.asarray(included)
    if values.ndim != 1 or values.shape != coins.shape:
        raise ValueError(f"scores and included have shapes {values.shape} and {coins.shape}, expected the same [m]")
    if not np.isfinite(values).all():
        raise ValueError(f"scores has {np.count_nonzero(~np.isfinite(values))} values that are not finite")
    coins = coins.astype(bool)
    if coins.all() or not coins.any():
        raise ValueError(f"included has {coins.sum()} of {len(coins)} canaries in, expected both groups")
    return values, coins
