"""Tables 1 and 2 side by side."""

import pandas as pd
import pytest
from test_tables import make_frame, make_rows

from metacanary import short_tables, tables


def make_tables(frame):
    """Tables 1 and 2 of a frame; the second auditor's bounds are twice the first's."""
    twice = frame.assign(auditor="fdp_gaussian", assumption="family", epsilon_lower=2 * frame["epsilon_lower"])
    both = pd.concat([frame, twice.assign(ceiling=2 * frame["ceiling"])])
    return [tables.table1(both), tables.table2(both)]


def test_printed_cells():
    cells = short_tables.printed(make_tables(make_frame()))
    public, private = cells.iloc[2], cells.iloc[5]
    assert (public["training"], public["canary"]) == ("sgd", "metagradient")
    assert (public["Table 1"], public["Table 1, pooled"]) == ("0.80 ± 0.90", "1.10")
    assert (public["Table 2"], public["Table 2, pooled"]) == ("1.60 ± 1.79", "2.20")
    assert (private["training"], private["Table 2"], private["accuracy"]) == ("dpsgd, ε 8", "1.00", "90.0%")
    assert len(cells) == 6


def test_what_rows_share_is_in_the_note_and_else_a_column():
    alike = make_tables(make_rows([0.1, 0.2], pooled=0.3))
    cells, note = short_tables.printed(alike), short_tables.note(alike)
    assert {"runs", "canaries", "step", "game", "data set"}.isdisjoint(cells.columns)
    assert "protocol corrected, score negative_loss, data set digits, runs 2, canaries 100, step 150" in note
    assert "Table 1: Steinke et al. 2023, assumption worst_case, ceiling 3.50, pooled 5.00." in note
    assert "assumption family, ceiling 7.00, pooled 10.00." in note
    assert "target" not in note
    mixed = pd.concat([make_rows([0.1, 0.2]), make_rows([0.1], training="dpsgd", epsilon="8", step=9, ceiling=2.0)])
    cells, note = short_tables.printed(make_tables(mixed)), short_tables.note(make_tables(mixed))
    assert list(cells["step"]) == ["150", "9"]
    assert list(cells["runs"]) == ["2", "1"]
    assert "ceiling 2.00 to 3.50" in note
    assert "step" not in note
    assert "target" in note


def test_markdown_links_the_whole_tables():
    text = short_tables.markdown(make_tables(make_frame()), ["one.md", "two.md"])
    assert "[Table 1](one.md) and [Table 2](two.md)." in text
    assert text.startswith("| training")


def test_tables_of_different_cells_are_refused():
    with pytest.raises(ValueError, match="got tables of different cells"):
        short_tables.printed([make_tables(make_frame())[0], make_tables(make_rows([0.1]))[1]])
