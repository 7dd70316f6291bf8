"""The runs of TAN: trainings without canaries, each measured on images that it did not train on.

A row says what was run and what it reached, so that tables need neither recipes nor models.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
import pandas as pd

from metacanary import accounting, data, store, tan, training
from metacanary.interruption import ShouldStop
from metacanary.recipes import DPSGD
from metacanary.runs import Pool

SETTINGS = (
    *("batch_size", "multiplicity", "num_steps", "learning_rate", "sampling_prob", "noise_multiplier"),
    *("eta", "epsilon_approximate", "epsilon_full", "epsilon_spent", "num_gradients"),
)
MEASURED = ("run", "seed", "accuracy", "seconds_per_step")
COLUMNS = (*SETTINGS, *MEASURED)
"""Columns of a run: `describe`, then what `train_runs` yields; docs/output.md says what each means."""


def split(labels: np.ndarray, num_classes: int, num_validation: int) -> tuple[np.ndarray, np.ndarray]:
    """Parts training images into those to train on and those to choose settings by.

    Args:
      labels: int [N].
      num_classes: number of classes.
      num_validation: images to hold out, the same ones always, as `data.stratified` chooses them.

    Returns:
      Ascending indices [N - num_validation] and [num_validation], which have none in common.

    Raises:
      ValueError: num_validation is not between 1 and N - 1, or a class has too few images.
    """
    if not 0 < num_validation < len(labels):
        raise ValueError(f"num_validation: got {num_validation}, expected 1 to {len(labels) - 1} of {len(labels)}")
    held_out = data.stratified(labels, num_classes, num_validation)
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out


def choose(searched: Sequence[pd.DataFrame]) -> int:
    """Chooses a setting by its runs on held-out images.

    Args:
      searched: Of each setting its runs, with the columns accuracy and num_gradients.

    Returns:
      The place of the setting of the highest mean accuracy; of equal ones that of the fewest gradients, then the
      first.

    Raises:
      ValueError: For no settings, a setting without runs, or an accuracy that is missing.
    """
    if not searched or any(runs.empty or runs["accuracy"].isna().any() for runs in searched):
        raise ValueError(f"searched: got {len(searched)} settings, expected at least one, each with accuracies")
    ranks = [(-runs["accuracy"].mean(), runs["num_gradients"].iloc[0], place) for place, runs in enumerate(searched)]
    return min(ranks)[2]


def describe(
    recipe: DPSGD, *, full_batch: float, num_full: int, num_trained: int, delta: float, accountant: str
) -> dict[str, float]:
    """What is run, and what it stands for at the full batch.

    Args:
      recipe: of the run, a simulation or not.
      full_batch: B of the full run.
      num_full: N of the full run.
      num_trained: N of this run.
      delta: of all epsilons.
      accountant: of `epsilon_full`; `epsilon_spent` is always RDP's, since a PLD takes minutes where sigma is small.

    Returns:
      A value for each of `SETTINGS`. eta, epsilon_approximate and epsilon_full are those of the full run that is
      simulated, epsilon_spent that of this run itself.
    """
    full = tan.restore(recipe, full_batch, num_examples=num_full, num_simulated=num_trained)
    eta = tan.total_noise(full.noise_multiplier, full.sampling_prob, full.num_steps)
    return {
        "batch_size": tan.expected_batch(recipe, num_trained),
        "multiplicity": recipe.augmentation.multiplicity,
        "num_steps": recipe.num_steps,
        "learning_rate": recipe.learning_rate,
        "sampling_prob": recipe.sampling_prob,
        "noise_multiplier": recipe.noise_multiplier,
        "eta": eta,
        "epsilon_approximate": tan.approximate_epsilon(eta, delta),
        "epsilon_full": _epsilon(full, delta, accountant),
        "epsilon_spent": _epsilon(recipe, delta, "rdp"),
        "num_gradients": tan.num_gradients(recipe, num_trained),
    }


def train_runs(
    recipe: DPSGD,
    model: nn.Module,
    images: np.ndarray,
    labels: np.ndarray,
    held_out: tuple[np.ndarray, np.ndarray],
    *,
    seeds: Sequence[int],
    checkpoints: Path | None = None,
    on_step: Callable[[int], None] | None = None,
    should_stop: ShouldStop | None = None,
) -> Iterator[dict[str, Any]]:
    """Train models that differ in their seed, without canaries.

    Args:
      recipe: what to train with.
      model: the network.
      images: uint8 [N, height, width, channels], all of which are trained on.
      labels: int [N].
      held_out: images uint8 [n, ...] and labels [n] of the accuracy.
      seeds: of the runs.
      checkpoints: folder for what is finished and for the run under way; None writes nothing.
      on_step: called after each step with the number of steps of all runs so far.
      should_stop: as of `training.train`.

    Yields:
      A row of `MEASURED` for each seed. The seconds are a mean without the first step, which compiles; missing for a
      run of which fewer than two steps were made here, the others before a kill.

    Raises:
      ValueError, FloatingPointError, Stopped: as `training.train`.

    Guarantees:
      Accuracies of a run that was killed and resumed are those of an undisturbed one.
    """
    none = np.zeros(0, np.int32)
    pool, canary_images = Pool.make(images, labels, none, none), np.zeros((0, *images.shape[1:]), np.float32)
    for number, seed in enumerate(seeds):
        finished = None if checkpoints is None else checkpoints / f"run{number}.json"
        if finished is None or not finished.exists():
            clock: list[float] = []

            def stepped(done: int, clock: list[float] = clock, before: int = number * recipe.num_steps) -> None:
                clock.append(time.perf_counter())
                if on_step:
                    on_step(before + done)

            params = training.train(
                recipe,
                model,
                pool,
                canary_images,
                np.zeros(0, bool),
                seed=seed,
                snapshots=[recipe.num_steps],
                checkpoint=None if checkpoints is None else checkpoints / f"run{number}.npz",
                on_step=stepped,
                should_stop=should_stop,
            )[recipe.num_steps]
            # `train` has waited for the device by now; the steps themselves are only handed to it.
            seconds = (time.perf_counter() - clock[0]) / (len(clock) - 1) if len(clock) > 1 else None
            accuracy = training.accuracy(model, params, *held_out)
            row = {"run": number, "seed": seed, "accuracy": accuracy, "seconds_per_step": seconds}
            if finished is not None:
                store.write_json(finished, row)
        yield row if finished is None else store.read_json(finished)


def _epsilon(recipe: DPSGD, delta: float, accountant: str) -> float:
    """What a recipe spends."""
    return accounting.epsilon(
        noise_multiplier=recipe.noise_multiplier,
        sampling_prob=recipe.sampling_prob,
        num_steps=recipe.num_steps,
        delta=delta,
        accountant=accountant,
    )
