"""Canary optimisation by metagradient descent (arXiv 2507.15836, Section 3).

The pixels of the canaries of a family, and their labels if that is asked for, are changed so that trained models tell
members from non-members.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from metacanary import metagradient, models, runs, steps, training
from metacanary.canaries import Canaries
from metacanary.interference import interference
from metacanary.interruption import ShouldStop
from metacanary.objectives import ModelObjective, Objective, logit_margin
from metacanary.recipes import DPSGD, SGD
from metacanary.replay_schedule import Plan, plan
from metacanary.replay_storage import Device, Disk, Host, Storage
from metacanary.scores import auroc
from metacanary.soft_labels import CanaryInputs, LabelUpdate, SoftlyLabelled
from metacanary.updates import AdamUpdate, MetaState, SignedUpdate

PyTree = Any


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """Settings of `optimize`.

    Attributes:
      objective: what is minimised, a value of `objectives.OBJECTIVES`.
      update: how pixels move, a value of `updates.UPDATES`.
      recipe: the training that is differentiated, private or not.
      num_metasteps: updates of the pixels.
      num_splits: draws of coins, model seed and batches per metastep; gradients are averaged.
      complement: train each draw twice, the second time with all coins turned and all else (initial model, batches
        but for the canaries in them, noise, augmentation) the same. The direct term of a canary has opposite signs in
        and out, so that it cancels between the two but for the effect of inclusion.
      interference: weight of `interference.interference` of the trained model, which is added to the objective; 0
        leaves it out.
      unit_gradients: divide each training's gradient by its norm before they are averaged, so that trainings have one
        vote each: through DP-SGD one gradient in several may be hundreds of times as long as the others. Of complements
        whose norms differ the direct terms then cancel less.
      objective_steps: steps of the training after which the objective is taken, ascending; the mean over them is
        minimised. None for the last step alone. What comes after the last of them is not trained.
      labels: how labels move in the first metasteps, until they are hardened; None keeps those of the start.
    """

    objective: Objective | ModelObjective
    update: SignedUpdate | AdamUpdate
    recipe: SGD | DPSGD
    num_metasteps: int
    num_splits: int = 1
    complement: bool = False
    interference: float = 0.0
    unit_gradients: bool = False
    objective_steps: tuple[int, ...] = ()
    labels: LabelUpdate | None = None

    def __post_init__(self) -> None:
        for name, least in (("num_metasteps", 1), ("num_splits", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected an integer >= {least}")
        if not self.interference >= 0:
            raise ValueError(f"interference: got {self.interference}, expected a number >= 0")
        steps, last = [*self.objective_steps], self.recipe.num_steps
        if steps != sorted({*steps}) or not all(1 <= step <= last for step in steps):
            raise ValueError(f"objective_steps: got {steps}, expected ascending steps from 1 to num_steps = {last}")
        if self.labels is not None and self.labels.harden_after > self.num_metasteps:
            got = f"labels.harden_after: got {self.labels.harden_after}"
            raise ValueError(f"{got}, expected at most num_metasteps = {self.num_metasteps}")

    @property
    def num_trainings(self) -> int:
        """Training runs per metastep."""
        return self.num_splits * (2 if self.complement else 1)

    @property
    def num_steps(self) -> int:
        """Steps of each training run, up to the last after which the objective is taken."""
        return self.objective_steps[-1] if self.objective_steps else self.recipe.num_steps


def initial(settings: Optimization, model: nn.Module, start: Canaries) -> MetaState:
    """The state before the first metastep."""
    pixels = jnp.asarray(start.images)
    labels = None
    if settings.labels is not None:
        logits = jax.eval_shape(partial(_first_logits, model), pixels[:1])
        labels = settings.labels.start(start.label, logits.shape[-1])
    return MetaState(step=0, images=start.images, optimizer=settings.update.optimizer().init(pixels), labels=labels)


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
    """Optimise the pixels of canaries, and their labels if they move, by metagradient descent.

    Each metastep draws new inclusion coins, a new model seed and a new data order, differentiates the objective
    through the whole training run (`metagradient.replay`: the path through training for included canaries and the
    direct term for all), updates the pixels and projects them to [0, 1]. While labels move, they are probabilities in
    the training and in the objective, with a gradient of their own by both paths.

    Args:
      settings: objective, update, training, numbers of steps.
      model: the metamodel.
      pool: the other training images, and all labels.
      start: the canaries to start from.
      seed: of the optimisation; metastep and split are folded into it.
      game: as in `runs.coins`.
      branching, storage: as of `metagradient.replay`; they change no bit. `plan_replay` chooses them.
      resume: continue after this state.
      checkpoint: folder for checkpoints within a metastep; None writes none.
      on_step, should_stop: as in `metagradient.replay`.

    Yields:
      After each metastep (MetaState, row of the history): metastep, objective (interference included; the mean over
      `objective_steps`), auroc (of the canaries before this metastep's update, on coins, a model and an order they have
      not seen; after the last of these steps), seconds; with `settings.labels` also labels_changed, the number of
      labels that are not the start's after the update.

    Raises:
      ValueError: a state to resume from with labels that move, and settings without them, or the other way round; a
        network that mixes examples, for an objective of canaries' own gradients.
      FloatingPointError: a training run or its objective is not finite.
      Stopped: `should_stop` said so; the checkpoint within the metastep is written.

    Guarantees:
      Resuming from a yielded state gives bit-identical later states, and so does resuming within a metastep, with the
      same checkpoint folder. A metastep's checkpoints are kept until the next state is asked for, so that the caller
      can put the yielded one in safety first. Pixels stay in [0, 1]. The labels that the last metastep yields, and
      those of every metastep after `labels.harden_after`, are classes.

    References:
      arXiv 2507.15836, Algorithm 1.
    """
    _check_model(settings, model, pool)
    state = resume or initial(settings, model, start)
    if (state.labels is None) != (settings.labels is None):
        got, expected = (repr(x) if x is None else "some" for x in (state.labels, settings.labels))
        raise ValueError(f"resume.labels: got {got}, expected {expected}, as settings.labels has it")
    options = {"branching": branching, "storage": storage, "on_step": on_step, "should_stop": should_stop}
    for metastep in range(state.step, settings.num_metasteps):
        began = time.perf_counter()
        folder = _metastep_folder(checkpoint, metastep)
        trainings = _splits(settings, seed, metastep, len(state.images), game)
        given = _inputs(settings, pool, state)
        gradient, rows = _metagradient(settings, model, *given, trainings, folder, options)
        state = _updated(settings, state, gradient)
        if state.labels is not None:
            rows["labels_changed"] = int((state.labels.classes != start.label).sum())
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
      ValueError: a budget that no plan fits, or a network as of `optimize`.
    """
    _check_model(settings, model, pool)
    offered = {name: size for name, size in budget.items() if size > 0 or name == "device"}
    storages: dict[str, Storage] = {"device": Device()}
    if "host" in offered:
        storages["host"] = Host()
    if "disk" in offered:
        if spill is None:
            raise ValueError("spill: got None, expected a folder, since the budget has disk")
        storages["disk"] = Disk(spill)
    included = np.arange(len(start.images)) % 2 == 0
    pool, canaries = _inputs(settings, pool, initial(settings, model, start))
    costs = metagradient.measure(
        training.step_function(settings.recipe, model),
        _objective_fn(settings.objective, settings.recipe, model, settings.interference),
        _training_state(settings, model, pool, included, 0),
        canaries,
        objective_steps=settings.objective_steps,
        storages=[storage for name, storage in storages.items() if name != "device"],
    )
    chosen = plan(settings.num_steps, costs, offered)
    return chosen, storages[chosen.storage]


