"""Fetches and verifies a data set: -> the four arrays, provenance.json."""

from pathlib import Path

from _job import running

from metacanary import data

if __name__ == "__main__":
    with running(snakemake) as job:
        dataset = data.load(job.settings["dataset"], Path(job.output.provenance).parent.parent)
        print(f"{dataset.name}: {len(dataset.train_labels)} training and {len(dataset.test_labels)} test images")
