"""Publishing results: copies what people read to docs/results/ and renews the documents' tables and numbers.

`python -m metacanary.publish RESULTS_DIR` after a finished workflow; `--numbers` renews the documents alone. No
number of ours in README.md is typed by hand; a test compares documents with docs/results.
"""

from __future__ import annotations

import argparse
import gzip
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metacanary import documents, job_costs, store

SUMMARY = "summary/epsilon.csv"  # published compressed: it has a row per run, snapshot, score, auditor and protocol
REPRODUCTION = "tables/reproduction.csv"
PUBLISHED = (
    *(SUMMARY, "summary/epsilon.provenance.json"),
    *("tables/bounds.csv", "tables/bounds.md"),
    *("tables/table1.csv", "tables/table1.md", "tables/table2.csv", "tables/table2.md"),
    *(REPRODUCTION, "tables/reproduction.md"),  # made anew with each change of published numbers or of the code
    *("figures/figure1.png", "figures/figure2.png"),
)
CHOSEN = ("accuracy", "comparison_*", "ledger")  # tables and figures that only some configs ask for
METASMOOTHNESS = (
    *("tables/metasmoothness.csv", "tables/metasmoothness.provenance.json", "tables/metasmoothness.md"),
    "figures/metasmoothness.png",
)
TAN = ("tables/tan.csv", "tables/tan.provenance.json", "tables/tan.md", "figures/tan.png")


def publish(results: Path, docs: Path) -> None:
    """Copy the published files of an experiment, and how it was set up for comparison with published numbers.

    Args:
      results: the experiment's results_dir.
      docs: folder to copy to; made if absent.

    Raises:
      ValueError: a file of PUBLISHED is missing, results come from more than one state of a script's code, or a table
        or figure was made of another summary, as of an earlier config.
    """
    _copy(results, docs, [*PUBLISHED, *_chosen(results)])
    settings = store.read_provenance(results / REPRODUCTION)["settings"]
    store.write_json(docs / documents.SETUP, {name: settings[name] for name in ("setup", "protocol", "score")})


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
    _require_one_source(results, names)
    made_on = _made_on(results, results / names[0])
    docs.mkdir(parents=True, exist_ok=True)
    for name in names:
        if name == SUMMARY:
            with store.atomic(docs / "epsilon.csv.gz") as file:
                file.write(gzip.compress((results / name).read_bytes(), mtime=0))
        else:
            shutil.copyfile(results / name, docs / Path(name).name)
    store.write_json(docs / "made_on.json", made_on)


def _chosen(results: Path) -> list[str]:
    """The tables and figures of an experiment that only some configs ask for."""
    patterns = [
        f"{folder}/{name}.{suffix}"
        for name in CHOSEN
        for folder, suffixes in (("tables", ("csv", "md")), ("figures", ("png",)))
        for suffix in suffixes
    ]
    return [str(path.relative_to(results)) for pattern in patterns for path in sorted(results.glob(pattern))]


def _require_one_source(results: Path, names: Sequence[str]) -> None:
    """Refuse a table that was made of another summary, the first of the names, and a figure of another table."""
    for path in (results / name for name in names[1:] if name.endswith((".csv", ".png"))):
        inputs = store.read_provenance(path)["settings"]["inputs"]
        sources = {"summary": results / names[0], "table": results / "tables" / f"{path.stem}.csv"}
        for name in sorted(sources.keys() & inputs.keys()):
            made = store.read_provenance(sources[name])["config_digest"]
            store.require_config(path, {"config_digest": inputs[name]}, made)


def _made_on(results: Path, table: Path) -> dict[str, Any]:
    """Device, versions, digests, and the time and memory of the jobs from Snakemake's benchmarks."""
    provenance = store.read_provenance(table)
    jobs = list(job_costs.jobs(results / "benchmarks"))
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
        "max_rss_mb": max((job_costs.number(job["max_rss"]) for _, job in jobs), default=0.0),
    }


def _code_digests(provenance: dict[str, Any]) -> dict[str, str]:
    """The digest of each script's code; there must be one only."""
    mixed = sorted(script for script, digests in provenance["code_digests"].items() if len(digests) != 1)
    if mixed:
        raise ValueError(
            f"results: made with more than one state of the code of {', '.join(mixed)}; run the workflow again"
        )
    return {script: digest for script, (digest,) in provenance["code_digests"].items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="?", help="results_dir of a finished workflow")
    parser.add_argument("--numbers", action="store_true", help="renew the documents alone, from docs/results")
    parser.add_argument("--root", type=Path, default=Path(), help="the repository; default: the current folder")
    chosen = parser.parse_args(arguments)
    if (chosen.results is None) != chosen.numbers:
        parser.error("expected either results or --numbers")
    if not chosen.numbers:
        docs = chosen.root / documents.RESULTS / chosen.results.name
        others = [names for names in (METASMOOTHNESS, TAN) if (chosen.results / names[0]).exists()]
        if others and not (chosen.results / PUBLISHED[0]).exists():
            publish_without_audits(chosen.results, docs, others[0])
        else:
            publish(chosen.results, docs)
    documents.renew(chosen.root)


if __name__ == "__main__":
    main()
