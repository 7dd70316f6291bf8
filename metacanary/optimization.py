"""Canary optimisation by metagradient descent (arXiv 2507.15836, Section 3).

The pixels of the canaries of a family are changed so that trained models tell members from non-members.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from metacanary import metagradient, models, runs, steps, training
from metacanary.canaries import Canaries
from metacanary.interference import interference
from metacanary.interruption import ShouldStop
from metacanary.objectives import Objective, logit_margin
from metacanary.recipes import DPSGD, SGD
from metacanary.replay_schedule import Plan, plan
from metacanary.replay_storage import Device, Disk, Host, Storage
from metacanary.scores import auroc

PyTree = Any


@dataclass(frozen=True, kw_only=True)
class SignedUpdate:
    """Move every pixel by `step_size` against the sign of its gradient (the paper's update)."""

    step_size: float

    def optimizer(self) -> optax.GradientTransformation:
        """The Optax transformation."""
        return optax.sign_sgd(self.step_size)


@dataclass(frozen=True, kw_only=True)
class AdamUpdate:
    """Adam on the pixels."""

    learning_rate: float
    b1: float = 0.9
    b2: float = 0.999

    def optimizer(self) -> optax.GradientTransformation:
        """The Optax transformation."""
        return optax.adam(self.learning_rate, b1=self.b1, b2=self.b2)


UPDATES = {"signed": SignedUpdate, "adam": AdamUpdate}


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """Settings of `optimize`.

    Attributes:
      objective: what is minimised, a value of `objectives.OBJECTIVES`.
      update: how pixels move, a value of UPDATES.
      recipe: the training that is differentiated, private or not.
      num_metasteps: updates of the pixels.
      num_splits: draws of coins, model seed and batches per metastep; gradients are averaged.
      complement: train each draw twice, the second time with all coins turned and all else (initial model, batches
        but for the canaries in them, noise, augmentation) the same. The direct term of a canary has opposite signs in
        and out, so that it cancels between the two but for the effect of inclusion.
      interference: weight of `interference.interference` of the trained model, which is added to the objective; 0
        leaves it out.
    """

    objective: Objective
    update: SignedUpdate | AdamUpdate
    recipe: SGD | DPSGD
    num_metasteps: int
    num_splits: int = 1
    complement: bool = False
    interference: float = 0.0

    def __post_init__(self) -> None:
        for name, least in (("num_metasteps", 1), ("num_splits", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected an integer >= {least}")
        if not self.interference >= 0:
            raise ValueError(f"interference: got {self.interference}, expected a number >= 0")

    @property
    def num_trainings(self) -> int:
        """Training runs per metastep."""
        return self.num_splits * (2 if self.complement else 1)


@dataclass(frozen=True, kw_only=True)
class MetaState:
    """Where an optimisation stands after `step` metasteps: all that is needed to go on."""

    step: int
    images: np.ndarray
    optimizer: PyTree


def initial(settings: Optimization, start: Canaries) -> MetaState:
    """The state before the first metastep."""
    optimizer = settings.update.optimizer().init(jnp.asarray(start.images))
    return MetaState(step=0, images=start.images, optimizer=optimizer)


def optimize(
    settings: Optimization,
    model: nn.Module,
    pool: runs.Pool,
    start: Canaries,
    *,
    seed: int,
    game: str,
    branching: int,
    storage: Storage | None = None,
    resume: MetaState | None = None,
    checkpoint: Path | None = None,
    on_step: Callable[[str, int], None] | None = None,
    should_stop: ShouldStop | None = None,
) -> Iterator[tuple[MetaState, dict[str, float]]]:
    """Optimise the pixels of canaries by metagradient descent.

    Each metastep draws new inclusion coins, a new model seed and a new data order, differentiates the objective
    through the whole training run (`metagradient.replay`: the path through training for included canaries and the
    direct term for all), updates the pixels and projects them to [0, 1].

    Args:
      settings: objective, update, training, numbers of steps.
      model: the metamodel.
      pool: the other training images, and all labels.
      start: the canaries to start from; labels are kept.
      seed: of the optimisation; metastep and split are folded into it.
      game: as in `runs.coins`.
      branching, storage: as of `metagradient.replay`; they change no bit. `plan_replay` chooses them.
      resume: continue after this state.
      checkpoint: folder for checkpoints within a metastep; None writes none.
      on_step, should_stop: as in `metagradient.replay`.

    Yields:
      After each metastep (MetaState, row of the history): metastep, objective (interference included), auroc (of the
      canaries before this metastep's update, on coins, a model and an order they have not seen), seconds.

    Raises:
      FloatingPointError: a training run or its objective is not finite.
      Stopped: `should_stop` said so; the checkpoint within the metastep is written.

    Guarantees:
      Resuming from a yielded state gives bit-identical later states, and so does resuming within a metastep, with the
      same checkpoint folder. A metastep's checkpoints are kept until the next state is asked for, so that the caller
      can put the yielded one in safety first. Pixels stay in [0, 1].

    References:
      arXiv 2507.15836, Algorithm 1.
    """
    optimizer = settings.update.optimizer()
    state = resume or initial(settings, start)
    options = {"branching": branching, "storage": storage, "on_step": on_step, "should_stop": should_stop}
    for metastep in range(state.step, settings.num_metasteps):
        began = time.perf_counter()
        folder = _metastep_folder(checkpoint, metastep)
        trainings = _splits(settings, seed, metastep, len(state.images), game)
        gradient, rows = _metagradient(settings, model, pool, state.images, trainings, folder, options)
        updates, opt_state = optimizer.update(gradient, state.optimizer)
        images = np.asarray(jnp.clip(state.images + updates, 0.0, 1.0))
        state = MetaState(step=metastep + 1, images=images, optimizer=opt_state)
        row = {"metastep": metastep + 1, **rows, "seconds": time.perf_counter() - began}
        yield state, row
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def plan_replay(
    settings: Optimization,
    model: nn.Module,
    pool: runs.Pool,
    start: Canaries,
    *,
    budget: Mapping[str, int],
    spill: Path | None = None,
) -> tuple[Plan, Storage]:
    """Choose branching and storage for the replays of `optimize`, from measured steps.

    Args:
      settings, model, pool, start: as of `optimize`.
      budget: bytes by storage, as of `replay_schedule.plan`; a storage of 0 bytes is not used.
      spill: a folder of its own for states, if the budget has "disk".

    Returns:
      The plan, which says what each training will cost, and the storage.

    Raises:
      ValueError: a budget that no plan fits.
    """
    offered = {name: size for name, size in budget.items() if size > 0 or name == "device"}
    storages: dict[str, Storage] = {"device": Device()}
    if "host" in offered:
        storages["host"] = Host()
    if "disk" in offered:
        if spill is None:
            raise ValueError("spill: got None, expected a folder, since the budget has disk")
        storages["disk"] = Disk(spill)
    included = np.arange(len(start.images)) % 2 == 0
    costs = metagradient.measure(
        training.step_function(settings.recipe, model),
        _objective_fn(settings.objective, settings.recipe, model, settings.interference),
        _training_state(settings, model, pool, included, 0),
        jnp.asarray(start.images),
        storages=[storage for name, storage in storages.items() if name != "device"],
    )
    chosen = plan(settings.recipe.num_steps, costs, offered)
    return chosen, storages[chosen.storage]


def _metastep_folder(checkpoint: Path | None, metastep: int) -> Path | None:
    """The folder for a metastep's checkpoints; those of others, whose states are in safety, are deleted."""
    if checkpoint is None:
        return None
    folder = checkpoint / f"metastep_{metastep}"
    for other in set(checkpoint.glob("metastep_*")) - {folder}:
        shutil.rmtree(other, ignore_errors=True)
    return folder


def _metagradient(
    settings: Optimization,
    model: nn.Module,
    pool: runs.Pool,
    images: np.ndarray,
    trainings: Iterator[tuple[int, np.ndarray]],
    folder: Path | None,
    options: Mapping[str, Any],
) -> tuple[jax.Array, dict[str, float]]:
    """The gradient averaged over the metastep's splits, with the mean objective and AUROC."""
    step_fn = training.step_function(settings.recipe, model)
    objective_fn = _objective_fn(settings.objective, settings.recipe, model, settings.interference)
    steps, pixels = settings.recipe.num_steps, jnp.asarray(images)
    gradients, values, aurocs = [], [], []
    for number, (run_seed, included) in enumerate(trainings):
        state = _training_state(settings, model, pool, included, run_seed)
        checkpoint = folder / f"training_{number}" if folder else None
        result = metagradient.replay(step_fn, objective_fn, state, pixels, steps, checkpoint=checkpoint, **options)
        gradients.append(result.gradient)
        values.append(float(result.value))
        aurocs.append(auroc(np.asarray(result.aux), included))
    mean = jnp.stack(gradients).mean(axis=0)
    return mean, {"objective": float(np.mean(values)), "auroc": float(np.mean(aurocs))}


def _training_state(
    settings: Optimization, model: nn.Module, pool: runs.Pool, included: np.ndarray, run_seed: int
) -> dict[str, PyTree]:
    """The state before a training, with the coins for the objective."""
    state = training.initial_state(settings.recipe, model, pool, included, seed=run_seed)
    return {**state, "included": jnp.asarray(included)}


def _splits(
    settings: Optimization, seed: int, metastep: int, num_canaries: int, game: str
) -> Iterator[tuple[int, np.ndarray]]:
    """(run seed, coins) of each training of a metastep."""
    for split in range(settings.num_splits):
        run_seed = split_seed(seed, metastep, split)
        included = runs.coins(run_seed, num_canaries, game)
        yield run_seed, included
        if settings.complement:
            yield run_seed, ~included


def split_seed(seed: int, metastep: int, split: int) -> int:
    """The seed of one training run of the optimisation."""
    return int(np.random.SeedSequence([seed, metastep, split]).generate_state(1)[0] >> 1)


@cache
def _objective_fn(
    objective: Objective, recipe: SGD | DPSGD, model: nn.Module, weight: float = 0.0
) -> metagradient.ObjectiveFn:
    """The objective of a trained state and its interference times `weight`, with the logit margins as aux.

    Cached so that it is compiled once.
    """

    def function(state: PyTree, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        labels, params = state["labels"][-len(pixels) :], steps.released(recipe, state)
        logits = models.apply(model, params, pixels)
        value = objective(logits, labels, state["included"])
        if weight:
            value += weight * interference(model, params, pixels, labels)
        return value, logit_margin(logits, labels)

    return function
