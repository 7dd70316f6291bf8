"""The figure of total noise: what its lines, rings and titles show, and what is refused."""

import numpy as np
import pandas as pd
import pytest
from test_tan_table import make_table, make_trials

from metacanary import figures, store, tan_table
from metacanary.tan_figure import figure


def test_figure_has_a_line_per_batch_size_and_a_star_for_the_full_run():
    table = make_table()
    left = figure(table).axes[0]
    labels = [container.get_label() for container in left.containers]
    assert labels == ["batch 32", "batch 512, full", "chosen, full"]
    scaling = table[(table["stage"] == "scaling") & (table["batch_size"] == 32)].sort_values("eta", ascending=False)
    points = left.containers[0].lines[0].get_xydata()
    beside = 1.03**-0.5  # of two lines the first
    np.testing.assert_allclose(points, np.column_stack([beside / scaling["eta"], scaling["accuracy_mean"]]))
    ends = left.containers[0].lines[2][0].get_segments()
    np.testing.assert_allclose([np.ptp(end[:, 1]) for end in ends], 2 * scaling["accuracy_std"])
    np.testing.assert_allclose(left.containers[2].lines[0].get_xydata(), [[1 / 0.8, 0.90]])


def test_figure_names_the_epsilon_of_each_level_of_noise():
    left = figure(make_table()).axes[0]
    assert [text.get_text() for text in left.get_xticklabels()] == ["0.62\nε 8", "1.25\nε 4", "2.50\nε 2"]


def test_figure_rings_what_was_chosen():
    table = make_table()
    right = figure(table).axes[1]
    best = table[table["chosen"]].iloc[0]
    np.testing.assert_allclose(right.collections[-1].get_offsets(), [[best["learning_rate"], best["accuracy_mean"]]])
    assert [container.get_label() for container in right.containers] == ["1 copy, 200 steps", "4 copies, 400 steps"]
    assert "16 times fewer gradients" in right.get_title()


def test_figure_has_a_row_for_each_data_set():
    (trials, runs), (others, more) = make_trials(), make_trials("cifar10")
    drawn = figure(tan_table.collect([*trials, *others], [*runs, *more]))
    assert [axis.get_title().split(", ")[-1] for axis in drawn.axes[::2]] == ["digits", "cifar10"]


def test_figure_is_the_same_after_a_round_trip_and_gives_the_same_bytes(tmp_path):
    """The workflow reads the table from a file, where truth values are text or numbers."""
    table = make_table()
    store.write_csv(tmp_path / "t.csv", table, {})
    for name, rows in (("a", table), ("b", store.read_csv(tmp_path / "t.csv"))):
        figures.save(figure(rows), tmp_path / f"{name}.pdf", tmp_path / f"{name}.png")
    for suffix in (".pdf", ".png"):
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (make_table().iloc[:0], "table: got no rows of any stage"),
        (make_table().query("stage != 'full'"), r"got no rows of \{'digits': \['full'\]\}"),
    ],
)
def test_figure_rejects_what_it_cannot_show(rows, message):
    assert isinstance(rows, pd.DataFrame)
    with pytest.raises(ValueError, match=message):
        figure(rows)
