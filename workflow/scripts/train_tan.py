"""Trains one setting of the search by total noise, without canaries: data set, what was searched -> trial.csv.

Finished runs, and the run under way once a minute, go to checkpoints; a killed job goes on from there.
"""

from dataclasses import replace
from typing import Any

import _build
import pandas as pd
from _job import advance, progress, running

from metacanary import recipes, store, tan, tan_runs


def recipe(
    settings: dict[str, Any], reference: recipes.DPSGD, searched: list[pd.DataFrame], num_full: int, num_trained: int
) -> recipes.DPSGD:
    """The recipe of a trial: a simulation without a target, or, of the stage full, the full run with its target."""
    stage, sizes = settings["stage"], {"num_examples": num_full, "num_simulated": num_trained}
    if stage == "scaling":
        noise = reference.noise_multiplier * settings["noise_factor"]
        batch_size = settings["batch_size"] or tan.expected_batch(reference, num_full)
        return tan.simulate(replace(reference, noise_multiplier=noise), batch_size, **sizes)
    chosen = settings["candidate"] if stage == "search" else settings["candidates"][tan_runs.choose(searched)]
    print(f"{stage}: {chosen}")
    found = tan.with_settings(reference, **chosen)
    if stage == "full":
        budget = {name: settings[name] for name in ("epsilon", "delta", "accountant")}
        return tan.calibrate(found, **budget)
    return tan.simulate(found, settings["batch_size"], **sizes)


if __name__ == "__main__":
    with running(snakemake) as job:
        settings = job.settings
        dataset = _build.dataset(settings, job.input.dataset)
        train, test = (_build.resized(settings, pixels) for pixels in (dataset.train_images, dataset.test_images))
        trained, held_out = (train, dataset.train_labels), (test, dataset.test_labels)
        if settings["stage"] == "search":
            parts = tan_runs.split(dataset.train_labels, len(dataset.class_names), settings["num_validation"])
            trained, held_out = ((train[part], dataset.train_labels[part]) for part in parts)
        budget = {name: settings[name] for name in ("epsilon", "delta", "accountant")}
        reference = tan.calibrate(_build.recipe("dpsgd", settings["options"] | {"noise_multiplier": 0.0}), **budget)
        searched = [store.read_csv(path) for path in job.input.get("searched", [])]
        chosen = recipe(settings, reference, searched, len(train), len(trained[0]))
        described = tan_runs.describe(
            chosen,
            full_batch=tan.expected_batch(reference, len(train)),
            num_full=len(train),
            num_trained=len(trained[0]),
            delta=settings["delta"],
            accountant=settings["accountant"],
        )
        with progress(len(settings["seeds"]) * chosen.num_steps, "step", snakemake.wildcards.trial) as bar:
            runs = tan_runs.train_runs(
                chosen,
                _build.model(settings["model"], len(dataset.class_names)),
                *trained,
                held_out,
                seeds=settings["seeds"],
                checkpoints=job.checkpoints,
                on_step=lambda done: advance(bar, done),
                should_stop=job.termination.listen(),
            )
            table = pd.DataFrame([described | run for run in runs], columns=list(tan_runs.COLUMNS))
        store.write_csv(job.output.runs, table, job.provenance(seed=settings["seeds"]))
        job.finish_checkpoints()
