"""Trains a model without privacy, for others to start from: data set -> model.npz.

The training goes to a checkpoint once a minute and on SIGTERM; a killed job goes on from there.
"""

from pathlib import Path
from typing import Any

import _build
import numpy as np
from _job import advance, progress, running

from metacanary import data, pretraining, runs, store, training
from metacanary.interruption import ShouldStop


def pretrain(
    settings: dict[str, Any], dataset: data.Dataset, checkpoints: Path, should_stop: ShouldStop | None = None
) -> dict[str, np.ndarray]:
    """Trains the model, on images without any canary.

    Returns:
      params/<path>, class_names [k], num_images [], test_accuracy [] on the test images of the same data set.
    """
    chosen, model = _build.recipe("sgd", settings["options"]), _build.model(settings["model"], len(dataset.class_names))
    pixels, test_images = (_build.resized(settings, part) for part in (dataset.train_images, dataset.test_images))
    no_source, no_label = np.empty(0, int), np.empty(0, np.int32)
    pool = runs.Pool.make(pixels, dataset.train_labels, no_source, no_label)
    with progress(chosen.num_steps, "step", "pretrain") as bar:
        trained = training.train(
            chosen,
            model,
            pool,
            np.empty((0, *pixels.shape[1:]), np.float32),
            np.empty(0, bool),
            seed=settings["seed"],
            snapshots=[chosen.num_steps],
            checkpoint=checkpoints / "training.npz",
            on_step=lambda done: advance(bar, done),
            should_stop=should_stop,
        )[chosen.num_steps]
    accuracy = training.accuracy(model, trained, test_images, dataset.test_labels)
    print(f"{dataset.name}: {len(pixels)} training images, test accuracy {accuracy:.4f}")
    made = pretraining.Pretrained(params=trained, class_names=dataset.class_names).arrays()
    return {**made, "num_images": np.array(len(pixels)), "test_accuracy": np.array(accuracy)}


if __name__ == "__main__":
    with running(snakemake) as job:
        dataset = _build.dataset(job.settings, job.input.dataset)
        model = pretrain(job.settings, dataset, job.checkpoints, job.termination.listen())
        store.write_npz(job.output.model, model, job.provenance(seed=job.settings["seed"]))
        job.finish_checkpoints()
