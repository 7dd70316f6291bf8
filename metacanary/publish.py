"""Publishing results: copies what people read to docs/results/ and puts the tables into the README.

`python -m metacanary.publish RESULTS_DIR` after a finished workflow. No number in the README is typed by hand; a test
compares it with docs/results.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from metacanary import store

SUMMARY = "summary/epsilon.csv"  # published compressed: it has a row per run, snapshot, score, auditor and protocol
PUBLISHED = (
    *(SUMMARY, "summary/epsilon.provenance.json"),
    *("tables/bounds.csv", "tables/bounds.md"),
    *("tables/table1.csv", "tables/table1.md", "tables/table2.csv", "tables/table2.md"),
    *("figures/figure1.png", "figures/figure2.png"),
)
METASMOOTHNESS = (
    *("tables/metasmoothness.csv", "tables/metasmoothness.provenance.json", "tables/metasmoothness.md"),
    "figures/metasmoothness.png",
)
TAN = ("tables/tan.csv", "tables/tan.provenance.json", "tables/tan.md", "figures/tan.png")
START, END = "<!-- results: made by `make publish`, not by hand -->", "<!-- end of results -->"


def publish(results: Path, docs: Path, readme: Path) -> None:
    """Copy the published files of an experiment and renew the README's tables.

    Args:
      results: the experiment's results_dir.
      docs: folder to copy to; made if absent.
      readme: a Markdown file with the lines START and END.

    Raises:
      ValueError: a file of PUBLISHED is missing, results come from more than one state of a script's code, or the
        README lacks the two lines.
    """
    _copy(results, docs, PUBLISHED)
    store.write_text(readme, with_tables(readme.read_text(encoding="utf-8"), docs))


def publish_without_audits(results: Path, docs: Path, names: Sequence[str]) -> None:
    """Copy the published files of an experiment that has no audits; otherwise as `publish`.

    Args:
      results: the experiment's results_dir.
      docs: folder to copy to; made if absent.
      names: METASMOOTHNESS or TAN.
    """
    _copy(results, docs, names)


def _copy(results: Path, docs: Path, names: Sequence[str]) -> None:
    """Copy files, the first of which is a table that all others come from, and say how they were made."""
    missing = [name for name in names if not (results / name).exists()]
    if missing:
        raise ValueError(f"results: {results} lacks {', '.join(missing)}; run the workflow to its end first")
    made_on = _made_on(results, results / names[0])
    docs.mkdir(parents=True, exist_ok=True)
    for name in names:
        if name == SUMMARY:
            with store.atomic(docs / "epsilon.csv.gz") as file:
                file.write(gzip.compress((results / name).read_bytes(), mtime=0))
        else:
            shutil.copyfile(results / name, docs / Path(name).name)
    store.write_json(docs / "made_on.json", made_on)


def with_tables(text: str, docs: Path) -> str:
    """The README's text with the published tables between START and END."""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise ValueError(f"readme: expected the lines {START!r} and {END!r}")
    tables = [(docs / f"{name}.md").read_text(encoding="utf-8").strip() for name in ("table1", "table2")]
    return "\n\n".join([before + start, *tables, end + after])


def _made_on(results: Path, table: Path) -> dict[str, Any]:
    """Device, versions, digests, and the time and memory of the jobs from Snakemake's benchmarks."""
    provenance = store.read_provenance(table)
    jobs = list(_benchmarks(results / "benchmarks"))
    seconds: dict[str, float] = {}
    for rule, job in jobs:
        seconds[rule] = round(seconds.get(rule, 0.0) + float(job["s"]), 2)
    return {
        "device": provenance["device"],
        "versions": provenance["versions"],
        "config_digest": provenance["config_digest"],
        "code_digests": _code_digests(provenance),
        "wall_seconds_by_rule": seconds,
        "wall_seconds": round(sum(seconds.values()), 2),
        "max_rss_mb": max((_number(job["max_rss"]) for _, job in jobs), default=0.0),
    }


def _code_digests(provenance: dict[str, Any]) -> dict[str, str]:
    """The digest of each script's code; there must be one only."""
    mixed = sorted(script for script, digests in provenance["code_digests"].items() if len(digests) != 1)
    if mixed:
        raise ValueError(
            f"results: made with more than one state of the code of {', '.join(mixed)}; run the workflow again"
        )
    return {script: digest for script, (digest,) in provenance["code_digests"].items()}


def _benchmarks(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """(rule, columns) of each job; the folder or file below `folder` names the rule."""
    for path in sorted(folder.rglob("*.tsv")):
        rule = path.relative_to(folder).parts[0].removesuffix(".tsv")
        with path.open(encoding="utf-8", newline="") as file:
            for job in csv.DictReader(file, delimiter="\t"):
                yield rule, job


def _number(cell: str) -> float:
    """A benchmark's number; 0 where Snakemake could not measure it, as in jobs too short to be seen."""
    try:
        return float(cell)
    except ValueError:
        return 0.0


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="results_dir of a finished workflow")
    parser.add_argument("--docs", type=Path, default=None, help="default: docs/results/<name of results>")
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    chosen = parser.parse_args(arguments)
    docs = chosen.docs or Path("docs/results", chosen.results.name)
    others = [names for names in (METASMOOTHNESS, TAN) if (chosen.results / names[0]).exists()]
    if others and not (chosen.results / PUBLISHED[0]).exists():
        publish_without_audits(chosen.results, docs, others[0])
    else:
        publish(chosen.results, docs, chosen.readme)


if __name__ == "__main__":
    main()
