"""The forms of published numbers beside ours."""

import re
import shutil
import subprocess

import pandas as pd
import pytest
from test_reproduction import NAMES, make_frame, one, setup

from metacanary import reproduction, reproduction_forms, store


@pytest.fixture(scope="module")
def published(root):
    """The published numbers of the repository."""
    return reproduction.read_published(root / "config/published.csv")


@pytest.fixture
def table(published):
    """One number that is reproduced, one not comparable, thirteen not run, and one cell without a number."""
    frames = [
        make_frame([0.7, 0.8, 0.7, 0.8, 0.7]),
        make_frame([0.1, 0.2, 0.1, 0.2, 0.1], canary="plain"),
        make_frame([0.5] * 5, canary="plain", epsilon="2"),
    ]
    cells = [*setup(), setup(model="resnet9", batch_size=100)[0] | {"canary": "plain"}]
    cells[1] = cells[1] | {"matches": cells[1]["matches"] | {"canary": "random"}}
    return reproduction.compare(pd.concat(frames), published, cells, **NAMES)


def test_printed_cells(table):
    cells = reproduction_forms.printed(table)
    cells.columns = [name.replace("\n", " ") for name in cells.columns]
    plain, absent, ours = (cells.iloc[place] for place in (0, 1, 2))
    assert (ours["theirs"], ours["ours, their protocol"], ours["verdict"]) == (
        "0.732 [S]",
        "0.740 ± 0.068",
        "reproduced",
    )
    assert (ours["our cell"], ours["theirs must be within"]) == ("cifar10, private", "0.644 to 0.836")
    assert (plain["verdict"], absent["verdict"]) == ("not comparable (a)", "not run")
    assert (cells.iloc[-1]["verdict"], cells.iloc[-1]["theirs"]) == ("no published number", "—")


def test_numbers_that_were_not_run_share_a_row(table):
    cells = reproduction_forms.printed(table)
    (row,) = cells[cells["data set, training"] == "mnist, dpsgd_finetune"].to_dict("records")
    assert row["canary"] == "random, mislabeled, metagradient"
    assert row["theirs"] == "0.321, 0.099, 1.465 [S]"
    assert (cells["verdict"] == "not run").sum() == 5  # four settings, and the mislabelled canaries of the first


def test_reasons_are_given_once_by_letter(published):
    far = {"model": "resnet9"}
    frames = [make_frame([0.1] * 5, canary=name) for name in ("ours", "plain")]
    cells = [setup(**far)[0], setup(**far, start="mislabeled")[0] | {"canary": "plain"}]
    table = reproduction.compare(pd.concat(frames), one(published), cells, **NAMES)
    assert reproduction_forms.reasons(table) == [
        "(a) Ours is cifar10, private: model resnet9 (theirs wrn16_4).",
        "(b) As (a), and start of the canaries mislabeled (theirs random).",
    ]
    assert list(reproduction_forms.printed(table)["verdict"]) == ["not comparable (a)", "not comparable (b)"]


def test_reasons_of_many_cells_go_on_after_z(published):
    cells = [setup(model=f"model{place}")[0] | {"canary": f"kind{place:02}"} for place in range(30)]
    frames = [make_frame([0.1] * 5, canary=cell["canary"]) for cell in cells]
    table = reproduction.compare(pd.concat(frames), one(published), cells, **NAMES)
    letters = [line.partition(" ")[0] for line in reproduction_forms.reasons(table)]
    assert letters == [f"({letter})" for letter in [*"abcdefghijklmnopqrstuvwxyz", "aa", "ab", "ac", "ad"]]


def test_markdown_has_note_table_and_reasons(table):
    text = reproduction_forms.markdown(table)
    for words in (
        "it is no bound",
        "docs/reproduction.md",
        "valid protocol corrected",
        "(a) Ours is cifar10, private: ",
    ):
        assert words in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1
    assert len(lines) == 2 + len(reproduction_forms.printed(table))
    short = reproduction_forms.short(table)
    assert "median" in text
    assert "median" not in short
    assert short.strip().splitlines()[-1].startswith("(a) Ours is")


def test_forms_are_the_same_read_back_from_csv(table, tmp_path):
    paths = [tmp_path / f"reproduction.{suffix}" for suffix in ("csv", "md", "tex")]
    reproduction_forms.write(table, *paths, provenance={})
    again = store.read_csv(paths[0])
    assert reproduction_forms.markdown(again) == paths[1].read_text() == reproduction_forms.markdown(table)
    assert reproduction_forms.latex(again) == paths[2].read_text()


def test_latex_structure(table):
    source = reproduction_forms.latex(table)
    assert source.isascii()
    (columns,) = re.findall(r"\\begin{tabular}{@{}([lr]+)@{}}", source)
    rows = [line for line in source.splitlines() if line.endswith(" \\\\")]
    assert {line.count(" & ") + 1 for line in rows} == {len(columns)}
    assert len(rows) == 1 + len(reproduction_forms.printed(table))
    assert "\\label{tab:reproduction}" in source
    assert "model resnet9 (theirs wrn16\\_4)" in source
    assert not [line for line in rows if line.startswith("[")]  # TeX would take it for a length


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not on this machine")
def test_latex_compiles(table, tmp_path):
    source = reproduction_forms.latex(table)
    document = f"\\documentclass{{article}}\\usepackage{{booktabs}}\\begin{{document}}{source}\\end{{document}}"
    (tmp_path / "table.tex").write_text(document)
    command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "table.tex"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0
