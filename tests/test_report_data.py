"""Frames of the report page: equal to the tables, and to counting by hand."""

import numpy as np
import pandas as pd
import pytest
import report_results

from metacanary import report_data, tables

CELL = tables.CELL


def one_cell(table, canary=report_results.HOSTILE, training="sgd"):
    return table[(table["canary"] == canary) & (table["training"] == training)]


def test_every_audit_equals_the_tables():
    frame = report_results.frame()
    found = report_data.every_audit(frame)
    assert len(found) == 4 * 2 * 2 * 2  # cells, auditors, protocols, scores
    for key, rows in found.groupby(report_data.AUDIT):
        wanted = tables.summarise(frame, **dict(zip(report_data.AUDIT, key, strict=True)))
        same = rows.drop(columns=["num_canaries_pooled", "by_run"]).reset_index(drop=True)
        pd.testing.assert_frame_equal(same, wanted)


def test_every_audit_lists_single_runs_and_all_coins():
    frame, found = report_results.frame(), report_data.every_audit(report_results.frame())
    last = frame[frame["step"] == 10]
    for row in found.itertuples():
        rows = last[np.logical_and.reduce([last[n] == getattr(row, n) for n in [*CELL, *report_data.AUDIT]])]
        single = rows[rows["run"] != "pooled"].sort_values("run")
        assert row.by_run == single["epsilon_lower"].tolist()
        assert row.num_canaries_pooled == 90


def test_every_audit_leaves_out_kinds_that_a_training_did_not_have():
    frame = report_results.frame()
    fewer = frame[~((frame["canary"] == "random") & (frame["training"] == "dpsgd"))]
    found = report_data.every_audit(fewer)
    assert len(found) == 3 * 8
    assert (found["num_runs"] == 3).all()


def test_cell_scores_are_of_audited_runs_at_the_last_step():
    (scores, runs), *_ = report_results.cells().values()
    reference = runs.assign(role=["reference" if run == 2 else "audited" for run in runs["run"]])
    cell = {"dataset": "digits", "canary": "random", "training": "sgd", "epsilon": "inf"}
    found = report_data.cell_scores(scores, reference, "negative_loss", cell=cell)
    assert set(found["run"]) == {0, 1}
    assert len(found) == 2 * report_results.NUM_CANARIES
    wanted = scores[(scores["step"] == 10) & (scores["run"] < 2)].set_index(["run", "canary_id"])
    for name, score in (("value", "negative_loss"), ("drawn", "logit_margin")):
        values = wanted["value"][wanted["score"] == score].sort_index()
        assert values.to_list() == found.set_index(["run", "canary_id"])[name].sort_index().to_list()


def test_cell_scores_name_a_score_that_is_not_there():
    (scores, runs), *_ = report_results.cells().values()
    cell = {"dataset": "digits", "canary": "random", "training": "sgd", "epsilon": "inf"}
    with pytest.raises(ValueError, match=r"score='margin' is not in scores, expected one of \['logit_margin'"):
        report_data.cell_scores(scores, runs, "margin", cell=cell)


def test_histograms_equal_a_naive_count():
    scores = report_results.shown_scores()
    found = one_cell(report_data.histograms(scores, num_bins=7))
    values = one_cell(scores)
    for side, included in (("in", True), ("out", False)):
        drawn = values["drawn"][values["included"] == included].to_numpy()
        counts = [
            ((drawn >= low) & (drawn < high)).sum() for low, high in zip(found["low"], found["high"], strict=True)
        ]
        counts[-1] += (drawn == found["high"].iloc[-1]).sum()  # the last bin holds its upper edge
        assert found[f"num_{side}"].tolist() == counts
        assert sum(counts) == len(drawn)
        np.testing.assert_allclose(found[f"share_{side}"], np.array(counts) / len(drawn), rtol=1e-15)


def test_histograms_of_a_setting_share_their_bins():
    found = report_data.histograms(report_results.shown_scores())
    assert found.groupby(tables.SETTING)["low"].nunique().tolist() == [40, 40]


def naive_tpr(values, allowed):
    """The largest share of ins above a threshold that at most `allowed` outs reach, by trying all thresholds."""
    ins, outs = values["value"][values["included"]], values["value"][~values["included"]]
    return max([(ins >= t).mean() for t in values["value"] if (outs >= t).sum() <= allowed], default=0.0)


def test_roc_curves_equal_all_thresholds_tried():
    scores = report_results.shown_scores()
    found, values = one_cell(report_data.roc_curves(scores)), one_cell(scores)
    num_out = int((~values["included"]).sum())
    assert found["fpr"].iloc[[0, 1, -1]].tolist() == [0.0, 1 / num_out, 1.0]
    assert found["tpr"].iloc[-1] == 1.0
    for row in found.itertuples():
        assert row.tpr == pytest.approx(naive_tpr(values, round(row.fpr * num_out)), abs=1e-15)


def test_rates_equal_all_thresholds_tried_and_the_summary():
    scores, frame = report_results.shown_scores(), report_results.frame()
    found = report_data.rates(scores)
    pooled = frame[(frame["run"] == "pooled") & (frame["step"] == 10) & (frame["score"] == "negative_loss")]
    for row in found.to_dict("records"):
        values = one_cell(scores, row["canary"], row["training"])
        assert row["num_in"] + row["num_out"] == len(values) == 90
        for fpr in report_data.FPRS:
            assert row[f"tpr_at_{fpr}"] == pytest.approx(naive_tpr(values, fpr * row["num_out"]), abs=1e-15)
        aurocs = one_cell(pooled, row["canary"], row["training"])["auroc"].unique()
        assert aurocs == pytest.approx([row["auroc"]], abs=1e-12)


def test_leaks_equal_naive_means_in_order():
    scores = report_results.shown_scores()
    found, values = one_cell(report_data.leaks(scores)), one_cell(scores)
    assert len(found) == report_results.NUM_CANARIES
    for row in found.itertuples():
        of_canary = values[values["canary_id"] == row.canary_id]
        ins, outs = of_canary["value"][of_canary["included"]], of_canary["value"][~of_canary["included"]]
        assert (row.num_in, row.num_out) == (len(ins), len(outs))
        if len(ins) and len(outs):
            assert row.leak == pytest.approx(sum(ins) / len(ins) - sum(outs) / len(outs), abs=1e-12)
        else:
            assert np.isnan(row.leak)
    known = found["leak"].dropna()
    assert 0 < len(known) < len(found)  # with three runs, some canaries were always in or always out
    assert found["leak"].iloc[: len(known)].notna().all()
    assert known.is_monotonic_decreasing


def test_by_accounted_has_every_step_of_private_trainings_and_the_last_of_others():
    frame = report_results.frame()
    found = report_data.by_accounted(frame, auditor="steinke", protocol="fixed", score="negative_loss")
    assert sorted(one_cell(found, training="dpsgd")["step"]) == [5, 10]
    assert one_cell(found)["step"].tolist() == [10]
    table = tables.summarise(frame, auditor="steinke", protocol="fixed", score="negative_loss")
    last = found[found["step"] == 10].set_index(CELL)
    names = {"mean": "epsilon_mean", "low": "epsilon_low", "high": "epsilon_high", "pooled": "epsilon_pooled"}
    names |= {name: name for name in ("ceiling", "ceiling_pooled", "epsilon_accounted", "num_runs")}
    for row in table.set_index(CELL).itertuples():
        for name, of_table in names.items():
            assert last.loc[row.Index, name] == getattr(row, of_table)
