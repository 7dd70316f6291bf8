"""docs/slurm.md holds what the tests on a cluster measured, and nothing else."""

import pytest
from tables import DOCUMENT, RESULTS, filled


def test_document_holds_the_published_tables():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert filled(text) == text


def test_every_fault_left_the_same_result():
    lines = (RESULTS / "faults.csv").read_text(encoding="utf-8").splitlines()
    assert len(lines) > 18
    assert all(line.endswith(",yes") for line in lines[1:])


def test_filled_puts_a_table_between_its_marks(tmp_path):
    (tmp_path / "load.csv").write_text("command,calls_a_minute\nsbatch,60\n", encoding="utf-8")
    marks = "before\n<!-- load: made by `make slurm-tables`, not by hand -->\nold\n<!-- end of load -->\nafter"
    text = filled(marks, tmp_path)
    assert "| command | calls a minute |\n| --- | --- |\n| sbatch | 60 |\n" in text
    assert "old" not in text
    assert filled(text, tmp_path) == text
    with pytest.raises(ValueError, match="expected the lines"):
        filled("no marks", tmp_path)
