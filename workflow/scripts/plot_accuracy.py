"""Plots accuracy against target epsilon: accuracy.csv -> accuracy.pdf, .png."""

from pathlib import Path

from _job import running

from metacanary import accuracy_figure, figures, store

if __name__ == "__main__":
    with running(snakemake) as job:
        figure = accuracy_figure.figure(store.read_csv(job.input.table))
        store.write_json(Path(job.output.pdf).with_suffix(".provenance.json"), job.provenance())
        figures.save(figure, job.output.pdf, job.output.png)
