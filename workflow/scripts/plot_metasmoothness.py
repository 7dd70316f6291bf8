"""Plots what metagradient descent reached against metasmoothness: metasmoothness.csv -> metasmoothness.pdf, .png."""

from pathlib import Path

from _job import running

from metacanary import figures, metasmoothness_figure, store

if __name__ == "__main__":
    with running(snakemake) as job:
        figure = metasmoothness_figure.figure(store.read_csv(job.input.table))
        store.write_json(Path(job.output.pdf).with_suffix(".provenance.json"), job.provenance())
        figures.save(figure, job.output.pdf, job.output.png)
