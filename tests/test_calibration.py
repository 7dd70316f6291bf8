"""Calibration of all bounds: what is committed, and smaller ones that are played here."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest

from benchmarks import calibration
from benchmarks.channels import BY_NAME, CHANNELS
from metacanary.auditors import NAMES, select

BREAKS = {
    # A channel outside an auditor's assumption, and the auditors that it deceives under "corrected" at m = 1000, or
    # under "fixed" where there is nothing to choose.
    "randomised_response_1": ("fdp_gaussian", "order_statistic_gaussian", "gaussian_rates", "gaussian_auroc"),
    "randomised_response_4": ("fdp_gaussian", "order_statistic_gaussian", "gaussian_rates", "gaussian_auroc"),
    "shared_level_1": ("order_statistic_gaussian", "gaussian_rates", "gaussian_auroc"),
    "mixture": (
        *("fdp_gaussian", "order_statistic", "order_statistic_gaussian"),
        *("clopper_pearson", "gaussian_rates", "gaussian_auroc"),
    ),
    "partial_leak": ("order_statistic_gaussian", "gaussian_rates", "gaussian_auroc"),
}
WORST = "fdp_epsilon_delta"
GUESSING = ("steinke", "fdp_epsilon_delta", "fdp_gaussian", "order_statistic", "order_statistic_gaussian")


@pytest.fixture(scope="module")
def committed():
    assert calibration.RESULTS.exists(), f"{calibration.RESULTS} is not there: run `make bench-audits`"
    return pd.read_csv(calibration.RESULTS, keep_default_na=False, na_values=[""])


def broken(table):
    """The rows that claim a level, and exceed it."""
    claims = table["holds"] & ~table["keeps_level"]
    return table.loc[claims, [*calibration.KEY, "rate", "limit"]].to_string()


def test_committed_calibration_covers_the_grid(committed):
    grid = itertools.product(BY_NAME, calibration.NUM_GAMES, calibration.PROTOCOLS, NAMES)
    played = [key for key in grid if key[3] != "gaussian_auroc" or key[2] == "fixed"]
    assert list(committed[calibration.KEY].itertuples(index=False, name=None)) == played
    assert list(committed.columns) == calibration.COLUMNS
    for row in committed.itertuples():
        (auditor,), channel = select([row.auditor]), BY_NAME[row.channel]
        case = calibration.Case(row.channel, row.num_canaries, share=1.0)
        assert row.games == case.games((row.protocol, auditor)) * (calibration.AGAIN if row.played_again else 1)
        assert row.seed == calibration.SEED + row.played_again
        assert row.true_epsilon == pytest.approx(channel.epsilon, rel=1e-12)
        assert row.delta == pytest.approx(channel.delta_at(row.num_canaries), rel=1e-12)
        assert row.assumption == auditor.assumes(row.protocol.partition("_")[0])


def test_committed_rows_that_were_doubted_were_played_again(committed):
    once = committed[~committed["played_again"] & committed["holds"]]
    assert (once["rate"] <= 0.05 + 1.5 * np.sqrt(0.0475 / once["games"])).all()
    assert committed.loc[committed["holds"], "played_again"].any()
    assert not committed.loc[committed["played_again"], "protocol"].eq("paper").any()


def test_committed_games_are_many_where_they_are_cheap(committed):
    """At m = 5000: 1,000 under what is fixed beforehand, 500 under "holdout"."""
    games = committed[(committed["num_canaries"] == 5000) & committed["holds"]].groupby("protocol")["games"].min()
    assert (games[["fixed", "fixed_quarter", "corrected", "corrected_geometric", "surrogate"]] == 1000).all()
    assert games["holdout"] == 500


def test_committed_columns_follow_from_the_counts(committed):
    rate = committed["false_alarms"] / committed["games"]
    np.testing.assert_allclose(committed["rate"], rate, rtol=1e-12)
    np.testing.assert_allclose(committed["standard_error"], np.sqrt(rate * (1 - rate) / committed["games"]), rtol=1e-9)
    np.testing.assert_array_equal(committed["keeps_level"], rate <= 0.05 + 3 * np.sqrt(0.0475 / committed["games"]))
    holds = [BY_NAME[c].satisfies(a) for c, a in zip(committed["channel"], committed["assumption"], strict=True)]
    np.testing.assert_array_equal(committed["holds"], holds)


def test_committed_bounds_keep_their_level_where_their_assumption_holds(committed):
    """`credible_rates` and "paper" claim none, and so never hold."""
    assert not committed.loc[committed["protocol"] == "paper", "holds"].any()
    assert not committed.loc[committed["auditor"] == "credible_rates", "holds"].any()
    claims = committed["holds"]
    assert claims.groupby(committed["auditor"]).any().sum() == len(NAMES) - 1
    assert committed.loc[claims, "keeps_level"].all(), broken(committed)


def test_committed_bounds_break_where_their_assumption_does_not_hold(committed):
    chosen = committed["protocol"] == np.where(committed["auditor"] == "gaussian_auroc", "fixed", "corrected")
    table = committed[chosen & (committed["num_canaries"] == 1000)]
    keeps = table.set_index(["channel", "auditor"])["keeps_level"]
    for channel, auditors in BREAKS.items():
        for auditor in auditors:
            assert not keeps[channel, auditor], (channel, auditor)


def test_committed_holdout_breaks_where_canaries_influence_each_other(committed):
    """`announced_leak` deceives `fdp_epsilon_delta` under "holdout", and under no protocol that chooses beforehand."""
    table = committed[(committed["channel"] == "announced_leak") & committed["auditor"].isin(("steinke", WORST))]
    split = table["protocol"].isin(("holdout", "median"))
    assert (table.loc[split, "assumption"] == "product").all()
    assert not table.loc[split, "holds"].any()
    broken = table[(table["protocol"] == "holdout") & (table["auditor"] == WORST) & (table["num_canaries"] > 100)]
    assert len(broken) == 2
    assert (broken["rate"] > broken["limit"]).all()
    declared = table[~split & (table["protocol"] != "paper")]
    assert declared["holds"].all()
    assert (declared["rate"] <= 0.05).all()


def test_committed_bounds_come_close_to_their_level_where_delta_is_spent(committed):
    """On leaks of some coins, where the bound of any mechanism at delta > 0 is above 0 and nearly too large."""
    table = committed[(committed["num_canaries"] >= 1000) & (committed["auditor"] == WORST)]
    rows = table.set_index(["channel", "protocol"])
    for key in (("quarter_leak", "fixed_quarter"), ("partial_leak", "fixed"), ("partial_leak", "fixed_quarter")):
        assert (rows.loc[[key], "rate"] > 0.015).all(), key
        assert (rows.loc[[key], "mean_bound"] > 0.1).all(), key
    steinke = committed[(committed["auditor"] == "steinke") & (committed["channel"] == "partial_leak")]
    at_all = steinke[(steinke["protocol"] == "fixed") & (steinke["num_canaries"] >= 1000)]
    assert (at_all["rate"] > 0.01).all()
    assert (at_all["mean_share"] > 0.8).all()


def test_committed_paper_protocol_breaks_on_scores_that_ignore_the_coins(committed):
    table = committed[(committed["protocol"] == "paper") & (committed["channel"] == "ignore")]
    of_guesses = table[table["auditor"].isin(GUESSING)]
    assert len(of_guesses) == len(GUESSING) * len(calibration.NUM_GAMES)
    assert (of_guesses["rate"] > of_guesses["limit"]).all()


def test_committed_bounds_grow_with_the_canaries(committed):
    """Mean bounds on Gaussian channels under a protocol that chooses; shares are below 1 for what claims a level."""
    chosen = committed["protocol"] == np.where(committed["auditor"] == "gaussian_auroc", "fixed", "corrected")
    table = committed[(committed["channel"] == "gaussian_1") & chosen]
    means = table.pivot(index="auditor", columns="num_canaries", values="mean_bound")
    assert (np.diff(means.to_numpy(), axis=1) > 0).all()
    assert (table.loc[table["holds"], "mean_share"] < 1).all()


def test_small_calibration():
    """800 games of 100 canaries; 3 standard errors. What breaks, breaks by far."""
    for channel in ("ignore", "gaussian_1", "randomised_response_1", "quarter_leak"):
        case = calibration.Case(channel, 100, 0.4, ("fixed_quarter", "corrected", "surrogate"), NAMES[:-1])
        table = pd.DataFrame(case.rows())
        assert (table["games"] == np.where(table["played_again"], 8000, 800)).all()
        assert table.loc[table["holds"], "keeps_level"].all(), broken(table)
        if channel == "randomised_response_1":
            corrected = table[table["protocol"] == "corrected"].set_index("auditor")
            assert corrected.loc["order_statistic_gaussian", "rate"] > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("channel", BY_NAME)
def test_calibration_of_a_thousand_canaries(channel):
    protocols = ("fixed", "fixed_quarter", "corrected", "corrected_geometric", "holdout", "surrogate")
    table = pd.DataFrame(calibration.Case(channel, 1000, 0.1, protocols, NAMES[:-1]).rows())
    assert table.loc[table["holds"], "keeps_level"].all(), broken(table)


def test_doubted_rows_are_played_again_in_fresh_games(monkeypatch):
    """All bounds are made too large: those that claim a level are seen, or would claim one but for "holdout"."""
    monkeypatch.setattr(calibration, "bounds", lambda auditor, protocol, delta, games, _: games.values[:, 0] + 1e3)
    rows = pd.DataFrame(calibration.Case("shared_level_1", 100, 0.01, ("fixed", "holdout", "paper")).rows())
    rows = rows.set_index(["protocol", "auditor"])
    assert (rows["rate"] == 1.0).all()
    again = {
        *(("fixed", name) for name in ("steinke", WORST, "fdp_gaussian")),
        *(("holdout", name) for name in ("steinke", WORST, "fdp_gaussian")),
    }
    assert set(rows.index[rows["played_again"]]) == again
    assert (rows.loc[sorted(again), "seed"] == calibration.SEED + 1).all()
    assert (rows.loc["fixed", "games"].loc[["steinke", "order_statistic"]] == [200, 20]).all()
    assert rows.loc["holdout", "games"]["steinke"] == 100
    assert not rows.loc["holdout", "holds"].any()
    assert not rows.loc[("fixed", WORST), "keeps_level"]


def test_summary_of_a_few_bounds():
    made = calibration.summary(np.array([0.0, 1.0, 1.5, 2.0]), 1.0)
    assert (made["games"], made["false_alarms"], made["rate"]) == (4, 2, 0.5)
    assert made["standard_error"] == 0.25
    assert made["mean_bound"] == made["mean_share"] == 1.125
    assert made["limit"] == pytest.approx(0.05 + 1.5 * math.sqrt(0.05 * 0.95))
    assert not made["keeps_level"]
    assert math.isnan(calibration.summary(np.zeros(4), 0.0)["mean_share"])


def test_protocols_meet_the_same_games():
    channel = BY_NAME["gaussian_1"]
    few, many = (list(calibration.batches(channel, 20, number)) for number in (30, 60))
    assert [len(games.values) for games, _ in few] == [25, 5]
    assert [len(games.values) for games, _ in many] == [25, 25, 10]
    np.testing.assert_array_equal(few[0][0].values, many[0][0].values)
    assert not np.isin(few[0][1].values, few[0][0].values).any()  # surrogates are other runs


def test_bounds_are_those_of_an_audit():
    from metacanary.audits import audit

    for channel in (BY_NAME["gaussian_2"], BY_NAME["paired_gaussian_1"]):
        rng = np.random.default_rng(1)
        pairs = channel.pairs(60)
        (scores, included), others = channel.draw(rng, 3, 60), channel.draw(rng, 4, 60)
        games, surrogates = (calibration.make_games(*drawn, pairs) for drawn in ((scores, included), others))
        for name, options in (
            ("corrected_geometric", {"spending": "geometric"}),
            ("surrogate", {"surrogates": others}),
        ):
            protocol = calibration.PROTOCOLS[name][0]
            frame = audit(scores, included, delta=channel.delta_at(60), pairs=pairs, protocol=protocol, **options)
            for auditor in select(None):
                if not calibration.plays(auditor, name):
                    continue
                expected = frame[(frame["run"] != "pooled") & (frame["auditor"] == auditor.name)]["epsilon_lower"]
                found = calibration.bounds(auditor, name, channel.delta_at(60), games, surrogates)
                np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)
                assert found.max() > 0


def test_paper_grid_goes_from_one_to_all():
    for size in (1, 2, 100, 5000):
        grid = calibration.paper_grid(size)
        assert (grid[0], grid[-1]) == (1, size)
        assert grid == sorted(set(grid))
        assert len(grid) <= 100


def test_main_resumes_and_sorts(tmp_path):
    output = tmp_path / "calibration.csv"
    arguments = ["--num-canaries", "100", "--protocols", "fixed", "--share", "0.005", "--jobs", "1"]
    arguments += ["--output", str(output)]
    calibration.main([*arguments, "--channels", "gaussian_1"])
    once = pd.read_csv(output)
    assert (once["processor"].str.len() > 0).all()
    marked = once.assign(date="kept")
    marked.to_csv(output, index=False)
    calibration.main([*arguments, "--channels", "ignore", "gaussian_1", "--resume"])
    both = pd.read_csv(output)
    assert both["channel"].tolist() == ["ignore"] * len(NAMES) + ["gaussian_1"] * len(NAMES)
    assert set(both.loc[both["channel"] == "gaussian_1", "date"]) == {"kept"}
    assert [channel.name for channel in CHANNELS] == list(BY_NAME)
