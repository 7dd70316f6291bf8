"""How the results of a bundle were made: chained from the summary to canaries, stored once per job, read back."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from metacanary import bundle_rows, store
from metacanary.bundle_layout import PROVENANCE, Cell

SUMMARY = "summary/epsilon.csv"
Made = dict[str, dict[str, Any]]
"""Provenance of results by their path, relative to the results_dir."""


def chained(results: Path, audits: pd.DataFrame) -> tuple[list[Cell], Made]:
    """Follows the provenance of the summary back to audits, scores and canaries.

    Args:
      results: The results_dir.
      audits: The summary.

    Returns:
      The cells of the summary, and the provenance of the summary and of all audits, scores, runs, populations and
      canaries that it came from.

    Raises:
      FileNotFoundError: If one of these is missing.
      ValueError: If one was made with another config than the file that was made from it says.
    """
    made = {SUMMARY: store.read_provenance(results / SUMMARY)}
    rows = audits[["dataset", "canary", "training", "epsilon"]].drop_duplicates().astype(str).to_dict("records")
    collected = _inputs(made[SUMMARY], "audits")
    if len(rows) != len(collected):
        raise ValueError(f"path={str(results / SUMMARY)!r} has {len(rows)} cells, expected {len(collected)}")
    cells = []
    for row, digest in zip(rows, collected, strict=True):
        names = {str(name): value for name, value in row.items()} | {"epsilon": f"{float(row['epsilon']):g}"}
        path = audit_file(Cell(**names, num_blocks=0, audit={}))
        _add(results, path, digest, made)
        scored = _inputs(made[path], "scores")
        cell = Cell(**names, num_blocks=len(scored), audit=made[path]["settings"]["audit"])
        for block, digest_of_block in enumerate(scored):
            for name in (files := bundle_rows.block_files(cell, block)):
                _add(results, name, digest_of_block, made)
            _add(results, canary_file(cell), _inputs(made[files[0]], "canaries"), made)
        cells.append(cell)
    return cells, made


def grouped(made: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Provenances with all files that have them: a job's files share theirs."""
    groups: dict[str, dict[str, Any]] = {}
    for name, provenance in sorted(made.items()):
        groups.setdefault(store.digest(provenance), {"files": [], "provenance": provenance})["files"].append(name)
    return list(groups.values())


def read(folder: Path, package: Mapping[str, Any], cells: Sequence[Cell]) -> Made:
    """Reads the provenance of every result that a bundle restores.

    Args:
      folder: The bundle.
      package: Its datapackage.json.
      cells: Its cells.

    Returns:
      The provenance by path.

    Raises:
      ValueError: If the file is none of a bundle, lacks a result, or says of a cell's audits that they were made with
        other settings than datapackage.json does.
    """
    path, entries = folder / PROVENANCE, store.read_json(folder / PROVENANCE)
    try:
        made = {str(name): dict(entry["provenance"]) for entry in entries for name in entry["files"]}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"path={str(path)!r} is {_shown(entries)}, expected objects with files, provenance") from error
    own = package["metacanary"]
    needed = [SUMMARY, *own["image_shapes"], *own["extras"], *map(audit_file, cells)]
    for cell in cells:
        needed += [name for block in range(cell.num_blocks) for name in bundle_rows.block_files(cell, block)]
    if missing := [name for name in needed if name not in made]:
        raise ValueError(f"path={str(path)!r} lacks {missing[0]}, expected all results of the bundle")
    for cell in cells:
        settings = made[audit_file(cell)].get("settings")
        audit = settings.get("audit") if isinstance(settings, dict) else None
        if audit != cell.audit:
            raise ValueError(f"audits of {cell.path}: made with {audit}, expected {cell.audit} as in datapackage.json")
    return made


def audit_file(cell: Cell) -> str:
    """The audits of a cell."""
    return f"audits/{cell.path}/epsilon.csv"


def canary_file(cell: Cell) -> str:
    """The canaries of a cell."""
    return f"canaries/{cell.dataset}/{cell.canary}/canaries.npz"


def _add(results: Path, name: str, digest: str, made: Made) -> None:
    """Reads the provenance of a result, which must have been made with settings of this digest."""
    made[name] = store.read_provenance(results / name)
    store.require_config(results / name, made[name], digest)


def _inputs(provenance: Mapping[str, Any], name: str) -> Any:
    """The digest of the settings of a result's input, or the digests of its inputs of one name."""
    try:
        return provenance["settings"]["inputs"][name]
    except KeyError:
        raise ValueError(
            f"provenance lacks settings.inputs.{name}, expected that of a result of the workflow"
        ) from None


def _shown(entries: Any) -> str:
    """The beginning of what was read."""
    return f"{entries!r:.60}"
