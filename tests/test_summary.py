"""Tests of the tidy table of audits."""

import dataclasses
import inspect
import math

import numpy as np
import pandas as pd
import pytest

from metacanary import accounting, auditors, audits, heuristics, reference_scores, score_table, summary, tables
from metacanary.scores import auroc

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


def make_runs(*, num_runs=3, steps=(10, 20), noise_multiplier=0.0, roles=None):
    """Runs of a cell, audited unless other roles are given by run; the accuracy of run r at step s is r/10 + s/100."""
    index = [(run, step) for run in range(num_runs) for step in steps]
    runs = pd.DataFrame(index, columns=["run", "step"])
    accuracy = runs["run"] / 10 + runs["step"] / 100
    role = runs["run"].map(lambda run: (roles or {}).get(run, "audited"))
    return runs.assign(role=role, test_accuracy=accuracy, noise_multiplier=noise_multiplier)


def settings(**changes):
    """Settings of a cell without privacy, with two of the auditors."""
    few = {"auditors": ["steinke", "fdp_gaussian"]}
    return summary.Settings(**({"scores": SCORES, "game": "independent", "delta": 1e-5} | few | changes))


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


def test_epsilon_table_has_a_row_for_every_audit():
    chosen, calls = settings(protocols=audits.PROTOCOLS, auditors=auditors.NAMES, scores=["logit_margin"]), []
    runs = make_runs(num_runs=4, roles={3: "surrogate"})
    table = summary.epsilon_table(
        make_scores(num_runs=4), runs, chosen, cell=CELL, on_audit=lambda: calls.append(len(calls))
    )
    assert tuple(table.columns) == summary.COLUMNS
    assert len(table) == 2 * (3 + 1) * len(audits.PROTOCOLS) * len(auditors.NAMES)
    assert len(calls) == 2 * len(audits.PROTOCOLS)
    assert not table.duplicated(list(summary.KEYS)).any()
    assert set(table["run"]) == {"0", "1", "2", "pooled"}


def test_epsilon_table_equals_the_audit_of_each_run():
    scores = make_scores()
    table = summary.epsilon_table(scores, make_runs(), settings(guess_fraction=0.5), cell=CELL)
    game = scores[(scores["run"] == 1) & (scores["step"] == 20) & (scores["score"] == "logit_margin")]
    for protocol, options in (("fixed", {"num_guesses": 20}), ("corrected", {}), ("paper", {})):
        own = {"auditors": ["steinke", "fdp_gaussian"]} | options
        expected = audits.audit(game["value"], game["included"], delta=1e-5, protocol=protocol, **own)
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


ROLES = {1: "surrogate", 3: "reference", 4: "reference"}


def test_epsilon_table_audits_audited_runs_only():
    """Runs of other roles change no row, whatever their numbers, and no mean accuracy."""
    scores, runs = make_scores(num_runs=5), make_runs(num_runs=5, roles=ROLES)
    chosen = settings(protocols=["fixed", "corrected", "paper"])
    table = summary.epsilon_table(scores, runs, chosen, cell=CELL)
    audited = runs["role"] == "audited"
    expected = summary.epsilon_table(scores[scores["run"].isin([0, 2])], runs[audited], chosen, cell=CELL)
    assert set(table["run"]) == {"0", "2", "pooled"}
    pd.testing.assert_frame_equal(table, expected)


def test_epsilon_table_chooses_guesses_on_surrogate_runs_where_there_are_any():
    scores, runs = make_scores(num_runs=5), make_runs(num_runs=5, roles=ROLES | {4: "surrogate"})
    table = summary.epsilon_table(scores, runs, settings(), cell=CELL)
    game = dict(list(scores[(scores["step"] == 20) & (scores["score"] == SCORES[0])].groupby("run")))
    values, coins = (np.stack([game[run][name] for run in range(5)]) for name in ("value", "included"))
    options = {"protocol": "surrogate", "surrogates": (values[[1, 4]], coins[[1, 4]]), "auditors": ["steinke"]}
    expected = audits.audit(values[[0, 2]], coins[[0, 2]], delta=1e-5, **options)
    wanted = (table["step"] == 20) & (table["score"] == SCORES[0]) & (table["protocol"] == "surrogate")
    found = table[wanted & (table["auditor"] == "steinke")].set_index("run")
    for row, run in zip(expected.itertuples(), ("0", "2", "pooled"), strict=True):
        assert found.loc[run, "epsilon_lower"] == row.epsilon_lower
        assert found.loc[run, "num_guesses_in"] == row.num_guesses_in
    without = summary.epsilon_table(make_scores(), make_runs(), settings(), cell=CELL)
    assert set(without["protocol"]) == {"fixed", "corrected", "paper"}


