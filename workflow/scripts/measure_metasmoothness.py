"""Measures the metasmoothness of a canary kind's metamodel and training: data set -> metasmoothness.csv."""

import _build
import _family
import pandas as pd
from _job import progress, running

from metacanary import metasmoothness, store

if __name__ == "__main__":
    with running(snakemake) as job:
        dataset = _build.dataset(job.settings, job.input.dataset)
        kind, seeds = job.settings["kind"], job.settings["seeds"]
        start = _family.canaries_of(kind["start"], job.settings, dataset)
        recipe = _build.recipe(kind["algorithm"], kind["training"])
        with progress(len(seeds) * 3 * recipe.num_steps, "step", "metasmoothness") as bar:
            rows = metasmoothness.of_canaries(
                recipe,
                _build.model(kind["model"], len(dataset.class_names)),
                _build.pool(job.settings, dataset, start),
                start,
                seeds=seeds,
                game=kind["game"],
                step=job.settings["step"],
                on_step=lambda step: bar.update(),
            )
            table = pd.DataFrame(rows, columns=list(metasmoothness.COLUMNS))
        store.write_csv(job.output.measured, table, job.provenance(seed=job.settings["seed"]))