def _check_model(settings: Optimization, model: nn.Module, pool: runs.Pool) -> None:
    """Refuse a network that mixes examples where each canary's own gradient counts."""
    if isinstance(settings.objective, ModelObjective):
        training.require_independent(model, pool.images.shape[1:])


def _metastep_folder(checkpoint: Path | None, metastep: int) -> Path | None:
    """The folder for a metastep's checkpoints; those of others, whose states are in safety, are deleted."""
    if checkpoint is None:
        return None
    folder = checkpoint / f"metastep_{metastep}"
    for other in set(checkpoint.glob("metastep_*")) - {folder}:
        shutil.rmtree(other, ignore_errors=True)
    return folder


def _first_logits(model: nn.Module, images: jax.Array) -> jax.Array:
    """The logits of a model that is not trained; for their shape."""
    return models.apply(model, models.init(model, jax.random.key(0), images.shape[1:]), images)


def _inputs(settings: Optimization, pool: runs.Pool, state: MetaState) -> tuple[runs.Pool, CanaryInputs]:
    """What the next metastep trains on: the pool with the labels of canaries, and the metaparameters."""
    pixels = jnp.asarray(state.images)
    if settings.labels is None or state.labels is None:
        return pool, pixels
    if state.step < settings.labels.harden_after:
        return pool, SoftlyLabelled(images=pixels, labels=state.labels.probabilities)
    return pool.with_canary_labels(state.labels.classes), pixels


