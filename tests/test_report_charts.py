"""Charts of the report page: their data are those of the frames, and they need nothing from outside."""

import json
import re

import numpy as np
import pytest
import report_results
import vl_convert

from metacanary import figure_style, report_charts, report_data, tables

HOSTILE = report_results.HOSTILE
LOOKS = figure_style.look(report_results.KINDS)


def one_cell(table):
    return table[(table["canary"] == HOSTILE) & (table["training"] == "sgd")]


def bins():
    return one_cell(report_data.histograms(report_results.shown_scores(), num_bins=8))


def histogram():
    options = {"score": "logit_margin", "top": 0.5, "labels": ("in", "out"), "description": "d"}
    return report_charts.histogram(bins(), LOOKS[HOSTILE], **options)


def points():
    found = report_data.roc_curves(report_results.shown_scores())
    return found[found["training"] == "sgd"]


def roc():
    return report_charts.roc(points(), LOOKS, marks=report_data.FPRS, num_out=45, description="d")


def accounted_rows(frame):
    return report_data.by_accounted(frame, auditor="steinke", protocol="fixed", score="negative_loss")


def accounted():
    return report_charts.accounted(accounted_rows(report_results.frame()), LOOKS, description="d")


def cost():
    tooltip = {"jobs": "jobs"}
    return report_charts.cost(report_results.COSTS, column="seconds", title="s", tooltip=tooltip, description="d")


def data(spec, *names):
    """The data set of a specification that has these columns."""
    return next(rows for rows in spec["datasets"].values() if set(names) <= rows[0].keys())


@pytest.mark.parametrize("make", [histogram, roc, accounted, cost])
def test_charts_are_drawn_by_vega_and_ask_for_nothing_outside(make):
    spec = make()
    text = report_charts.embedded(spec)
    assert "<" not in text
    assert not re.search(r"https?:|\"url\"", text)
    assert json.loads(text) == spec
    assert (spec["width"], spec["description"]) == ("container", "d")
    drawn = vl_convert.vegalite_to_svg({**spec, "width": 300})
    assert drawn.count("<path") > 3
    assert "NaN" not in drawn


@pytest.mark.parametrize("make", [histogram, roc, accounted, cost])
def test_charts_of_equal_data_are_equal(make):
    assert report_charts.embedded(make()) == report_charts.embedded(make())


def test_histogram_holds_every_bin_and_closes_the_outline():
    rows, wanted = data(histogram(), "share_in"), bins()
    for name in ("low", "high", "share_in", "share_out", "num_in", "num_out"):
        assert [row[name] for row in rows[:-1]] == pytest.approx(wanted[name].tolist(), rel=1e-5)
    assert (rows[-1]["low"], rows[-1]["share_out"]) == (pytest.approx(wanted["high"].iloc[-1], rel=1e-5), 0.0)


def test_roc_leaves_out_nothing_that_a_log_axis_cannot_show():
    rows, wanted = data(roc(), "fpr", "drawn_fpr"), points()
    assert [row["fpr"] for row in rows] == pytest.approx(wanted["fpr"].tolist(), rel=1e-5, abs=1e-12)
    assert [row["tpr"] for row in rows] == pytest.approx(wanted["tpr"].tolist(), rel=1e-5, abs=1e-12)
    assert (wanted[["fpr", "tpr"]] == 0).any().all()
    least = roc()["layer"][0]["encoding"]["x"]["scale"]["domain"][0]
    assert 0 < least < min(report_data.FPRS)
    for row in rows:
        assert row["drawn_fpr"] == pytest.approx(max(row["fpr"], least), rel=1e-5)
        assert row["drawn_tpr"] == pytest.approx(max(row["tpr"], least), rel=1e-5)


def test_accounted_draws_the_bounds_at_their_accounted_epsilon():
    rows, wanted = data(accounted(), "pooled"), accounted_rows(report_results.frame())
    for name in ("mean", "low", "high", "pooled", "ceiling", "ceiling_pooled"):
        assert [row[name] for row in rows] == pytest.approx(wanted[name].tolist(), rel=1e-5, abs=1e-12)
    largest = wanted["epsilon_accounted"].replace(np.inf, np.nan).max()
    for row, value in zip(rows, wanted["epsilon_accounted"], strict=True):
        if np.isinf(value):
            assert row["x"] > 1.1 * largest
        else:
            assert abs(row["x"] - value) < 0.06 * largest  # kinds stand beside each other
    line = data(accounted(), "x", "y")
    assert [(row["x"], row["y"]) for row in line] == [(end, end) for end in (0, pytest.approx(1.08 * largest))]


def test_accounted_sets_kinds_of_one_epsilon_apart():
    rows = data(accounted(), "pooled")
    places = [(row["x"], row["step"]) for row in rows]
    assert len(set(places)) == len(rows)


def test_accounted_without_private_trainings_has_no_line():
    frame = report_results.frame()
    spec = report_charts.accounted(accounted_rows(frame[frame["training"] == "sgd"]), LOOKS, description="d")
    assert len(spec["layer"]) == len(accounted()["layer"]) - 1
    assert "NaN" not in vl_convert.vegalite_to_svg({**spec, "width": 300})


def test_colours_are_those_of_the_figures():
    kinds = [*tables.KINDS, "x", "y"]
    looks = figure_style.look(kinds)
    color = accounted()["layer"][-1]["encoding"]["color"]["scale"]
    assert dict(zip(color["domain"], color["range"], strict=True)) == {
        k: LOOKS[k]["color"] for k in ("random", HOSTILE)
    }
    assert {look["marker"] for look in looks.values()} <= report_charts.SHAPES.keys()


def test_every_marker_and_dash_of_the_figures_has_a_glyph():
    for look in figure_style.look([f"kind{number}" for number in range(40)]).values():
        glyph = report_charts.glyph(look)
        assert report_charts.SHAPES[look["marker"]] in glyph
        assert ("currentColor" in glyph) == (look["color"] == "#000000")


@pytest.mark.parametrize(("right", "expected"), [(8, [0, 2, 4, 6, 8]), (0.5, [0, 0.1, 0.2, 0.3, 0.4, 0.5]), (0, [])])
def test_ticks_are_round(right, expected):
    assert report_charts._ticks(right) == pytest.approx(expected)
