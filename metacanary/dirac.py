"""Dirac canaries: what an observer who sees the noisy gradients of DP-SGD learns of one canary, without training.

A Dirac canary has a clipped gradient C e_i, with e_i a coordinate of its own that no other gradient has a part in. Then
this coordinate of the noisy sum, in units of the clip norm C, is

    x_t = b_t + N(0, sigma^2),    t = 1 .. T,

with b_t = 1 in the steps whose batch holds the canary, and 0 elsewhere. It depends on no model, so that it is simulated
exactly. Coins and Poisson draws are those of a run; the noise is a stream of its own.

References:
  Nasr, Song, Thakurta, Papernot, Carlini 2021 (arXiv 2101.04535): adversaries by what they see and insert.
  Nasr, Hayes, Steinke, Balle, Tramèr, Jagielski, Carlini, Terzis 2023 (arXiv 2302.07956): Dirac gradients, two runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import numpy as np
import pandas as pd

from metacanary import dpsgd, runs

ALL_ITERATES = "dirac_all_iterates"
LAST_ITERATE = "dirac_last_iterate"
SCORES = (ALL_ITERATES, LAST_ITERATE)

STREAM = 6  # a number that no stream of `runs.STREAMS` has, since training draws none of this noise


def observations(
    seed: int,
    included: np.ndarray,
    *,
    num_others: int,
    noise_multiplier: float,
    sampling_prob: float,
    num_steps: int,
) -> np.ndarray:
    """The canaries' coordinates of the noisy gradient sums of a run, in units of the clip norm.

    Args:
      seed: The run's seed.
      included: bool [m], the run's coins.
      num_others: r, the training images that are no canary.
      noise_multiplier: sigma, > 0.
      sampling_prob: q, in (0, 1].
      num_steps: T, >= 1.

    Returns:
      Float64 [T, m].

    Raises:
      ValueError: If an argument is out of range.

    Guarantees:
      - A canary is in the batches that hold its row in the run of this seed with r other images (`steps.dpsgd_state`).
      - Given the coins the columns are independent of each other, as the noise of different coordinates is, and as
        Poisson draws of different rows are. So each canary's column is exactly what `accounting.epsilon` accounts for.
      - The noise of a step depends on seed, step and m alone.
    """
    _check("noise_multiplier", noise_multiplier, 0 < noise_multiplier < math.inf, "a finite number > 0")
    _check("sampling_prob", sampling_prob, 0 < sampling_prob <= 1, "a number in (0, 1]")
    _check("num_steps", num_steps, num_steps >= 1, "an integer >= 1")
    _check("num_others", num_others, num_others >= 0, "an integer >= 0")
    num_canaries = len(included)
    used = np.concatenate([np.ones(num_others, bool), np.asarray(included, bool)])
    batches = dpsgd.poisson_batches(runs.stream(seed, "sampling"), sampling_prob, used, num_steps, 1)
    observed = _noise(seed, num_steps, num_canaries) * noise_multiplier
    for step, rows in enumerate(batches):
        observed[step, rows[rows >= num_others] - num_others] += 1.0
    return observed


def all_iterates(observed: np.ndarray, *, noise_multiplier: float, sampling_prob: float) -> np.ndarray:
    """The score of an observer of all noisy gradients who does not know which batches the canary was drawn into.

        sum_t log((1 - q) + q exp((2 x_t - 1) / (2 sigma^2)))

    Args:
      observed: From `observations`, [T, m].
      noise_multiplier: sigma.
      sampling_prob: q.

    Returns:
      [m], the log of the likelihood ratio of an included canary against an excluded one.

    Guarantees:
      No test of the observations has more power at its level (Neyman and Pearson): the mechanism on one canary is the
      Poisson-subsampled Gaussian that is accounted, so that epsilon by PLD is tight for this observer, up to the
      accountant's rounding. What a bound from these scores lacks of it is the bound's loss, not the attack's.
    """
    log_odds = (2 * observed - 1) / (2 * noise_multiplier**2)
    never = math.log1p(-sampling_prob) if sampling_prob < 1 else -math.inf
    return np.logaddexp(never, math.log(sampling_prob) + log_odds).sum(axis=0)


def last_iterate(observed: np.ndarray) -> np.ndarray:
    """The score of an observer of the last iterate, sum_t x_t [m].

    Under plain SGD at a constant rate it is the canary's coordinate of the last parameters, shifted and scaled. With
    momentum, a schedule, a moving average or another optimiser the last parameters are another function of the noisy
    gradients; this is their sum all the same, the mechanism of `heuristics.last_iterate_epsilon`.

    Guarantees:
      The likelihood ratio grows with the sum, so that no test of the sum has more power, and
      `heuristics.last_iterate_epsilon` is this observer's true epsilon.
    """
    return observed.sum(axis=0)


def score_tables(
    numbers: Sequence[int],
    roles: Sequence[str],
    seeds: Sequence[int],
    *,
    num_canaries: int,
    num_others: int,
    noise_multiplier: float,
    sampling_prob: float,
    num_steps: int,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scores of Dirac canaries in the runs of a cell, as `summary.epsilon_table` takes them.

    Args:
      numbers: Of the runs.
      roles: Of the runs: audited, surrogate or reference; a reference run includes no canary.
      seeds: Of the runs.
      num_canaries: m, in the independent game.
      num_others, noise_multiplier, sampling_prob, num_steps: As of `observations`.

    Returns:
      Scores with columns run, step, canary_id, included, score, value, of the scores `SCORES` at step T, and runs with
      columns run, role, step, test_accuracy (missing: there is no model), noise_multiplier.

    Guarantees:
      The coins of a run are those of `runs.coins` in the independent game. Values of a canary depend on its own coin
      alone: add/remove neighbours differ in one column.
    """
    mechanism = {"noise_multiplier": noise_multiplier, "sampling_prob": sampling_prob}
    frames = []
    for run, role, seed in zip(numbers, roles, seeds, strict=True):
        included = runs.coins(seed, num_canaries, "independent") & (role != "reference")
        seen = observations(seed, included, num_others=num_others, num_steps=num_steps, **mechanism)
        values = {ALL_ITERATES: all_iterates(seen, **mechanism), LAST_ITERATE: last_iterate(seen)}
        columns = {
            "run": run,
            "step": num_steps,
            "canary_id": np.arange(num_canaries),
            "included": included.astype(int),
        }
        frames += [pd.DataFrame(columns | {"score": name, "value": values[name]}) for name in SCORES]
    listed = {"run": list(numbers), "role": list(roles), "step": num_steps, "test_accuracy": math.nan}
    return pd.concat(frames, ignore_index=True), pd.DataFrame(listed | {"noise_multiplier": noise_multiplier})


def _noise(seed: int, num_steps: int, num_canaries: int) -> np.ndarray:
    """Standard normal noise of the canaries' coordinates, float64 [T, m]; step t draws from fold_in(stream, t)."""
    stream = jax.random.fold_in(jax.random.key(seed), STREAM)
    draws = [jax.random.normal(jax.random.fold_in(stream, t), (num_canaries,)) for t in range(num_steps)]
    return np.asarray(draws, np.float64)


def _check(name: str, value: float, valid: bool, expected: str) -> None:
    """ValueError naming argument, value and expectation unless valid."""
    if not valid:
        raise ValueError(f"{name}: got {value!r}, expected {expected}")
