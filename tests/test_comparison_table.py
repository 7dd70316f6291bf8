"""Tables of comparisons: their numbers are those of the summary, and their places those of the kinds' settings."""

import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from metacanary import comparison_cost, comparison_table, store, summary

CHOICE = {"auditor": "steinke", "protocol": "corrected", "score": "negative_loss"}
SMALL = {"name": "convnet", "options": {"widths": [8, 16], "pool": "average"}}
WIDE = {"name": "convnet", "options": {"widths": [32, 64], "pool": "average"}}
OPTIMIZED = {"family": "metagradient", "num_canaries": 100, "start": "mislabeled", "model": SMALL, "algorithm": "sgd"}
PLAIN = {"num_canaries": 100}
TRAININGS = {"sgd": {"model": SMALL, "algorithm": "sgd"}, "dpsgd": {"model": WIDE, "algorithm": "dpsgd"}}
KINDS = {
    "start": {
        "random": {**PLAIN, "family": "random"},
        "mislabeled": {**PLAIN, "family": "mislabeled"},
        "from_clean": {**OPTIMIZED, "start": "random"},
        "from_mislabeled": OPTIMIZED,
    },
    "num_canaries": {
        "many": {**OPTIMIZED, "num_canaries": 200},
        "few": {**OPTIMIZED, "num_canaries": 25},
        "mislabeled": {**PLAIN, "family": "mislabeled"},
        "middle": OPTIMIZED,
    },
    "model": {
        "random": {**PLAIN, "family": "random"},
        "on_small": OPTIMIZED,
        "on_wide": {**OPTIMIZED, "model": WIDE},
    },
    "cost": {
        "random": {**PLAIN, "family": "random"},
        "mislabeled": {**PLAIN, "family": "mislabeled"},
        "metagradient": OPTIMIZED,
        "gradient_max": {**OPTIMIZED, "family": "gradient_max"},
    },
}


def make_frame(kinds, num_runs=4, datasets=("digits",)):
    """Rows of summary/epsilon.csv: two trainings, two steps, bounds that grow with the place of the kind."""
    rng, rows = np.random.default_rng(0), []
    cells = product(datasets, (("sgd", np.inf), ("dpsgd", 8.0)), enumerate(kinds), (10, 20))
    for dataset, (training, epsilon), (place, kind), step in cells:
        for run in [*map(str, range(num_runs)), "pooled"]:
            value = step / 20 * (place + rng.uniform(0, 0.4)) / (1 if training == "sgd" else 3)
            accounted = np.inf if training == "sgd" else 7.9
            num_canaries = kinds[kind]["num_canaries"]
            rows.append(
                {
                    "dataset": dataset,
                    "canary": kind,
                    "training": training,
                    "epsilon": epsilon,
                    "step": step,
                    "run": run,
                    "epsilon_lower": value,
                    "auroc": 0.5 + value / 9,
                    "epsilon_accounted": accounted,
                    "num_canaries": num_canaries * (num_runs if run == "pooled" else 1),
                    "ceiling": np.log(num_canaries) - 1 + (run == "pooled"),
                }
            )
    shared = {"accountant": "pld", "game": "independent", "epsilon_accounted_rdp": np.inf, "epsilon_heuristic": np.inf}
    shared |= {"assumption": "worst_case", "adjacency": "add_remove", "num_guesses": 10, "num_guesses_in": 5}
    frame = pd.DataFrame(rows).assign(**shared, num_correct=8, test_accuracy=0.9, **CHOICE)
    return frame[list(summary.COLUMNS)]


def make_costs(kinds, datasets=("digits",)):
    """Costs of every optimisation and cell, with two blocks each."""
    device = {"platform": "cpu", "kind": "cpu", "cpu": "Some CPU"}
    jobs = []
    for dataset, kind in product(datasets, kinds):
        if "model" in kinds[kind]:
            work = {"num_metasteps": 5, "num_splits": 2, "complement": True, "training": {"num_steps": 10}}
            made = {"device": device, "wall_seconds": 60.0 * (1 + len(jobs)), "settings": {"kind": work}}
            jobs.append(comparison_cost.job("optimize_canaries", {"dataset": dataset, "canary": kind}, made))
    for dataset, kind, (training, epsilon), block in product(datasets, kinds, (("sgd", "inf"), ("dpsgd", "8")), (0, 1)):
        cell = {"dataset": dataset, "canary": kind, "training": training, "epsilon": epsilon}
        made = {"device": device, "wall_seconds": 30.0 + block}
        made["settings"] = {"runs": [0, 1], "options": {"num_steps": 10}}
        jobs.append(comparison_cost.job("train_audit_models", cell, made))
    return comparison_cost.table(jobs)


