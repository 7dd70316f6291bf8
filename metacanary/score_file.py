"""Files of membership scores: a CSV with a row per canary and run, read and checked."""

import csv
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from metacanary.audits import POOLED

REQUIRED = ("id", "included", "score")

_COINS = {"0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True}


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The contents of a file.

    Attributes:
      scores: Float64 [m], or [R, m] for several runs.
      included: Bool, the same shape.
      ids: The name of each canary, m of them.
      runs: The name of each run in the order of the file; empty if the file has no column `run`.
      pairs: Integers [m], or None.
      pair_names: The name of each canary's pair, m of them, or None.
      multi_run: Whether every score (pair) comes from a run of its own; then rows are ordered by run, and the pair of a
        canary is its run.
    """

    scores: np.ndarray
    included: np.ndarray
    ids: tuple[str, ...]
    runs: tuple[str, ...]
    pairs: np.ndarray | None
    pair_names: tuple[str, ...] | None
    multi_run: bool


class _Row(NamedTuple):
    """A line of the file; run and pair are None without such a column."""

    line: int
    run: str | None
    id: str
    pair: str | None
    included: bool
    score: float


_Canaries = dict[str, _Row]  # of a run, by id


def read(path: Path) -> Scores:
    """Reads and checks a file of scores.

    Args:
      path: A CSV in UTF-8 with the columns id, included, score, and perhaps run and pair. Space around cells, blank
        lines and other columns are ignored.

    Returns:
      Its scores and coins, canaries in the order of the first run.

    Raises:
      ValueError: In one line, with the line of the file where there is one: no CSV, a missing column or one twice, no
        rows, a row with more or fewer cells than the header, an empty name, an id twice in a run, a score that is not a
        finite number, a coin that is not 0 or 1, a pair that has not two members with one included in every run, or
        runs with different canaries or pairs.
      OSError: If the file cannot be read.
    """
    runs: dict[str | None, _Canaries] = {}
    for row in _rows(path):
        canaries = runs.setdefault(row.run, {})
        if row.id in canaries:
            raise ValueError(f"{path}, line {row.line}: id {row.id!r} twice, expected each canary once per run")
        canaries[row.id] = row
    for run, canaries in runs.items():
        _check_pairs(path, run, canaries.values())
    paired = any(row.pair is not None for canaries in runs.values() for row in canaries.values())
    if len(runs) > 1 and all(len(canaries) == 1 + paired for canaries in runs.values()):
        return _of_many_runs(runs, paired)
    return _of_the_same_canaries(path, runs, paired)


def surrogates(other: Scores, audited: Scores) -> tuple[np.ndarray, np.ndarray]:
    """Runs that are not audited, as `audits.audit` takes them to choose the guesses of those that are.

    Args:
      other: Of runs that are not audited.
      audited: Of those that are.

    Returns:
      Scores and coins of `other`, [m'] or [S, m']; in the paired game in the order of the audited canaries.

    Raises:
      ValueError: If one of the two is paired and the other independent, or in the paired game if a canary is missing
        from one, or its pair differs; where each pair has a run of its own, if they differ in number.
    """
    kinds = ["independent" if data.pairs is None else "paired" for data in (other, audited)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"surrogates are {kinds[0]}, expected {kinds[1]} as the scores that are audited")
    if audited.pair_names is None or other.pair_names is None:
        return other.scores, other.included
    if audited.multi_run or other.multi_run:
        if audited.multi_run != other.multi_run or other.scores.shape != audited.scores.shape:
            raise ValueError(
                f"surrogates are {_shape(other)}, expected {_shape(audited)} as the scores that are audited"
            )
        return other.scores, other.included
    theirs, ours = (dict(zip(data.ids, data.pair_names or (), strict=True)) for data in (other, audited))
    for name in (*ours, *theirs):
        if theirs.get(name) != ours.get(name):
            raise ValueError(
                f"surrogates: the pair of id {name!r} is {theirs.get(name)!r}, expected {ours.get(name)!r} as in the "
                "scores that are audited (None: no such id)"
            )
    places = {name: place for place, name in enumerate(other.ids)}
    order = [places[name] for name in audited.ids]
    return other.scores[..., order], other.included[..., order]


def _shape(data: Scores) -> str:
    """How many pairs, and where from, for a message."""
    return f"{data.scores.shape[-1] // 2} pairs{', each of a run of its own' if data.multi_run else ' in every run'}"


def _rows(path: Path) -> list[_Row]:
    """The rows, each parsed by itself."""
    header, lines = _lines(path)
    missing = [name for name in REQUIRED if name not in header]
    if missing:
        raise ValueError(f"{path} has the columns {', '.join(header)}, expected also {', '.join(missing)}")
    twice = [name for place, name in enumerate(header) if name in header[:place]]
    if twice:
        raise ValueError(f"{path} has the column {twice[0]!r} twice, expected each column once")
    if not lines:
        raise ValueError(f"{path} has no rows, expected one per canary")
    rows = []
    for line, cells in lines:
        if len(cells) != len(header):
            raise ValueError(f"{path}, line {line}: {len(cells)} cells, expected {len(header)} as in the header")
        rows.append(_parse(f"{path}, line {line}", line, dict(zip(header, cells, strict=True))))
    return rows


def _lines(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header, and the other lines that are not blank with their numbers."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True, skipinitialspace=True)
            lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no CSV file: {error}") from None
    lines = [(line, cells) for line, cells in lines if cells not in ([], [""])]
    if not lines:
        raise ValueError(f"{path} is no CSV file: it is empty")
    return lines[0][1], lines[1:]


def _parse(where: str, line: int, cells: Mapping[str, str]) -> _Row:
    """A row; ValueError for the first cell that is wrong."""
    for name in ("run", "id", "pair"):
        if cells.get(name) == "":
            raise ValueError(f"{where}: {name} is empty, expected a name")
    if cells.get("run") == POOLED:
        raise ValueError(f"{where}: run is {POOLED!r}, expected another name (it stands for all runs as one game)")
    included = _COINS.get(cells["included"].lower())
    if included is None:
        raise ValueError(f"{where}: included is {cells['included']!r}, expected 0 or 1")
    score = _finite(cells["score"])
    if score is None:
        raise ValueError(f"{where}: score is {cells['score']!r}, expected a finite number")
    return _Row(line, cells.get("run"), cells["id"], cells.get("pair"), included, score)


def _finite(text: str) -> float | None:
    """The number, None unless it is finite."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _check_pairs(path: Path, run: str | None, rows: Collection[_Row]) -> None:
    """ValueError unless each pair of a run has two members, one of them included."""
    pairs: dict[str, list[bool]] = {}
    for row in rows:
        if row.pair is not None:
            pairs.setdefault(row.pair, []).append(row.included)
    for name, coins in pairs.items():
        where = f"{path}: pair {name!r}" + ("" if run is None else f" of run {run!r}")
        if len(coins) != 2:
            raise ValueError(f"{where} has {len(coins)} member(s), expected 2")
        if sum(coins) != 1:
            raise ValueError(f"{where} has {sum(coins)} members included, expected 1")


def _of_many_runs(runs: Mapping[str | None, _Canaries], paired: bool) -> Scores:
    """One coin per run: the runs take the place of canaries."""
    rows = [row for canaries in runs.values() for row in canaries.values()]
    return Scores(
        scores=np.array([row.score for row in rows]),
        included=np.array([row.included for row in rows]),
        ids=tuple(row.id for row in rows),
        runs=_names(runs),
        pairs=np.repeat(np.arange(len(runs)), 2) if paired else None,
        pair_names=tuple(str(row.pair) for row in rows) if paired else None,
        multi_run=True,
    )


def _of_the_same_canaries(path: Path, runs: Mapping[str | None, _Canaries], paired: bool) -> Scores:
    """The scores of runs with the same canaries, put in the order of the first run."""
    (name, first), *others = runs.items()
    for run, canaries in others:
        odd = sorted(canaries.keys() ^ first.keys())
        if odd:
            raise ValueError(
                f"{path}: run {run!r} has other canaries than run {name!r} ({odd[0]!r} is in one of them), "
                "expected the same ids in every run"
            )
        for row in canaries.values():
            if row.pair != first[row.id].pair:
                raise ValueError(
                    f"{path}, line {row.line}: id {row.id!r} is of several pairs, expected the same in every run"
                )
    table = [[canaries[canary] for canary in first] for canaries in runs.values()]
    shape = (len(first),) if len(runs) == 1 else (len(runs), len(first))
    pair_names = tuple(str(row.pair) for row in table[0]) if paired else None
    return Scores(
        scores=np.array([row.score for rows in table for row in rows]).reshape(shape),
        included=np.array([row.included for rows in table for row in rows]).reshape(shape),
        ids=tuple(first),
        runs=_names(runs),
        pairs=None if pair_names is None else _numbers(pair_names),
        pair_names=pair_names,
        multi_run=False,
    )


def _numbers(names: Collection[str]) -> np.ndarray:
    """A number for each distinct name, in the order of their first place."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names])


def _names(runs: Mapping[str | None, _Canaries]) -> tuple[str, ...]:
    """The runs that have a name."""
    return tuple(run for run in runs if run is not None)
