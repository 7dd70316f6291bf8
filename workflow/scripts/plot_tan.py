"""Plots accuracy against total noise, and what was searched: tan.csv -> tan.pdf, .png."""

from pathlib import Path

from _job import running

from metacanary import figures, store, tan_figure

if __name__ == "__main__":
    with running(snakemake) as job:
        figure = tan_figure.figure(store.read_csv(job.input.table))
        store.write_json(Path(job.output.pdf).with_suffix(".provenance.json"), job.provenance())
        figures.save(figure, job.output.pdf, job.output.png)
