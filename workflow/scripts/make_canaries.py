"""Makes the canaries of a family that needs no optimisation: data set -> canaries.npz."""

from pathlib import Path

import _family
from _job import running

from metacanary import data, store

if __name__ == "__main__":
    with running(snakemake) as job:
        dataset = data.load(job.settings["dataset"], Path(job.input.dataset).parent.parent)
        made = _family.canaries_of(job.settings["kind"]["family"], job.settings, dataset)
        provenance = job.provenance(seed=job.settings["seed"], class_names=dataset.class_names)
        store.write_npz(job.output.canaries, made.arrays(), provenance)
