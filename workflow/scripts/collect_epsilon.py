"""Puts the audits of all cells into one tidy table: epsilon.csv of each cell -> summary/epsilon.csv."""

from _job import running

from metacanary import store, summary

if __name__ == "__main__":
    with running(snakemake) as job:
        table = summary.collect(map(store.read_csv, job.input.audits))
        store.write_csv(job.output.summary, table, job.provenance())
