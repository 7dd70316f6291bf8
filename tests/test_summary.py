"""Tests of the tidy table of audits."""

import math

import numpy as np
import pandas as pd
import pytest

from metacanary import accounting, audits, summary, tables

CELL = {"dataset": "digits", "canary": "random", "training": "sgd", "epsilon": "inf"}
SCORES = ("negative_loss", "logit_margin")


def make_scores(*, num_runs=3, steps=(10, 20), num_canaries=40, game="independent", signal=2.0, seed=0):
    """Scores of a cell: standard normal, shifted by `signal` for included canaries."""
    rng = np.random.default_rng(seed)
    frames = []
    for run in range(num_runs):
        included = rng.integers(0, 2, num_canaries)
        if game == "paired":
            included[1::2] = 1 - included[::2]
        for step in steps:
            for score in SCORES:
                values = rng.normal(size=num_canaries) + signal * included
                columns = {"run": run, "step": step, "canary_id": np.arange(num_canaries), "included": included}
                frames.append(pd.DataFrame(columns | {"score": score, "value": values}))
    return pd.concat(frames, ignore_index=True)


def make_runs(*, num_runs=3, steps=(10, 20), noise_multiplier=0.0):
    """Runs of a cell; the accuracy of run r at step s is r/10 + s/100."""
    index = [(run, step) for run in range(num_runs) for step in steps]
    runs = pd.DataFrame(index, columns=["run", "step"])
    accuracy = runs["run"] / 10 + runs["step"] / 100
    return runs.assign(test_accuracy=accuracy, noise_multiplier=noise_multiplier)


def settings(**changes):
    """Settings of a cell without privacy."""
    return summary.Settings(**({"scores": SCORES, "game": "independent", "delta": 1e-5} | changes))


def one(table, **wanted):
    """The only row with these values."""
    (row,) = table[(table[list(wanted)] == pd.Series(wanted)).all(axis=1)].to_dict("records")
    return row


def test_columns_are_those_that_tables_need():
    assert set(summary.COLUMNS) == set(tables.COLUMNS)


def test_settings_refuse_an_unknown_game():
    with pytest.raises(ValueError, match="game is 'even', expected one of independent, paired"):
        settings(game="even")


@pytest.mark.parametrize("changes", [{"guess_fraction": 0.0}, {"grid": [0.5, 1.5]}])
def test_settings_refuse_fractions_out_of_range(changes):
    with pytest.raises(ValueError, match=r"guess_fraction and grid hold .*, expected fractions in \(0, 1\]"):
        settings(**changes)


def test_run_table_lists_runs_and_snapshots():
    arrays = {"run": np.array([4, 5]), "step": np.array([10, 20]), "noise_multiplier": np.array([1.5, 1.5])}
    table = summary.run_table(arrays | {"test_accuracy": np.array([[0.1, 0.2], [0.3, 0.4]])})
    expected = {"run": [4, 4, 5, 5], "step": [10, 20, 10, 20], "test_accuracy": [0.1, 0.2, 0.3, 0.4]}
    pd.testing.assert_frame_equal(table, pd.DataFrame(expected | {"noise_multiplier": 1.5}))


def test_epsilon_table_has_a_row_for_every_audit():
    table = summary.epsilon_table(make_scores(), make_runs(), settings(), cell=CELL)
    assert tuple(table.columns) == summary.COLUMNS
    assert len(table) == 2 * (3 + 1) * len(SCORES) * len(audits.PROTOCOLS) * len(audits.AUDITORS)
    assert not table.duplicated(list(summary.KEYS)).any()
    assert set(table["run"]) == {"0", "1", "2", "pooled"}


def test_epsilon_table_equals_the_audit_of_each_run():
    scores = make_scores()
    table = summary.epsilon_table(scores, make_runs(), settings(guess_fraction=0.5), cell=CELL)
    game = scores[(scores["run"] == 1) & (scores["step"] == 20) & (scores["score"] == "logit_margin")]
    for protocol, options in (("fixed", {"num_guesses": 20}), ("corrected", {}), ("paper", {})):
        expected = audits.audit(game["value"], game["included"], delta=1e-5, protocol=protocol, **options)
        found = table[(table["step"] == 20) & (table["run"] == "1") & (table["score"] == "logit_margin")]
        found = found[found["protocol"] == protocol][list(audits.COLUMNS)].reset_index(drop=True)
        pd.testing.assert_frame_equal(found, expected)


