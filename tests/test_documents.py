"""README and guides: their tables and numbers are those of docs/results, and the README has no others."""

import re
import shutil
from pathlib import Path

import pandas as pd
import pytest

from metacanary import documents, reproduction

# Numbers of the README that no run of ours made.
CONSTANTS = {"3.11", "95%", "2.0"}  # Python, intervals, the licence


@pytest.fixture
def copy(root, tmp_path):
    """A repository with the published results of the digits and with two documents."""
    shutil.copytree(root / "docs/results/digits", tmp_path / "docs/results/digits")
    (tmp_path / "config").mkdir()
    shutil.copy(root / "config/published.csv", tmp_path / "config")
    (tmp_path / "README.md").write_text(f"above\n\n{mark('digits')}\nold\n{END}\n\nbelow {NUMBER}<!--/-->.\n")
    (tmp_path / "docs/guide.md").write_text(f"{mark('reproduction digits')}\n{END}\n{mark('digits')}\n{END}\n")
    return tmp_path


END = "<!-- end of table -->"
NUMBER = "<!--= digits/table1 num_runs training=sgd canary=random -->"


def mark(name):
    return f"<!-- table {name}: made by `make publish`, not by hand -->"


def test_documents_hold_what_is_published(root):
    """Every table and every marked number of README.md and docs/*.md. If not: `make publish`."""
    for document in documents.documents(root):
        text = document.read_text(encoding="utf-8")
        assert documents.fill(text, root, document) == text, f"{document}: run python -m metacanary.publish --numbers"


def test_published_reproductions_are_those_of_the_published_summaries(root):
    found = documents.reproductions(root)
    assert {"digits", "cifar10_small"} <= set(found)
    for experiment, table in found.items():
        path = root / "docs/results" / experiment / "reproduction.csv"
        assert path.read_text(encoding="utf-8") == table.to_csv(index=False, lineterminator="\n")


def test_readme_has_no_number_of_ours_that_was_typed(root):
    """Outside of marks, tables, code and links there are none with decimals or percent signs, but for constants."""
    text = (root / "README.md").read_text(encoding="utf-8")
    for made in (documents.BLOCK.pattern, r"<!--= .*?<!--/-->", r"```.*?```", r"`[^`\n]*`", r"\]\([^)]*\)"):
        text = re.sub(made, "", text, flags=re.DOTALL)
    text = re.sub(r"arXiv \d{4}\.\d{5}", "", text)
    assert set(re.findall(r"\d+(?:\.\d+)+%?|\d+%", text)) <= CONSTANTS


def test_readme_says_whether_a_published_number_is_reproduced(root):
    """The sentence above its first table."""
    verdicts = pd.concat(documents.reproductions(root).values())["verdict"]
    said = "**None of the paper's numbers is\nreproduced yet**" in (root / "README.md").read_text(encoding="utf-8")
    assert said == (reproduction.REPRODUCED not in set(verdicts))


def test_guide_of_reproduction_runs(root, monkeypatch):
    guide = (root / "docs/reproduction.md").read_text(encoding="utf-8")
    monkeypatch.chdir(root)
    names = {}
    exec(compile(re.search(r"```python\n(.*?)```", guide, re.DOTALL)[1], "docs/reproduction.md", "exec"), names)
    assert tuple(names["table"].columns) == reproduction.COLUMNS


def test_the_check_for_typed_numbers_would_find_one():
    assert re.findall(r"\d+(?:\.\d+)+%?|\d+%", "an AUROC of 0.88, 94% of them and 16 runs") == ["0.88", "94%"]


def test_renew_fills_tables_and_numbers_and_keeps_the_rest(copy):
    documents.renew(copy)
    readme, guide = ((copy / name).read_text() for name in ("README.md", "docs/guide.md"))
    num_runs = pd.read_csv(copy / "docs/results/digits/table1.csv")["num_runs"][0]
    assert readme.startswith(f"above\n\n{mark('digits')}\n| training")
    assert readme.endswith(f"{END}\n\nbelow {NUMBER}{num_runs}<!--/-->.\n")
    assert "old" not in readme
    assert "(docs/results/digits/table1.md)" in readme
    assert "(results/digits/table1.md)" in guide
    for text in (readme, guide):
        assert "| metagradient |" in text
    assert "0.405, 0.225, 0.732 [S]" in guide
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    documents.renew(copy)
    assert before == {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}


def test_renew_takes_up_new_published_numbers(copy):
    table = pd.read_csv(copy / "config/published.csv")
    table.assign(value=table["value"] + 1).to_csv(copy / "config/published.csv", index=False)
    documents.renew(copy)
    assert "1.405, 1.225, 1.732 [S]" in (copy / "docs/guide.md").read_text()
    assert "1.405" in (copy / "docs/results/digits/reproduction.md").read_text()


def test_reproduction_shows_own_cells_at_published_epsilons_only(copy):
    table = documents.reproductions(copy)["digits"]
    own = table[table["verdict"] == reproduction.NOT_PUBLISHED]
    assert set(own["training"]) == {"sgd", "dpsgd"}
    documents.renew(copy)
    guide = (copy / "docs/guide.md").read_text().split(END)[0]
    assert "digits, dpsgd" in guide
    assert "digits, sgd" not in guide


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{mark('digits')}\n", "README.md: a table's first line or <!-- end of table --> is missing"),
        ("<!-- table digits -->\n" + END, "README.md: a table's first line"),
        (f"{mark('absent')}\n{END}", r"README.md: table absent: there is no docs/results/absent/table1\.csv"),
        (
            f"{mark('reproduction absent')}\n{END}",
            "README.md: table reproduction absent: got 'absent', expected one of",
        ),
        ("<!--= digits/table1 x -->1<!--/-->", "README.md: mark: 'digits/table1 x': "),
    ],
)
def test_a_wrong_mark_is_named_with_its_document(copy, text, message):
    with pytest.raises(ValueError, match=message):
        documents.fill(text, copy, Path(copy, "README.md"))
