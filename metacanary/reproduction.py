"""Published numbers beside ours: which can be compared, and whether they agree.

The rule is stated in docs/reproduction.md, before any run on the setting of the published numbers.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from scipy import special

from metacanary import store, tables

MARKS = ("P", "S", "I", "U")
# What a number must be named by; all other columns of the file may be empty, and are then not known and not asked for.
KEY = ("paper", "item", "dataset", "training", "canary", "epsilon", "auditor")
_NUMBERS = ("epsilon", "value")
_REQUIRED = (*KEY, "protocol", "value", "mark")
# Numbers are compared only where these are the same, in words for people.
FACTS = {
    "dataset": "data set",
    "num_train": "training images",
    "image_size": "image size",
    "model": "model",
    "pretraining": "public images",
    "num_canaries": "canaries",
    "game": "game",
    "delta": "delta",
    "batch_size": "batch",
    "clip_norm": "clip norm",
    "multiplicity": "copies of an image",
    "metamodel": "metamodel",
    "start": "start of the canaries",
    "objective": "objective of the canaries",
}
_TOLERANCE = {"batch_size": 0.01}  # relative: expected sizes of Poisson batches are no whole numbers
OTHER_COLUMNS = ("score", "statistic", "standard_error", "num_runs", "note", *FACTS)
_SEPARATOR = "; "
REPRODUCED, NOT_REPRODUCED = "reproduced", "not reproduced"
NOT_COMPARABLE, NOT_RUN, NOT_PUBLISHED = "not comparable", "not run", "no published number"
COLUMNS = (
    *KEY,
    *("theirs", "mark", "own_dataset", "own_training", "own_canary", "score", "num_runs", "game", "adjacency"),
    *("like_protocol", "like_mean", "like_low", "like_high", "accepted_low", "accepted_high"),
    *("protocol", "epsilon_mean", "epsilon_low", "epsilon_high", "epsilon_median", "ceiling", "epsilon_accounted"),
    *("verdict", "reasons"),
)


def read_published(path: store.PathLike) -> pd.DataFrame:
    """Reads published numbers.

    Args:
      path: A CSV file with a row per number; docs/reproduction.md says what its columns mean.

    Returns:
      Its rows; epsilon and value as numbers.

    Raises:
      ValueError: For missing or unknown columns, an empty cell where none may be, a mark that is none, or two rows of
        the same number.
    """
    table = pd.read_csv(path)
    missing = [name for name in (*_REQUIRED, *OTHER_COLUMNS) if name not in table]
    unknown = [name for name in table if name not in (*_REQUIRED, *OTHER_COLUMNS)]
    if missing or unknown:
        raise ValueError(f"path={str(path)!r} lacks the columns {missing} and has the unknown ones {unknown}")
    for name in _REQUIRED:
        if table[name].isna().any():
            line = int(table[name].isna().argmax()) + 2
            raise ValueError(f"path={str(path)!r}: {name} of line {line} is empty, expected a value")
    odd = sorted({*table["mark"]} - {*MARKS})
    if odd:
        raise ValueError(f"path={str(path)!r}: mark: got {odd[0]!r}, expected one of {', '.join(MARKS)}")
    if table.duplicated(list(KEY)).any():
        twice = table[table.duplicated(list(KEY))].iloc[0][list(KEY)].to_dict()
        raise ValueError(f"path={str(path)!r} has {twice} twice, expected each number once")
    return table.astype(dict.fromkeys(_NUMBERS, float))


def compare(
    frame: pd.DataFrame, published: pd.DataFrame, setup: Sequence[Mapping[str, Any]], *, protocol: str, score: str
) -> pd.DataFrame:
    """Puts published numbers beside ours, each with a verdict.

    A cell is the counterpart of a published number if it is of the same images (or an altered copy or a subset of
    them), kind of training, canary family and target epsilon. They are comparable if all FACTS that are known of the
    number are the cell's too, it was audited by the same auditor and protocol with the same score, and it has as many
    runs or more, at least two.

    A comparable number y is reproduced if |x - y| <= t sqrt(s^2 / n + e^2), with x the mean of our n runs under
    *their* protocol, s the runs' standard deviation, t the 97.5% quantile of Student's distribution with n - 1 degrees
    of freedom, and e the standard error of y; if that is not known, e^2 = s^2 / k, with k the number of runs that y is
    the mean of, n if that is not known either.

    Args:
      frame: summary/epsilon.csv.
      published: From `read_published`.
      setup: Of each dataset, training and canary kind of the frame a mapping: these three names; `matches`, with the
        dataset, training and canary that published numbers of it name; and `facts`, of those in FACTS that the frame
        does not hold.
      protocol: A valid protocol, whose bounds stand beside; not "paper".
      score: Membership score of cells that have no published counterpart, and of numbers whose score is not known.

    Returns:
      `COLUMNS`, a row per published number and counterpart, or one without; then, for each auditor that the published
      numbers name, a row per cell that is no counterpart of any. `like_...` is ours under their protocol with its 95% t
      interval, `accepted_...` the interval that their number must lie in to be reproduced (missing if it is not
      comparable); `epsilon_...` is our valid bound. `reasons` says why numbers are not comparable.

    Raises:
      ValueError: If the frame lacks columns, a cell of it has no setup, or the protocol is "paper".

    Guarantees:
      If y is the mean of k runs and its standard error is not known, all runs of both sides independent and from one
      normal distribution, it is found reproduced with probability 95%, for every k and n.
    """
    if protocol == tables.PAPER:
        raise ValueError(f"protocol={protocol!r} is no bound, expected a valid protocol")
    frame = tables.select(frame)
    cells = _cells(frame, setup)
    audits = _Audits(frame)
    rows, found = [], set[int]()
    for theirs in _records(published):
        counterparts = [place for place, cell in enumerate(cells) if _is_counterpart(cell, theirs)]
        found.update(counterparts)
        wanted = {"auditor": theirs["auditor"], "score": theirs["score"] if _known(theirs["score"]) else score}
        named = {name: theirs[name] for name in KEY} | {"theirs": theirs["value"], "mark": theirs["mark"]}
        for place in counterparts:
            own = _own(audits, cells[place], like=theirs["protocol"], protocol=protocol, **wanted)
            rows.append(named | own | _judge(theirs, cells[place], own))
        if not counterparts:
            rows.append(named | {"verdict": NOT_RUN, "reasons": ""})
    likes = published.drop_duplicates("auditor")[["auditor", "protocol"]].itertuples(index=False, name=None)
    for auditor, like in likes:
        for cell in (cell for place, cell in enumerate(cells) if place not in found):
            own = _own(audits, cell, like=like, protocol=protocol, auditor=auditor, score=score)
            named = {name: cell[name] for name in ("dataset", "training", "canary", "epsilon")} | {"auditor": auditor}
            rows.append(named | own | {"verdict": NOT_PUBLISHED, "reasons": ""})
    return pd.DataFrame(rows, columns=list(COLUMNS))


def combine(tables_by_experiment: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Takes of each published number the nearest of our cells over several experiments.

    Args:
      tables_by_experiment: From `compare` with the same published numbers, by the name of the experiment.

    Returns:
      `COLUMNS` and `experiment`. A published number stands once for each comparable counterpart; if there is none,
      once with that which the fewest reasons speak against, the first of several; if there is no counterpart, once as
      not run. Then all cells without a published number, in the order of experiments.
    """
    everything = pd.concat(
        [table.assign(experiment=name) for name, table in tables_by_experiment.items()], ignore_index=True
    )
    own = everything["verdict"] == NOT_PUBLISHED
    reasons = everything["reasons"].map(lambda text: len(split_reasons(text)))
    distance = reasons.where(everything["verdict"] != NOT_RUN, math.inf)
    chosen = []
    for _, places in everything[~own].groupby(list(KEY), sort=False).groups.items():
        comparable = [place for place in places if distance[place] == 0]
        chosen += comparable or [distance[places].idxmin()]
    table = everything.loc[[*chosen, *everything.index[own]]].reset_index(drop=True)
    return table.assign(experiment=table["experiment"].where(table["verdict"] != NOT_RUN))


