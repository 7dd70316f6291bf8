import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from metacanary import dirac, ledger, tables

RUNS = ("0", "1", "2")
CELL = {"dataset": "digits", "training": "dpsgd", "epsilon": 8.0}
BOUNDS = {  # of runs 0, 1, 2 and pooled
    ("dirac", "dirac_all_iterates"): (3.0, 4.0, 5.0, 6.0),
    ("dirac", "dirac_last_iterate"): (2.0, 3.5, 4.0, 5.5),
    ("metagradient", "negative_loss"): (1.0, 2.0, 3.0, 4.0),
    ("metagradient", "rmia"): (1.0, 1.0, 2.5, 4.5),
    ("random", "negative_loss"): (0.0, 0.0, 0.0, 0.25),
    ("random", "rmia"): (0.0, 0.5, 0.0, 0.0),
}
KINDS = {"dpsgd": ["random", "metagradient"]}


def rows(bounds=BOUNDS, **changes):
    """Rows as summary/epsilon.csv has them."""
    shared = CELL | {
        "accountant": "pld",
        "epsilon_accounted": 8.0,
        "epsilon_accounted_rdp": 8.5,
        "epsilon_heuristic": 7.5,
        "game": "independent",
        "auditor": "fdp_gaussian",
        "protocol": "surrogate",
        "assumption": "family",
        "adjacency": "add_remove",
        "num_guesses": 50,
        "num_guesses_in": 25,
        "num_correct": 30,
        "test_accuracy": 0.9,
        "step": 200,
    }
    listed = [
        shared
        | {"canary": canary, "score": score, "run": run, "epsilon_lower": bound}
        | {"num_canaries": 300 if run == "pooled" else 100, "ceiling": 13.0 if run == "pooled" else 8.2}
        | {"auroc": 0.5 + bound / 20}
        for (canary, score), values in bounds.items()
        for run, bound in zip((*RUNS, "pooled"), values, strict=True)
    ]
    return pd.DataFrame([row | changes for row in listed])[list(tables.COLUMNS)]


def split(frame):
    """The audits of black-box and of Dirac canaries."""
    is_dirac = frame["canary"] == ledger.DIRAC
    return frame[~is_dirac], frame[is_dirac]


def collected(frame=None, **changes):
    black, white = split(rows() if frame is None else frame)
    options = {"trainings": ["dpsgd"], "canaries": KINDS, "auditor": "fdp_gaussian", "protocol": "surrogate"}
    return ledger.collect(black, white, **options | changes)


def test_claims_stand_in_order_with_what_they_are_compared_with_and_the_owner():
    table = collected()
    assert list(table.columns) == list(ledger.COLUMNS)
    found = [tuple(row) for row in table[["claim", "compared_with", "owner"]].fillna("").to_numpy()]
    assert found == [
        ("accounted, RDP", "", ""),
        ("accounted, PLD", "accounted, RDP", "accounting"),
        ("last iterate, heuristic", "accounted, PLD", "hidden iterates"),
        ("Dirac, all iterates", "accounted, PLD", "estimator"),
        ("Dirac, last iterate", "Dirac, all iterates", "hidden iterates"),
        ("metagradient, negative_loss", "Dirac, last iterate", "black box"),
        ("metagradient, rmia", "metagradient, negative_loss", "score"),
        ("random, rmia", "metagradient, negative_loss", "canary"),
        ("random, negative_loss", "random, rmia", "score"),
    ]
    assert {*table["owner"].dropna()} == {*ledger.OWNERS}


def test_values_are_means_with_t_intervals_and_bounds_of_all_runs():
    table = collected().set_index("claim")
    for claim, key in (("Dirac, last iterate", ("dirac", "dirac_last_iterate")), ("random, rmia", ("random", "rmia"))):
        row, values = table.loc[claim], np.array(BOUNDS[key][:3])
        half = stats.t.ppf(0.975, 2) * values.std(ddof=1) / math.sqrt(3)
        assert row["epsilon_mean"] == pytest.approx(values.mean())
        assert row["epsilon_high"] - row["epsilon_mean"] == pytest.approx(half)
        assert row["epsilon_pooled"] == BOUNDS[key][3]
        assert (row["ceiling"], row["ceiling_pooled"], row["num_runs"], row["num_canaries"]) == (8.2, 13.0, 3, 100)
        assert row["auroc_mean"] == pytest.approx(0.5 + values.mean() / 20)
        assert (row["auditor"], row["protocol"], row["assumption"]) == ("fdp_gaussian", "surrogate", "family")
    claims = table.loc[[ledger.RDP, ledger.PLD, ledger.HEURISTIC]]
    assert claims["epsilon_mean"].tolist() == claims["epsilon_pooled"].tolist() == [8.5, 8.0, 7.5]
    assert claims[["auditor", "protocol", "num_runs", "ceiling", "epsilon_low"]].isna().all(axis=None)


def test_gaps_are_differences_within_runs():
    table = collected().set_index("claim")
    row = table.loc["metagradient, negative_loss"]
    differences = np.subtract(BOUNDS["dirac", "dirac_last_iterate"], BOUNDS["metagradient", "negative_loss"])
    half = stats.t.ppf(0.975, 2) * differences[:3].std(ddof=1) / math.sqrt(3)
    assert row["gap_mean"] == pytest.approx(differences[:3].mean())
    assert row["gap_high"] - row["gap_mean"] == pytest.approx(half)
    assert row["gap_pooled"] == differences[3]
    assert table.loc["metagradient, rmia", "gap_pooled"] == -0.5  # a gap may be negative
    assert table.loc[ledger.PLD, ["gap_mean", "gap_pooled"]].tolist() == [0.5, 0.5]
    assert table.loc[ledger.PLD, ["gap_low", "gap_high"]].isna().all()
    assert table.loc[ledger.ALL_ITERATES, "gap_mean"] == 4.0


