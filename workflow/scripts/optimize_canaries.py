"""Optimises canaries, by metagradient descent or for their gradients' norms: data set -> canaries.npz, history.csv.

The state goes to a checkpoint (metagradients: after every metastep, and within one every two minutes; norms: once a
minute) and on SIGTERM; a killed job goes on from there, to the same canaries bit by bit.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _build
import _family
import numpy as np
import pandas as pd
from _job import advance, progress, running

from metacanary import canaries, data, gradient_max, objectives, optimization, soft_labels, store, updates
from metacanary.interruption import ShouldStop, Stopped

HISTORY = ("metastep", "objective", "auroc", "seconds")
LABEL_HISTORY = (*HISTORY, "labels_changed")
NORM_HISTORY = ("step", "mean_gradient_norm", "geometric_mean_gradient_norm", "seconds")
CHECKPOINT_SECONDS = 60.0


def settings_of(kind: dict[str, Any]) -> optimization.Optimization:
    """The settings of `optimization.optimize` from those of a canary kind."""
    objective = dict(kind["objective"])
    return optimization.Optimization(
        objective=objectives.OBJECTIVES[objective.pop("name")](**objective),
        update=update_of(kind),
        recipe=_build.recipe(kind["algorithm"], kind["training"]),
        num_metasteps=kind["num_metasteps"],
        num_splits=kind["num_splits"],
        complement=kind["complement"],
        interference=kind.get("interference", 0.0),
        unit_gradients=kind.get("unit_gradients", False),
        objective_steps=tuple(kind.get("objective_steps", ())),
        labels=soft_labels.LabelUpdate(**kind["labels"]) if "labels" in kind else None,
    )


def norm_settings_of(kind: dict[str, Any]) -> gradient_max.GradientMax:
    """The settings of `gradient_max.maximize` from those of a canary kind."""
    return gradient_max.GradientMax(
        update=update_of(kind),
        recipe=_build.recipe(kind["algorithm"], kind["training"]),
        num_steps=kind["num_steps"],
        num_proxies=kind["num_proxies"],
        proxy_steps=tuple(kind["proxy_steps"]),
        microbatch=kind["microbatch"],
    )


def update_of(kind: dict[str, Any]) -> updates.SignedUpdate | updates.AdamUpdate:
    """How the pixels of a canary kind move."""
    update = dict(kind["update"])
    return updates.UPDATES[update.pop("name")](**update)


def optimize_canaries(
    settings: dict[str, Any], dataset: data.Dataset, checkpoints: Path, should_stop: ShouldStop | None = None
) -> tuple[canaries.Canaries, pd.DataFrame]:
    """Optimises canaries, from the checkpoints if there are any.

    Returns:
      The canaries, and a row per update of their pixels: what is optimised, before the update, and seconds.
    """
    start = _family.canaries_of(settings["kind"]["start"], settings, dataset)
    optimizer = {"metagradient": descend, "gradient_max": maximize_norms}[settings["kind"]["family"]]
    return optimizer(settings, dataset, start, checkpoints, should_stop)


def descend(
    settings: dict[str, Any],
    dataset: data.Dataset,
    start: canaries.Canaries,
    checkpoints: Path,
    should_stop: ShouldStop | None,
) -> tuple[canaries.Canaries, pd.DataFrame]:
    """Optimises canaries by metagradient descent; as `optimize_canaries`."""
    kind, checkpoint = settings["kind"], checkpoints / "state.npz"
    chosen = settings_of(kind)
    model = _build.model(kind["model"], len(dataset.class_names))
    given = (chosen, model, _build.pool(settings, dataset, start), start)
    budget = {name: size * 2**20 for name, size in kind["memory_mb"].items()}
    plan, storage = optimization.plan_replay(*given, budget=budget, spill=checkpoints / "spill")
    print(f"each of {chosen.num_trainings * chosen.num_metasteps} trainings: {plan}")
    columns = HISTORY if chosen.labels is None else LABEL_HISTORY
    state, history = resumed(checkpoint, optimization.initial(chosen, model, start), chosen.num_metasteps, columns)
    work = chosen.num_trainings * chosen.num_steps
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
            history[state.step - 1] = [row[name] for name in columns]
            store.write_tree(checkpoint, {**vars(state), "history": history}, {})
            bar.set_postfix(metastep=state.step, objective=row["objective"], auroc=row["auroc"], refresh=False)
    return state.canaries(start), pd.DataFrame(history, columns=list(columns))


def maximize_norms(
    settings: dict[str, Any],
    dataset: data.Dataset,
    start: canaries.Canaries,
    checkpoints: Path,
    should_stop: ShouldStop | None,
) -> tuple[canaries.Canaries, pd.DataFrame]:
    """Optimises canaries for their gradients' norms on proxies; as `optimize_canaries`."""
    kind, checkpoint = settings["kind"], checkpoints / "state.npz"
    chosen, model = norm_settings_of(kind), _build.model(kind["model"], len(dataset.class_names))
    pool, seed = _build.pool(settings, dataset, start), settings["optimization_seed"]
    with progress(chosen.num_proxies * chosen.recipe.num_steps, "step", "proxies") as bar:
        options = {"on_step": lambda done: advance(bar, done), "should_stop": should_stop}
        proxies = gradient_max.train_proxies(chosen, model, pool, start, seed=seed, checkpoint=checkpoints, **options)
    state, history = resumed(checkpoint, gradient_max.initial(chosen, start), chosen.num_steps, NORM_HISTORY)
    written = time.monotonic()
    with progress(chosen.num_steps, "step", kind["family"], initial=state.step) as bar:
        for reached, row in gradient_max.maximize(chosen, model, start, proxies, resume=state):
            state = reached
            history[state.step - 1] = [row[name] for name in NORM_HISTORY]
            stopping = should_stop is not None and should_stop()
            if stopping or time.monotonic() - written > CHECKPOINT_SECONDS or state.step == chosen.num_steps:
                store.write_tree(checkpoint, {**vars(state), "history": history}, {})
                written = time.monotonic()
            bar.update()
            bar.set_postfix(norm=row["geometric_mean_gradient_norm"], refresh=False)
            if stopping:
                raise Stopped(f"stopped after step {state.step} of {chosen.num_steps}")
    return state.canaries(start), pd.DataFrame(history, columns=list(NORM_HISTORY))


def resumed(
    checkpoint: Path, begin: updates.MetaState, num_steps: int, columns: Sequence[str]
) -> tuple[updates.MetaState, np.ndarray]:
    """The state and the history of a checkpoint, or those of the beginning if there is none."""
    history = np.full((num_steps, len(columns)), np.nan)
    if not checkpoint.exists():
        return begin, history
    saved = store.read_tree(checkpoint, {**vars(begin), "history": history})
    print(f"goes on from {checkpoint}, after {columns[0]} {saved['step']}")
    return updates.MetaState(**{name: saved[name] for name in vars(begin)}), saved["history"]


if __name__ == "__main__":
    with running(snakemake) as job:
        dataset = _build.dataset(job.settings, job.input.dataset)
        made, history = optimize_canaries(job.settings, dataset, job.checkpoints, job.termination.listen())
        provenance = job.provenance(seed=job.settings["optimization_seed"], class_names=dataset.class_names)
        counts = {name: int for name in (history.columns[0], "labels_changed") if name in history}
        store.write_csv(job.output.history, history.astype(counts), provenance)
        store.write_npz(job.output.canaries, made.arrays(), provenance)
        job.finish_checkpoints()
