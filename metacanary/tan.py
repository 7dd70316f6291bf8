"""TAN: the total amount of noise of DP-SGD, and what follows for the search of its settings (arXiv 2210.03403).

Both what a run costs and how it trains depend on batch size, noise and steps mostly through one number, eta. So
settings are searched at a small batch with the noise of the large one, and the large run is made once:

    small = simulate(reference, 256, num_examples=50_000)  # not private: search with it
    found = with_settings(reference, learning_rate=4.0, multiplicity=16, num_steps=2500)
    full = calibrate(found, epsilon=8, delta=1e-5)
"""

from __future__ import annotations

import math
from dataclasses import replace

from metacanary import accounting
from metacanary.recipes import DPSGD, Target


def total_noise(noise_multiplier: float, sampling_prob: float, num_steps: int) -> float:
    """Eta, with which the noise of a whole run is measured: eta^2 = q^2 T / (2 sigma^2).

    1 / eta grows with the noise; eta grows with what is spent.

    Args:
      noise_multiplier: sigma, > 0.
      sampling_prob: q, in (0, 1].
      num_steps: T, >= 1.

    Returns:
      eta > 0. The Renyi divergence of order alpha of the run is about alpha eta^2, and the run about
      (sqrt(2) eta)-GDP, where sigma is not small and q is.

    Raises:
      ValueError: an argument is out of range.

    References:
      Sander, Stock, Sablayrolles 2022, arXiv 2210.03403.
    """
    for name, value, valid, expected in (
        ("noise_multiplier", noise_multiplier, 0 < noise_multiplier < math.inf, "a finite number > 0"),
        ("sampling_prob", sampling_prob, 0 < sampling_prob <= 1, "a probability in (0, 1]"),
        ("num_steps", num_steps, num_steps >= 1, "an integer >= 1"),
    ):
        if not valid:
            raise ValueError(f"{name}: got {value}, expected {expected}")
    return sampling_prob * math.sqrt(num_steps / 2) / noise_multiplier


def approximate_epsilon(eta: float, delta: float) -> float:
    """About what a run of total noise eta spends: eta^2 + 2 eta sqrt(log(1 / delta)).

    An approximation and no bound: it is the epsilon of Renyi divergences alpha eta^2 in the plainest conversion.

    Args:
      eta: as `total_noise` has it, >= 0.
      delta: in (0, 1).

    Returns:
      Epsilon at delta, of add/remove neighbours. It was 1.02 to 1.42 times the accountant's (PLD) for sigma from 2 to
      10, 0.92 to 1.20 times it at 1.5, 0.60 to 1.02 at 1 and 0.09 to 0.34 at 0.5 (178 runs of eta from 0.05 to 1.5, q
      from 0.001 to 0.4, up to 10,000 steps, delta 1e-5 and 1e-6): far too small where sigma is.

    Raises:
      ValueError: an argument is out of range.

    References:
      arXiv 2210.03403; Mironov 2017, arXiv 1702.07476, Proposition 3.
    """
    if not 0 <= eta < math.inf:
        raise ValueError(f"eta: got {eta}, expected a finite number >= 0")
    if not 0 < delta < 1:
        raise ValueError(f"delta: got {delta}, expected a number between 0 and 1")
    return eta**2 + 2 * eta * math.sqrt(-math.log(delta))


def expected_batch(recipe: DPSGD, num_examples: int) -> float:
    """B = q N, the mean size of a Poisson batch, which need not be an integer."""
    return recipe.sampling_prob * num_examples


def num_gradients(recipe: DPSGD, num_examples: int) -> float:
    """B K T, the gradients of single copies of single examples that a run takes on average: its compute."""
    return expected_batch(recipe, num_examples) * recipe.augmentation.multiplicity * recipe.num_steps


def compute_ratio(reference: DPSGD, simulated: DPSGD, *, num_examples: int, num_simulated: int | None = None) -> float:
    """How many times the gradients of a simulation its reference takes; arguments as of `simulate`."""
    return num_gradients(reference, num_examples) / num_gradients(simulated, num_simulated or num_examples)


