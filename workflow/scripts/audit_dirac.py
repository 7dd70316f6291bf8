"""Turns the scores of Dirac canaries into lower bounds on epsilon: scores.csv, runs.csv -> epsilon.csv."""

from _job import running

from metacanary import store, summary

if __name__ == "__main__":
    with running(snakemake) as job:
        table = summary.epsilon_table(
            store.read_csv(job.input.scores),
            store.read_csv(job.input.runs),
            summary.Settings(**job.settings["audit"]),
            cell=job.settings["cell"],
        )
        store.write_csv(job.output.epsilon, table, job.provenance())
