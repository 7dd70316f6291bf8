"""What jobs took: seconds and memory by rule, from the benchmark files that Snakemake writes."""

import csv
from collections.abc import Collection, Iterator
from pathlib import Path

import pandas as pd

COLUMNS = ("rule", "jobs", "seconds", "seconds_longest", "memory_mb")


def jobs(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields (rule, columns) of each job; the folder or file below `folder` names the rule."""
    for path in sorted(folder.rglob("*.tsv")):
        rule = path.relative_to(folder).parts[0].removesuffix(".tsv")
        with path.open(encoding="utf-8", newline="") as file:
            for job in csv.DictReader(file, delimiter="\t"):
                yield rule, job


def number(cell: str) -> float:
    """Reads a benchmark's number; 0 where Snakemake could not measure it, as in jobs too short to be seen."""
    try:
        return float(cell)
    except ValueError:
        return 0.0


def by_rule(folder: Path, rules: Collection[str] | None = None) -> pd.DataFrame:
    """Sums up jobs by rule.

    Args:
      folder: The experiment's folder of benchmarks; it may be absent, as in results that were restored.
      rules: Which rules; None for all that are found.

    Returns:
      Columns `COLUMNS`, a row per rule that has jobs, by name: the number of jobs; seconds, their sum over jobs, which
      run side by side, not the time that passed; seconds of the longest; the largest resident memory of a job in MB.
    """
    found = [
        {"rule": rule, "seconds": float(job["s"]), "memory_mb": number(job["max_rss"])}
        for rule, job in jobs(folder)
        if rules is None or rule in rules
    ]
    frame = pd.DataFrame(found, columns=["rule", "seconds", "memory_mb"])
    total = frame.groupby("rule").agg(
        jobs=("seconds", "size"),
        seconds_longest=("seconds", "max"),
        seconds=("seconds", "sum"),
        memory_mb=("memory_mb", "max"),
    )
    return total.reset_index()[list(COLUMNS)]
