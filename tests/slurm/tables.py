"""Puts what the tests on a cluster measured into docs/slurm.md, between its marks; no number there is typed by hand.

python tests/slurm/tables.py
"""

import csv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
DOCUMENT, RESULTS = ROOT / "docs" / "slurm.md", ROOT / "docs" / "results" / "slurm"
START, END = "<!-- {name}: made by `make slurm-tables`, not by hand -->", "<!-- end of {name} -->"


def markdown(path: Path) -> str:
    """A CSV file as a Markdown table."""
    with path.open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    titles = [name.replace("_", " ") for name in header]
    lines = [titles, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def filled(text: str, results: Path = RESULTS) -> str:
    """The document with a table for every CSV file.

    Raises:
      ValueError: The document lacks the marks of a table.
    """
    for path in sorted(results.glob("*.csv")):
        start, end = START.format(name=path.stem), END.format(name=path.stem)
        before, found, rest = text.partition(start)
        _, ended, after = rest.partition(end)
        if not (found and ended):
            raise ValueError(f"docs/slurm.md: expected the lines {start!r} and {end!r}")
        text = f"{before}{start}\n{markdown(path)}\n{end}{after}"
    return text


if __name__ == "__main__":
    DOCUMENT.write_text(filled(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
