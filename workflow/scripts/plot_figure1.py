"""Plots canaries before and after optimisation: canaries.npz -> figure1.pdf, figure1.png."""

from pathlib import Path

from _job import running

from metacanary import canaries, figures, store

if __name__ == "__main__":
    with running(snakemake) as job:
        arrays, origin = store.read_npz(job.input.canaries)
        figure = figures.figure1(
            canaries.Canaries.from_arrays(arrays),
            class_names=origin["class_names"],
            num_shown=job.settings["num_shown"],
        )
        store.write_json(Path(job.output.pdf).with_suffix(".provenance.json"), job.provenance())
        figures.save(figure, job.output.pdf, job.output.png)