def split_reasons(text: Any) -> list[str]:
    """Lists the reasons of a row of `compare`; none in a row without any, also read back from CSV."""
    return text.split(_SEPARATOR) if isinstance(text, str) and text else []


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Lists rows by column."""
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def _cells(frame: pd.DataFrame, setup: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Lists the cells of the frame in its order, each with its setup."""
    names = ("dataset", "training", "canary")
    known = {tuple(cell[name] for name in names): cell for cell in setup}
    cells = []
    for cell in _records(frame[tables.CELL].drop_duplicates()):
        key = tuple(cell[name] for name in names)
        if key not in known:
            raise ValueError(f"setup lacks the cell {'/'.join(key)}, expected all cells of the frame")
        cells.append(cell | {name: known[key][name] for name in ("matches", "facts")})
    return cells


def _is_counterpart(cell: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Tells whether a cell is what a published number speaks of, as far as its images, training and canaries go."""
    same = all(cell["matches"][name] == theirs[name] for name in ("dataset", "training", "canary"))
    return same and cell["epsilon"] == theirs["epsilon"]


def _own(
    audits: "_Audits", cell: Mapping[str, Any], *, like: str, protocol: str, auditor: str, score: str
) -> dict[str, Any]:
    """Our numbers of a cell: under their protocol and as a valid bound; numbers that there are not are left out."""
    own = {f"own_{name}": cell[name] for name in ("dataset", "training", "canary")}
    own |= {"score": score, "like_protocol": like, "protocol": protocol}
    for prefix, wanted in (("like_", like), ("epsilon_", protocol)):
        found = audits.over_runs(cell, auditor=auditor, protocol=wanted, score=score)
        if not found:
            continue
        own |= {f"{prefix}{name}": found[f"epsilon_{name}"] for name in ("mean", "low", "high")}
        own |= {name: found[name] for name in ("num_runs", "game", "num_canaries", "epsilon_accounted")}
        if wanted == protocol:
            own |= {name: found[name] for name in ("epsilon_median", "ceiling", "adjacency")}
    return own


class _Audits:
    """The audits of a frame over runs, summarised once for each auditor, protocol and score."""

    def __init__(self, frame: pd.DataFrame) -> None:
        self._frame = frame
        self._summaries: dict[tuple[str, ...], dict[tuple[Any, ...], dict[str, Any]]] = {}

    def over_runs(self, cell: Mapping[str, Any], **wanted: str) -> dict[str, Any]:
        """The row of a cell in `tables.summarise`; empty if the cell was not audited so."""
        key = tuple(wanted.values())
        if key not in self._summaries:
            rows = self._frame
            for name, value in wanted.items():
                rows = rows[rows[name] == value]
            found = _records(tables.summarise(rows, **wanted)) if len(rows) else []
            self._summaries[key] = {tuple(row[name] for name in tables.CELL): row for row in found if row["num_runs"]}
        return self._summaries[key].get(tuple(cell[name] for name in tables.CELL), {})


def _judge(theirs: Mapping[str, Any], cell: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The verdict on a published number and a counterpart."""
    reasons = _differences(theirs, cell, own)
    if reasons:
        return {"verdict": NOT_COMPARABLE, "reasons": _SEPARATOR.join(reasons)}
    half = own["like_high"] - own["like_mean"]
    quantile = special.stdtrit(own["num_runs"] - 1, 0.5 + tables.CONFIDENCE / 2)
    if _known(theirs["standard_error"]):
        error = theirs["standard_error"] * quantile
    else:  # a run of theirs scatters as one of ours
        num_theirs = theirs["num_runs"] if _known(theirs["num_runs"]) else own["num_runs"]
        error = half * math.sqrt(own["num_runs"] / num_theirs)
    low, high = (own["like_mean"] + sign * math.hypot(half, error) for sign in (-1, 1))
    verdict = REPRODUCED if low <= theirs["value"] <= high else NOT_REPRODUCED
    return {"accepted_low": low, "accepted_high": high, "verdict": verdict, "reasons": ""}


def _differences(theirs: Mapping[str, Any], cell: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """Says in what a cell differs from what is known of a published number."""
    audited = f"{own['score']} under protocol {theirs['protocol']} by auditor {theirs['auditor']}"
    if "like_mean" not in own:
        return [f"no audit of {audited}"]
    paired = own["game"] == "paired"
    facts = {**cell["facts"], "game": own["game"], "num_canaries": own["num_canaries"] * (2 if paired else 1)}
    reasons = [
        f"{word} {_text(facts.get(name))} (theirs {_text(theirs[name])})"
        for name, word in FACTS.items()
        if _known(theirs[name]) and not _equal(facts.get(name), theirs[name], _TOLERANCE.get(name, 1e-9))
    ]
    least = max(2, int(theirs["num_runs"])) if _known(theirs["num_runs"]) else 2
    if own["num_runs"] < least:
        reasons.append(f"runs {own['num_runs']:.0f} (at least {least} needed)")
    return reasons


def _equal(ours: Any, theirs: Any, tolerance: float) -> bool:
    """Compares a fact."""
    if isinstance(ours, str) or isinstance(theirs, str) or not _known(ours):
        return bool(ours == theirs)
    return math.isclose(ours, theirs, rel_tol=tolerance)


def _known(value: Any) -> bool:
    """Tells whether a cell of a table holds something."""
    return value is not None and not pd.isna(value)


def _text(value: Any) -> str:
    """Writes a fact."""
    if not _known(value):
        return "none"
    return value if isinstance(value, str) else f"{value:.10g}"
