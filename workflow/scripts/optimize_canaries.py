"""Optimises canaries by metagradient descent: data set -> canaries.npz, history.csv.

The state goes to a checkpoint after every metastep, and within one every two minutes and on SIGTERM; a killed job goes
on from there, to the same canaries bit by bit.
"""

import dataclasses
from pathlib import Path
from typing import Any

import _build
import _family
import numpy as np
import pandas as pd
from _job import progress, running

from metacanary import canaries, data, objectives, optimization, store
from metacanary.interruption import ShouldStop

HISTORY = ("metastep", "objective", "auroc", "seconds")


def settings_of(kind: dict[str, Any]) -> optimization.Optimization:
    """The settings of `optimization.optimize` from those of a canary kind."""
    objective, update = dict(kind["objective"]), dict(kind["update"])
    return optimization.Optimization(
        objective=objectives.OBJECTIVES[objective.pop("name")](**objective),
        update=optimization.UPDATES[update.pop("name")](**update),
        recipe=_build.recipe(kind["algorithm"], kind["training"]),
        num_metasteps=kind["num_metasteps"],
        num_splits=kind["num_splits"],
        complement=kind["complement"],
    )


def optimize_canaries(
    settings: dict[str, Any], dataset: data.Dataset, checkpoints: Path, should_stop: ShouldStop | None = None
) -> tuple[canaries.Canaries, pd.DataFrame]:
    """Optimises canaries, from the checkpoints if there are any.

    Returns:
      The canaries, and a row per metastep: objective and AUROC before its update, and seconds.
    """
    kind, checkpoint = settings["kind"], checkpoints / "state.npz"
    chosen, start = settings_of(kind), _family.canaries_of(kind["start"], settings, dataset)
    given = (
        chosen,
        _build.model(kind["model"], len(dataset.class_names)),
        _build.pool(settings, dataset, start),
        start,
    )
    budget = {name: size * 2**20 for name, size in kind["memory_mb"].items()}
    plan, storage = optimization.plan_replay(*given, budget=budget, spill=checkpoints / "spill")
    print(f"each of {chosen.num_trainings * chosen.num_metasteps} trainings: {plan}")
    state, history = resumed(
        checkpoint, optimization.initial(chosen, start), np.full((chosen.num_metasteps, len(HISTORY)), np.nan)
    )
    work = chosen.num_trainings * chosen.recipe.num_steps
    with progress(chosen.num_metasteps * work, "step", kind["family"], initial=state.step * work) as bar:
        for reached, row in optimization.optimize(
            *given,
            seed=settings["optimization_seed"],
            game=kind["game"],
            branching=plan.branching,
            storage=storage,
            resume=state,
            checkpoint=checkpoints,
            on_step=lambda phase, step: bar.update(phase == "backward"),
            should_stop=should_stop,
        ):
            state = reached
            history[state.step - 1] = [row[name] for name in HISTORY]
            store.write_tree(checkpoint, {**vars(state), "history": history}, {})
            bar.set_postfix(metastep=state.step, objective=row["objective"], auroc=row["auroc"], refresh=False)
    return dataclasses.replace(start, images=state.images), pd.DataFrame(history, columns=list(HISTORY))


def resumed(
    checkpoint: Path, begin: optimization.MetaState, history: np.ndarray
) -> tuple[optimization.MetaState, np.ndarray]:
    """The state and the history of a checkpoint, or those of the beginning if there is none."""
    if not checkpoint.exists():
        return begin, history
    saved = store.read_tree(checkpoint, {**vars(begin), "history": history})
    print(f"goes on from {checkpoint}, after metastep {saved['step']}")
    return optimization.MetaState(**{name: saved[name] for name in vars(begin)}), saved["history"]


if __name__ == "__main__":
    with running(snakemake) as job:
        dataset = _build.dataset(job.settings, job.input.dataset)
        made, history = optimize_canaries(job.settings, dataset, job.checkpoints, job.termination.listen())
        provenance = job.provenance(seed=job.settings["optimization_seed"], class_names=dataset.class_names)
        store.write_csv(job.output.history, history.astype({"metastep": int}), provenance)
        store.write_npz(job.output.canaries, made.arrays(), provenance)
        job.finish_checkpoints()
