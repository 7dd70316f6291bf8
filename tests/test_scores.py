"""Scores: closed forms, naive twins, scikit-learn."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn import metrics

from metacanary.scores import SCORES, auroc, logit_margin, negative_loss, roc, tpr_at_fpr


def random_logits(seed=0, scale=3.0):
    rng = np.random.default_rng(seed)
    return scale * rng.normal(size=(50, 4)), rng.integers(0, 4, size=50)


def test_negative_loss_equals_cross_entropy():
    logits, labels = random_logits()
    expected = -optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(logits), jnp.asarray(labels))
    assert np.allclose(negative_loss(logits, labels), expected, rtol=1e-5, atol=1e-6)


def test_logit_margin_is_the_log_odds_of_the_label():
    logits, labels = random_logits()
    probability = np.exp(negative_loss(logits, labels))
    assert np.allclose(logit_margin(logits, labels), np.log(probability / (1 - probability)), rtol=1e-9)


def test_negative_loss_and_logit_margin_rank_alike_where_probabilities_round_to_one():
    logits = np.stack([np.linspace(30, 300, 200), np.zeros(200)], axis=1)
    labels = np.zeros(200, int)
    for score in SCORES.values():
        assert (np.diff(score(logits, labels)) > 0).all()
    assert negative_loss([[0.0, 1e4]], [0])[0] == -1e4


@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
def test_scores_ignore_a_shift_of_logits(score):
    logits, labels = random_logits()
    assert np.allclose(score(logits + 100.0, labels), score(logits, labels), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize(
    ("shape", "labels", "message"),
    [
        ((3, 1), [0, 0, 0], "expected"),
        ((3, 2), [0, 0], "expected"),
        ((3,), [0, 0, 0], "expected"),
        ((2, 3), [0, 3], "labels span 0 .. 3"),
        ((2, 3), [-1, 0], "labels span -1 .. 0"),
    ],
)
def test_scores_reject_bad_shapes_and_labels(score, shape, labels, message):
    with pytest.raises(ValueError, match=message):
        score(np.zeros(shape), np.array(labels))


def test_auroc_counts_pairs_with_ties_as_half():
    rng = np.random.default_rng(0)
    scores, included = rng.integers(0, 10, size=60).astype(float), rng.random(60) < 0.4
    inside, outside = scores[included][:, None], scores[~included][None]
    expected = np.mean((inside > outside) + 0.5 * (inside == outside))
    assert auroc(scores, included) == pytest.approx(expected, abs=1e-12)
    assert auroc(scores, included) == pytest.approx(metrics.roc_auc_score(included, scores), abs=1e-12)


def test_auroc_is_not_the_area_under_the_hull():
    """Trap 11: jax-privacy 2.0.0's attack_auroc gives 0.8125 here; Mann-Whitney is 11/16."""
    scores, included = [0, 4, 6, 7, 1, 2, 3, 5], [1, 1, 1, 1, 0, 0, 0, 0]
    assert auroc(scores, included) == 11 / 16
    auditing = pytest.importorskip("jax_privacy.auditing", reason="jax-privacy is a development extra")
    hull = auditing.CanaryScoreAuditor(np.array(scores[:4]), np.array(scores[4:])).attack_auroc()
    assert hull == pytest.approx(0.8125)


def test_auroc_of_perfect_constant_and_inverted_scores():
    included = np.array([1, 1, 0, 0, 0])
    assert auroc(included, included) == 1.0
    assert auroc(-included, included) == 0.0
    assert auroc(np.zeros(5), included) == 0.5


def test_roc_equals_scikit_learn():
    rng = np.random.default_rng(1)
    scores, included = rng.normal(size=80).round(1), rng.random(80) < 0.5
    fpr, tpr = roc(scores, included)
    expected_fpr, expected_tpr, _ = metrics.roc_curve(included, scores, drop_intermediate=False)
    assert np.allclose(fpr, expected_fpr, atol=1e-15)
    assert np.allclose(tpr, expected_tpr, atol=1e-15)
    assert np.trapezoid(tpr, fpr) == pytest.approx(auroc(scores, included), abs=1e-12)


def test_tpr_at_fpr_uses_thresholds_only():
    scores, included = np.array([5, 4, 3, 2, 1, 0]), np.array([1, 1, 0, 1, 0, 0])
    assert tpr_at_fpr(scores, included, 0.0) == pytest.approx(2 / 3)
    assert tpr_at_fpr(scores, included, 0.3) == pytest.approx(2 / 3)
    assert tpr_at_fpr(scores, included, 0.34) == 1.0
    assert tpr_at_fpr(np.zeros(6), included, 0.99) == 0.0
    with pytest.raises(ValueError, match="fpr is 2"):
        tpr_at_fpr(scores, included, 2)


@pytest.mark.parametrize("metric", [auroc, roc])
@pytest.mark.parametrize(
    ("scores", "included", "message"),
    [
        ([0.0, 1.0], [1], "expected the same"),
        ([0.0, np.nan], [0, 1], "1 values that are not finite"),
        ([0.0, 1.0], [1, 1], "2 of 2 canaries in"),
        ([0.0, 1.0], [0, 0], "0 of 2 canaries in"),
    ],
)
def test_metrics_reject_bad_input(metric, scores, included, message):
    with pytest.raises(ValueError, match=message):
        metric(scores, included)
