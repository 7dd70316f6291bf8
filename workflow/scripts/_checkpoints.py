"""When checkpoints are deleted: not by the job that is done with them, but once the workflow has its result.

After a job's script a few seconds pass until Snakemake and SLURM know that it succeeded. What ends the job in between
(its time limit, its node) makes Snakemake delete the result; the next attempt then finds all work in the checkpoints.
"""

import shutil
from pathlib import Path

FINISHED = "finished"
EARLIER = "earlier.log"


def earlier_log(folder: Path | str) -> Path:
    """Where a job keeps the log of its earlier attempts, since Snakemake deletes a log before each attempt."""
    return Path(folder, EARLIER)


def mark_finished(folder: Path) -> None:
    """Says that a folder of checkpoints holds all of a result."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FINISHED).touch()


def discard_finished(checkpoints: Path) -> None:
    """Deletes the checkpoints of all results that are finished, and the logs beside them; others stay."""
    for marker in list(checkpoints.rglob(FINISHED)):
        shutil.rmtree(marker.parent, ignore_errors=True)
        earlier_log(marker.parent.parent).unlink(missing_ok=True)