def test_epsilon_table_pools_the_coins_of_all_runs():
    scores = make_scores()
    table = summary.epsilon_table(scores, make_runs(), settings(), cell=CELL)
    game = scores[(scores["step"] == 10) & (scores["score"] == "negative_loss")]
    expected = audits.audit(game["value"], game["included"], delta=1e-5).iloc[0]
    row = one(table, step=10, run="pooled", score="negative_loss", protocol="corrected", auditor="steinke")
    assert row["num_canaries"] == 3 * 40
    assert row["epsilon_lower"] == expected["epsilon_lower"]
    assert row["test_accuracy"] == pytest.approx(0.1 + 0.1, rel=1e-12)  # rounding of a mean of three


def test_epsilon_table_of_the_paired_game_counts_pairs():
    table = summary.epsilon_table(make_scores(game="paired"), make_runs(), settings(game="paired"), cell=CELL)
    assert set(table["adjacency"]) == {"replace_one"}
    by_run = table.drop_duplicates(["run"]).set_index("run")["num_canaries"]
    assert by_run.to_dict() == {"0": 20, "1": 20, "2": 20, "pooled": 60}


def test_epsilon_table_takes_guesses_from_fractions():
    chosen = settings(guess_fraction=0.3, grid=[0.001, 1.0, 0.25, 0.001])
    table = summary.epsilon_table(make_scores(), make_runs(), chosen, cell=CELL)
    fixed = table[table["protocol"] == "fixed"].set_index("run")["num_guesses"]
    assert set(fixed["0"]) == {12}
    assert set(fixed["pooled"]) == {36}
    corrected = table[(table["protocol"] == "corrected") & (table["run"] == "0")]
    assert set(corrected["num_guesses"]) <= {1, 10, 40}


def test_epsilon_table_accounts_for_the_steps_so_far():
    runs = make_runs(noise_multiplier=1.2)
    chosen = settings(sampling_prob=0.1)
    table = summary.epsilon_table(make_scores(), runs, chosen, cell=CELL | {"epsilon": "8"})
    for step in (10, 20):
        mechanism = {"noise_multiplier": 1.2, "sampling_prob": 0.1, "num_steps": step, "delta": 1e-5}
        rows = table[table["step"] == step]
        assert set(rows["epsilon_accounted"]) == {accounting.epsilon(**mechanism)}
        assert set(rows["epsilon_accounted_rdp"]) == {accounting.epsilon(**mechanism, accountant="rdp")}


def test_epsilon_table_accounts_for_the_adjacency_of_the_game():
    runs = make_runs(noise_multiplier=1.2)
    chosen = settings(game="paired", sampling_prob=0.1)
    table = summary.epsilon_table(make_scores(game="paired"), runs, chosen, cell=CELL | {"epsilon": "8"})
    mechanism = {"noise_multiplier": 1.2, "sampling_prob": 0.1, "num_steps": 20, "delta": 1e-5}
    expected = accounting.epsilon(**mechanism, adjacency="replace_one")
    assert set(table[table["step"] == 20]["epsilon_accounted"]) == {expected}
    assert table["epsilon_accounted_rdp"].isna().all()


def test_epsilon_table_of_training_without_privacy_accounts_for_nothing():
    table = summary.epsilon_table(make_scores(), make_runs(), settings(), cell=CELL)
    assert set(table["epsilon_accounted"]) == set(table["epsilon_accounted_rdp"]) == {math.inf}


def test_epsilon_table_ignores_the_order_of_rows():
    scores, runs = make_scores(), make_runs()
    table = summary.epsilon_table(scores, runs, settings(), cell=CELL)
    shuffled = scores.sample(frac=1, random_state=1), runs.sample(frac=1, random_state=2)
    pd.testing.assert_frame_equal(summary.epsilon_table(*shuffled, settings(), cell=CELL), table)


def test_epsilon_table_takes_the_wanted_scores_only():
    table = summary.epsilon_table(make_scores(), make_runs(), settings(scores=["logit_margin"]), cell=CELL)
    assert set(table["score"]) == {"logit_margin"}


def drop_canary(scores, runs):
    return scores.drop(index=5), runs


def drop_run(scores, runs):
    return scores[scores["run"] != 2], runs


def repeat_run(scores, runs):
    return pd.concat([scores, scores[scores["run"] == 2]]), runs