def test_snapshots_hold_the_games_of_audited_and_of_surrogate_runs():
    scores, runs = make_scores(num_runs=5, num_canaries=6), make_runs(num_runs=5, roles=ROLES | {4: "surrogate"})
    shuffled = scores.sample(frac=1, random_state=0)
    found = list(summary._snapshots(shuffled, runs, ["logit_margin"]))
    assert [(snapshot.step, snapshot.score) for snapshot in found] == [(10, "logit_margin"), (20, "logit_margin")]
    for snapshot in found:
        rows = scores[(scores["step"] == snapshot.step) & (scores["score"] == "logit_margin")]
        game = {run: (of_run["value"].tolist(), of_run["included"].tolist()) for run, of_run in rows.groupby("run")}
        assert snapshot.runs == [0, 2]
        for games, numbers in ((snapshot.audited, (0, 2)), (snapshot.surrogates, (1, 4))):
            values, included = games
            assert [(v, i) for v, i in zip(values.tolist(), included.tolist(), strict=True)] == [
                game[n] for n in numbers
            ]


def test_epsilon_table_audits_reference_scores():
    """Offline LiRA of two reference runs by hand, with one standard deviation for all canaries."""
    scores, runs = make_scores(num_runs=5), make_runs(num_runs=5, roles=ROLES)
    chosen = settings(scores=["negative_loss", "offline_lira"])
    table = summary.epsilon_table(scores, runs, chosen, cell=CELL)
    assert set(table["score"]) == {"negative_loss", "offline_lira"}
    margin = scores[(scores["step"] == 20) & (scores["score"] == "logit_margin")].set_index("run")["value"]
    first, second = margin[3].to_numpy(), margin[4].to_numpy()
    z = (margin[2].to_numpy() - (first + second) / 2) / np.sqrt(np.mean((first - second) ** 2 / 2))
    coins = scores[(scores["step"] == 20) & (scores["score"] == "logit_margin") & (scores["run"] == 2)]["included"]
    expected = audits.audit(z, coins, delta=1e-5, auditors=["steinke", "fdp_gaussian"])
    found = table[(table["step"] == 20) & (table["run"] == "2") & (table["score"] == "offline_lira")]
    found = found[found["protocol"] == "corrected"][list(audits.COLUMNS)].reset_index(drop=True)
    pd.testing.assert_frame_equal(found, expected)


def test_epsilon_table_hands_the_population_and_its_options_to_rmia():
    scores, runs = make_scores(num_runs=5), make_runs(num_runs=5, roles=ROLES)
    drawn = -np.random.default_rng(1).exponential(size=(5, 2, 9))
    block = {"run": np.arange(5), "step": np.array([10, 20]), "log_probability": drawn}
    options = {"gamma": 3.0, "offline_a": 0.9}
    chosen = settings(scores=["rmia"], **{f"rmia_{name}": value for name, value in options.items()})
    table = summary.epsilon_table(scores, runs, chosen, cell=CELL, population=[block])
    values = score_table.with_reference_scores(scores, runs, ["rmia"], population=[block], **options)
    pooled = values[(values["step"] == 10) & (values["score"] == "rmia") & values["run"].isin([0, 2])]
    row = table[(table["step"] == 10) & (table["run"] == "pooled")].iloc[0]
    assert row["auroc"] == auroc(pooled["value"], pooled["included"])
    with pytest.raises(ValueError, match=r"population lacks runs \[0, 1, 2\] at step 10"):
        summary.epsilon_table(scores, runs, chosen, cell=CELL)


def test_settings_have_the_options_of_rmia():
    keywords = inspect.getfullargspec(reference_scores.rmia).kwonlydefaults
    fields = {field.name: field.default for field in dataclasses.fields(summary.Settings)}
    assert {f"rmia_{name}": value for name, value in keywords.items()}.items() <= fields.items()


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        ({0: "extra"}, r"runs has the roles \['audited', 'extra'\], expected audited and perhaps surrogate, reference"),
        (dict.fromkeys(range(3), "surrogate"), r"runs has the roles \['surrogate'\], expected audited"),
    ],
)
def test_epsilon_table_refuses_roles_that_are_not_known_or_nothing_to_audit(roles, expected):
    with pytest.raises(ValueError, match=expected):
        summary.epsilon_table(make_scores(), make_runs(roles=roles), settings(), cell=CELL)


