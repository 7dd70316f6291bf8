"""The table of total noise: what is chosen, joined and printed, and what is refused."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from metacanary import store, tan_runs
from metacanary.tan_table import (
    COLUMNS,
    STAGES,
    collect,
    compute_saved,
    findings,
    latex,
    markdown,
    printed,
    write,
)

ETAS = {0.5: 1.6, 1.0: 0.8, 2.0: 0.4}


def make_runs(accuracies, *, batch_size=32.0, copies=1, steps=200, rate=2.0, eta=0.8, seconds=0.01):
    """Rows of `tan_runs`, a row per run."""
    described = {
        "batch_size": batch_size,
        "multiplicity": copies,
        "num_steps": steps,
        "learning_rate": rate,
        "sampling_prob": batch_size / 1000,
        "noise_multiplier": batch_size / 100,
        "eta": eta,
        "epsilon_approximate": 6.0 * eta,
        "epsilon_full": 5.0 * eta,
        "epsilon_spent": 3000.0 * eta / batch_size,
        "num_gradients": batch_size * copies * steps,
    }
    measured = [{"run": i, "seed": 7 + i, "accuracy": a, "seconds_per_step": seconds} for i, a in enumerate(accuracies)]
    return pd.DataFrame([described | row for row in measured], columns=list(tan_runs.COLUMNS))


def make_trials(dataset="digits"):
    """Two settings searched, the prediction, the full run, and a grid of two batches and three levels of noise."""
    pairs = [
        ("search", make_runs([0.70, 0.80], rate=1.0)),
        ("search", make_runs([0.85, 0.91], copies=4, steps=400)),
        ("prediction", make_runs([0.86, 0.90], copies=4, steps=400)),
        ("full", make_runs([0.87, 0.93], batch_size=512.0, copies=4, steps=400, seconds=0.08)),
    ]
    grid = [(b, f) for b in (32.0, 512.0) for f in ETAS]
    pairs += [("scaling", make_runs([0.9 - f / 10, 0.88 - f / 10], batch_size=b, eta=ETAS[f])) for b, f in grid]
    return [{"dataset": dataset, "stage": stage} for stage, _ in pairs], [runs for _, runs in pairs]


def make_table():
    return collect(*make_trials())


def test_columns_are_those_of_the_runs():
    """Written down twice, since the table is read without JAX."""
    assert COLUMNS[4 : 4 + len(tan_runs.SETTINGS)] == tan_runs.SETTINGS
    assert {*make_table()["stage"]} == {*STAGES}


def test_collect_averages_over_runs_and_marks_what_was_chosen():
    table = make_table()
    assert tuple(table.columns) == COLUMNS
    assert table["stage"].tolist() == ["search"] * 2 + ["prediction", "full"] + ["scaling"] * 6
    assert table["chosen"].tolist() == [False, True] + [False] * 8
    assert table["images"].tolist() == ["validation"] * 2 + ["test"] * 8
    row = table.iloc[3]
    assert row["accuracy_mean"] == pytest.approx(0.90, abs=1e-12)
    assert row["accuracy_std"] == pytest.approx(0.06 / np.sqrt(2), abs=1e-12)  # n - 1
    assert row["seconds_per_run"] == pytest.approx(400 * 0.08)
    assert row["num_runs"] == 2


def test_collect_marks_what_the_full_run_of_each_data_set_has():
    """Not what has the highest accuracy: the full run was made with what had it then."""
    (trials, runs), (others, more) = make_trials(), make_trials("cifar10")
    more[3] = make_runs([0.5], batch_size=512.0, rate=1.0)
    table = collect([*trials, *others], [*runs, *more])
    assert table.index[table["chosen"]].tolist() == [1, 10]


def test_collect_of_one_run_has_no_deviation():
    table = collect([{"dataset": "digits", "stage": "scaling"}], [make_runs([0.5])])
    assert table["accuracy_std"].isna().all()
    assert printed(table)["accuracy"].tolist() == ["50.0%"]


@pytest.mark.parametrize(
    ("trials", "message"),
    [([], "runs: got those of 1 trials, expected those of 0"), ([{"dataset": "a", "stage": "b"}], "stage: got ['b']")],
)
def test_collect_rejects(trials, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        collect(trials, [make_runs([0.5])])


def test_compute_saved_is_the_ratio_of_batches():
    """All settings of the search at a sixteenth of the batch, whatever their copies and steps."""
    assert compute_saved(make_table()) == pytest.approx(512 / 32, rel=1e-12)


def test_findings_say_what_was_predicted_and_what_came_out():
    (sentence,) = findings(make_table())
    assert "of 2 settings searched at batch 32, learning rate 2, multiplicity 4 and 400 steps were chosen" in sentence
    assert "would spend ε 4.00 (η² + 2η√log(1/δ): 4.80); calibrated to ε 4.00, at batch 512" in sentence
    assert "reached 90.0 ± 4.2%, where the simulation had predicted 88.0 ± 2.8%" in sentence
    assert "The search took 16.0 times fewer gradients" in sentence
    assert "8.0 times fewer seconds" in sentence
    trials, runs = make_trials()
    assert findings(collect(trials[4:], runs[4:])) == []


def test_findings_name_no_seconds_that_were_not_measured():
    trials, runs = make_trials()
    runs[3] = runs[3].assign(seconds_per_step=np.nan)
    (sentence,) = findings(collect(trials, runs))
    assert "seconds" not in sentence
    assert printed(collect(trials, runs))["seconds\nper run"].iloc[3] == "—"


def test_printed_is_the_same_after_a_round_trip(tmp_path):
    table = make_table()
    write(table, tmp_path / "t.csv", provenance={})
    assert markdown(store.read_csv(tmp_path / "t.csv")) == markdown(table)


def test_markdown_is_a_table_of_all_trials():
    lines = markdown(make_table()).split("\n\n")[1].strip().splitlines()
    assert len(lines) == 2 + 10
    assert {line.count("|") for line in lines} == {lines[0].count("|")}
    assert "| search, chosen |" in lines[3]


def test_latex_is_ascii_and_balanced():
    text = latex(make_table())
    assert text.isascii()
    assert text.count("\\begin{") == text.count("\\end{") == 2
    assert text.count("\\addlinespace") == 3  # between stages


def test_write_makes_each_form(tmp_path):
    write(make_table(), *(tmp_path / f"t.{suffix}" for suffix in ("csv", "md", "tex")), provenance={"seed": 1})
    assert store.read_provenance(tmp_path / "t.csv") == {"seed": 1}
    assert (tmp_path / "t.md").read_text(encoding="utf-8") == markdown(make_table())


@pytest.mark.slow
def test_table_needs_no_jax():
    code = "import sys, metacanary.tan_table; print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.parametrize("column", [*COLUMNS, *tan_runs.MEASURED])
def test_columns_are_explained_in_the_docs(column):
    text = (Path(__file__).parent.parent / "docs" / "output.md").read_text(encoding="utf-8")
    assert f"`{column}`" in text.split("## Columns of tan/{dataset}/{trial}.csv")[1]
