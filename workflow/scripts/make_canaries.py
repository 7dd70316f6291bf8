"""Makes the canaries of a family that needs no optimisation: data set -> canaries.npz."""

import _build
import _family
from _job import running

from metacanary import store

if __name__ == "__main__":
    with running(snakemake) as job:
        dataset = _build.dataset(job.settings, job.input.dataset)
        made = _family.canaries_of(job.settings["kind"]["family"], job.settings, dataset)
        provenance = job.provenance(seed=job.settings["seed"], class_names=dataset.class_names)
        store.write_npz(job.output.canaries, made.arrays(), provenance)
