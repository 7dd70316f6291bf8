"""Puts scores, audits and canaries into a bundle that others can audit again: all results but models -> bundle."""

import json
from pathlib import Path

from _job import running

from metacanary import bundle

if __name__ == "__main__":
    with running(snakemake) as job:
        folder = Path(job.output[0]).parent
        names = ("canaries", "histories", "metasmoothness", "trials", "cost")
        listed = [path for name in names for path in job.input.get(name)]
        also = [Path(path).relative_to(folder.parent).as_posix() for path in listed]
        bundle.write(folder.parent, folder, config=json.loads(job.settings["config"]), also=also)