@pytest.mark.parametrize("column", ["mean", "pooled"])
def test_gaps_down_to_the_best_add_up(column):
    table = collected()
    best = table.loc[table["owner"] == ledger.BLACK_BOX].iloc[0]
    path = [ledger.PLD, ledger.ALL_ITERATES, ledger.LAST_ITERATE, best["claim"]]
    gaps = table.set_index("claim").loc[path, f"gap_{column}"]
    assert gaps.sum() == pytest.approx(8.5 - best[f"epsilon_{column}"])


def test_kinds_without_a_bound_are_ordered_by_what_their_scores_tell():
    none = {key: (0.0,) * 4 if key[0] != "dirac" else bound for key, bound in BOUNDS.items()}
    frame = rows(none)
    frame.loc[(frame["canary"] == "random") & (frame["score"] == "rmia"), "auroc"] = 0.6
    claims = collected(frame)["claim"].tolist()
    assert claims[5:] == [
        "random, rmia",
        "random, negative_loss",
        "metagradient, negative_loss",
        "metagradient, rmia",
    ]


def test_cells_stand_by_training_and_falling_epsilon():
    frame = pd.concat([rows(epsilon=e, training=t) for t in ("b", "a") for e in (2.0, 8.0)])
    table = collected(frame, trainings=["b", "a"], canaries={"a": KINDS["dpsgd"], "b": ["random"]})
    cells = table[["training", "epsilon"]].drop_duplicates().itertuples(index=False, name=None)
    assert list(cells) == [("b", 8.0), ("b", 2.0), ("a", 8.0), ("a", 2.0)]
    assert set(table.loc[table["training"] == "b", "canary"].dropna()) == {"dirac", "random"}


def test_other_audits_do_not_count():
    other = [rows(dict.fromkeys(BOUNDS, (9.0,) * 4), **c) for c in ({"auditor": "steinke"}, {"protocol": "fixed"})]
    earlier = rows(dict.fromkeys(BOUNDS, (9.0,) * 4), step=100)
    pd.testing.assert_frame_equal(collected(pd.concat([rows(), *other, earlier])), collected())


def test_one_run_has_no_interval():
    frame = rows()
    table = collected(frame[frame["run"].isin(["0", "pooled"])]).set_index("claim")
    assert table[["epsilon_low", "gap_low"]].isna().all(axis=None)
    assert table.loc["Dirac, last iterate", "gap_mean"] == 1.0
    assert table.loc["Dirac, last iterate", "num_runs"] == 1


def test_white_box_scores_are_those_of_the_simulation():
    assert tuple(ledger.WHITE_BOX.values()) == dirac.SCORES


def test_forms_say_what_rows_share_and_what_the_best_row_is_not():
    table = collected()
    text = ledger.markdown(table)
    assert "dataset digits, training dpsgd, 3 runs of 100 canaries" in text
    assert "protocol surrogate" in text
    assert "the largest of several bounds and holds at no stated level" in text
    assert r"\toprule" in ledger.latex(table)
    cells = ledger.printed(table).set_index("claim")
    assert cells.loc["Dirac, all iterates", "ε\nmean"] == "4.00 ± 2.48"
    assert cells.loc["Dirac, all iterates", "ceiling\n(pooled)"] == "8.20 (13.00)"
    assert cells.loc["accounted, RDP", "gap\nmean"] == "—"
    assert cells.loc["accounted, RDP", "owner"] == "—"


def test_read_back_from_csv_it_prints_alike(tmp_path):
    table = collected()
    path = tmp_path / "ledger.csv"
    ledger.write(table, path, provenance={})
    assert ledger.markdown(pd.read_csv(path)) == ledger.markdown(table)


def spoiled(where, **changes):
    """The rows with values of black-box or Dirac rows changed."""
    frame = rows()
    chosen = (frame["canary"] == ledger.DIRAC) == (where == "white")
    return frame.assign(**{name: frame[name].mask(chosen, value) for name, value in changes.items()})


@pytest.mark.parametrize(
    ("frame", "changes", "expected"),
    [
        (spoiled("white", num_canaries=50), {}, r"num_canaries: got \[50, 100\] at dataset digits"),
        (spoiled("white", epsilon_accounted_rdp=8.6), {}, "epsilon_accounted_rdp: got .*expected one mechanism"),
        (spoiled("black", game="paired"), {}, "game: got .*'paired'.*expected independent"),
        (spoiled("white", step=100), {}, "step: got"),
        (rows()[lambda f: (f["run"] != "1") | (f["canary"] == "random")], {}, "expected the same runs in all rows"),
        (rows(), {"canaries": {"dpsgd": ["random", "noise"]}}, r"lacks canaries \['noise'\]"),
        (rows(), {"protocol": "paper"}, "protocol: got 'paper'"),
        (rows(), {"trainings": ["other"]}, "white_box lacks training 'other' on digits"),
        (rows(), {"auditor": "steinke"}, "auditor='steinke' is not in frame"),
    ],
)
def test_collect_names_what_does_not_fit(frame, changes, expected):
    with pytest.raises(ValueError, match=expected):
        collected(frame, **changes)
