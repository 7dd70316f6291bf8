"""Tests of metacanary.table_formats."""

import re
import shutil
import subprocess

import pandas as pd
import pytest
from test_tables import make_frame, make_rows

from metacanary import table_formats, tables


def test_printed_cells():
    cells = table_formats.printed(tables.table1(make_frame()))
    cells.columns = [name.replace("\n", " ") for name in cells.columns]
    missing, private, public = (cells.iloc[place] for place in (4, 5, 2))
    assert (public["target ε"], public["ε mean"], public["ε pooled"]) == ("∞", "0.80 ± 0.90", "1.10")
    assert (public["ceiling (pooled)"], public["accounted ε (by RDP)"]) == ("3.50 (5.00)", "∞")
    assert (private["target ε"], private["ε mean"], private["accounted ε (by RDP)"]) == (
        "8",
        "0.50",
        "7.50 (7.90)",
    )
    assert (private["AUROC mean"], private["test accuracy"]) == ("0.550", "90.0%")
    assert missing["runs"] == "0"
    assert set(missing.drop(["training", "target ε", "canary", "runs"])) == {table_formats.NO_VALUE}


def test_note_has_what_rows_share_and_columns_what_they_do_not():
    alike = tables.table1(make_frame())
    assert "game independent, adjacency add_remove" in table_formats.note(alike)
    assert {"game", "adjacency", "dataset", "step"}.isdisjoint(table_formats.printed(alike).columns)
    paired = make_frame().assign(game="paired", adjacency="replace_one", dataset="mnist")
    mixed = tables.table1(pd.concat([make_frame(), paired]))
    assert {"game", "adjacency", "dataset"} <= set(table_formats.printed(mixed).columns)
    assert "game independent" not in table_formats.note(mixed)


@pytest.mark.parametrize(
    "word", ["Steinke", "protocol corrected", "worst_case", "negative_loss", "t interval", "pld", "one set of canaries"]
)
def test_note_says_what_a_number_needs(word):
    assert word in table_formats.note(tables.table1(make_frame()))


def test_markdown_is_aligned_and_complete():
    table = tables.table1(make_frame())
    lines = [line for line in table_formats.markdown(table).splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(table)
    assert len({len(line) for line in lines}) == 1
    bars = {tuple(match.start() for match in re.finditer(r"\|", line)) for line in lines}
    assert len(bars) == 1


def test_markdown_escapes_bars():
    text = table_formats.markdown(tables.table1(make_rows([0.1], canary="a|b")))
    assert "a\\|b" in text


def test_text_is_aligned():
    lines = table_formats.text(tables.table1(make_frame())).rstrip("\n").split("\n")
    rule = lines[2]
    assert set(rule) == {"-", " "}
    gaps = [place for place, character in enumerate(rule) if character == " "]
    assert all(line.ljust(len(rule))[gap] == " " for line in lines for gap in gaps)
    assert max(map(len, lines)) <= len(rule)


@pytest.mark.parametrize(
    ("name", "escaped"),
    [
        ("gradient_max", "gradient\\_max"),
        ("50%&$#", "50\\%\\&\\$\\#"),
        ("{a}", "\\{a\\}"),
        ("a\\b~c^d", "a\\textbackslash{}b\\textasciitilde{}c\\textasciicircum{}d"),
        ("a<b|c>", "a$<$b$|$c$>$"),
    ],
)
def test_latex_escapes_names(name, escaped):
    assert f" {escaped} &" in table_formats.latex(tables.table1(make_rows([0.1, 0.2], canary=name)))


def test_latex_structure():
    table = tables.table1(make_frame())
    source = table_formats.latex(table)
    assert source.isascii()
    for rule in (
        "\\toprule",
        "\\midrule",
        "\\bottomrule",
        "\\addlinespace",
        "\\caption{",
        "\\label{tab:epsilon-steinke}",
    ):
        assert source.count(rule) == 1
    (columns,) = re.findall(r"\\begin{tabular}{@{}([lr]+)@{}}", source)
    rows = [line for line in source.splitlines() if line.endswith(" \\\\")]
    assert len(rows) == 1 + len(table)
    assert {line.count(" & ") + 1 for line in rows} == {len(columns)}
    unescaped = re.sub(r"\\[{}]", "", source)
    assert unescaped.count("{") == unescaped.count("}")
    assert re.findall(r"\\begin{(.+?)}", source) == re.findall(r"\\end{(.+?)}", source)[::-1]


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not on this machine")
def test_latex_compiles(tmp_path):
    table = table_formats.latex(tables.table1(make_frame()))
    document = f"\\documentclass{{article}}\\usepackage{{booktabs}}\\begin{{document}}{table}\\end{{document}}"
    (tmp_path / "table.tex").write_text(document)
    command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "table.tex"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0


def test_printed_says_what_canaries_were_optimised_for():
    table = tables.table1(make_frame())
    assert "optimised\nfor" not in table_formats.printed(table)
    said = tables.with_objectives(table, {"metagradient": "smooth_auroc"})
    cells = table_formats.printed(said)
    for kind, objective in zip(cells["canary"], cells["optimised\nfor"], strict=True):
        assert objective == ("smooth_auroc" if kind == "metagradient" else "—")
    assert "smooth_auroc" in table_formats.markdown(said)
    assert r"smooth\_auroc" in table_formats.latex(said)