def _updated(settings: Optimization, state: MetaState, gradient: CanaryInputs) -> MetaState:
    """The state after a metastep, from the gradient by what `_inputs` gave it."""
    labels = state.labels
    if settings.labels is not None and labels is not None and isinstance(gradient, SoftlyLabelled):
        labels, gradient = settings.labels.update(labels, gradient.labels), gradient.images
    updates, optimizer = settings.update.optimizer().update(gradient, state.optimizer)
    images = np.asarray(jnp.clip(state.images + updates, 0.0, 1.0))
    return MetaState(step=state.step + 1, images=images, optimizer=optimizer, labels=labels)


def _metagradient(
    settings: Optimization,
    model: nn.Module,
    pool: runs.Pool,
    canaries: CanaryInputs,
    trainings: Iterator[tuple[int, np.ndarray]],
    folder: Path | None,
    options: Mapping[str, Any],
) -> tuple[CanaryInputs, dict[str, float]]:
    """The gradient averaged over the metastep's splits, with the mean objective and AUROC."""
    step_fn = training.step_function(settings.recipe, model)
    objective_fn = _objective_fn(settings.objective, settings.recipe, model, settings.interference)
    steps, options = settings.num_steps, {**options, "objective_steps": settings.objective_steps}
    gradients, values, aurocs = [], [], []
    for number, (run_seed, included) in enumerate(trainings):
        state = _training_state(settings, model, pool, included, run_seed)
        checkpoint = folder / f"training_{number}" if folder else None
        result = metagradient.replay(step_fn, objective_fn, state, canaries, steps, checkpoint=checkpoint, **options)
        gradients.append(_unit(result.gradient) if settings.unit_gradients else result.gradient)
        values.append(float(result.value))
        aurocs.append(auroc(np.asarray(result.aux), included))
    mean = jax.tree.map(lambda *parts: jnp.stack(parts).mean(axis=0), *gradients)
    return mean, {"objective": float(np.mean(values)), "auroc": float(np.mean(aurocs))}


def _unit(gradient: CanaryInputs) -> CanaryInputs:
    """A gradient of norm 1, by pixels and by labels each; 0 stays 0."""

    def of(part: jax.Array) -> jax.Array:
        largest = jnp.abs(part).max()  # first, or the squares would overflow
        part = part / jnp.where(largest > 0, largest, 1)
        norm = jnp.linalg.norm(part)
        return part / jnp.where(norm > 0, norm, 1)

    return jax.tree.map(of, gradient)


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
    objective: Objective | ModelObjective, recipe: SGD | DPSGD, model: nn.Module, weight: float = 0.0
) -> metagradient.ObjectiveFn:
    """The objective of a trained state and its interference times `weight`, with the logit margins as aux.

    Cached so that it is compiled once.
    """

    def function(state: PyTree, canaries: CanaryInputs) -> tuple[jax.Array, jax.Array]:
        (pixels, labels), params = steps.canaries_of(state, canaries), steps.released(recipe, state)
        logits = models.apply(model, params, pixels)
        if isinstance(objective, ModelObjective):
            trainable, included = recipe.trainable, state["included"]
            value = objective.of_model(model, params, pixels, labels, included, trainable=trainable)
        else:
            value = objective(logits, labels, state["included"])
        if weight:
            value += weight * interference(model, params, pixels, labels)
        return value, logit_margin(logits, labels)

    return function
