import numpy as np
import pandas as pd
import pytest
from test_ledger import BOUNDS, collected, rows

from metacanary import figures, ledger, ledger_figure

COLORS = ledger_figure._COLORS


def two_cells():
    """A ledger at two target epsilons."""
    weaker = {key: tuple(value / 4 for value in values) for key, values in BOUNDS.items()}
    other = rows(weaker, epsilon=2.0, epsilon_accounted=2.0, epsilon_accounted_rdp=2.2, epsilon_heuristic=1.9)
    return collected(pd.concat([rows(), other]))


def test_a_panel_per_epsilon_with_rungs_from_accountants_to_kinds():
    drawn = ledger_figure.figure(two_cells())
    assert [axis.get_title() for axis in drawn.axes] == [f"digits, dpsgd, target ε = {e}" for e in (8, 2)]
    names = [text.get_text() for text in drawn.axes[0].get_yticklabels()]
    tops = [ledger.RDP, ledger.PLD, ledger.HEURISTIC, ledger.ALL_ITERATES, ledger.LAST_ITERATE]
    assert names == [*tops, "metagradient", "random"]
    low, high = drawn.axes[0].get_ylim()
    assert low > high  # the first rung is on top


def test_bars_lead_from_a_rung_to_what_its_gap_is_measured_from():
    table = two_cells()
    (axis, _) = ledger_figure.figure(table).axes
    found = {round(b.get_y() + b.get_height() / 2): (b.get_x(), b.get_x() + b.get_width()) for b in axis.patches}
    by_claim = table[table["epsilon"] == 8].set_index("claim")["epsilon_mean"]
    claims = {1: ledger.PLD, 2: ledger.HEURISTIC, 3: ledger.ALL_ITERATES, 4: ledger.LAST_ITERATE}
    against = {1: ledger.RDP, 2: ledger.PLD, 3: ledger.PLD, 4: ledger.ALL_ITERATES}
    claims |= {5: "metagradient, negative_loss", 6: "random, rmia"}
    against |= {5: ledger.LAST_ITERATE, 6: "metagradient, negative_loss"}
    assert found.keys() == claims.keys()
    for place, ends in found.items():
        np.testing.assert_allclose(ends, (by_claim[claims[place]], by_claim[against[place]]), atol=1e-12)


def test_markers_stand_at_means_and_at_bounds_of_all_runs():
    (axis, _) = ledger_figure.figure(two_cells()).axes
    hollow = [line for line in axis.lines if line.get_markerfacecolor() == "white"]
    found = sorted(float(line.get_xdata()[0]) for line in hollow)
    assert found == sorted(values[3] for values in BOUNDS.values())


def test_ceilings_beyond_a_panel_are_named():
    drawn = ledger_figure.figure(two_cells())
    named = [[text.get_text() for text in axis.texts] for axis in drawn.axes]
    assert named == [[], ["ceiling of one run: 8.20 →"]]
    ticks = [line for line in drawn.axes[0].lines if list(line.get_xdata()) == [8.2, 8.2]]
    assert len(ticks) == 4  # Dirac canaries of two observers, two kinds


def test_every_owner_of_a_bar_has_a_colour():
    assert {*COLORS} == {*ledger.OWNERS} - {ledger.SCORE}  # scores stand beside each other on a rung


def test_the_same_bytes_each_time(tmp_path):
    for name in ("one", "two"):
        figures.save(ledger_figure.figure(collected()), tmp_path / f"{name}.pdf", tmp_path / f"{name}.png")
    for suffix in ("pdf", "png"):
        assert (tmp_path / f"one.{suffix}").read_bytes() == (tmp_path / f"two.{suffix}").read_bytes()


def test_an_empty_table_is_refused():
    with pytest.raises(ValueError, match="no rows"):
        ledger_figure.figure(collected().iloc[:0])