def make_table(by, **changes):
    """A table from `collect`."""
    kinds = KINDS[by]
    costs = make_costs(kinds) if by == "cost" else None
    given = {"frame": make_frame(kinds), "kinds": kinds, "trainings": TRAININGS, "costs": costs} | changes
    return comparison_table.collect(**given, by=by, **CHOICE)


@pytest.mark.parametrize("by", KINDS)
def test_collect_has_the_numbers_of_the_last_step(by):
    """By a naive computation from the frame."""
    frame, table = make_frame(KINDS[by]), make_table(by)
    assert tuple(table.columns) == comparison_table.COLUMNS
    assert len(table) == 2 * len(KINDS[by])
    for _, row in table.iterrows():
        found = frame[(frame["canary"] == row["canary"]) & (frame["training"] == row["training"])]
        found = found[found["step"] == 20]
        single, pooled = found[found["run"] != "pooled"], found[found["run"] == "pooled"]
        for column, name in (("epsilon_lower", "epsilon"), ("auroc", "auroc")):
            mean, sem = single[column].mean(), single[column].std(ddof=1) / 2
            low, high = scipy.stats.t.interval(0.95, df=3, loc=mean, scale=sem)
            expected = [mean, low, high]
            np.testing.assert_allclose(row[[f"{name}_{end}" for end in ("mean", "low", "high")]].tolist(), expected)
        assert row["epsilon_pooled"] == pooled["epsilon_lower"].item()
        assert row["ceiling"] == single["ceiling"].iloc[0]
        assert row["num_canaries"] == KINDS[by][row["canary"]]["num_canaries"]
        assert row["num_runs"] == 4


def test_collect_places_kinds_by_their_settings():
    start = make_table("start")
    assert start["canary"].tolist() == [*KINDS["start"]] * 2  # as listed
    assert start["value"].tolist()[:4] == ["random", "mislabeled", "random", "mislabeled"]
    assert start["line"].tolist()[:4] == ["not optimised"] * 2 + ["metagradient"] * 2
    numbers = make_table("num_canaries")
    assert numbers["canary"].tolist()[:4] == ["few", "middle", "many", "mislabeled"]
    assert numbers["value"].tolist()[:4] == [25, 100, 200, 100]


def test_collect_knows_the_model_that_canaries_were_optimised_on():
    table = make_table("model").set_index(["canary", "training"])
    own = table["own_model"]
    assert own[own].index.tolist() == [("on_small", "sgd"), ("on_wide", "dpsgd")]
    assert table["metamodel"]["on_wide", "sgd"] == "convnet widths 32-64"
    assert table["audited_model"]["on_wide", "sgd"] == "convnet widths 8-16"
    assert pd.isna(table["metamodel"]["random", "sgd"])
    assert table["own_recipe"][table["own_recipe"]].index.tolist() == [("on_small", "sgd")]
    assert table["metarecipe"]["on_wide", "dpsgd"] == "sgd"
    assert table["audited_recipe"]["on_wide", "dpsgd"] == "dpsgd"


