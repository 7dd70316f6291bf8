"""Trains a block of audited models: data set, canaries.npz, model.npz of a pretraining if there is one -> block.npz.

Finished runs, and those under way once a minute and on SIGTERM, go to checkpoints; a killed job goes on from there.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import _build
import flax.linen as nn
import jax
import numpy as np
from _job import advance, progress, running
from flax.traverse_util import flatten_dict

from metacanary import accounting, canaries, data, pretraining, runs, store, training, training_together
from metacanary.interruption import ShouldStop


def recipe(settings: dict[str, Any]) -> training.Recipe:
    """The recipe of a training; the noise of DP-SGD is what its target epsilon needs."""
    options = settings["options"]
    if settings["algorithm"] == "sgd":
        return _build.recipe("sgd", options)
    noise = accounting.noise_multiplier(
        epsilon=float(settings["epsilon"]),
        sampling_prob=options["sampling_prob"],
        num_steps=options["num_steps"],
        delta=settings["delta"],
        accountant=settings["accountant"],
    )
    print(f"noise multiplier {noise:.4g} for epsilon {settings['epsilon']} at delta {settings['delta']}")
    target = {"epsilon": float(settings["epsilon"]), "delta": settings["delta"]}
    return _build.recipe("dpsgd", options | {"noise_multiplier": noise, "target": target})


def train_runs(
    settings: dict[str, Any],
    chosen: training.Recipe,
    model: nn.Module,
    dataset: data.Dataset,
    inserted: canaries.Canaries,
    roles: Sequence[str],
    pretrained: pretraining.Pretrained | None = None,
    *,
    seeds: Sequence[int],
    **options: Any,
) -> list[dict[str, np.ndarray]]:
    """Trains models, each on its own coins or on no canary at all; if there are several, at once.

    Args:
      settings: Of the job.
      chosen: What to train with.
      model: The network.
      dataset: Its training images make the pool, its test images the accuracy.
      inserted: The canaries.
      roles: audited, surrogate or reference, of each run; a reference run includes no canary.
      pretrained: What to start from; None for from scratch.
      seeds: Of each run.
      **options: checkpoint, on_step, should_stop of `training.train`.

    Returns:
      Of each run: included [m], test_accuracy [S], noise_multiplier [], initial/<path> [...], and params/<path>
      [S, ...] of S snapshots.
    """
    coins = [runs.coins(seed, len(inserted.id), settings["game"]) for seed in seeds]
    included = np.stack([own & (role != "reference") for own, role in zip(coins, roles, strict=True)])
    pool = _build.pool(settings, dataset, inserted)
    keys, image_shape = [runs.stream(seed, "init") for seed in seeds], pool.images.shape[1:]
    start = partial(pretraining.start, model, pretrained, dataset.class_names, image_shape=image_shape)
    initial = [start(key=key) for key in keys]
    shared, options = (chosen, model, pool, inserted.images), options | {"snapshots": settings["snapshots"]}
    if len(seeds) == 1:
        found = [training.train(*shared, included[0], seed=seeds[0], initial=initial[0], **options)]
    else:
        found = training_together.train_together(*shared, included, seeds=seeds, initial=initial, **options)
    test_images = _build.resized(settings, dataset.test_images)

    def arrays(own: np.ndarray, first: training.Params, snapshots: dict[int, training.Params]) -> dict[str, np.ndarray]:
        trees = [snapshots[step] for step in settings["snapshots"]]
        accuracies = [training.accuracy(model, params, test_images, dataset.test_labels) for params in trees]
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *trees)
        return {
            "included": own,
            "test_accuracy": np.array(accuracies),
            "noise_multiplier": np.array(getattr(chosen, "noise_multiplier", 0.0)),
            **{f"initial/{path}": np.asarray(leaf) for path, leaf in flatten_dict(first, sep="/").items()},
            **{f"params/{path}": leaf for path, leaf in flatten_dict(stacked, sep="/").items()},
        }

    return list(map(arrays, included, initial, found))


def train_block(
    settings: dict[str, Any],
    dataset: data.Dataset,
    inserted: canaries.Canaries,
    checkpoints: Path,
    pretrained: pretraining.Pretrained | None = None,
    should_stop: ShouldStop | None = None,
) -> dict[str, np.ndarray]:
    """Trains the runs of a block, one after the other, or groups of `runs_together` of them.

    Returns:
      The arrays of block.npz: run [K], role [K], step [S], canary_id [m], and those of `train_runs`, stacked over runs.
    """
    chosen, model = recipe(settings), _build.model(settings["model"], len(dataset.class_names))
    steps, together = chosen.num_steps, settings.get("runs_together", 1)
    listed = list(zip(settings["runs"], settings["roles"], settings["seeds"], strict=True))
    groups = [listed[first : first + together] for first in range(0, len(listed), together)]
    finished = {run: checkpoints / f"run{run}.npz" for run in settings["runs"]}

    def is_finished(group: list[tuple[int, str, int]]) -> bool:
        return all(finished[run].exists() for run, _, _ in group)

    arrays = []
    finished_before = sum(len(group) for group in groups if is_finished(group))
    with progress(len(listed) * steps, "step", "train", initial=finished_before * steps) as bar:
        for group in groups:
            numbers, roles, seeds = zip(*group, strict=True)
            if not is_finished(group):
                before, count = len(arrays) * steps, len(group)
                name = f"run{numbers[0]}" if count == 1 else f"runs{numbers[0]}-{numbers[-1]}"
                found = train_runs(
                    settings,
                    chosen,
                    model,
                    dataset,
                    inserted,
                    roles,
                    pretrained,
                    seeds=seeds,
                    checkpoint=checkpoints / f"{name}-training.npz",
                    on_step=lambda done, before=before, count=count: advance(bar, before + done * count, by=count),
                    should_stop=should_stop,
                )
                for run, of_run in zip(numbers, found, strict=True):
                    store.write_npz(finished[run], of_run, {})
            arrays += [store.read_npz(finished[run])[0] for run in numbers]
            bar.set_postfix(run=numbers[-1], test_accuracy=arrays[-1]["test_accuracy"][-1], refresh=False)
    index = {"run": settings["runs"], "role": settings["roles"], "step": settings["snapshots"]}
    index["canary_id"] = inserted.id
    return {**index, **{name: np.stack([of_run[name] for of_run in arrays]) for name in arrays[0]}}


if __name__ == "__main__":
    with running(snakemake) as job:
        dataset = _build.dataset(job.settings, job.input.dataset)
        inserted = canaries.Canaries.from_arrays(store.read_npz(job.input.canaries)[0])
        given = job.input.pretrained
        pretrained = pretraining.Pretrained.from_arrays(store.read_npz(given)[0]) if given else None
        block = train_block(job.settings, dataset, inserted, job.checkpoints, pretrained, job.termination.listen())
        store.write_npz(job.output.models, block, job.provenance(seed=job.settings["seeds"]))
        job.finish_checkpoints()
