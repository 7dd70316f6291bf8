"""The command line: what it reads, prints, writes and refuses."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from metacanary import accounting, audit_file, heuristics, score_file
from metacanary.audits import PROTOCOLS, audit

GOOD = "id,included,score\na,1,0.5\nb,0,0.1\n"


def play(rng, shape, shift=1.0):
    """Coins and scores of a Gaussian channel."""
    coins = rng.random(shape) < 0.5
    return coins, rng.normal(size=shape) + shift * coins


def write_runs(path, coins, scores, rng, names="0123"):
    """A file of several runs, the canaries of each in an order of its own."""
    rows = [
        (names[run], f"c{i}", int(coins[run, i]), scores[run, i])
        for run in range(len(coins))
        for i in rng.permutation(len(coins[0]))
    ]
    pd.DataFrame(rows, columns=["run", "id", "included", "score"]).to_csv(path, index=False)


def write_run(path, coins, scores):
    """A file of one run."""
    pd.DataFrame({"id": range(len(coins)), "included": coins.astype(int), "score": scores}).to_csv(path, index=False)


def test_audit_of_a_file_is_the_audit_of_its_arrays(tmp_path, capsys):
    coins, scores = play(np.random.default_rng(0), 300)
    path = tmp_path / "scores.csv"
    pd.DataFrame({"score": scores, "other": "x", "id": range(300), "included": coins.astype(int)}).to_csv(path)
    assert audit_file.main([str(path), "--delta", "1e-5"]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "scores.audit.json").read_text())
    expected = audit(scores, coins, delta=1e-5)
    found = pd.DataFrame(report["bounds"])[list(expected.columns)]
    pd.testing.assert_frame_equal(found, expected, check_exact=False, rtol=1e-12)
    for row in expected.itertuples():
        (line,) = [line for line in printed.splitlines() if line.split()[1:2] == [row.auditor]]
        assert f" {row.epsilon_lower:.3f} " in line
        assert f" {row.assumption} " in line
    assert report["num_runs"] == 1
    assert report["accounted"] is None


def test_runs_are_audited_one_by_one_and_pooled(tmp_path, capsys):
    rng = np.random.default_rng(1)
    coins, scores = play(rng, (3, 60))
    write_runs(tmp_path / "runs.csv", coins, scores, rng, names="2xy")
    arguments = ["--delta", "1e-5", "--protocol", "fixed", "--num-guesses", "20,10"]
    assert audit_file.main([str(tmp_path / "runs.csv"), *arguments]) == 0
    report = json.loads((tmp_path / "runs.audit.json").read_text())
    found = pd.DataFrame(report["bounds"])
    assert report["runs"] == ["2", "x", "y"]
    assert found["run"].unique().tolist() == ["2", "x", "y", "pooled"]
    for run, name in enumerate("2xy"):
        alone = audit(scores[run], coins[run], delta=1e-5, protocol="fixed", num_guesses=(20, 10))
        rows = found[found["run"] == name]
        np.testing.assert_allclose(rows["epsilon_lower"], alone["epsilon_lower"], rtol=1e-9)
    pooled = found[found["run"] == "pooled"]
    assert (pooled["num_canaries"] == 180).all()
    printed = capsys.readouterr().out
    assert "180 scores of 3 runs (2, x, y)." in " ".join(printed.split())  # the line may break anywhere
    for row in pooled.itertuples():
        (line,) = [line.split() for line in printed.splitlines() if line.split()[1:2] == [row.auditor]]
        single = found.loc[(found["auditor"] == row.auditor) & (found["run"] != "pooled"), "epsilon_lower"]
        values = [single.mean(), single.median(), row.epsilon_lower]
        assert line[3:7] == [*(f"{value:.3f}" for value in values), f"{row.ceiling:.2f}"]


def test_rows_that_are_runs_of_their_own_need_no_assumption_of_independence(tmp_path, capsys):
    coins, scores = play(np.random.default_rng(2), 200)
    path = tmp_path / "many.csv"
    pd.DataFrame({"run": range(200), "id": "c", "included": coins.astype(int), "score": scores}).to_csv(path)
    assert audit_file.main([str(path), "--delta", "1e-5"]) == 0
    report = json.loads((tmp_path / "many.audit.json").read_text())
    assumed = {row["auditor"]: row["assumption"] for row in report["bounds"]}
    assert assumed["clopper_pearson"] == assumed["order_statistic"] == "worst_case"
    assert assumed["gaussian_rates"] == assumed["order_statistic_gaussian"] == "family"
    assert report["num_runs"] == 200
    assert "product" not in capsys.readouterr().out


@pytest.mark.parametrize("multi_run", [False, True])
def test_pairs_bound_the_replacing_of_a_record(tmp_path, multi_run):
    rng = np.random.default_rng(3)
    first = rng.random(80) < 0.5
    coins = np.stack([first, ~first], axis=1)
    scores = rng.normal(size=(80, 2)) + 2 * coins
    rows = [
        {
            "pair": f"p{i}",
            "run": i if multi_run else 0,
            "id": f"c{i}{k}",
            "included": int(coins[i, k]),
            "score": scores[i, k],
        }
        for i in range(80)
        for k in (0, 1)
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "pairs.csv", index=False)
    data = score_file.read(tmp_path / "pairs.csv")
    assert data.multi_run == multi_run
    expected = audit(scores.ravel(), coins.ravel(), delta=1e-5, pairs=np.repeat(range(80), 2), multi_run=multi_run)
    audit_file.main([str(tmp_path / "pairs.csv"), "--delta", "1e-5"])
    found = pd.DataFrame(json.loads((tmp_path / "pairs.audit.json").read_text())["bounds"])
    np.testing.assert_allclose(found["epsilon_lower"], expected["epsilon_lower"], rtol=1e-9)
    assert set(found["adjacency"]) == {"replace_one"}
    assert found["assumption"].tolist() == expected["assumption"].tolist()


def test_all_protocols_and_surrogates(tmp_path):
    rng = np.random.default_rng(4)
    coins, scores = play(rng, (3, 100))
    write_runs(tmp_path / "other.csv", coins[:2], scores[:2], rng)
    pd.DataFrame({"id": range(100), "included": coins[2].astype(int), "score": scores[2]}).to_csv(tmp_path / "a.csv")
    arguments = [str(tmp_path / "a.csv"), "--delta", "1e-5", "--output", str(tmp_path / "new" / "out.json")]
    for extra, expected in (
        (["--protocol", "all"], [p for p in PROTOCOLS if p != "surrogate"]),
        (["--protocol", "all", "--surrogates", str(tmp_path / "other.csv")], list(PROTOCOLS)),
        (["--surrogates", str(tmp_path / "other.csv")], ["surrogate"]),
        (["--protocol", "fixed", "--protocol", "paper"], ["fixed", "paper"]),
    ):
        assert audit_file.main([*arguments, *extra]) == 0
        found = pd.DataFrame(json.loads((tmp_path / "new" / "out.json").read_text())["bounds"])
        assert found["protocol"].unique().tolist() == expected
    assert (found[found["protocol"] == "paper"]["assumption"] == "none").all()


def test_accounted_epsilons_stand_beside_the_bounds(tmp_path, capsys):
    (tmp_path / "a.csv").write_text(GOOD)
    mechanism = {"noise_multiplier": 2.0, "sampling_prob": 0.1, "num_steps": 50}
    flags = [text for name, value in mechanism.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    assert audit_file.main([str(tmp_path / "a.csv"), "--delta", "1e-5", *flags]) == 0
    accounted = json.loads((tmp_path / "a.audit.json").read_text())["accounted"]
    assert accounted == {
        "epsilon_pld": pytest.approx(accounting.epsilon(**mechanism, delta=1e-5)),
        "epsilon_rdp": pytest.approx(accounting.epsilon(**mechanism, delta=1e-5, accountant="rdp")),
        "epsilon_last_iterate_heuristic": pytest.approx(heuristics.last_iterate_epsilon(**mechanism, delta=1e-5)),
    }
    assert f"epsilon_pld {accounted['epsilon_pld']:.3f}" in capsys.readouterr().out
    assert audit_file.main([str(tmp_path / "a.csv"), "--delta", "1e-5", "--num-steps", "3"]) == 1
    assert "--noise-multiplier, --sampling-prob missing" in capsys.readouterr().err


def test_bad_files_get_one_clear_line(tmp_path, capsys):
    """What is bad: see test_score_file.py."""
    (tmp_path / "bad.csv").write_text(GOOD + "c,2,0.3\n")
    assert audit_file.main([str(tmp_path / "bad.csv"), "--delta", "1e-5"]) == 1
    printed = capsys.readouterr()
    assert printed.err == f"error: {tmp_path / 'bad.csv'}, line 4: included is '2', expected 0 or 1\n"
    assert printed.out == ""
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--delta", "2"], "delta is 2.0, expected (0, 1)"),
        (["--delta", "1e-5", "--significance", "0.7"], "significance is 0.7"),
        (["--delta", "1e-5", "--protocol", "surrogate"], "surrogates is None"),
        (["--delta", "1e-5", "--protocol", "fixed", "--num-guesses", "9"], "1 to 2 guesses"),
        (["--delta", "1e-5", "--auditors", "magic"], "auditors is ['magic']"),
        (["--delta", "1e-5", "--surrogates", "absent.csv"], "absent.csv"),
    ],
)
def test_bad_options_get_one_clear_line(tmp_path, capsys, flags, message):
    (tmp_path / "a.csv").write_text(GOOD)
    assert audit_file.main([str(tmp_path / "a.csv"), *flags]) == 1
    assert message in capsys.readouterr().err


def test_guesses_alone_are_those_of_the_fixed_protocol(tmp_path):
    coins, scores = play(np.random.default_rng(5), 100)
    write_run(tmp_path / "a.csv", coins, scores)
    assert audit_file.main([str(tmp_path / "a.csv"), "--delta", "1e-5", "--num-guesses", "0.3"]) == 0
    report = json.loads((tmp_path / "a.audit.json").read_text())
    assert {(row["protocol"], row["num_guesses"]) for row in report["bounds"] if row["auditor"] == "steinke"} == {
        ("fixed", 30)
    }
    assert report["declared"]["num_guesses"] == 0.3


def test_fractions_fit_every_protocol_and_numbers_are_refused_under_its_name(tmp_path, capsys):
    coins, scores = play(np.random.default_rng(6), 100)
    write_run(tmp_path / "a.csv", coins, scores)
    arguments = [str(tmp_path / "a.csv"), "--delta", "1e-5", "--protocol", "all", "--num-splits", "2", "--grid"]
    assert audit_file.main([*arguments, "1.0", "0.5"]) == 0
    capsys.readouterr()
    assert audit_file.main([*arguments, "100", "50"]) == 1
    assert capsys.readouterr().err.startswith("error: protocol holdout: grid is [100, 50], expected distinct")


def test_what_was_declared_is_written(tmp_path):
    rng = np.random.default_rng(7)
    coins, scores = play(rng, (2, 100))
    write_run(tmp_path / "a.csv", coins[0], scores[0])
    write_run(tmp_path / "b.csv", coins[1], scores[1])
    arguments = [str(tmp_path / "a.csv"), "--delta", "1e-5"]
    assert audit_file.main(arguments) == 0
    report = json.loads((tmp_path / "a.audit.json").read_text())
    assert report["declared"]["protocols"] == ["corrected"]
    assert report["declared"]["spending"] == "bonferroni"
    assert report["declared"]["seed"] is report["declared"]["num_splits"] is report["declared"]["surrogates"] is None
    flags = "--protocol all --auditors steinke fdp_gaussian --grid 20 5,6 --num-guesses 7 --spending geometric"
    flags += f" --num-splits 3 --seed 4 --surrogates {tmp_path / 'b.csv'}"
    assert audit_file.main([*arguments, *flags.split()]) == 0
    report = json.loads((tmp_path / "a.audit.json").read_text())
    digest = {name: hashlib.sha256((tmp_path / f"{name}.csv").read_bytes()).hexdigest() for name in "ab"}
    assert report["sha256"] == digest["a"]
    assert report["declared"] == {
        "protocols": list(PROTOCOLS),
        "auditors": ["steinke", "fdp_gaussian"],
        "grid": [20, [5, 6]],
        "num_guesses": 7,
        "spending": "geometric",
        "num_splits": 3,
        "seed": 4,
        "surrogates": {"file": str(tmp_path / "b.csv"), "sha256": digest["b"]},
    }
    found = pd.DataFrame(report["bounds"])
    for protocol, told in {
        "fixed": {"num_guesses": 7},
        "corrected": {"spending": "geometric"},
        "holdout": {"seed": 4},
        "median": {"num_splits": 3, "seed": 4},
        "surrogate": {"surrogates": (scores[1], coins[1])},
        "paper": {},
    }.items():
        grid = {} if protocol == "fixed" else {"grid": [20, (5, 6)]}
        expected = audit(scores[0], coins[0], delta=1e-5, protocol=protocol, **told, **grid)["epsilon_lower"][[0, 2]]
        np.testing.assert_allclose(found.loc[found["protocol"] == protocol, "epsilon_lower"], expected, rtol=1e-9)


def test_reports_that_cannot_be_written_get_one_line_and_no_table(tmp_path, capsys):
    (tmp_path / "a.csv").write_text(GOOD)
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for output, message in (
        ("folder", "cannot write"),
        ("a.csv/out.json", "cannot write"),
        ("a.csv", "expected another file than those of scores"),
    ):
        assert audit_file.main([str(tmp_path / "a.csv"), "--delta", "1e-5", "--output", str(tmp_path / output)]) == 1
        printed = capsys.readouterr()
        assert printed.out == ""
        assert message in printed.err
        assert str(tmp_path / output) in printed.err
        assert printed.err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "a.csv").read_text() == GOOD


def test_surrogates_of_another_game_get_one_line(tmp_path, capsys):
    (tmp_path / "a.csv").write_text(GOOD)
    (tmp_path / "b.csv").write_text("id,included,score,pair\na,1,1,p\nb,0,2,p\n")
    for first, other, kind in (("a", "b", "paired"), ("b", "a", "independent")):
        files = [str(tmp_path / f"{first}.csv"), "--surrogates", str(tmp_path / f"{other}.csv")]
        assert audit_file.main([*files, "--delta", "1e-5"]) == 1
        assert capsys.readouterr().err.startswith(f"error: surrogates are {kind}, expected ")


@pytest.mark.parametrize(
    ("size", "largest"),
    [
        (2, "worst_case bound would be 0.00."),
        # 6 right guesses have probability (e^eps / (1 + e^eps))^6, which is 0.05 at eps 0.43
        (6, "worst_case bound would be 0.43."),
        (300, None),
    ],
)
def test_tables_say_what_they_do_not_say(tmp_path, capsys, size, largest):
    coins, scores = play(np.random.default_rng(8), size)
    write_run(tmp_path / "a.csv", coins, scores)
    assert audit_file.main([str(tmp_path / "a.csv"), "--delta", "1e-5"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "the largest of several holds at no stated level." in printed
    assert ("So few canaries and guesses cannot show more" in printed) == (largest is not None)
    assert largest is None or largest in printed


def test_the_named_module_runs():
    """As a process: what users call."""
    command = [sys.executable, "-m", "metacanary.audits", "--help"]
    assert "FILE is a CSV" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