def test_collect_adds_what_was_spent_and_gained():
    """Half of the rows in hand-made numbers: 20 trainings of 10 steps in one and two minutes, audits of 61 s."""
    frame = make_frame(KINDS["cost"])
    runs = frame[(frame["step"] == 20) & (frame["run"] != "pooled")]
    by_run = runs.set_index(["training", "canary", "run"])["epsilon_lower"].sort_index()
    table = make_table("cost").set_index(["training", "canary"])
    spent = table.loc["sgd", ["optimization_seconds", "num_trainings", "num_steps", "audit_seconds"]]
    assert spent.loc["metagradient"].tolist() == [60.0, 20, 200, 61.0]
    assert spent.loc["gradient_max"].tolist() == [120.0, 20, 200, 61.0]
    assert spent.loc["random"].tolist() == [0, 0, 0, 61.0]
    mean = table["epsilon_mean"]
    for training, kind in (("sgd", "metagradient"), ("dpsgd", "gradient_max")):
        gain = mean[training, kind] - mean[training, "random"]
        assert table["epsilon_gain"][training, kind] == pytest.approx(gain, rel=1e-12)
        paired = scipy.stats.ttest_rel(by_run[training, kind], by_run[training, "random"]).confidence_interval(0.95)
        found = table.loc[(training, kind), ["epsilon_gain_low", "epsilon_gain_high"]].tolist()
        np.testing.assert_allclose(found, paired, rtol=1e-9)
        seconds = table["optimization_seconds"][training, kind]
        assert table["seconds_per_epsilon"][training, kind] == pytest.approx(seconds / gain, rel=1e-12)
    assert table["epsilon_gain"].isna().tolist() == [name == "random" for _, name in table.index]
    assert table["seconds_per_epsilon"].notna().tolist() == ["grad" in name for _, name in table.index]
    assert set(table["device"]) == {"Some CPU"}


def test_collect_calls_no_loss_a_gain():
    kinds = KINDS["cost"]
    frame = make_frame(kinds)
    frame.loc[frame["canary"] == "random", "epsilon_lower"] = 9.0
    table = make_table("cost", frame=frame)
    assert (table["epsilon_gain"].dropna() < 0).all()
    assert table["seconds_per_epsilon"].isna().all()


def test_collect_has_no_minutes_for_a_gain_that_may_be_none():
    """In SGD the gains of the runs are 1, 1, 1 and -2, in DP-SGD all 1; the means of both are positive."""
    frame = make_frame(KINDS["cost"])
    level = frame["run"].map({"0": 3.0, "1": 4.0, "2": 5.0, "3": 6.0}).fillna(3.0)
    frame["epsilon_lower"] = level + (frame["canary"] == "metagradient")
    lost = (frame["canary"] == "metagradient") & (frame["training"] == "sgd") & (frame["run"] == "3")
    frame.loc[lost, "epsilon_lower"] = 4.0
    table = make_table("cost", frame=frame).set_index(["training", "canary"])
    gains = [table["epsilon_gain"][training, "metagradient"] for training in ("sgd", "dpsgd")]
    np.testing.assert_allclose(gains, [0.25, 1.0], rtol=1e-12)
    assert np.isnan(table["seconds_per_epsilon"]["sgd", "metagradient"])
    assert table["seconds_per_epsilon"]["dpsgd", "metagradient"] == pytest.approx(60.0, rel=1e-12)
    cells = comparison_table.printed(table.reset_index()).set_index(["training", "canary"])
    assert cells["ε over\nrandom"]["sgd", "metagradient"] == "0.25 ± 2.39"  # t 3.182, s 1.5, 4 runs
    assert cells["minutes\nper ε"]["sgd", "metagradient"] == "—"


@pytest.mark.parametrize("dropped", ["metagradient", "random"])
def test_collect_has_no_gain_over_other_runs(dropped):
    frame = make_frame(KINDS["cost"])
    frame = frame[(frame["canary"] != dropped) | (frame["run"] != "2") | (frame["training"] != "sgd")]
    table = make_table("cost", frame=frame).set_index(["training", "canary"])
    missing = {kind for kind in ("mislabeled", "gradient_max", "metagradient") if dropped in ("random", kind)}
    for name in ("epsilon_gain", "epsilon_gain_low", "seconds_per_epsilon"):
        found = table.loc["sgd", name].drop(index=["random", "mislabeled"])
        assert set(found.index[found.isna()]) == missing - {"mislabeled"}
        assert table.loc["dpsgd", name].drop(index=["random", "mislabeled"]).notna().all()


def test_collect_pairs_runs_whatever_runs_another_kind_has():
    frame = make_frame(KINDS["cost"])
    more = frame[(frame["canary"] == "mislabeled") & (frame["run"] == "0")].assign(run="4")
    found = make_table("cost", frame=pd.concat([frame, more])).set_index(["training", "canary"])
    expected = make_table("cost", frame=frame).set_index(["training", "canary"])
    for training in ("sgd", "dpsgd"):
        assert found["epsilon_gain"][training, "metagradient"] == expected["epsilon_gain"][training, "metagradient"]
        assert np.isnan(found["epsilon_gain"][training, "mislabeled"])


