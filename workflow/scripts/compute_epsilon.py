"""Turns the scores of all runs of a cell into lower bounds on epsilon: scores, runs, population -> epsilon.csv."""

import pandas as pd
from _job import progress, running

from metacanary import store, summary

if __name__ == "__main__":
    with running(snakemake) as job:
        scores = pd.concat(map(store.read_csv, job.input.scores), ignore_index=True)
        runs = pd.concat(map(store.read_csv, job.input.runs), ignore_index=True)
        population = [store.read_npz(path)[0] for path in job.input.population]
        settings = summary.Settings(**job.settings["audit"])
        num_audits = runs["step"].nunique() * len(settings.scores) * len(settings.protocols)
        with progress(num_audits, "audit", "audit") as bar:
            table = summary.epsilon_table(
                scores, runs, settings, cell=job.settings["cell"], population=population, on_audit=bar.update
            )
        store.write_csv(job.output.epsilon, table, job.provenance())
