"""The figure of model variants: what it shows, and labels that can be read."""

import itertools

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from test_metasmoothness_table import make_table

from metacanary import figures
from metacanary.metasmoothness_figure import figure

NAMES = ["base", "max_pool", "logits_1", "logits_01", "wide", "norm_before", "norm_after", "relu", "batch_50", "rough"]


def make_rows(num=10, spread=0.03, crowd=0.5, scale=1.0, seed=0):
    """Variants at random; `crowd` is how far apart they stand."""
    rng = np.random.default_rng(seed)
    place = 0.5 + crowd * rng.uniform(-1, 1, (3, num))
    values = {
        "metasmoothness_mean": place[0],
        "objective_reduction": scale * (place[1] - 0.5) / 3,
        "auroc_gain": place[2] / 2,
    }
    names = {"dataset": "digits", "canary": NAMES[:num], "objective": "smooth_auroc"}
    return pd.DataFrame({**names, **values, "metasmoothness_std": spread})


def boxes(drawn, axis):
    """The extents of the labels of an axis, and of the axis, in pixels."""
    FigureCanvasAgg(drawn)
    with figures.style():
        drawn.draw_without_rendering()
        # Without the lines to their points.
        return [Text.get_window_extent(text) for text in axis.texts], axis.get_window_extent()


def test_figure_shows_each_variant_at_its_place():
    table = make_table()
    left, right = figure(table).axes
    for axis, column in ((left, "objective_reduction"), (right, "auroc_gain")):
        points = axis.containers[0].lines[0].get_xydata()
        np.testing.assert_allclose(points, table[["metasmoothness_mean", column]])
        assert [text.get_text() for text in axis.texts] == ["max_pool", "base"]
        np.testing.assert_allclose([text.xy for text in axis.texts], points[::-1])
        ends = axis.containers[0].lines[2][0].get_segments()[0][:, 0]
        assert np.ptp(ends) == pytest.approx(2 * table["metasmoothness_std"].iloc[0])
    assert "(smooth auroc)" in left.get_title()


@pytest.mark.parametrize(("crowd", "seed"), [(0.5, 0), (0.5, 1), (0.02, 2), (0.0005, 3)])
def test_figure_labels_do_not_overlap(crowd, seed):
    """Nor points, nor the edge; not even where all variants are nearly alike."""
    drawn = figure(make_rows(crowd=crowd, seed=seed))
    for axis in drawn.axes:
        labels, frame = boxes(drawn, axis)
        assert len(labels) == 10
        points = axis.transData.transform(axis.containers[0].lines[0].get_xydata())
        for first, second in itertools.combinations(labels, 2):
            assert not first.overlaps(second)
        for label in labels:
            assert frame.contains(label.x0, label.y0)
            assert frame.contains(label.x1, label.y1)
            assert not any(label.contains(*point) for point in points)


def test_figure_names_the_rank_correlation():
    """1 where both orders are the same, and nothing for two variants."""
    rows = make_rows(num=5)
    rows["objective_reduction"] = np.exp(rows["metasmoothness_mean"])
    left, right = figure(rows).axes
    assert "rank correlation 1.00, 5 variants" in left.get_title()
    assert "rank correlation" in right.get_title()
    assert "rank correlation" not in figure(rows.iloc[:2]).axes[0].get_title()


def test_figure_names_the_data_set_if_there_are_several():
    rows = make_rows(num=4).assign(dataset=["digits", "cifar10"] * 2)
    assert {text.get_text().split(", ")[1] for text in figure(rows).axes[0].texts} == {"digits", "cifar10"}


def test_figure_of_one_direction_has_no_spread():
    axis = figure(make_rows(spread=np.nan)).axes[0]
    assert all(np.ptp(segment[:, 0]) == 0 for segment in axis.containers[0].lines[2][0].get_segments())


def test_figure_gives_the_same_bytes_again(tmp_path):
    for name in ("a", "b"):
        figures.save(figure(make_rows()), tmp_path / f"{name}.pdf", tmp_path / f"{name}.png")
    for suffix in (".pdf", ".png"):
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


@pytest.mark.parametrize("scale", [1.0, 0.05, 0.002])
def test_figure_fits_the_page(scale):
    """Ticks of many digits and with a sign too."""
    drawn = figure(make_rows(scale=scale))
    with figures.style():
        drawn.draw_without_rendering()
        box = drawn.get_tightbbox()
    assert drawn.get_figwidth() == figures.TWO_COLUMNS
    assert min(box.x0, box.y0, drawn.get_figwidth() - box.x1, drawn.get_figheight() - box.y1) >= 0


@pytest.mark.parametrize("rows", [make_rows(num=0), make_rows().assign(auroc_gain=np.nan)])
def test_figure_rejects_what_it_cannot_show(rows):
    with pytest.raises(ValueError, match="expected at least one, and a value in all of"):
        figure(rows)
