"""The forms that tables are printed in: Markdown, LaTeX, and text for a terminal.

Those of lower bounds start from `printed`, the text of the cells, and say what the numbers are with `note`.
`markdown_table`, `latex_table` and `write` serve any table.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from metacanary import store

SETTING = ["dataset", "training", "epsilon"]
PAPER_COLUMN = "epsilon_mean_paper_not_a_bound"
NO_VALUE = "—"
AUDITORS = {
    "steinke": "Steinke et al. 2023",
    "fdp_gaussian": "f-DP, Gaussian family (Mahloujifar et al. 2024)",
}
_TITLES = {("steinke",): "Table 1", ("fdp_gaussian",): "Table 2"}
# A column of the printed table when it differs between rows, a word of its note when it does not.
_NOTED = {
    "auditor": "auditor",
    "dataset": "dataset",
    "step": "step",
    "num_canaries": "canaries",
    "game": "game",
    "adjacency": "adjacency",
    "assumption": "assumption",
    "accountant": "accountant",
}
_WORDS = {"training", "canary", *_NOTED.values()} - {"step", "canaries"}
_LEGEND = (
    "ε is the mean over runs of each run's lower bound, ± half of its 95% t interval over runs (none for "
    "one run). These are audit runs of one set of canaries (optimised ones: of one optimisation), so ± leaves out "
    "how optimisations and source images vary. "
    "Pooled is the lower bound from the coins of all runs at once; the ceiling is that of an audit whose guesses "
    "are all right. Accounted is the upper bound, in brackets by RDP; last iterate is a heuristic for what the final "
    "model alone would cost, no bound."
)
_PAPER_LEGEND = "The paper protocol chooses the number of guesses on the scores it then counts: not a bound."


def printed(table: pd.DataFrame) -> pd.DataFrame:
    """Turns a table into the text of its cells, under the headers that people read.

    Args:
      table: From `tables.table1`, `table2` or `bounds`, or read back from its CSV.

    Returns:
      Text cells. A header may hold one line break. Missing values are a dash.
    """
    table = _without_idle_accountant(table)
    names = ["training", *(name for name in _NOTED if _varies(table, name))]
    cells = {_NOTED.get(name, name): [words(value) for value in table[name]] for name in names}
    cells |= {"target\nε": [words(value) for value in table["epsilon"]], "canary": list(table["canary"])}
    if "objective" in table:
        cells |= {"optimised\nfor": [words(value) for value in table["objective"]]}
    cells |= {"runs": [str(count) for count in table["num_runs"]]}
    cells |= {"ε\nmean": plus_minus(table, "epsilon", 2), "ε\nmedian": fixed(table["epsilon_median"], 2)}
    cells |= {"ε\npooled": fixed(table["epsilon_pooled"], 2)}
    if PAPER_COLUMN in table:
        cells |= {"paper protocol,\nnot a bound": fixed(table[PAPER_COLUMN], 2)}
    cells |= {"ceiling\n(pooled)": _with_second(table["ceiling"], table["ceiling_pooled"])}
    accounted = _with_second(table["epsilon_accounted"], table["epsilon_accounted_rdp"])
    cells |= {"accounted ε\n(by RDP)": accounted, "last iterate,\nheuristic": fixed(table["epsilon_heuristic"], 2)}
    cells |= {"AUROC\nmean": plus_minus(table, "auroc", 3)}
    cells |= {"test\naccuracy": fixed(100 * table["test_accuracy"], 1, "%")}
    return pd.DataFrame(cells, dtype=object)


def note(table: pd.DataFrame) -> str:
    """Says of one table the auditor, protocol and score, what its rows share, and how to read it."""
    table = _without_idle_accountant(table)
    names = {"auditor": "auditor", "protocol": "protocol", "score": "score"} | _NOTED
    shared = []
    for name, word in names.items():
        if not _varies(table, name) and table[name].notna().any():
            value = words(table[name].dropna().iloc[0])
            shared.append(f"{word} {AUDITORS.get(value, value)}")
    legend = _LEGEND if PAPER_COLUMN not in table else f"{_LEGEND} {_PAPER_LEGEND}"
    return f"Empirical lower bounds on ε at the last step: {', '.join(shared)}. {legend} {NO_VALUE}: no value."


def title(table: pd.DataFrame) -> str:
    """Names a table by its auditors."""
    names = tuple(table["auditor"].unique())
    return _TITLES.get(names, "Table" if len(names) == 1 else "All bounds")


def markdown(table: pd.DataFrame) -> str:
    """Writes a table as an aligned Markdown table under its note."""
    return markdown_table(f"**{title(table)}.** {note(table)}", printed(table), _WORDS)


def text(table: pd.DataFrame) -> str:
    """Writes a table for a terminal: columns by spaces, headers of two lines, no note."""
    cells = printed(table)
    headers = [name.split("\n") if "\n" in name else ["", name] for name in cells.columns]
    rows = [*map(list, zip(*headers, strict=True)), *cells.to_numpy().tolist()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(_aligned(row, widths, _is_left(cells, _WORDS))).rstrip() for row in rows]
    return "\n".join([*lines[:2], "  ".join("-" * width for width in widths), *lines[2:], ""])


def latex(table: pd.DataFrame) -> str:
    """Writes a table as `latex_table` does; groups of one training are set apart."""
    names = table["auditor"].unique()
    label = f"tab:epsilon-{names[0] if len(names) == 1 else 'bounds'}".replace("_", "-")
    groups = table[SETTING if len(names) == 1 else [*SETTING, "canary"]].to_numpy().tolist()
    return latex_table(printed(table), _WORDS, caption=note(table), label=label, groups=groups)


def markdown_table(heading: str, cells: pd.DataFrame, words: Collection[str]) -> str:
    """Writes an aligned Markdown table under a heading.

    Args:
      heading: Markdown.
      cells: Text; a header may hold line breaks.
      words: The columns that are set flush left; others are set flush right.
    """
    rows = [[_markdown_cell(text) for text in row] for row in [list(cells.columns), *cells.to_numpy().tolist()]]
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    left = _is_left(cells, words)
    rules = [f":{'-' * (w - 1)}" if flush else f"{'-' * (w - 1)}:" for flush, w in zip(left, widths, strict=True)]
    lines = [_aligned(row, widths, left) for row in [rows[0], rules, *rows[1:]]]
    return "\n".join([heading, "", *(f"| {' | '.join(line)} |" for line in lines), ""])


def latex_table(
    cells: pd.DataFrame, words: Collection[str], *, caption: str, label: str, groups: Sequence[Any] | None = None
) -> str:
    """Writes a LaTeX float that needs the package booktabs and nothing else.

    Args:
      cells, words: As of `markdown_table`.
      caption: Text, which is escaped.
      label: TeX.
      groups: Of each row its group; neighbouring rows of different groups are set apart.

    Guarantees:
      Every special character of TeX in the text is escaped. Only ASCII, if the text has no other characters beyond
      it than ε, δ, η, ², √, ∞, ± and `NO_VALUE`.
    """
    lines = [_tex_row(map(_tex_header, cells.columns)), "\\midrule"]
    for place, row in enumerate(cells.to_numpy()):
        if groups and place and groups[place] != groups[place - 1]:
            lines.append("\\addlinespace")
        lines.append(_tex_row(map(_tex, row)))
    columns = "".join("l" if flush else "r" for flush in _is_left(cells, words))
    return "\n".join(
        [
            *("\\begin{table*}", "\\centering", "\\footnotesize", "\\setlength{\\tabcolsep}{3pt}"),
            *(f"\\caption{{{_tex(caption)}}}", f"\\label{{{label}}}"),
            *(f"\\begin{{tabular}}{{@{{}}{columns}@{{}}}}", "\\toprule", *lines, "\\bottomrule"),
            *("\\end{tabular}", "\\end{table*}", ""),
        ]
    )


def write(
    table: pd.DataFrame,
    *paths: store.PathLike,
    provenance: Mapping[str, Any],
    markdown: Callable[[pd.DataFrame], str],
    latex: Callable[[pd.DataFrame], str],
) -> None:
    """Writes a table to files, each in the form that its suffix names: .csv, .md or .tex.

    Args:
      table: Any.
      *paths: The files.
      provenance: Goes beside the CSV, as in `store.write_csv`.
      markdown, latex: Turn the table into text.

    Raises:
      ValueError: For another suffix; nothing is written then.
    """
    forms = {".md": markdown, ".tex": latex}
    for path in map(Path, paths):
        if path.suffix not in (".csv", *forms):
            raise ValueError(f"path={str(path)!r} has suffix {path.suffix!r}, expected .csv, .md or .tex")
    for path in map(Path, paths):
        if path.suffix == ".csv":
            store.write_csv(path, table, provenance)
        else:
            store.write_text(path, forms[path.suffix](table))


def _without_idle_accountant(table: pd.DataFrame) -> pd.DataFrame:
    """Blanks the accountant of trainings without DP, where nothing was accounted."""
    return table.assign(accountant=table["accountant"].where(table["epsilon_accounted"] < float("inf")))


def _varies(table: pd.DataFrame, name: str) -> bool:
    """Tells whether the rows that have a value differ in it."""
    return table[name].nunique() > 1


def _number(value: float, digits: int, unit: str = "") -> str:
    """Writes one number."""
    if pd.isna(value):
        return NO_VALUE
    return "∞" if value == float("inf") else f"{value:.{digits}f}{unit}"


def words(value: Any) -> str:
    """Writes a descriptor, whole numbers without a decimal point."""
    if isinstance(value, str):
        return value
    return f"{value:.10g}" if pd.notna(value) and value != float("inf") else _number(value, 0)


def fixed(values: pd.Series, digits: int, unit: str = "") -> list[str]:
    """Writes a column of numbers."""
    return [_number(value, digits, unit) for value in values]


def plus_minus(table: pd.DataFrame, name: str, digits: int) -> list[str]:
    """Writes means with the half-widths of their intervals, where they have one."""
    halves = table[f"{name}_high"] - table[f"{name}_mean"]
    means = fixed(table[f"{name}_mean"], digits)
    return [m if pd.isna(h) else f"{m} ± {_number(h, digits)}" for m, h in zip(means, halves, strict=True)]


def _with_second(values: pd.Series, seconds: pd.Series) -> list[str]:
    """Writes numbers, each with a second one in brackets if that is there and finite."""
    pairs = zip(fixed(values, 2), fixed(seconds, 2), strict=True)
    return [first if second in (NO_VALUE, "∞") else f"{first} ({second})" for first, second in pairs]


def _is_left(cells: pd.DataFrame, words: Collection[str]) -> list[bool]:
    """Tells which columns hold words, which are set flush left."""
    return [name in words for name in cells.columns]


def _aligned(row: Sequence[str], widths: Sequence[int], left: Sequence[bool]) -> list[str]:
    """Pads the cells of one line."""
    return [
        cell.ljust(width) if flush else cell.rjust(width) for cell, width, flush in zip(row, widths, left, strict=True)
    ]


def _markdown_cell(text: str) -> str:
    """Escapes what would end a cell."""
    return text.replace("|", "\\|").replace("\n", " ")


_TEX = str.maketrans(
    {
        **{character: f"\\{character}" for character in "&%$#_{}"},
        **{character: f"${character}$" for character in "<>|"},
        "\\": "\\textbackslash{}",
        "~": "\\textasciitilde{}",
        "^": "\\textasciicircum{}",
        "ε": "$\\varepsilon$",
        "δ": "$\\delta$",
        "η": "$\\eta$",
        "²": "$^2$",
        "√": "$\\surd$",
        "∞": "$\\infty$",
        "±": "$\\pm$",
        NO_VALUE: "---",
        "\n": " ",
    }
)


def _tex_row(cells: Iterable[str]) -> str:
    """Joins the cells of a row."""
    return f"{' & '.join(cells)} \\\\"


def _tex_header(name: str) -> str:
    """Writes a header, one of two lines as a stack."""
    lines = " \\\\ ".join(map(_tex, name.split("\n")))
    return f"\\shortstack{{{lines}}}" if "\n" in name else lines


def _tex(text: str) -> str:
    """Writes text as TeX."""
    return text.translate(_TEX)