def simulate(reference: DPSGD, batch_size: float, *, num_examples: int, num_simulated: int | None = None) -> DPSGD:
    """The small-batch simulation of a run: **not private** at the budget of what it simulates.

    Its B / sigma is the reference's, and so is the noise in an update, sigma C / B. Its sigma is small where its batch
    is, and there eta no longer tells what is spent, which is many times more. So the simulation is for data that
    are public or one's own, and nothing that is seen in it may be published as private.

    Args:
      reference: the run at its full batch.
      batch_size: B of the simulation, at most num_simulated.
      num_examples: N of the reference, whose B is q N.
      num_simulated: N of the simulation; None for the same.

    Returns:
      The same recipe but for `sampling_prob` and `noise_multiplier`, and without `target`.

    Raises:
      ValueError: a batch or a number of examples out of range.

    Guarantees:
      `restore` with the reference's batch and the same numbers returns the reference without its target, up to
      rounding. On the same examples both have the same `total_noise`.

    References:
      arXiv 2210.03403.
    """
    return _at_batch_size(reference, batch_size, *_sizes(num_examples, num_simulated))


def restore(simulated: DPSGD, batch_size: float, *, num_examples: int, num_simulated: int | None = None) -> DPSGD:
    """The full run of a simulation: the inverse of `simulate`, without a target.

    What it spends is near what the reference spent, not equal to it: `calibrate` it before it is run.

    Args:
      simulated: the simulation.
      batch_size: B of the full run.
      num_examples, num_simulated: as of `simulate`.
    """
    return _at_batch_size(simulated, batch_size, *reversed(_sizes(num_examples, num_simulated)))


def with_settings(recipe: DPSGD, *, learning_rate: float, multiplicity: int, num_steps: int) -> DPSGD:
    """A recipe with other settings at the same total noise: sigma' = sigma sqrt(T' / T).

    Args:
      recipe: the recipe; its target is dropped, since equal eta is not equal epsilon.
      learning_rate: at the peak of the schedule.
      multiplicity: K, which costs no budget: the gradients of copies are averaged before the clip.
      num_steps: T'.
    """
    return replace(
        recipe,
        learning_rate=learning_rate,
        augmentation=replace(recipe.augmentation, multiplicity=multiplicity),
        num_steps=num_steps,
        noise_multiplier=recipe.noise_multiplier * math.sqrt(num_steps / recipe.num_steps),
        target=None,
    )


def calibrate(recipe: DPSGD, *, epsilon: float, delta: float, accountant: str = "pld") -> DPSGD:
    """A recipe with the noise that the accountant asks for at this (epsilon, delta), which becomes its target.

    Raises:
      ValueError: as `accounting.noise_multiplier`.
    """
    noise = accounting.noise_multiplier(
        epsilon=epsilon,
        sampling_prob=recipe.sampling_prob,
        num_steps=recipe.num_steps,
        delta=delta,
        accountant=accountant,
    )
    return replace(recipe, noise_multiplier=noise, target=Target(epsilon=epsilon, delta=delta))


def _sizes(num_examples: int, num_simulated: int | None) -> tuple[int, int]:
    """The examples of the reference and of its simulation."""
    sizes = (num_examples, num_examples if num_simulated is None else num_simulated)
    for name, size in zip(("num_examples", "num_simulated"), sizes, strict=True):
        if size < 1:
            raise ValueError(f"{name}: got {size}, expected an integer >= 1")
    return sizes


def _at_batch_size(recipe: DPSGD, batch_size: float, num_before: int, num_after: int) -> DPSGD:
    """A recipe at another expected batch, on another number of examples, at the same B / sigma."""
    # A reference at full batch, q = 1, may be a rounding error above it when it is restored.
    if not 0 < batch_size <= num_after * (1 + 1e-9):
        raise ValueError(f"batch_size: got {batch_size}, expected a number > 0, at most the {num_after} examples")
    return replace(
        recipe,
        sampling_prob=min(batch_size / num_after, 1.0),
        noise_multiplier=recipe.noise_multiplier * batch_size / expected_batch(recipe, num_before),
        target=None,
    )
