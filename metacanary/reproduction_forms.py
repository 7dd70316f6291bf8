"""The forms that published numbers beside ours are printed in: Markdown and LaTeX."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from metacanary import reproduction, store, table_formats
from metacanary.table_formats import NO_VALUE, fixed, plus_minus

_WORDS = {"data set, training", "canary", "auditor", "theirs", "our cell", "verdict"}
_LEGEND = (
    "Published numbers (of arXiv 2507.15836 unless a column names another) beside ours, by a rule stated beforehand "
    "(docs/reproduction.md). Theirs carries its mark: P printed, S second-hand, I inferred, U unverified. Of ours the "
    "first is the mean over runs under their protocol, the only one that theirs is compared with, ± half of its 95% t "
    "interval; it is no bound, since the number of guesses is chosen on the scores that are then counted. The second "
    "is the mean of valid lower bounds, with the ceiling of an audit whose guesses are all right. "
    f"{NO_VALUE}: no value."
)
_SHORT_COLUMNS = ["data set, training", "canary", "ε", "auditor", "theirs"]
_SHORT_COLUMNS += ["ours, their\nprotocol", "ours, valid\nbound", "runs", "verdict"]


def printed(table: pd.DataFrame) -> pd.DataFrame:
    """Turns a table into the text of its cells.

    Args:
      table: From `reproduction.compare` or `combine`, or read back from CSV.

    Returns:
      Text cells. Published numbers of one setting that were not run share a row. A letter behind a verdict stands for
      one of `reasons`. Columns that say the same everywhere and have a place in the note are left out.
    """
    table = _joined(table)
    letters = _letters(table)
    settings = zip(table["dataset"], table["training"], strict=True)
    cells: dict[str, list[str]] = {"data set, training": [f"{dataset}, {training}" for dataset, training in settings]}
    cells |= {"canary": list(table["canary"]), "ε": [table_formats.words(value) for value in table["epsilon"]]}
    for name in ("paper", "auditor"):
        if table[name].nunique() > 1:
            cells[name] = [table_formats.words(value) for value in table[name]]
    cells |= {"theirs": list(table["theirs"])}
    if table["accepted_low"].notna().any():  # else those that differ stand in the reasons
        cells["our cell"] = [_own(row) for _, row in table.iterrows()]
    cells |= {
        "ours, their\nprotocol": plus_minus(table, "like", 3),
        "ours, valid\nbound": plus_minus(table, "epsilon", 2),
    }
    cells |= {"median": fixed(table["epsilon_median"], 2), "ceiling": fixed(table["ceiling"], 2)}
    cells |= {"accounted\nε": fixed(table["epsilon_accounted"], 2), "runs": fixed(table["num_runs"], 0)}
    if table["accepted_low"].notna().any():
        cells |= {"theirs must\nbe within": _accepted(table)}
    keys = [_key(row) for _, row in table.iterrows()]
    verdicts = zip(table["verdict"], keys, strict=True)
    cells |= {"verdict": [f"{text} ({letters[key]})" if key in letters else text for text, key in verdicts]}
    return pd.DataFrame(cells, dtype=object)


def note(table: pd.DataFrame) -> str:
    """Says what all rows share and how to read them."""
    shared = [
        f"{name} {table[name].dropna().iloc[0]}"
        for name in ("auditor", "score", "protocol")
        if table[name].nunique() == 1
    ]
    return f"{_LEGEND} All rows: {', '.join(shared).replace('protocol', 'valid protocol')}." if shared else _LEGEND


def reasons(table: pd.DataFrame) -> list[str]:
    """Says, letter by letter, why numbers are not comparable; an earlier letter's reasons are not repeated."""
    lines, said = [], dict[str, tuple[str, list[str]]]()
    for (cell, text), letter in _letters(_joined(table)).items():
        listed = reproduction.split_reasons(text)
        before, known = said.setdefault(cell, (letter, listed))
        more = [reason for reason in listed if reason not in known]
        if before != letter and len(listed) == len(known) + len(more):
            lines.append(f"({letter}) As ({before}), and {'; '.join(more)}.")
        else:
            lines.append(f"({letter}) Ours is {cell}: {text}.")
    return lines