def test_epsilon_table_refuses_a_run_of_two_roles():
    runs = make_runs()
    runs.loc[0, "role"] = "surrogate"
    with pytest.raises(ValueError, match="runs has a run of two roles"):
        summary.epsilon_table(make_scores(), runs, settings(), cell=CELL)


def test_epsilon_table_refuses_half_a_pair():
    scores = make_scores(game="paired")
    with pytest.raises(ValueError, match=r"scores has canaries \[6\] without the other of the pair"):
        summary.epsilon_table(scores[scores["canary_id"] != 7], make_runs(), settings(game="paired"), cell=CELL)


def test_epsilon_table_of_the_paired_game_counts_pairs():
    table = summary.epsilon_table(make_scores(game="paired"), make_runs(), settings(game="paired"), cell=CELL)
    assert set(table["adjacency"]) == {"replace_one"}
    by_run = table.drop_duplicates(["run"]).set_index("run")["num_canaries"]
    assert by_run.to_dict() == {"0": 20, "1": 20, "2": 20, "pooled": 60}


def test_epsilon_table_takes_guesses_from_fractions():
    chosen = settings(guess_fraction=0.3, grid=[0.001, 1.0, 0.25, 0.0011])
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
        assert set(rows["epsilon_heuristic"]) == {heuristics.last_iterate_epsilon(**mechanism)}


def test_epsilon_table_accounts_for_the_adjacency_of_the_game():
    runs = make_runs(noise_multiplier=1.2)
    chosen = settings(game="paired", sampling_prob=0.1)
    table = summary.epsilon_table(make_scores(game="paired"), runs, chosen, cell=CELL | {"epsilon": "8"})
    mechanism = {"noise_multiplier": 1.2, "sampling_prob": 0.1, "num_steps": 20, "delta": 1e-5}
    expected = accounting.epsilon(**mechanism, adjacency="replace_one")
    assert set(table[table["step"] == 20]["epsilon_accounted"]) == {expected}
    assert table["epsilon_accounted_rdp"].isna().all()
    heuristic = heuristics.last_iterate_epsilon(**mechanism, adjacency="replace_one")
    assert set(table[table["step"] == 20]["epsilon_heuristic"]) == {heuristic}


def test_epsilon_table_of_training_without_privacy_accounts_for_nothing():
    table = summary.epsilon_table(make_scores(), make_runs(), settings(), cell=CELL)
    for name in ("epsilon_accounted", "epsilon_accounted_rdp", "epsilon_heuristic"):
        assert set(table[name]) == {math.inf}


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


def test_epsilon_table_refuses_reference_scores_without_what_they_are_made_of():
    scores = make_scores(num_runs=5)
    scores = scores[scores["score"] != "logit_margin"]
    with pytest.raises(ValueError, match=r"scores lacks \['logit_margin'\], it has \['negative_loss'\]"):
        summary.epsilon_table(scores, make_runs(num_runs=5, roles=ROLES), settings(scores=["rmia"]), cell=CELL)


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


@pytest.mark.parametrize("game", ["independent", "paired"])
def test_pooled_bound_has_its_level(game):
    """Scores that know nothing: at most 5% of 400 pooled audits may bound epsilon above 0, and 3 standard errors."""
    chosen, num_games = settings(game=game, guess_fraction=0.5), 400
    rng, alarms = np.random.default_rng(0), []
    for _ in range(num_games):
        coins, values = rng.integers(0, 2, (4, 20)).astype(bool), rng.normal(size=(4, 20))
        if game == "paired":
            coins[:, 1::2] = ~coins[:, ::2]
        snapshot = summary._Snapshot(step=1, score="s", runs=[0, 1, 2, 3], audited=(values, coins), surrogates=None)
        rows = pd.concat([summary._audited(snapshot, protocol, chosen) for protocol in ("fixed", "corrected")])
        pooled = rows[rows["run"] == "pooled"]
        assert (pooled["num_canaries"] == (80 if game == "independent" else 40)).all()
        alarms.append(pooled.set_index(["protocol", "auditor"])["epsilon_lower"] > 0)
    rates = pd.DataFrame(alarms).mean()
    assert len(rates) == 4
    assert rates.min() > 0  # at 0 this would test nothing
    assert rates.max() <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / num_games)
