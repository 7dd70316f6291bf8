"""Plots a comparison of canary kinds: comparison_*.csv -> comparison_*.pdf, .png."""

from pathlib import Path

from _job import running

from metacanary import comparison_figure, figures, store

if __name__ == "__main__":
    with running(snakemake) as job:
        figure = comparison_figure.figure(store.read_csv(job.input.table))
        store.write_json(Path(job.output.pdf).with_suffix(".provenance.json"), job.provenance())
        figures.save(figure, job.output.pdf, job.output.png)
