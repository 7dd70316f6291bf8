"""Scores the canaries under every model of a block: data set, canaries.npz, block.npz -> scores, runs, population."""

import _build
from _job import progress, running

from metacanary import block_scores, canaries, store

if __name__ == "__main__":
    with running(snakemake) as job:
        dataset = _build.dataset(job.settings, job.input.dataset)
        inserted = canaries.Canaries.from_arrays(store.read_npz(job.input.canaries)[0])
        block, _ = store.read_npz(job.input.models)
        model = _build.model(job.settings["model"], len(dataset.class_names))
        first = slice(job.settings["num_population"])
        others = _build.resized(job.settings, dataset.test_images[first])
        options = {"names": job.settings["scores"], **job.settings.get("augmentation", {})}
        with progress(2 * block["test_accuracy"].size, "model", "score") as bar:
            table = block_scores.score_block(model, block, inserted, **options, on_model=bar.update)
            population = block_scores.population_block(
                model, block, others, dataset.test_labels[first], on_model=bar.update
            )
        provenance = job.provenance()
        store.write_csv(job.output.runs, block_scores.run_table(block), provenance)
        store.write_npz(job.output.population, population, provenance)
        store.write_csv(job.output.scores, table, provenance)
