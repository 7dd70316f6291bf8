"""Tables as Markdown, and documents that hold them between marks."""

from __future__ import annotations

import re

import pandas as pd


def markdown(table: pd.DataFrame) -> str:
    """A table as Markdown, numbers to the right."""
    aligned = ["---" if i == 0 else "---:" for i in range(len(table.columns))]
    lines = [list(table.columns), aligned, *table.astype(str).to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def filled(readme: str, generated: dict[str, str]) -> str:
    """The README with its generated parts replaced."""
    for name, text in generated.items():
        begin, end = f"<!-- {name}: made by benchmarks.tables -->", f"<!-- end of {name} -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        parts = pattern.split(readme)
        if len(parts) != 2:
            raise ValueError(f"README: got no section {name!r}, expected {begin} and {end}")
        readme = f"{begin}\n{text}\n{end}".join(parts)
    return readme