def markdown(table: pd.DataFrame) -> str:
    """Writes the whole table as Markdown, under its note and above its reasons."""
    return _with_reasons(
        table_formats.markdown_table(f"**Reproduction.** {note(table)}", printed(table), _WORDS), table
    )


def short(table: pd.DataFrame) -> str:
    """Writes the columns that a reader needs first as Markdown, above the reasons; without a note."""
    cells = printed(table)
    cells = cells[[name for name in _SHORT_COLUMNS if name in cells]]
    return _with_reasons(table_formats.markdown_table("", cells, _WORDS).lstrip("\n"), table)


def latex(table: pd.DataFrame) -> str:
    """Writes the whole table as a LaTeX float, with the reasons in its caption; settings are set apart."""
    cells, caption = printed(table), " ".join([note(table), *reasons(table)])
    groups = list(cells["data set, training"])
    return table_formats.latex_table(cells, _WORDS, caption=caption, label="tab:reproduction", groups=groups)


def write(table: pd.DataFrame, *paths: store.PathLike, provenance: Mapping[str, Any]) -> None:
    """Writes a table from `reproduction.compare` to files as `table_formats.write` does."""
    table_formats.write(table, *paths, provenance=provenance, markdown=markdown, latex=latex)


def _with_reasons(text: str, table: pd.DataFrame) -> str:
    """Puts the reasons below a table."""
    return "\n".join([text, *(line + "\n" for line in reasons(table))])


def _joined(table: pd.DataFrame) -> pd.DataFrame:
    """Writes theirs with its mark, and joins numbers of one setting that were not run."""
    table = table.assign(theirs=table["theirs"].map("{:.3f}".format, na_action="ignore"))
    setting = [*(name for name in reproduction.KEY if name != "canary"), "mark"]
    groups = [
        (*row[setting], None if row["verdict"] == reproduction.NOT_RUN else place) for place, row in table.iterrows()
    ]
    place = pd.factorize(pd.Series(groups, dtype=object))[0]  # by order of first appearance
    joined = {name: _listed if name in ("canary", "theirs") else "first" for name in table}
    table = table.groupby(place, sort=False).agg(joined).reset_index(drop=True)
    marked = table["theirs"] + " [" + table["mark"] + "]"
    return table.assign(theirs=marked.fillna(NO_VALUE))


def _listed(texts: pd.Series) -> str | None:
    """Joins texts; none if there is none."""
    return ", ".join(texts.dropna()) or None


def _key(row: pd.Series) -> tuple[str, str]:
    """Our cell, and what speaks against comparing it."""
    return _own(row), "; ".join(reproduction.split_reasons(row["reasons"]))


def _letters(table: pd.DataFrame) -> dict[tuple[str, str], str]:
    """Names each cell's list of reasons by a letter."""
    keys = dict.fromkeys(_key(row) for _, row in table.iterrows())
    return {key: _letter(place) for place, key in enumerate(key for key in keys if key[1])}


def _letter(place: int) -> str:
    """Counts a, b, ..., z, aa, ab, ..."""
    before, last = divmod(place, 26)
    return (_letter(before - 1) if before else "") + chr(ord("a") + last)


def _own(row: pd.Series) -> str:
    """Names our cell."""
    if pd.isna(row["own_dataset"]):
        return NO_VALUE
    return f"{row['own_dataset']}, {row['own_training']}"


def _accepted(table: pd.DataFrame) -> list[str]:
    """Writes the intervals that published numbers must lie in."""
    pairs = zip(table["accepted_low"], table["accepted_high"], strict=True)
    return [NO_VALUE if pd.isna(low) else f"{low:.3f} to {high:.3f}" for low, high in pairs]
