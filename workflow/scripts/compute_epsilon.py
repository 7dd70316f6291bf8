"""Turns the scores of all runs of a cell into lower bounds on epsilon: scores, runs -> epsilon.csv."""

import pandas as pd
from _job import progress, running

from metacanary import store, summary

if __name__ == "__main__":
    with running(snakemake) as job:
        scores = pd.concat(map(store.read_csv, job.input.scores), ignore_index=True)
        runs = pd.concat(map(store.read_csv, job.input.runs), ignore_index=True)
        settings = summary.Settings(**job.settings["audit"])
        num_games = (runs["run"].nunique() + 1) * runs["step"].nunique() * len(settings.scores)
        with progress(num_games, "game", "audit") as bar:
            table = summary.epsilon_table(scores, runs, settings, cell=job.settings["cell"], on_game=bar.update)
        store.write_csv(job.output.epsilon, table, job.provenance())