@pytest.mark.parametrize(
    ("by", "changes", "message"),
    [
        (
            "start",
            {"trainings": {"other": {"model": SMALL, "algorithm": "sgd"}}},
            "frame lacks canaries .* in training 'other'",
        ),
        ("start", {"frame": make_frame(KINDS["model"])}, "frame lacks canaries ['mislabeled'"),
        ("start", {"kinds": {"a": OPTIMIZED, "b": OPTIMIZED}}, "canaries: got a and b, both metagradient with start"),
    ],
)
def test_collect_rejects(by, changes, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        make_table(by, **changes)


def test_printed_has_a_column_for_what_varies():
    assert comparison_table.printed(make_table("start"))["start"].tolist()[:2] == ["random", "mislabeled"]
    numbers = comparison_table.printed(make_table("num_canaries"))
    assert numbers["canaries"].tolist()[:3] == ["25", "100", "200"]
    cost = comparison_table.printed(make_table("cost"))
    assert cost["optimisation,\nminutes"].tolist()[:4] == ["0.0", "0.0", "1.0", "2.0"]
    assert cost["minutes\nper ε"].tolist()[0] == "—"


def test_printed_by_model_is_a_matrix():
    table = make_table("model")
    cells = comparison_table.printed(table).set_index("canary")
    assert cells.columns.tolist() == [
        "optimised through",
        "sgd\nconvnet widths 8-16",
        "dpsgd ε 8\nconvnet widths 32-64",
    ]
    row = table[(table["canary"] == "on_wide") & (table["training"] == "dpsgd")].iloc[0]
    expected = f"{row['epsilon_mean']:.2f} ({row['auroc_mean']:.3f}) *"
    assert cells.loc["on_wide", "dpsgd ε 8\nconvnet widths 32-64"] == expected
    assert cells.loc["random", "optimised through"] == "—"
    assert cells.loc["on_wide", "optimised through"] == "convnet widths 32-64, sgd"
    assert cells.loc["on_small", "sgd\nconvnet widths 8-16"].endswith(" **")
    assert cells.iloc[:, 1:].map(lambda text: text.endswith("*")).sum().sum() == 2


@pytest.mark.parametrize("by", KINDS)
def test_forms_are_the_same_after_a_round_trip(by, tmp_path):
    """The workflow's figure reads the CSV."""
    table = make_table(by)
    names = [tmp_path / f"t.{suffix}" for suffix in ("csv", "md", "tex")]
    comparison_table.write(table, *names, provenance={"seed": 1})
    again = store.read_csv(names[0])
    assert comparison_table.markdown(again) == comparison_table.markdown(table) == names[1].read_text(encoding="utf-8")
    assert comparison_table.latex(again) == names[2].read_text(encoding="utf-8")
    assert store.read_provenance(names[0]) == {"seed": 1}


@pytest.mark.parametrize("by", KINDS)
def test_latex_is_ascii_and_balanced(by):
    source = comparison_table.latex(make_table(by))
    assert source.isascii()
    (columns,) = re.findall(r"\\begin{tabular}{@{}([lr]+)@{}}", source)
    rows = [line for line in source.splitlines() if line.endswith(" \\\\")]
    assert {line.count(" & ") + 1 for line in rows} == {len(columns)}
    assert source.count("\\begin{") == source.count("\\end{") == 2


def test_note_says_what_rows_share_and_names_the_device():
    text = comparison_table.note(make_table("cost"))
    for words in (
        "Minutes of Some CPU",
        "that of its last attempt",
        "proxies of Gradient Max",
        "run by run",
        "Steinke et al. 2023",
        "protocol corrected",
        "canaries 100",
        "runs 4",
    ):
        assert words in text
    assert "canaries 100" not in comparison_table.note(make_table("num_canaries"))
    frame = make_frame(KINDS["start"], datasets=("digits", "mnist"))
    assert "dataset digits" not in comparison_table.note(make_table("start", frame=frame))


@pytest.mark.slow
def test_table_needs_no_jax():
    code = "import sys, metacanary.comparison_table; print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.parametrize("column", comparison_table.COLUMNS)
def test_columns_are_explained_in_the_docs(column):
    text = (Path(__file__).parent.parent / "docs" / "output.md").read_text(encoding="utf-8")
    assert f"`{column}`" in text.split("## Columns of tables/comparison_*.csv")[1].split("\n## ")[0]
