import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from metacanary import accuracy_table, comparison_cost

MODEL = {"name": "convnet", "options": {"widths": [8]}}
FLAT = {"num_steps": 100, "sampling_prob": 0.1, "clipping": {"name": "flat"}, "ema": {"decay": 0.0}}
TRAININGS = {
    "flat": {"model": MODEL, "options": FLAT},
    "adaptive": {"model": MODEL, "options": FLAT | {"clipping": {"name": "adaptive"}}},
    "sgd": {"model": MODEL, "options": {"num_steps": 100}},
}
ACCURACIES = {("flat", 8.0): [0.5, 0.6, 0.7], ("flat", 1.0): [0.2, 0.2, 0.5], ("adaptive", 8.0): [0.4, 0.4, 0.4]}
ACCURACIES |= {("sgd", math.inf): [0.9, 0.8, 0.85]}


def frame():
    rows = [
        {
            "dataset": "digits",
            "canary": "random",
            "training": training,
            "epsilon": epsilon,
            "step": step,
            "run": str(run),
            "score": score,
            "test_accuracy": accuracy if step == 100 else 0.0,
            "epsilon_accounted": epsilon,
            "epsilon_accounted_rdp": epsilon * 1.1,
        }
        for (training, epsilon), accuracies in ACCURACIES.items()
        for run, accuracy in [*enumerate(accuracies), ("pooled", 0.01)]
        for step in (50, 100)
        for score in ("negative_loss", "logit_margin")
    ]
    return pd.DataFrame(rows)


def costs():
    job = {"dataset": "digits", "canary": "random", "training": "flat", "epsilon": "8", "num_trainings": 2}
    jobs = [
        job | {"stage": "train_audit_models", "seconds": 20.0},
        job | {"stage": "train_audit_models", "seconds": 30.0},
        job | {"stage": "score_membership", "seconds": 1000.0},
        job | {"stage": "train_audit_models", "seconds": 1000.0, "canary": "mislabeled"},
    ]
    return comparison_cost.table(jobs)


def collected(**changes):
    arguments = {"frame": frame(), "trainings": TRAININGS, "canary": "random", "costs": costs()}
    return accuracy_table.collect(**arguments | changes)


def test_means_and_intervals_are_those_of_the_runs_at_the_last_step():
    table = collected().set_index(["training", "epsilon"])
    for cell, accuracies in ACCURACIES.items():
        row = table.loc[cell]
        assert row["num_runs"] == 3
        assert row["accuracy_mean"] == pytest.approx(np.mean(accuracies))
        half = stats.t.ppf(0.975, 2) * np.std(accuracies, ddof=1) / math.sqrt(3)
        assert row["accuracy_high"] - row["accuracy_mean"] == pytest.approx(half, abs=1e-12)
        assert row["accuracy_std"] == pytest.approx(np.std(accuracies, ddof=1))


def test_rows_are_ordered_by_training_then_epsilon_and_seconds_are_where_they_were_measured():
    table = collected()
    cells = list(table[["training", "epsilon"]].itertuples(index=False, name=None))
    assert cells == [("flat", 8.0), ("flat", 1.0), ("adaptive", 8.0), ("sgd", math.inf)]
    assert table["seconds_per_run"].tolist()[:1] == [12.5]
    assert table["seconds_per_run"].isna().tolist() == [False, True, True, True]
    assert list(table.columns) == list(accuracy_table.COLUMNS)


def test_changes_name_the_settings_that_differ_from_the_first():
    changes = accuracy_table.changes(TRAININGS)
    assert changes == {
        "flat": "",
        "adaptive": "clipping adaptive",
        "sgd": "SGD without privacy",
    }


def test_lists_switches_and_numbers_are_written_shortly():
    other = {"model": {"name": "convnet", "options": {"widths": [8, 16]}}, "options": FLAT | {"sampling_prob": 0.25}}
    changes = accuracy_table.changes({"flat": TRAININGS["flat"], "other": other})
    assert changes["other"] == "widths 8-16, sampling prob 0.25"


def test_printed_has_a_line_per_training_and_a_column_per_epsilon():
    cells = accuracy_table.printed(collected())
    assert cells["training"].tolist() == ["flat", "adaptive", "sgd"]
    assert list(cells.columns)[2:] == ["no\nprivacy", "ε 8", "ε 1", "seconds\nper run"]
    assert cells["ε 8"].tolist() == ["60.0 ± 24.8%", "40.0 ± 0.0%", "—"]
    assert cells["no\nprivacy"].tolist()[-1] == "85.0 ± 12.4%"
    assert cells["seconds\nper run"].tolist() == ["12.5", "—", "—"]


def test_forms_say_how_many_runs_and_which_data():
    table = collected()
    assert "dataset digits, canaries random, 3 runs of each" in accuracy_table.markdown(table)
    assert r"\toprule" in accuracy_table.latex(table)


def test_runs_of_other_canary_kinds_do_not_count():
    both = pd.concat([frame(), frame().assign(canary="mislabeled", test_accuracy=0.0)])
    pd.testing.assert_frame_equal(collected(frame=both), collected())


def test_a_training_without_audits_is_named():
    with pytest.raises(ValueError, match="lacks the trainings"):
        collected(trainings=TRAININGS | {"per_layer": TRAININGS["flat"]})
