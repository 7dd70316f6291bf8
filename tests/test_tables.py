"""Tests of metacanary.tables."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from metacanary import store, summary, table_formats, tables

STEINKE = {"auditor": "steinke", "protocol": "corrected", "score": "negative_loss"}


def make_rows(values, *, canary="random", pooled=None, step=150, protocol="corrected", **changes):
    """Rows of summary/epsilon.csv: a run for each value, and one for all of them if `pooled` is given."""
    runs = {str(run): value for run, value in enumerate(values)}
    if pooled is not None:
        runs["pooled"] = pooled
    shared = {
        "dataset": "digits",
        "canary": canary,
        "training": "sgd",
        "epsilon": "inf",
        "accountant": "pld",
        "epsilon_accounted": np.inf,
        "epsilon_accounted_rdp": np.inf,
        "epsilon_heuristic": np.inf,
        "game": "independent",
        "step": step,
        "score": "negative_loss",
        "auditor": "steinke",
        "protocol": protocol,
        "assumption": "worst_case",
        "adjacency": "add_remove",
        "num_guesses": 100,
        "num_guesses_in": 50,
        "num_correct": 70,
        "test_accuracy": 0.9,
    }
    rows = [
        {
            "run": run,
            "epsilon_lower": value,
            "ceiling": 5.0 if run == "pooled" else 3.5,
            "auroc": 0.5 + value / 10,
        }
        | {"num_canaries": 100 * len(values) if run == "pooled" else 100}
        for run, value in runs.items()
    ]
    return pd.DataFrame([shared | row | changes for row in rows])[list(tables.COLUMNS)]


def make_frame(**changes):
    """Two trainings, of which the private one lacks mislabeled canaries and has one run of the others."""
    private = {"training": "dpsgd", "epsilon": "8", "epsilon_accounted": 7.5}
    private |= {"epsilon_accounted_rdp": 7.9, "epsilon_heuristic": 7.1}
    frame = pd.concat(
        [
            make_rows([0.5, 0.7, 1.2], canary="metagradient", pooled=1.1),
            make_rows([0.6, 0.9, 1.5], canary="metagradient", protocol="paper", assumption="none"),
            make_rows([0.1, 0.2, 0.3], canary="random", pooled=0.2),
            make_rows([0.2, 0.2, 0.2], canary="mislabeled"),
            make_rows([0.25], canary="random", **private),
            make_rows([0.5], canary="metagradient", **private),
        ],
        ignore_index=True,
    )
    return frame.assign(**changes)


def cell(table, canary, training="sgd"):
    """The row of a canary kind."""
    (row,) = table[(table["canary"] == canary) & (table["training"] == training)].to_dict("records")
    return row


def test_canary_order_puts_the_papers_kinds_first_and_others_by_name():
    kinds = ["zeta", "metagradient", "alpha", "clipbkd", "random", "mislabeled", "random", "gradient_max", "noise"]
    expected = ["random", "noise", "mislabeled", "clipbkd", "gradient_max", "metagradient", "alpha", "zeta"]
    assert tables.canary_order(kinds) == expected


def test_summarise_interval_is_that_of_scipy():
    rng = np.random.default_rng(0)
    values = rng.gamma(2.0, 0.5, size=7)
    row = cell(tables.summarise(make_rows(values), **STEINKE), "random")
    low, high = scipy.stats.t.interval(0.95, df=6, loc=values.mean(), scale=scipy.stats.sem(values))
    found = [row["epsilon_mean"], row["epsilon_low"], row["epsilon_high"], row["epsilon_median"]]
    np.testing.assert_allclose(found, [values.mean(), low, high, np.median(values)], rtol=1e-12)
    # AUROC is 0.5 + epsilon / 10 in these rows: the interval follows.
    auroc = [row["auroc_mean"], row["auroc_low"], row["auroc_high"]]
    np.testing.assert_allclose(auroc, 0.5 + np.array([values.mean(), low, high]) / 10, rtol=1e-12)


def test_summarise_interval_covers_the_mean_at_its_level():
    rng = np.random.default_rng(1)
    num_trials = 2000
    values = rng.normal(1.0, 0.3, size=(num_trials, 5))
    frame = pd.DataFrame({"cell": np.repeat(np.arange(num_trials), 5), "value": values.ravel()})
    interval = tables.over_runs(frame, ["cell"], "value")
    covered = ((interval["low"] <= 1.0) & (interval["high"] >= 1.0)).mean()
    assert abs(covered - 0.95) < 4 * np.sqrt(0.95 * 0.05 / num_trials)  # four standard errors


def test_summarise_one_run_has_no_interval():
    row = cell(tables.summarise(make_frame(), **STEINKE), "random", "dpsgd")
    assert (row["num_runs"], row["epsilon_mean"], row["epsilon_median"]) == (1, 0.25, 0.25)
    assert np.isnan([row["epsilon_low"], row["epsilon_high"], row["auroc_low"], row["auroc_high"]]).all()


def test_summarise_keeps_pooled_apart():
    row = cell(tables.summarise(make_frame(), **STEINKE), "metagradient")
    assert row["num_runs"] == 3
    assert row["epsilon_mean"] == pytest.approx(0.8, rel=1e-12)
    assert (row["epsilon_pooled"], row["ceiling"], row["ceiling_pooled"]) == (1.1, 3.5, 5.0)
    assert row["num_canaries"] == 100


def test_summarise_takes_the_last_step_of_each_cell():
    steps = {("sgd", 50): 2.0, ("sgd", 150): 1.0, ("dpsgd", 100): 0.3, ("dpsgd", 200): 0.4}
    rows = [make_rows([value] * 2, training=name, step=step) for (name, step), value in steps.items()]
    table = tables.summarise(pd.concat(rows), **STEINKE)
    assert list(zip(table["training"], table["step"], table["epsilon_mean"], strict=True)) == [
        ("sgd", 150, 1.0),
        ("dpsgd", 200, 0.4),
    ]
    assert "step" in table_formats.printed(tables.table1(pd.concat(rows))).columns


def test_summarise_shows_every_kind_in_every_setting():
    table = tables.summarise(make_frame(), **STEINKE)
    kinds = ["random", "mislabeled", "metagradient"]
    assert list(zip(table["training"], table["canary"], strict=True)) == [
        (training, kind) for training in ("sgd", "dpsgd") for kind in kinds
    ]
    missing = cell(table, "mislabeled", "dpsgd")
    assert missing["num_runs"] == 0
    assert np.isnan([missing["epsilon_mean"], missing["ceiling"], missing["test_accuracy"]]).all()


def test_summarise_puts_larger_epsilon_first():
    rows = [make_rows([0.1], training="dpsgd", epsilon=epsilon) for epsilon in ("1", "inf", "8", "10")]
    table = tables.summarise(pd.concat(rows), **STEINKE)
    assert list(table["epsilon"]) == [np.inf, 10, 8, 1]


def test_summarise_does_not_depend_on_the_order_of_rows():
    frame = make_frame()
    shuffled = frame.sample(frac=1, random_state=0)
    order = ["training", "canary"]
    first, second = (tables.summarise(f, **STEINKE).sort_values(order) for f in (frame, shuffled))
    pd.testing.assert_frame_equal(first.reset_index(drop=True), second.reset_index(drop=True), rtol=1e-12)


def test_summarise_reads_what_store_wrote(tmp_path):
    for frame in (make_frame(), make_rows([0.1, 0.2])):  # the second has numbers only as runs
        store.write_csv(tmp_path / "epsilon.csv", frame, {})
        again = tables.summarise(store.read_csv(tmp_path / "epsilon.csv"), **STEINKE)
        pd.testing.assert_frame_equal(again, tables.summarise(frame, **STEINKE), check_dtype=False, rtol=1e-12)


def test_summarise_of_chance_is_zero_with_zero_width():
    row = cell(tables.summarise(make_rows([0.0, 0.0, 0.0]), **STEINKE), "random")
    assert (row["epsilon_mean"], row["epsilon_low"], row["epsilon_high"]) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("column", tables.COLUMNS)
def test_summarise_names_missing_columns(column):
    with pytest.raises(ValueError, match=re.escape(f"frame lacks the columns ['{column}']")):
        tables.summarise(make_frame().drop(columns=column), **STEINKE)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"auditor": "oracle"}, r"auditor='oracle' is not in frame, expected one of \['steinke'\]"),
        (
            {"protocol": "fixed"},
            r"protocol='fixed' is not in frame, expected one of \['corrected', 'paper'\]",
        ),
        ({"score": "loss"}, r"score='loss' is not in frame, expected one of \['negative_loss'\]"),
    ],
)
def test_summarise_names_what_is_there(wrong, message):
    with pytest.raises(ValueError, match=message):
        tables.summarise(make_frame(), **STEINKE | wrong)


def test_summarise_refuses_to_count_a_run_twice():
    twice = pd.concat([make_frame(), make_frame()[:1]])
    with pytest.raises(ValueError, match=r"several rows for .*'run': '0'.*, expected one per run"):
        tables.summarise(twice, **STEINKE)


def test_summarise_refuses_missing_bounds():
    with pytest.raises(ValueError, match="rows without epsilon_lower"):
        tables.summarise(make_rows([0.1, np.nan]), **STEINKE)


def test_summarise_ignores_runs_without_auroc():
    rows = make_rows([0.1, 0.2, 0.3])
    rows.loc[0, "auroc"] = np.nan  # all coins of that run were equal
    row = cell(tables.summarise(rows, **STEINKE), "random")
    low, high = scipy.stats.t.interval(0.95, df=1, loc=0.525, scale=scipy.stats.sem([0.52, 0.53]))
    np.testing.assert_allclose([row["auroc_mean"], row["auroc_low"], row["auroc_high"]], [0.525, low, high])


def test_table1_puts_the_paper_protocol_beside():
    table = tables.table1(make_frame())
    assert cell(table, "metagradient")[table_formats.PAPER_COLUMN] == pytest.approx(1.0, rel=1e-12)
    assert np.isnan(cell(table, "random")[table_formats.PAPER_COLUMN])
    assert "not_a_bound" in table_formats.PAPER_COLUMN
    assert "paper protocol,\nnot a bound" in table_formats.printed(table).columns


def test_table1_works_without_the_paper_protocol():
    assert tables.table1(make_rows([0.1, 0.2]))[table_formats.PAPER_COLUMN].isna().all()


def test_table1_refuses_the_paper_protocol():
    with pytest.raises(ValueError, match="protocol='paper' is no bound"):
        tables.table1(make_frame(), protocol="paper")


def test_table2_takes_the_other_auditor():
    other = make_frame(auditor="fdp_gaussian", assumption="family")
    other["epsilon_lower"] *= 2
    frame = pd.concat([make_frame(), other])
    first, second = tables.table1(frame), tables.table2(frame)
    assert set(first["auditor"]) == {"steinke"}
    assert set(second["auditor"]) == {"fdp_gaussian"}
    np.testing.assert_allclose(second["epsilon_mean"], 2 * first["epsilon_mean"], rtol=1e-12)
    assert "Mahloujifar" in table_formats.note(second)


def test_write_gives_the_same_bytes_again(tmp_path):
    names = ["table1.csv", "table1.md", "table1.tex"]
    for folder in ("first", "second"):
        paths = [tmp_path / folder / name for name in names]
        tables.write(tables.table1(make_frame()), *paths, provenance={"config_digest": "0"})
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    assert store.read_provenance(tmp_path / "first" / "table1.csv") == {"config_digest": "0"}


def test_write_csv_prints_the_same_table_when_read(tmp_path):
    table = tables.table1(make_frame())
    tables.write(table, tmp_path / "table1.csv", provenance={})
    again = store.read_csv(tmp_path / "table1.csv")
    assert table_formats.markdown(again) == table_formats.markdown(table)
    assert table_formats.latex(again) == table_formats.latex(table)


def test_write_refuses_other_formats_before_it_writes(tmp_path):
    paths = [tmp_path / name for name in ("table1.csv", "table1.xlsx")]
    with pytest.raises(ValueError, match=r"suffix '.xlsx', expected .csv, .md or .tex"):
        tables.write(tables.table1(make_frame()), *paths, provenance={})
    assert list(tmp_path.iterdir()) == []


def test_main_prints_tables_and_paths(tmp_path, capsys):
    frame = pd.concat([make_frame(), make_frame(auditor="fdp_gaussian")])
    tables.write(tables.table1(frame), tmp_path / "tables" / "table1.csv", provenance={})
    tables.write(tables.table2(frame), tmp_path / "tables" / "table2.csv", provenance={})
    for name in ("figures/figure1.pdf", "figures/figure2.png", "report.html"):
        store.write_text(tmp_path / name, "")
    assert tables.main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert table_formats.text(tables.table1(frame)) in printed
    assert table_formats.text(tables.table2(frame)) in printed
    for name in ("figures/figure1.pdf", "figures/figure2.png", "report.html", "tables/table1.csv"):
        assert f"{tmp_path / name}\n" in printed
    assert "provenance" not in printed


def test_main_says_what_is_missing(tmp_path, capsys):
    assert tables.main([str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert str(tmp_path / "tables" / "table2.csv") in error
    assert f"with the FILE in config/ whose results_dir is {tmp_path}" in error
    assert "Traceback" not in error


def test_tables_need_no_jax():
    code = "import sys, metacanary.tables; print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_columns_are_those_of_the_summary():
    assert tables.COLUMNS == summary.COLUMNS
    assert tables.POOLED == summary.POOLED


def test_bounds_puts_all_auditors_of_a_kind_together():
    gaussian = make_frame(auditor="fdp_gaussian", assumption="family")
    gaussian["epsilon_lower"] *= 2
    table = tables.bounds(pd.concat([make_frame(), gaussian], ignore_index=True))
    steinke = tables.summarise(make_frame(), **STEINKE)
    assert table["auditor"].tolist() == ["steinke", "fdp_gaussian"] * len(steinke)
    pd.testing.assert_frame_equal(table.iloc[::2].reset_index(drop=True), steinke)
    np.testing.assert_allclose(table.iloc[1::2]["epsilon_mean"], 2 * steinke["epsilon_mean"])
    assert tables.PAPER_COLUMN not in table
    with pytest.raises(ValueError, match="protocol='paper' is no bound"):
        tables.bounds(make_frame(), protocol="paper")


def test_bounds_are_printed_with_their_assumptions():
    frame = pd.concat([make_frame(), make_frame(auditor="gaussian_auroc", assumption="asymptotic")], ignore_index=True)
    text = table_formats.markdown(tables.bounds(frame))
    assert text.startswith("**All bounds.** Empirical lower bounds")
    assert "protocol corrected" in text
    assert "paper protocol" not in text
    header, rows = text.splitlines()[2], text.splitlines()[4:]
    names = [cell.strip() for cell in header.strip("|").split("|")]
    assert {"auditor", "assumption", "last iterate, heuristic"} <= {*names}
    cells = [dict(zip(names, (cell.strip() for cell in row.strip("|").split("|")), strict=True)) for row in rows]
    assert {(cell["auditor"], cell["assumption"]) for cell in cells if cell["runs"] != "0"} == {
        ("steinke", "worst_case"),
        ("gaussian_auroc", "asymptotic"),
    }
    assert {cell["last iterate, heuristic"] for cell in cells if cell["training"] == "dpsgd"} >= {"7.10"}
    assert table_formats.latex(tables.bounds(frame)).count("\\label{tab:epsilon-bounds}") == 1


@pytest.mark.parametrize("column", [*tables.COLUMNS, *tables.table1(make_frame()).columns])
def test_columns_are_explained_in_the_docs(column):
    text = (Path(__file__).parent.parent / "docs" / "output.md").read_text(encoding="utf-8")
    assert f"`{column}`" in text
