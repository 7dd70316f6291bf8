"""Membership scores that compare a model with reference models, which were trained alike and without any canary.

All are functions of models and images alone. The coins of an audited run have no part in its reference models either,
so that a bound holds for these scores as for any other.
"""

import numpy as np
import numpy.typing as npt
from scipy import special

MIN_REFERENCES = {"relative_to_reference": 1, "offline_lira": 2, "rmia": 1}
"""The scores of this module, and how many reference models each needs."""

MIN_FOR_OWN_VARIANCE = 8
"""Reference models from which on each canary has a variance of its own in `offline_lira`; our choice."""


def relative_to_reference(negative_loss: npt.ArrayLike, reference: npt.ArrayLike) -> np.ndarray:
    """Negative loss minus its mean over reference models: how hard a canary is without having been trained on.

    Args:
      negative_loss: [..., m], of the audited models.
      reference: [R, m], of R >= 1 reference models.

    Returns:
      Float64 [..., m]; higher for an example that was trained on.

    Raises:
      ValueError: If the shapes do not fit or there is no reference model.

    References:
      Watson et al. 2022, "On the Importance of Difficulty Calibration in Membership Inference Attacks",
      arXiv 2111.08440.
    """
    values, others = _checked(negative_loss, reference, MIN_REFERENCES["relative_to_reference"])
    return values - others.mean(axis=0)


def offline_lira(logit_margin: npt.ArrayLike, reference: npt.ArrayLike) -> np.ndarray:
    """Offline LiRA: the logit margin in standard deviations above its mean over reference models.

    z_i = (phi_i - mu_i) / sigma_i. The paper's score is Phi(z_i), the chance of a lower margin had the canary been
    left out; z_i orders canaries alike, and has no ties where Phi rounds to 1.

    The mean is each canary's own. From `MIN_FOR_OWN_VARIANCE` reference models on the variance (unbiased) is too;
    with fewer it is the mean of these variances over all canaries, as an estimate from a few numbers says little. The
    paper too takes one variance for all when there are few reference models. How many are few, and that the margins
    are centred at each canary's mean before, are choices of ours.

    Args:
      logit_margin: [..., m], of the audited models (`scores.logit_margin`).
      reference: [R, m], of R >= 2 reference models.

    Returns:
      Float64 [..., m]; higher for an example that was trained on.

    Raises:
      ValueError: If the shapes do not fit, there are fewer than 2 reference models, or they all agree on a canary
        (with a pooled variance: on all of them).

    References:
      Carlini et al. 2022, "Membership Inference Attacks From First Principles", arXiv 2112.03570, the offline attack.
    """
    values, others = _checked(logit_margin, reference, MIN_REFERENCES["offline_lira"])
    variance, is_constant = others.var(axis=0, ddof=1), np.ptp(others, axis=0) == 0
    if len(others) < MIN_FOR_OWN_VARIANCE:
        variance, is_constant = variance.mean(), is_constant & is_constant.all()
    if np.any(is_constant):
        raise ValueError(f"reference models agree on {np.count_nonzero(is_constant)} canaries, expected a variance")
    return (values - others.mean(axis=0)) / np.sqrt(variance)


def rmia(
    log_probability: npt.ArrayLike,
    population: npt.ArrayLike,
    reference: npt.ArrayLike,
    reference_population: npt.ArrayLike,
    *,
    gamma: float = 1.0,
    offline_a: float = 0.3,
) -> np.ndarray:
    """Offline RMIA under one model: which share of a population the canary dominates.

    With ratio(x) = p(x | model) / p(x), p(x) = ((1 + a) p_out(x) + 1 - a) / 2 and p_out(x) the mean probability over
    reference models, the paper's score is the share of z in the population with ratio(x) / ratio(z) >= gamma. As a step
    function it has ties; this is a continuous one that keeps its order:

        share <= score <= share + 1 / (number of z),

    interpolated linearly by log ratio(x) between neighbours in the population, with tails 1 / (1 + distance) beyond.
    It grows strictly with ratio(x), so that under one model population and gamma change no order of canaries, only how
    scores compare across models.

    Args:
      log_probability: [m], of the canaries' labels (`scores.negative_loss`).
      population: [z], the same of z >= 1 images that neither the model nor its references were trained on.
      reference: [R, m], of the canaries, under R >= 1 reference models.
      reference_population: [R, z].
      gamma: How far a canary has to dominate.
      offline_a: a in [0, 1]: membership is taken to raise a probability p_out to a p_out + 1 - a.

    Returns:
      Float64 [m] in [0, 1 + 1 / z]; higher for an example that was trained on.

    Raises:
      ValueError: If the shapes do not fit, gamma or offline_a is out of range, or the population is empty.

    References:
      Zarifzadeh, Liu, Shokri 2024, "Low-Cost High-Power Membership Inference Attacks", arXiv 2312.03262. The defaults
      are those of their code (github.com/privacytrustlab/ml_privacy_meter): gamma 1, and a = 0.3 in its example, beside
      a search for a that is left out here.
    """
    if not gamma > 0:
        raise ValueError(f"gamma is {gamma}, expected a number > 0")
    if not 0 <= offline_a <= 1:
        raise ValueError(f"offline_a is {offline_a}, expected a number in [0, 1]")
    of_canaries = _log_ratio(log_probability, reference, offline_a)
    of_population = _log_ratio(population, reference_population, offline_a)
    if not of_population.size:
        raise ValueError("population is empty, expected at least one image")
    return _continuous_share(of_canaries - np.log(gamma), of_population)


def _log_ratio(log_probability: npt.ArrayLike, reference: npt.ArrayLike, offline_a: float) -> np.ndarray:
    """Log of p(x | model) / p(x), [n]."""
    values, others = _checked(log_probability, reference, MIN_REFERENCES["rmia"])
    certain = np.zeros((1, others.shape[1]))
    weights = np.append(np.full(len(others), (1 + offline_a) / 2 / len(others)), (1 - offline_a) / 2)
    return values - special.logsumexp(np.concatenate([others, certain]), axis=0, b=weights[:, None])


def _continuous_share(values: np.ndarray, population: np.ndarray) -> np.ndarray:
    """Share of the population that is at most a value, and a fraction of 1/z that grows with the value between them."""
    knots, counts = np.unique(population, return_counts=True)
    place = np.searchsorted(knots, values, side="right")
    below, above = knots[np.maximum(place - 1, 0)], knots[np.minimum(place, len(knots) - 1)]
    with np.errstate(invalid="ignore", divide="ignore"):  # beyond the population, where another branch is taken
        between = (values - below) / (above - below)
        tails = np.where(place == 0, 1 / (1 + above - values), (values - below) / (1 + values - below))
    is_inside = (place > 0) & (place < len(knots))
    return (np.append(0, np.cumsum(counts))[place] + np.where(is_inside, between, tails)) / len(population)


def _checked(values: npt.ArrayLike, reference: npt.ArrayLike, least: int) -> tuple[np.ndarray, np.ndarray]:
    """Values [..., m] and those of reference models [R, m] as float64, R at least `least`."""
    own, others = np.asarray(values, np.float64), np.asarray(reference, np.float64)
    if own.ndim < 1 or others.ndim != 2 or others.shape[1] != own.shape[-1]:
        raise ValueError(f"values and reference have shapes {own.shape} and {others.shape}, expected [..., m], [R, m]")
    if len(others) < least:
        raise ValueError(f"reference has {len(others)} models, expected at least {least}")
    return own, others
