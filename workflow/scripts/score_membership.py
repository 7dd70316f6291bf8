"""Scores the membership of every canary in every model of a block: canaries.npz, block.npz -> scores, runs."""

import _build
from _job import progress, running

from metacanary import canaries, scores, store, summary

if __name__ == "__main__":
    with running(snakemake) as job:
        arrays, origin = store.read_npz(job.input.canaries)
        block, _ = store.read_npz(job.input.models)
        model = _build.model(job.settings["model"], len(origin["class_names"]))
        with progress(block["test_accuracy"].size, "model", "score") as bar:
            table = scores.score_block(model, block, canaries.Canaries.from_arrays(arrays), on_model=bar.update)
        provenance = job.provenance()
        store.write_csv(job.output.runs, summary.run_table(block), provenance)
        store.write_csv(job.output.scores, table, provenance)
