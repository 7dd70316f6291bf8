"""Tables 1 and 2 as a reader of a document wants them: side by side, with few columns, and below what rows share."""

from collections.abc import Sequence

import pandas as pd

from metacanary import table_formats
from metacanary.table_formats import fixed, plus_minus, words

# A column where rows differ in it, else a word of the line below.
_SHARED = {"dataset": "data set", "num_runs": "runs", "num_canaries": "canaries", "step": "step", "game": "game"}
_WORDS = {"training", "canary", "data set", "game"}


def printed(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Turns tables into the text of their most wanted cells.

    Args:
      tables: From `tables.table1` and `table2`, or read back from their CSV; of the same cells in the same order.

    Returns:
      Text cells: training with its target epsilon, canary kind, what rows differ in; of each table the mean bound with
      its interval and the pooled bound; AUROC with its interval, test accuracy.

    Raises:
      ValueError: If the tables are of different cells.
    """
    first, *others = tables
    key = [*table_formats.SETTING, "canary"]
    for other in others:
        if not first[key].equals(other[key]):
            raise ValueError("tables: got tables of different cells, expected the same rows in the same order")
    pairs = zip(first["training"], first["epsilon"], strict=True)
    cells = {"training": [name if value == float("inf") else f"{name}, ε {words(value)}" for name, value in pairs]}
    cells |= {"canary": list(first["canary"])}
    cells |= {word: [words(v) for v in first[name]] for name, word in _SHARED.items() if first[name].nunique() > 1}
    for table in tables:
        title = table_formats.title(table)
        cells |= {title: plus_minus(table, "epsilon", 2), f"{title}, pooled": fixed(table["epsilon_pooled"], 2)}
    cells |= {"AUROC": plus_minus(first, "auroc", 3), "accuracy": fixed(100 * first["test_accuracy"], 1, "%")}
    return pd.DataFrame(cells, dtype=object)


def note(tables: Sequence[pd.DataFrame]) -> str:
    """Says what bounds are, of each table its auditor, assumption and ceiling, and what all rows share."""
    sentences = ["Lower bounds on ε: mean over runs, ± half of the 95% t interval over runs of one set of canaries;"]
    sentences.append("pooled: one bound from the coins of all runs.")
    for table in tables:
        ceilings = f"ceiling {_range(table['ceiling'])}, pooled {_range(table['ceiling_pooled'])}"
        auditor, assumption = table["auditor"].iloc[0], table["assumption"].dropna().iloc[0]
        name = table_formats.AUDITORS.get(auditor, auditor)
        sentences.append(f"{table_formats.title(table)}: {name}, assumption {assumption}, {ceilings}.")
    first = tables[0]
    shared = [f"{name} {first[name].iloc[0]}" for name in ("protocol", "score")]
    shared += [f"{word} {words(first[name].iloc[0])}" for name, word in _SHARED.items() if first[name].nunique() == 1]
    sentences.append(f"All rows: {', '.join(shared)}.")
    if (first["epsilon"] < float("inf")).any():
        sentences.append("ε beside a training is its target, which the accounted ε does not exceed.")
    return " ".join(sentences)


def markdown(tables: Sequence[pd.DataFrame], links: Sequence[str]) -> str:
    """Writes tables as one in Markdown, and below it its note.

    Args:
      tables: As of `printed`.
      links: Where the whole tables are, with accounted epsilons and the paper's protocol.
    """
    named = " and ".join(f"[{table_formats.title(t)}]({link})" for t, link in zip(tables, links, strict=True))
    body = table_formats.markdown_table("", printed(tables), _WORDS).lstrip("\n")
    return f"{body}\n{note(tables)} Whole tables, with accounted ε and the paper's protocol: {named}."


def _range(values: pd.Series) -> str:
    """Writes the least and the greatest of some values, or the one."""
    return " to ".join(dict.fromkeys(fixed(pd.Series([values.min(), values.max()]), 2)))
