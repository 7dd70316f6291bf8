"""Plots the ledger of epsilon: ledger.csv -> ledger.pdf, .png."""

from pathlib import Path

from _job import running

from metacanary import figure_style, ledger_figure, store

if __name__ == "__main__":
    with running(snakemake) as job:
        figure = ledger_figure.figure(store.read_csv(job.input.table))
        store.write_json(Path(job.output.pdf).with_suffix(".provenance.json"), job.provenance())
        figure_style.save(figure, job.output.pdf, job.output.png)
