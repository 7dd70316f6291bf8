"""Membership scores from logits, and what scores are worth: AUROC and ROC."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy import special


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
    # Half a second of imports, and a workflow asks this module for names each time it is parsed.
    from scipy import stats

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
