"""Plots empirical epsilon and AUROC along training: summary/epsilon.csv -> figure2.pdf, figure2.png."""

from pathlib import Path

from _job import running

from metacanary import figures, store

if __name__ == "__main__":
    with running(snakemake) as job:
        figure = figures.figure2(store.read_csv(job.input.summary), **job.settings["figure"])
        store.write_json(Path(job.output.pdf).with_suffix(".provenance.json"), job.provenance())
        figures.save(figure, job.output.pdf, job.output.png)
