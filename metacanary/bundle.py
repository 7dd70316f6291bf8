"""Results as open data: scores and audits as Parquet, with what others need to audit the same scores again.

    python -m metacanary.bundle check FOLDER            files whole, and all audits recomputed from the scores
    python -m metacanary.bundle restore FOLDER RESULTS  the results as the workflow lays them out, byte for byte

The workflow writes a bundle (`make bundle`); docs/bundle.md says what is in it. Nothing in it is unpickled.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from metacanary import (
    bundle_audits,
    bundle_layout,
    bundle_package,
    bundle_provenance,
    bundle_rows,
    datasheet,
    parquet,
    store,
)
from metacanary.bundle_layout import CONFIG, DATASHEET, DENSE, EXTRAS, PACKAGE, PROVENANCE, SUMS, Cell, inside, types
from metacanary.bundle_provenance import SUMMARY


def write(
    results: store.PathLike, folder: store.PathLike, *, config: Mapping[str, Any], also: Sequence[str] = ()
) -> None:
    """Writes a bundle of all cells that `summary/epsilon.csv` has.

    Args:
      results: The results_dir of a finished workflow; its models are not needed.
      folder: The bundle; new, empty, or with a bundle of the same files, which is written over.
      config: The config of the workflow, complete, which is put into the bundle as it is.
      also: Further results, relative to `results`: the canaries.npz of kinds that no cell has, and CSV files.

    Raises:
      FileNotFoundError: If a result is missing.
      ValueError: If results were made with different configs, or would not be restored byte for byte, or the folder
        holds a file that the checksums of no such bundle list.

    Guarantees:
      `restore` gives back every file byte for byte; that is tried, and no file is left in the folder if it fails.
      Nothing in the folder is touched before all of it is known to be a bundle, and results to be of one config.
      The bytes of the bundle are a function of the results, the config and the versions of metacanary and pyarrow.
    """
    results, folder = Path(results), Path(folder)
    extras = [name for name in also if not name.endswith(".npz")]
    names = [*bundle_layout.FILES, *(f"{EXTRAS}/{name}" for name in extras)]
    _require_own(folder, names)
    audits = store.read_csv(results / SUMMARY)
    cells, made = bundle_provenance.chained(results, audits)
    inserted: dict[str, dict[str, np.ndarray]] = {}
    for name in dict.fromkeys([*map(bundle_provenance.canary_file, cells), *also]):
        if name in extras:
            made[name] = store.read_provenance(results / name)
        else:
            inserted[name], made[name] = store.read_npz(results / name)
    (folder / SUMS).unlink(missing_ok=True)  # while files are written there is no whole bundle
    try:
        rows = _write_tables(results, folder, audits, inserted, cells)
        for name in extras:
            with store.atomic(inside(folder, f"{EXTRAS}/{name}")) as file:
                file.write((results / name).read_bytes())
        # Keys in their order, which is that of cells.
        store.write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
        store.write_json(folder / PROVENANCE, bundle_provenance.grouped(made))
        package = bundle_package.describe(
            folder,
            rows=rows,
            cells=cells,
            shapes={name: arrays["images"].shape[1:] for name, arrays in inserted.items()},
            extras=extras,
            provenance=made,
            experiment=str(config.get("experiment", results.name)),
        )
        store.write_json(folder / PACKAGE, package)
        store.write_text(folder / DATASHEET, datasheet.text(package, cells, made, _counts(folder, cells)))
        bundle_package.write_sums(folder)
        _require_restorable(folder, results)
    except BaseException:
        for name in names:
            (folder / name).unlink(missing_ok=True)
        raise


def verify(folder: store.PathLike) -> tuple[dict[str, Any], list[Cell]]:
    """Checks that a bundle is whole: its files, their checksums, its version and the columns of its tables.

    Args:
      folder: The bundle.

    Returns:
      What datapackage.json holds, and the cells.

    Raises:
      ValueError: For a file that is missing, foreign, or has another checksum, a name that leads out of the folder, an
        unknown version, or a table with other columns.
    """
    folder = Path(folder)
    bundle_package.check_sums(folder)
    package, cells = bundle_package.read(folder)
    for name in bundle_layout.TABLES:
        parquet.check(folder / f"{name}.parquet", types(name))
    return package, cells


def check(folder: store.PathLike, *, progress: bool = False) -> str:
    """Checks a bundle as `verify`, and that its audits are those of its scores.

    Args:
      folder: The bundle.
      progress: Whether to show a progress bar on standard error.

    Returns:
      What was found, a line.

    Raises:
      ValueError: As `verify`, and for the first audit that is not what the scores give, is of no cell, or was made with
        other settings than its provenance says.
    """
    folder = Path(folder)
    package, cells = verify(folder)
    bundle_provenance.read(folder, package, cells)
    audits, largest = bundle_rows.audits(folder, cells), 0.0
    total = sum(bundle_audits.count(bundle_rows.runs(folder, cell), cell) for cell in cells)
    with tqdm(total=total, unit="audit", desc="audit", disable=not progress, file=sys.stderr) as bar:
        for cell in cells:
            scored = bundle_rows.scores(folder, cell), bundle_rows.runs(folder, cell)
            others = bundle_rows.population(folder, cell)
            recomputed = bundle_audits.recompute(*scored, others, cell, on_audit=bar.update)
            largest = max(largest, bundle_audits.compare(bundle_rows.of_cell(audits, cell), recomputed, cell))
    found = "to the last bit" if largest == 0 else f"up to a relative difference of {largest:.1e} in floats"
    return f"{folder}: all checksums are right, and its {len(audits):,} bounds were recomputed from its scores {found}"


def restore(folder: store.PathLike, results: store.PathLike) -> None:
    """Writes the results that a bundle holds as the workflow lays them out, so that it can go on from them.

    Args:
      folder: The bundle.
      results: A new or empty folder, to be the results_dir.

    Raises:
      ValueError: As `verify`, or if `results` is not empty.

    Guarantees:
      Files have the bytes that they had when the bundle was written, and are written in the order in which the
      workflow makes them, so that it takes none for out of date. Nothing is written outside of `results`.
    """
    folder, results = Path(folder), Path(results)
    package, cells = verify(folder)
    if results.exists() and any(results.iterdir()):
        raise ValueError(f"results: {str(results)!r} is not empty, expected a new or an empty folder")
    made = bundle_provenance.read(folder, package, cells)
    audits = bundle_rows.audits(folder, cells)
    rows = parquet.read(folder / "canaries.parquet", types("canaries"))
    for name, shape in package["metacanary"]["image_shapes"].items():
        store.write_npz(inside(results, name), bundle_rows.canary_arrays(rows, name, shape), made[name])
    extras = package["metacanary"]["extras"]
    summaries = [name for name in extras if name.startswith("summary/")]  # made of audits, which come before
    _restore_extras(folder, results, [name for name in extras if name not in summaries], made)
    for cell in cells:
        _restore_scores(folder, results, cell, made)
    for cell in cells:
        name = bundle_provenance.audit_file(cell)
        store.write_csv(results / name, bundle_rows.of_cell(audits, cell), made[name])
    # As a table of CSV files is read: whole numbers only if no cell has another epsilon.
    whole = all(cell.epsilon.isdigit() for cell in cells)
    table = audits.astype({"epsilon": "int64"}) if whole else audits
    store.write_csv(results / SUMMARY, table, made[SUMMARY])
    _restore_extras(folder, results, summaries, made)


def _write_tables(
    results: Path,
    folder: Path,
    audits: pd.DataFrame,
    inserted: Mapping[str, Mapping[str, np.ndarray]],
    cells: Sequence[Cell],
) -> dict[str, int]:
    """Writes all Parquet files; returns how many rows each has."""
    frames: dict[str, Iterator[pd.DataFrame]] = {
        "audits": iter([audits]),
        "canaries": (bundle_rows.canary_rows(name, arrays) for name, arrays in inserted.items()),
        "population": (bundle_rows.population_rows(results, cell) for cell in cells),
        "runs": (bundle_rows.run_rows(results, cell) for cell in cells),
        "scores": (bundle_rows.score_rows(results, cell) for cell in cells),
    }
    return {
        name: parquet.write(folder / f"{name}.parquet", parts, types(name), dense=DENSE.get(name, ()))
        for name, parts in frames.items()
    }


def _restore_scores(folder: Path, results: Path, cell: Cell, made: Mapping[str, dict[str, Any]]) -> None:
    """Writes the three files of each block of a cell."""
    scores, runs = bundle_rows.scores(folder, cell), bundle_rows.runs(folder, cell)
    population = bundle_rows.population(folder, cell)
    for block in range(cell.num_blocks):
        own = runs[runs["block"] == block]
        names = bundle_rows.block_files(cell, block)
        store.write_csv(results / names[1], own[bundle_rows.RUN_COLUMNS], made[names[1]])
        store.write_npz(results / names[2], population[block], made[names[2]])
        store.write_csv(results / names[0], scores[scores["run"].isin(own["run"])], made[names[0]])


def _restore_extras(folder: Path, results: Path, names: Sequence[str], made: Mapping[str, dict[str, Any]]) -> None:
    """Writes the CSV files that a bundle holds as they were."""
    for name in names:
        path = inside(results, name)
        store.write_json(path.with_suffix(".provenance.json"), made[name])
        with store.atomic(path) as file:
            file.write(inside(folder, f"{EXTRAS}/{name}").read_bytes())


def _counts(folder: Path, cells: Sequence[Cell]) -> pd.DataFrame:
    """Runs by role, snapshots and canaries of each cell, for the data sheet."""
    rows = []
    for cell in cells:
        runs, scores = bundle_rows.runs(folder, cell), bundle_rows.scores(folder, cell)
        roles = runs.drop_duplicates("run")["role"].value_counts()
        rows.append(
            cell.names
            | {f"{role} runs": int(roles.get(role, 0)) for role in ("audited", "surrogate", "reference")}
            | {"snapshots": runs["step"].nunique(), "canaries": scores["canary_id"].nunique(), "scores": len(scores)}
        )
    return pd.DataFrame(rows)


def _require_own(folder: Path, names: Sequence[str]) -> None:
    """Raises ValueError if the folder holds files that are not those of this bundle, written before."""
    for name in names:
        inside(folder, name)
    listed, present = bundle_package.listed(folder), bundle_package.files(folder)
    if foreign := [name for name in [*present, *listed] if name not in names]:
        raise ValueError(f"folder: {str(folder)!r} holds {foreign[0]}, which this bundle has not; delete it first")
    if foreign := [name for name in present if name not in {*listed, SUMS}]:
        raise ValueError(
            f"folder: {str(folder)!r} holds {foreign[0]}, which no {SUMS} lists, expected an empty folder or a bundle"
        )


def _require_restorable(folder: Path, results: Path) -> None:
    """Restores a bundle for a moment, and raises ValueError if a file is not what it was."""
    with tempfile.TemporaryDirectory() as scratch:
        restore(folder, scratch)
        for name in bundle_package.files(Path(scratch)):
            if not filecmp.cmp(Path(scratch, name), results / name, shallow=False):
                raise ValueError(f"path={str(results / name)!r} would not come back byte for byte; was it edited?")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line.

    Args:
      arguments: None for those of the process.

    Returns:
      The exit status: 0, or 1 after one line on standard error that says what is wrong with the bundle.
    """
    parser = argparse.ArgumentParser(prog="python -m metacanary.bundle", description=__doc__.splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True)
    checking = actions.add_parser("check", help="check all files, and recompute all audits from the scores")
    restoring = actions.add_parser("restore", help="write the results as the workflow lays them out")
    for action in (checking, restoring):
        action.add_argument("folder", type=Path, metavar="FOLDER", help="the bundle")
    restoring.add_argument("results", type=Path, metavar="RESULTS", help="a new folder: the config's results_dir")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.action == "check":
            print(check(chosen.folder, progress=True))
        else:
            restore(chosen.folder, chosen.results)
            print(f"{chosen.results}: restored; next: snakemake --cores 1 --configfile {chosen.folder / CONFIG}")
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