def repeat_listed_run(scores, runs):
    return scores, pd.concat([runs, runs.tail(1)])


def mix_noise(scores, runs):
    return scores, runs.assign(noise_multiplier=np.arange(len(runs)))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (drop_canary, "scores has other canaries in one run than in another"),
        (drop_run, r"scores and runs differ in \(run, step\) \[\(2, 10\), \(2, 20\)\]"),
        (repeat_run, "scores has a canary twice in a run"),
        (repeat_listed_run, "runs has a run twice"),
        (mix_noise, "expected one for all runs of a cell"),
    ],
)
def test_epsilon_table_refuses_scores_and_runs_that_do_not_fit(damage, expected):
    with pytest.raises(ValueError, match=expected):
        summary.epsilon_table(*damage(make_scores(), make_runs()), settings(), cell=CELL)


def test_epsilon_table_refuses_a_score_that_is_not_there():
    with pytest.raises(ValueError, match=r"scores lacks \['lira'\], it has"):
        summary.epsilon_table(make_scores(), make_runs(), settings(scores=["lira"]), cell=CELL)


@pytest.fixture(scope="module")
def cells():
    """The tables of two cells."""
    names = ("random", "mislabeled")
    tables_ = [
        summary.epsilon_table(make_scores(seed=s), make_runs(), settings(), cell=CELL | {"canary": name})
        for s, name in enumerate(names)
    ]
    return tables_


def test_collect_keeps_all_rows(cells):
    table = summary.collect(iter(cells))
    assert tuple(table.columns) == summary.COLUMNS
    assert len(table) == sum(map(len, cells))
    assert not table.duplicated(list(summary.KEYS)).any()


def test_collect_reads_runs_as_text(cells):
    single = cells[0][cells[0]["run"] == "1"].assign(run=1)  # as a CSV without pooled rows is read
    assert set(summary.collect([single])["run"]) == {"1"}


def test_collect_refuses_a_cell_twice(cells):
    with pytest.raises(ValueError, match="twice, expected each row once"):
        summary.collect([cells[0], cells[0]])


def test_collect_refuses_other_columns(cells):
    with pytest.raises(ValueError, match=r"frames\[1\] has other columns \(\['auroc'\]\)"):
        summary.collect([cells[0], cells[1].drop(columns="auroc")])


def test_collect_refuses_nothing():
    with pytest.raises(ValueError, match="frames is empty"):
        summary.collect([])


def pooled_bounds(values, coins, pairs, chosen):
    """Bounds by protocol and auditor of one pooled game, without tables; bounds of equal counts are found once."""
    correct = audits._correct_by_guesses(values, coins, pairs)
    total = len(correct) - 1
    plans = {
        "fixed": audits._plan("fixed", total, 0.05, round(chosen.guess_fraction * total), None),
        "corrected": audits._plan("corrected", total, 0.05, None, None),
    }
    return {
        (protocol, auditor.name): audits._bound(auditor, correct, guesses, chosen.delta, level)["epsilon_lower"]
        for protocol, (guesses, level) in plans.items()
        for auditor in audits.AUDITORS
    }


@pytest.mark.parametrize("game", ["independent", "paired"])
def test_pooled_bound_has_its_level(game):
    """Scores that know nothing: at most 5% of 2,000 pooled audits may bound epsilon above 0, and 3 standard errors."""
    chosen, num_games = settings(game=game, guess_fraction=0.5), 2000
    columns = {"run": np.repeat([0, 1], 20), "canary_id": np.tile(np.arange(20), 2)}
    pairs = np.repeat(np.arange(20), 2) if game == "paired" else None
    rng, alarms = np.random.default_rng(0), []
    for number in range(num_games):
        coins, values = rng.integers(0, 2, 40).astype(bool), rng.normal(size=40)
        if game == "paired":
            coins[1::2] = ~coins[::2]
        bounds = pooled_bounds(values, coins, pairs, chosen)
        alarms.append({key: bound > 0 for key, bound in bounds.items()})
        if number < 20:  # they are what the table holds
            rows = summary._audited(pd.DataFrame(columns | {"included": coins, "value": values}), chosen)
            found = rows.set_index(["protocol", "auditor"])["epsilon_lower"]
            assert all(found[key] == bound for key, bound in bounds.items())
    rates = pd.DataFrame(alarms).mean()
    assert len(rates) == 4
    assert rates.min() > 0  # at 0 this would test nothing
    assert rates.max() <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / num_games)
