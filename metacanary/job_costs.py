"""What jobs took: seconds and memory by rule, from the benchmark files that Snakemake writes."""

import csv
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pandas as pd

COLUMNS = ("rule", "jobs", "seconds", "seconds_longest", "memory_mb")


def jobs(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields (rule, columns) of each job; the folder or file below `folder` names the rule."""
    for path in sorted(folder.rglob("*.tsv")):
        rule = path.relative_to(folder).parts[0].removesuffix(".tsv")
        for job in _rows(path):
            yield rule, job


def _rows(path: Path) -> list[dict[str, str]]:
    """Reads a benchmark file: a row per repetition of the job."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def number(cell: str) -> float:
    """Reads a benchmark's number; 0 where Snakemake could not measure it, as in jobs too short to be seen."""
    try:
        return float(cell)
    except ValueError:
        return 0.0


def by_rule(files: Mapping[str, Iterable[Path]]) -> pd.DataFrame:
    """Sums up jobs by rule.

    Args:
      files: The benchmark files of each rule's jobs. Some may be absent, as in results that were restored. Not all of
        a folder: jobs of an older config leave theirs there.

    Returns:
      Columns `COLUMNS`, a row per rule that has jobs, by name: the number of jobs; seconds, their sum over jobs, which
      run side by side, not the time that passed; seconds of the longest; the largest resident memory of a job in MB.
      Of a job that was interrupted, Snakemake measures the last attempt alone.
    """
    found = [
        {"rule": rule, "seconds": float(job["s"]), "memory_mb": number(job["max_rss"])}
        for rule, paths in files.items()
        for path in paths
        if path.is_file()
        for job in _rows(path)
    ]
    frame = pd.DataFrame(found, columns=["rule", "seconds", "memory_mb"])
    total = frame.groupby("rule").agg(
        jobs=("seconds", "size"),
        seconds_longest=("seconds", "max"),
        seconds=("seconds", "sum"),
        memory_mb=("memory_mb", "max"),
    )
    return total.reset_index()[list(COLUMNS)]
