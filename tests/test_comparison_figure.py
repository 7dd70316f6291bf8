"""Figures of comparisons: what points, bars, frames and numbers show, that nothing leaves the page, equal bytes."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.patches import Rectangle
from test_comparison_table import KINDS, make_frame, make_table
from test_figures import overflow, remarks_of

from metacanary import comparison_table, figures, store
from metacanary.comparison_figure import figure


def points_of(axis):
    """The points of means, a line each, in drawing order."""
    means = [line for line in axis.lines if len(line.get_xdata()) == 1 and line.get_markerfacecolor() != "white"]
    return np.array([line.get_xydata()[0] for line in means if line.get_marker() not in ("_", "|")])


def hollow_of(axis):
    """The points of bounds of all runs at once."""
    return np.concatenate([line.get_xydata() for line in axis.lines if line.get_markerfacecolor() == "white"])


@pytest.mark.parametrize(("panel", "training", "column"), [(0, "sgd", "epsilon"), (3, "dpsgd", "auroc")])
def test_figure_by_start_has_a_column_for_each_start(panel, training, column):
    table = make_table("start")
    axis = figure(table).axes[panel]
    rows = table[table["training"] == training]
    assert [text.get_text() for text in axis.get_xticklabels()] == ["random", "mislabeled"]
    drawn = points_of(axis)
    assert sorted(drawn[:, 1]) == sorted(rows[f"{column}_mean"])
    assert set(np.round(drawn[:, 0])) == {0, 1}
    found = {(round(x), y) for x, y in drawn}
    expected = {
        (["random", "mislabeled"].index(v), m) for v, m in zip(rows["value"], rows[f"{column}_mean"], strict=True)
    }
    assert found == expected
    segments = np.concatenate([np.array(bar.get_segments()) for bar in axis.collections])
    ends = {(f"{low:.9f}", f"{high:.9f}") for low, high in segments[:, :, 1]}
    spans = zip(rows[f"{column}_low"], rows[f"{column}_high"], strict=True)
    assert ends == {(f"{low:.9f}", f"{high:.9f}") for low, high in spans}


def test_figure_by_start_shows_pooled_bounds_beside_the_means():
    table = make_table("start")
    left, right = figure(table).axes[:2]
    pooled = table.loc[table["training"] == "sgd", "epsilon_pooled"]
    assert sorted(hollow_of(left)[:, 1]) == sorted(pooled)
    assert not any(line.get_markerfacecolor() == "white" for line in right.lines)


def test_figure_by_number_has_the_numbers_on_a_logarithmic_axis_and_the_ceiling_of_each():
    table = make_table("num_canaries")
    axis = figure(table).axes[0]
    assert axis.get_xscale() == "log"
    assert [text.get_text() for text in axis.get_xticklabels()] == ["25", "100", "200"]
    (ceiling,) = [line for line in axis.lines if str(line.get_label()).startswith("ceiling")]
    np.testing.assert_allclose(ceiling.get_xydata(), [[m, np.log(m) - 1] for m in (25, 100, 200)])
    assert remarks_of(axis) == ["ceiling of one run, 2.22 to 4.30"]
    means = table[(table["training"] == "sgd") & (table["line"] == "metagradient")]["epsilon_mean"]
    assert any(list(line.get_ydata()) == list(means) for line in axis.lines)


def test_figure_names_a_far_ceiling_and_keeps_the_data_readable():
    table = make_table("start")
    table[["epsilon_mean", "epsilon_low", "epsilon_high", "epsilon_pooled"]] /= 20
    axis = figure(table).axes[0]
    assert remarks_of(axis) == ["↑ ceiling of one run, 3.61"]
    assert axis.dataLim.y1 > 0.5 * axis.get_ylim()[1]


def test_figure_by_cost_places_kinds_by_minutes_and_names_the_audit():
    table = make_table("cost")
    axis = figure(table).axes[0]
    rows = table[table["training"] == "sgd"]
    expected = np.column_stack([rows["optimization_seconds"] / 60, rows["epsilon_mean"]])
    np.testing.assert_allclose(points_of(axis), expected)
    assert "audit of a kind: 1.0 minutes" in remarks_of(axis)


def test_figure_shows_nothing_that_no_auroc_can_be():
    table = make_table("start")
    table["auroc_high"] += 0.4
    right = figure(table).axes[1]
    assert right.get_ylim()[1] == 1.02
    assert right.get_ylim()[0] <= 0.5


def test_figure_by_model_is_a_matrix_with_its_numbers_and_frames():
    table = make_table("model")
    epsilons, aurocs = figure(table).axes[:2]
    for axis, name, form in ((epsilons, "epsilon_mean", ".2f"), (aurocs, "auroc_mean", ".3f")):
        values = table.pivot(index="canary", columns="training", values=name).loc[[*KINDS["model"]], ["sgd", "dpsgd"]]
        np.testing.assert_array_equal(axis.images[0].get_array(), values.to_numpy())
        assert remarks_of(axis) == [f"{value:{form}}" for value in values.to_numpy().ravel()]
        frames = [patch for patch in axis.patches if isinstance(patch, Rectangle)]
        assert [(round(f.get_x() + 0.47), round(f.get_y() + 0.44)) for f in frames] == [(0, 1), (1, 2)]
        assert [frame.get_linestyle() == "solid" for frame in frames] == [True, False]  # on_wide: another recipe
    labels = [text.get_text() for text in aurocs.get_xticklabels()]
    assert labels == comparison_table.column_names(table)
    assert aurocs.get_yticklabels()[1].get_text() == "on_small\nconvnet widths 8-16, sgd"


@pytest.mark.parametrize("by", KINDS)
def test_figure_has_panels_for_each_data_set(by):
    frame = make_frame(KINDS[by], datasets=("digits", "mnist"))
    drawn = figure(make_table(by, frame=frame) if by != "cost" else make_table(by))
    panels = {"model": 4, "cost": 4}.get(by, 8)
    assert len([axis for axis in drawn.axes if axis.get_label() != "<colorbar>"]) == panels


@pytest.mark.parametrize("by", KINDS)
def test_figure_fits_the_page(by):
    assert overflow(figure(make_table(by))) <= 1e-6


@pytest.mark.parametrize("by", KINDS)
def test_figure_is_the_same_after_a_round_trip_and_gives_the_same_bytes(by, tmp_path):
    table = make_table(by)
    store.write_csv(tmp_path / "t.csv", table, {})
    for name, rows in (("a", table), ("b", store.read_csv(tmp_path / "t.csv"))):
        figures.save(figure(rows), tmp_path / f"{name}.pdf", tmp_path / f"{name}.png")
    for suffix in (".pdf", ".png"):
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


@pytest.mark.parametrize("rows", [[], ["start", "model"]], ids=str)
def test_figure_rejects_what_is_not_one_comparison(rows):
    tables = [make_table("start").iloc[:0], *map(make_table, rows)]
    with pytest.raises(ValueError, match=f"of {len(rows)} comparisons, expected those of one"):
        figure(pd.concat(tables))
