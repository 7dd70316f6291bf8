"""The list of a bundle's files, with checksums: datapackage.json (Frictionless Data Package 1.0) and SHA256SUMS."""

import dataclasses
import hashlib
import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import metacanary
from metacanary import bundle_audits, data, store
from metacanary.bundle_layout import CONFIG, EXTRAS, PACKAGE, PROVENANCE, SUMS, TABLES, VERSION, Cell, inside

_FIELD_TYPES = {"string": "string", "integer": "integer", "number": "number", "numbers": "array", "pixels": "array"}
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def files(folder: Path) -> list[str]:
    """Names of all files below a folder, sorted, without hidden ones."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()]
    return sorted(name for name in names if not any(part.startswith(".") for part in name.split("/")))


def describe(
    folder: Path,
    *,
    rows: Mapping[str, int],
    cells: Sequence[Cell],
    shapes: Mapping[str, Sequence[int]],
    extras: Sequence[str],
    provenance: Mapping[str, Mapping[str, Any]],
    experiment: str,
) -> dict[str, Any]:
    """Describes a bundle.

    Args:
      folder: The bundle; all files but datapackage.json, datasheet.md and SHA256SUMS are there.
      rows: Number of rows of each table.
      cells: What is audited.
      shapes: Height, width and channels of images, by the path of canaries.npz.
      extras: CSV files, relative to the results.
      provenance: Of the results, by path.
      experiment: Its name.

    Returns:
      A Data Package; what restoring needs stands under "metacanary".
    """
    tables = [_table(folder, name, rows[name]) for name in TABLES]
    others = [_resource(folder, f"{EXTRAS}/{name}", "csv") for name in extras]
    others += [_resource(folder, name, "json") for name in (CONFIG, PROVENANCE)]
    return {
        "name": f"metacanary-{experiment.lower()}",
        "title": f"Membership scores and lower bounds on epsilon: {experiment}",
        "profile": "data-package",
        "resources": tables + others,
        "sources": [_source(name) for name in _stored(provenance)],
        "metacanary": {
            "layout": VERSION,
            "version": metacanary.__version__,
            "pyarrow": importlib.metadata.version("pyarrow"),
            "cells": [dataclasses.asdict(cell) for cell in cells],
            "image_shapes": {name: list(shape) for name, shape in shapes.items()},
            "extras": list(extras),
        },
    }


def read(folder: Path) -> tuple[dict[str, Any], list[Cell]]:
    """Reads datapackage.json.

    Returns:
      What it holds, and the cells.

    Raises:
      ValueError: If it is no bundle's, of an unknown version, has no cells, one twice or one with unknown settings of
        its audits, or names something outside of a folder.
    """
    try:
        package = store.read_json(folder / PACKAGE)
        own = package["metacanary"]
        if own["layout"] != VERSION:
            raise ValueError(
                f"layout is {own['layout']!r}, written by metacanary {own.get('version')}; this one, "
                f"{metacanary.__version__}, expects {VERSION}"
            )
        cells = [Cell(**cell) for cell in own["cells"]]
        for cell in cells:
            bundle_audits.settings(cell)
        if not cells or len({tuple(cell.values.values()) for cell in cells}) < len(cells):
            raise ValueError(f"cells: got {[cell.path for cell in cells]}, expected one or more, each once")
        for name in [*own["extras"], *own["image_shapes"]]:
            inside(folder, name)
        for name, shape in own["image_shapes"].items():
            if len(shape) != 3 or not all(isinstance(size, int) for size in shape):
                raise ValueError(f"image_shapes: got {shape!r} for {name}, expected height, width and channels")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"path={str(folder / PACKAGE)!r} is not that of a bundle: {error}") from error
    return package, cells


def write_sums(folder: Path) -> None:
    """Writes SHA256SUMS, for `sha256sum -c`, of all files."""
    lines = [f"{_sha256(folder / name)}  {name}\n" for name in files(folder) if name != SUMS]
    store.write_text(folder / SUMS, "".join(lines))


def listed(folder: Path) -> list[str]:
    """Names of the files that SHA256SUMS lists; none if it is not there. Raises ValueError if it is no such file."""
    path = folder / SUMS
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [_parsed(line, path)[0] for line in lines]


def check_sums(folder: Path) -> None:
    """Raises ValueError unless a folder holds exactly the files of its SHA256SUMS, with these checksums."""
    path = folder / SUMS
    if not path.is_file():
        raise ValueError(f"folder: {str(folder)!r} has no file {SUMS}, expected a finished bundle")
    sums = dict(_parsed(line, path) for line in path.read_text(encoding="utf-8").splitlines())
    required = {PACKAGE, CONFIG, PROVENANCE, *(f"{name}.parquet" for name in TABLES)}
    if unlisted := sorted(required - sums.keys()):
        raise ValueError(f"path={str(path)!r} does not list {unlisted[0]}, expected every file of the bundle")
    for name, expected in sums.items():
        file = inside(folder, name)
        if not file.is_file():
            raise ValueError(f"file {name} is missing in {str(folder)!r}, expected it there")
        if (found := _sha256(file)) != expected:
            raise ValueError(f"file {name} in {str(folder)!r} has the SHA-256 {found}, expected {expected}")
    if foreign := [name for name in files(folder) if name not in {*sums, SUMS}]:
        raise ValueError(f"file {foreign[0]} in {str(folder)!r} is not listed in {SUMS}, expected no other files")


def _sha256(path: Path) -> str:
    """The checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parsed(line: str, path: Path) -> tuple[str, str]:
    """Name and checksum of a line."""
    if not (match := _LINE.fullmatch(line)):
        raise ValueError(f"path={str(path)!r} has the line {line!r}, expected a SHA-256, two spaces and a name")
    return match[2], match[1]


def _table(folder: Path, name: str, num_rows: int) -> dict[str, Any]:
    """Describes a Parquet file with its columns."""
    fields = [
        {"name": column, "type": _FIELD_TYPES[kind], "description": meaning}
        for column, (kind, meaning) in TABLES[name].items()
    ]
    return {**_resource(folder, f"{name}.parquet", "parquet"), "rows": num_rows, "schema": {"fields": fields}}


def _resource(folder: Path, name: str, kind: str) -> dict[str, Any]:
    """Describes a file."""
    path = inside(folder, name)
    known = {"name": name.lower(), "path": name, "format": kind}
    return {**known, "bytes": path.stat().st_size, "hash": f"sha256:{_sha256(path)}"}


def _stored(provenance: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Names of the data sets that the canaries are from, without the number of images of a subset."""
    names = (made["settings"]["dataset"] for path, made in provenance.items() if path.endswith("canaries.npz"))
    return list(dict.fromkeys(names))


def _source(name: str) -> dict[str, Any]:
    """Describes a data set."""
    source = data.SOURCES[name]
    licence = {"licence": source.licence, "class_names": list(source.class_names)}
    return {"title": f"{name}: {source.description}", "path": source.url, "name": name, **licence}
