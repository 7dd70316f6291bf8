import math

import numpy as np
import pandas as pd
import pytest

from metacanary import accuracy_figure, accuracy_table, figures


def table(datasets=("digits",), epsilons=(8.0, 2.0), low=0.5):
    rows = [
        {
            "dataset": dataset,
            "training": training,
            "epsilon": epsilon,
            "accuracy_mean": 0.6,
            "accuracy_low": low,
            "accuracy_high": 0.6 + (0.6 - low),
        }
        for dataset in datasets
        for training in ("flat", "adaptive", "sgd")
        for epsilon in ((math.inf,) if training == "sgd" else epsilons)
    ]
    return pd.DataFrame(rows).reindex(columns=list(accuracy_table.COLUMNS))


def test_a_line_per_private_training_and_a_level_without_privacy():
    (axis,) = accuracy_figure.figure(table()).axes
    assert len(axis.containers) == 2  # error bars
    levels = [line for line in axis.lines if line.get_linestyle() == "--"]
    assert [list(line.get_ydata()) for line in levels] == [[0.6, 0.6]]
    xs = np.array([container.lines[0].get_xdata() for container in axis.containers], float)
    np.testing.assert_allclose(np.mean(np.log(xs), axis=0) - np.log([2, 8]), np.log(1.025) * -0.5, atol=1e-12)
    assert [text.get_text() for text in axis.get_xticklabels()] == ["2", "8"]


@pytest.mark.parametrize("epsilons", [(8.0, 2.0), (math.inf,)], ids=["private", "not private"])
def test_nine_trainings_all_look_different(epsilons):
    rows = [table(epsilons=epsilons).query("training == 'flat'").assign(training=f"recipe{i}") for i in range(9)]
    (axis,) = accuracy_figure.figure(pd.concat(rows)).axes
    handles, names = axis.get_legend_handles_labels()
    lines = [handle if epsilons == (math.inf,) else handle.lines[0] for handle in handles]
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}
    assert len(looks) == len(names) == 9


def test_bars_are_half_intervals_and_a_single_run_has_none():
    (axis,) = accuracy_figure.figure(table()).axes
    (bars,) = axis.containers[0].lines[2]
    np.testing.assert_allclose([s[1, 1] - s[0, 1] for s in bars.get_segments()], 0.2)
    (axis,) = accuracy_figure.figure(table(low=float("nan"))).axes
    (bars,) = axis.containers[0].lines[2]
    np.testing.assert_allclose([s[1, 1] - s[0, 1] for s in bars.get_segments()], 0.0)


def test_a_panel_per_dataset():
    drawn = accuracy_figure.figure(table(datasets=("digits", "mnist")))
    assert [axis.get_title() for axis in drawn.axes] == ["digits", "mnist"]


def test_the_same_bytes_each_time(tmp_path):
    for name in ("one", "two"):
        figures.save(accuracy_figure.figure(table()), tmp_path / f"{name}.pdf", tmp_path / f"{name}.png")
    for suffix in ("pdf", "png"):
        assert (tmp_path / f"one.{suffix}").read_bytes() == (tmp_path / f"two.{suffix}").read_bytes()


def test_an_empty_table_is_refused():
    with pytest.raises(ValueError, match="no rows"):
        accuracy_figure.figure(table().iloc[:0])
