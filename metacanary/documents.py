"""Documents whose tables and numbers come from published results: README.md and docs/*.md.

What stands between the lines

    <!-- table digits: made by `make publish`, not by hand -->
    <!-- end of table -->

is table1.csv and table2.csv of docs/results/digits side by side; `table reproduction digits` is published numbers
beside ours over all published experiments, and below the cells of the digits at the same target epsilons. Numbers in
sentences: `numbers`.
"""

import re
from pathlib import Path

import pandas as pd

from metacanary import numbers, reproduction, reproduction_forms, short_tables, store

RESULTS = Path("docs", "results")
PUBLISHED = Path("config", "published.csv")
BLOCK = re.compile(
    r"(<!-- table ([^<>]+?): made by `make publish`, not by hand -->\n).*?(<!-- end of table -->)", re.DOTALL
)
SETUP = "setup.json"
TABLES = ("table1", "table2")


def documents(root: Path) -> list[Path]:
    """Lists the documents of a repository."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def renew(root: Path) -> None:
    """Makes docs/results/*/reproduction.csv and .md anew, then all tables and numbers of the documents.

    Args:
      root: The repository.

    Raises:
      ValueError: If a document names what is not there; documents before it are renewed then, it and those after it
        are not.
    """
    for experiment, table in reproductions(root).items():
        folder = root / RESULTS / experiment
        store.write_text(folder / "reproduction.csv", table.to_csv(index=False, lineterminator="\n"))
        store.write_text(folder / "reproduction.md", reproduction_forms.markdown(table))
    for document in documents(root):
        text = document.read_text(encoding="utf-8")
        if (renewed := fill(text, root, document)) != text:
            store.write_text(document, renewed)


def fill(text: str, root: Path, document: Path) -> str:
    """Returns the text of a document with its tables and numbers made anew.

    Raises:
      ValueError: If it names a table or number that is not there, or if a block has no end.
    """
    if text.count("<!-- table ") != len(BLOCK.findall(text)):
        raise ValueError(f"{document.name}: a table's first line or <!-- end of table --> is missing")
    link = (root / RESULTS).relative_to(document.parent)

    def block(match: re.Match[str]) -> str:
        return f"{match[1]}{_table(match[2], root, link)}\n{match[3]}"

    try:
        return numbers.fill(BLOCK.sub(block, text), root / RESULTS)
    except ValueError as error:
        raise ValueError(f"{document.name}: {error}") from None


def reproductions(root: Path) -> dict[str, pd.DataFrame]:
    """Compares published numbers with each published experiment that says how it was set up, by its name."""
    published, found = reproduction.read_published(root / PUBLISHED), {}
    for path in sorted((root / RESULTS).glob(f"*/{SETUP}")):
        summary = pd.read_csv(path.parent / "epsilon.csv.gz")
        found[path.parent.name] = reproduction.compare(summary, published, **store.read_json(path))
    return found


def _table(name: str, root: Path, link: Path) -> str:
    """Writes the table that a block names; links are relative to its document."""
    kind, _, own = name.partition(" ")
    if kind == "reproduction":
        found = reproductions(root)
        if own not in found:
            raise ValueError(f"table {name}: got {own!r}, expected one of {', '.join(found)}")
        table = reproduction.combine(found)
        numbered = table["verdict"] != reproduction.NOT_PUBLISHED
        shown = numbered | (table["experiment"] == own) & table["epsilon"].isin(table["epsilon"][numbered])
        return reproduction_forms.short(table[shown].reset_index(drop=True)).strip()
    paths = [root / RESULTS / name / f"{table}.csv" for table in TABLES]
    if missing := [path.relative_to(root) for path in paths if not path.is_file()]:
        raise ValueError(f"table {name}: there is no {missing[0]}")
    links = [f"{link}/{name}/{table}.md" for table in TABLES]
    return short_tables.markdown([pd.read_csv(path) for path in paths], links)
