"""Trains a block of audited models: data set, canaries.npz, model.npz of a pretraining if there is one -> block.npz.

Finished runs, and the run under way once a minute and on SIGTERM, go to checkpoints; a killed job goes on from there.
"""

from pathlib import Path
from typing import Any

import _build
import flax.linen as nn
import jax
import numpy as np
from _job import advance, progress, running
from flax.traverse_util import flatten_dict

from metacanary import accounting, canaries, data, pretraining, runs, store, training
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


def train_run(
    settings: dict[str, Any],
    chosen: training.Recipe,
    model: nn.Module,
    dataset: data.Dataset,
    inserted: canaries.Canaries,
    role: str,
    pretrained: pretraining.Pretrained | None = None,
    **options: Any,
) -> dict[str, np.ndarray]:
    """Trains one model on its own coins, or on no canary at all.

    Args:
      settings: Of the job.
      chosen: What to train with.
      model: The network.
      dataset: Its training images make the pool, its test images the accuracy.
      inserted: The canaries.
      role: audited, surrogate or reference; a reference run includes no canary.
      pretrained: What to start from; None for from scratch.
      **options: seed, checkpoint, on_step, should_stop of `training.train`.

    Returns:
      included [m], test_accuracy [S], noise_multiplier [], initial/<path> [...], and params/<path> [S, ...] of S
      snapshots.
    """
    coins = runs.coins(options["seed"], len(inserted.id), settings["game"])
    included = np.zeros_like(coins) if role == "reference" else coins
    pool = _build.pool(settings, dataset, inserted)
    key, image_shape = runs.stream(options["seed"], "init"), pool.images.shape[1:]
    initial = pretraining.start(model, pretrained, dataset.class_names, key=key, image_shape=image_shape)
    snapshots = training.train(
        chosen, model, pool, inserted.images, included, snapshots=settings["snapshots"], initial=initial, **options
    )
    trees = [snapshots[step] for step in settings["snapshots"]]
    test_images = _build.resized(settings, dataset.test_images)
    accuracies = [training.accuracy(model, params, test_images, dataset.test_labels) for params in trees]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *trees)
    return {
        "included": included,
        "test_accuracy": np.array(accuracies),
        "noise_multiplier": np.array(getattr(chosen, "noise_multiplier", 0.0)),
        **{f"initial/{path}": np.asarray(leaf) for path, leaf in flatten_dict(initial, sep="/").items()},
        **{f"params/{path}": leaf for path, leaf in flatten_dict(stacked, sep="/").items()},
    }


def train_block(
    settings: dict[str, Any],
    dataset: data.Dataset,
    inserted: canaries.Canaries,
    checkpoints: Path,
    pretrained: pretraining.Pretrained | None = None,
    should_stop: ShouldStop | None = None,
) -> dict[str, np.ndarray]:
    """Trains the runs of a block, one after the other.

    Returns:
      The arrays of block.npz: run [K], role [K], step [S], canary_id [m], and those of `train_run`, stacked over runs.
    """
    chosen, model = recipe(settings), _build.model(settings["model"], len(dataset.class_names))
    runs, steps = [], chosen.num_steps
    finished_before = sum((checkpoints / f"run{run}.npz").exists() for run in settings["runs"])
    listed = zip(settings["runs"], settings["roles"], settings["seeds"], strict=True)
    with progress(len(settings["runs"]) * steps, "step", "train", initial=finished_before * steps) as bar:
        for index, (run, role, seed) in enumerate(listed):
            finished = checkpoints / f"run{run}.npz"
            if not finished.exists():
                arrays = train_run(
                    settings,
                    chosen,
                    model,
                    dataset,
                    inserted,
                    role,
                    pretrained,
                    seed=seed,
                    checkpoint=checkpoints / f"run{run}-training.npz",
                    on_step=lambda done, before=index * steps: advance(bar, before + done),
                    should_stop=should_stop,
                )
                store.write_npz(finished, arrays, {})
            runs.append(store.read_npz(finished)[0])
            bar.set_postfix(run=run, test_accuracy=runs[-1]["test_accuracy"][-1], refresh=False)
    index = {"run": settings["runs"], "role": settings["roles"], "step": settings["snapshots"]}
    index["canary_id"] = inserted.id
    return {**index, **{name: np.stack([arrays[name] for arrays in runs]) for name in runs[0]}}


if __name__ == "__main__":
    with running(snakemake) as job:
        dataset = _build.dataset(job.settings, job.input.dataset)
        inserted = canaries.Canaries.from_arrays(store.read_npz(job.input.canaries)[0])
        given = job.input.pretrained
        pretrained = pretraining.Pretrained.from_arrays(store.read_npz(given)[0]) if given else None
        block = train_block(job.settings, dataset, inserted, job.checkpoints, pretrained, job.termination.listen())
        store.write_npz(job.output.models, block, job.provenance(seed=job.settings["seeds"]))
        job.finish_checkpoints()
