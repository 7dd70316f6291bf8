"""Audits from scores and coins: the table of bounds, its level on known mechanisms, runs, validation."""

import itertools
import math
import timeit
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_guesses import PAIRS, flip

from metacanary import accounting, auditors, heuristics, protocols
from metacanary.auditors import AUDITORS, NAMES
from metacanary.audits import COLUMNS, PROTOCOLS, audit, count_correct, default_grid, fdp_gaussian, steinke
from metacanary.guesses import make_games

DELTA = 1e-5
OF_GUESSES = [auditor.name for auditor in AUDITORS if auditor.statistic is auditors.GUESSES]
WITH_LEVEL = [name for name in NAMES if name != "credible_rates"]


def surrogates_of(protocol, pairs=None, size=100):
    """Scores and coins of 6 other runs where the protocol asks for some."""
    if protocol != "surrogate":
        return None
    rng = np.random.default_rng(50)
    coins = np.stack([flip(rng, pairs, size) for _ in range(6)])
    return rng.normal(size=coins.shape) + 2 * coins, coins


def false_alarms(num_repetitions, play, *, above=0.0, names=WITH_LEVEL, **options):
    """Share of games whose bound exceeds `above`, per auditor."""
    rng = np.random.default_rng(7)
    games = [play(rng) for _ in range(num_repetitions)]
    scores, included = (np.stack([game[key] for game in games]) for key in ("scores", "included"))
    frame = audit(scores, included, delta=DELTA, auditors=names, **options)
    alarms = frame[frame["run"] != "pooled"].set_index("auditor")["epsilon_lower"] > above
    return alarms.groupby(level=0).mean()


def with_error(rate, num_repetitions, sigmas=3):
    return rate + sigmas * math.sqrt(rate * (1 - rate) / num_repetitions)


@pytest.mark.parametrize("pairs", [None, PAIRS], ids=["independent", "paired"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_audit_reports_the_bounds_of_its_own_counts(pairs, protocol):
    rng = np.random.default_rng(2)
    included = flip(rng, pairs)
    scores = rng.normal(size=100) + 2 * included
    options = {"pairs": pairs, "protocol": protocol, "num_splits": 3, "surrogates": surrogates_of(protocol, pairs)}
    frame = audit(scores, included, delta=DELTA, **options)
    assert tuple(frame.columns) == COLUMNS
    assert tuple(frame["auditor"]) == NAMES
    assert (frame["epsilon_lower"] >= 0).all()
    assert (frame["epsilon_lower"] <= frame["ceiling"] + 1e-9).all()
    m = 100 if pairs is None else 50
    halved = protocol in ("holdout", "median")
    level = {"corrected": 0.05 / len(default_grid(m)), "median": 0.025}.get(protocol, 0.05)
    rows = frame.set_index("auditor")
    assert (rows.loc[OF_GUESSES, "num_canaries"] == (m // 2 if halved else m)).all()
    assert rows.loc["gaussian_auroc", ["num_canaries", "num_guesses", "num_guesses_in"]].tolist() == [m, 0, 0]
    for name, bound in {"steinke": steinke, "fdp_gaussian": fdp_gaussian}.items():
        row = rows.loc[name]
        made = (row["num_guesses_in"], row["num_guesses"] - row["num_guesses_in"])
        assert row["epsilon_lower"] > 0
        if not halved:
            assert count_correct(scores, included, made, pairs=pairs) == row["num_correct"]
        counts = (row["num_canaries"], row["num_guesses"], row["num_correct"])
        assert row["epsilon_lower"] == pytest.approx(bound(*counts, delta=DELTA, significance=level), abs=1e-9)
    for name in ("clopper_pearson", "gaussian_rates", "credible_rates"):  # they decide on all
        assert rows.loc[name, "num_guesses"] == rows.loc[name, "num_canaries"]


@pytest.mark.parametrize("protocol", ["corrected", "paper"])
def test_audit_finds_the_best_number_of_guesses(protocol):
    """Against all bounds of the grid, one by one."""
    rng = np.random.default_rng(3)
    included = flip(rng)
    scores = rng.normal(size=100) + 1.5 * included
    grid = default_grid(100) if protocol == "corrected" else range(1, 101)
    level = 0.05 / len(grid) if protocol == "corrected" else 0.05
    frame = audit(scores, included, delta=DELTA, protocol=protocol, auditors=["steinke", "fdp_gaussian"])
    for value, bound in zip(frame["epsilon_lower"], (steinke, fdp_gaussian), strict=True):
        all_bounds = [bound(100, k, count_correct(scores, included, k), delta=DELTA, significance=level) for k in grid]
        assert value == pytest.approx(max(all_bounds), abs=1e-7)


def test_audit_names_assumption_and_adjacency():
    rng = np.random.default_rng(4)
    included = flip(rng, PAIRS)
    scores = rng.normal(size=100)
    corrected = audit(scores, included, delta=DELTA, pairs=PAIRS)
    assert corrected["assumption"].tolist() == [auditor.assumption for auditor in AUDITORS]
    assert set(corrected["adjacency"]) == {"replace_one"}
    paper = audit(scores, included, delta=DELTA, protocol="paper")
    assert set(paper["assumption"]) == {"none"}
    assert set(paper["adjacency"]) == {"add_remove"}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_audit_of_many_trainings_changes_the_labels_only(protocol):
    rng = np.random.default_rng(5)
    included = flip(rng)
    scores = rng.normal(size=100) + included
    options = {"delta": DELTA, "protocol": protocol, "num_splits": 2, "surrogates": surrogates_of(protocol)}
    one, many = (audit(scores, included, multi_run=flag, **options) for flag in (False, True))
    pd.testing.assert_frame_equal(one.drop(columns="assumption"), many.drop(columns="assumption"))
    facts = {"product": "worst_case", "family+product": "family"}
    expected = [facts.get(auditor.assumption, auditor.assumption) for auditor in AUDITORS]
    assert many["assumption"].tolist() == (["none"] * len(AUDITORS) if protocol == "paper" else expected)


@pytest.mark.parametrize("protocol", ["fixed", "corrected", "paper"])
def test_audit_depends_on_the_order_of_scores_only(protocol):
    """Nor on the order of rows, for distinct scores."""
    rng = np.random.default_rng(5)
    included = flip(rng)
    scores = rng.normal(size=100) + included
    frame = audit(scores, included, delta=DELTA, protocol=protocol)
    for values, coins in [(np.exp(3 * scores), included.astype(int)), (scores[::-1], included[::-1])]:
        pd.testing.assert_frame_equal(frame, audit(values, coins, delta=DELTA, protocol=protocol))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("pairs", [None, np.repeat(np.arange(20), 2)], ids=["independent", "paired"])
def test_audit_of_runs_is_that_of_each_and_of_all_as_one(pairs, protocol):
    """With distinct pair numbers. Rates and AUROCs of pairs are left out of the latter: which member comes first is a
    fixed draw by position."""
    rng = np.random.default_rng(6)
    included = np.stack([flip(rng, pairs, 40) for _ in range(3)])
    scores = rng.normal(size=(3, 40)) + 2 * included
    options = {"delta": DELTA, "protocol": protocol, "num_splits": 2}
    few = surrogates_of(protocol, pairs, 40)
    frame = audit(scores, included, pairs=pairs, surrogates=few, **options)
    assert tuple(frame.columns) == ("run", *COLUMNS)
    assert frame["run"].tolist() == [run for run in ("0", "1", "2", "pooled") for _ in NAMES]
    for run in range(3):
        mine = frame[frame["run"] == str(run)].drop(columns="run").reset_index(drop=True)
        alone = audit(scores[run], included[run], pairs=pairs, surrogates=few, **options)
        pd.testing.assert_frame_equal(mine, alone)
    if pairs is not None and few is not None:
        return  # surrogates have the pairs of a run
    numbers = None if pairs is None else np.concatenate([pairs + 100 * run for run in range(3)])
    whole = audit(scores.ravel(), included.ravel(), pairs=numbers, surrogates=few, **options)
    pooled = frame[frame["run"] == "pooled"].drop(columns="run").reset_index(drop=True)
    kept = pooled["auditor"].isin(NAMES if pairs is None else OF_GUESSES)
    pd.testing.assert_frame_equal(pooled[kept], whole[kept])


@pytest.mark.parametrize("paired", [False, True], ids=["independent", "paired"])
def test_audit_of_identical_scores_reads_no_coin_off_the_order_of_the_table(paired):
    """Trap 11 (3.54 by a Gaussian fit on identical scores), with all members first: chance, on 300 tables."""
    bounds = []
    for size in range(20, 620, 2):
        included = np.arange(size) % 2 == 0 if paired else np.arange(size) < size // 2
        pairs = np.arange(size) // 2 if paired else None
        frame = audit(np.zeros(size), included, delta=DELTA, pairs=pairs, auditors=WITH_LEVEL)
        assert (frame["auroc"] == 0.5).all()
        bounds.append(frame["epsilon_lower"])
    assert (np.mean(np.array(bounds) > 0, axis=0) <= with_error(0.05, 300)).all()
    assert np.max(bounds) < 1.5


def test_audit_of_chance_scores_is_zero():
    """Trap 5 through the whole audit: half of the guesses are right."""
    included = np.tile([True, True, False, False], 50)
    scores = np.tile([2.0, -2.0, 1.0, -1.0], 50) + np.linspace(0, 1e-3, 200)
    frame = audit(scores, included, delta=DELTA, protocol="fixed").set_index("auditor")
    assert (frame.loc[OF_GUESSES, "num_correct"] == 100).all()
    assert (frame.loc[OF_GUESSES, "epsilon_lower"] == 0).all()
    # Half of the members lie above all non-members and half below: chance for counts and areas, not for thresholds.
    assert frame.loc["gaussian_auroc", "epsilon_lower"] == 0


@pytest.mark.parametrize("pairs", [None, PAIRS], ids=["independent", "paired"])
@pytest.mark.parametrize("protocol", ["fixed", "corrected"])
def test_audit_holds_its_level_on_scores_that_ignore_the_coins(pairs, protocol):
    """1,000 null games; scores are rounded, so that ties occur. Tolerance: 3 standard errors."""

    def play(rng):
        return {"scores": rng.normal(size=100).round(1), "included": flip(rng, pairs)}

    rates = false_alarms(1000, play, protocol=protocol, pairs=pairs)
    assert (rates <= with_error(0.05, 1000)).all()
    assert (rates[OF_GUESSES] >= 0.005).all()


@pytest.mark.parametrize("pairs", [None, PAIRS], ids=["independent", "paired"])
def test_audit_by_the_paper_protocol_does_not_hold_its_level(pairs):
    """Trap 4: the number of guesses chosen on the same scores; false alarms of 12-20% instead of 5%."""

    def play(rng):
        return {"scores": rng.normal(size=100), "included": flip(rng, pairs)}

    rates = false_alarms(300, play, protocol="paper", pairs=pairs, names=OF_GUESSES, grid=range(1, 51))
    assert (rates > 0.08).all()


def test_audit_of_pooled_runs_holds_its_level_if_each_run_flips_its_own_coins():
    """The same canaries are easy in all runs: scores are dependent, coins are not."""

    def play(rng):
        difficulty = np.repeat(rng.normal(size=(1, 40)), 4, axis=0) + 0.1 * rng.normal(size=(4, 40))
        return {"scores": difficulty.ravel(), "included": flip(rng, size=160)}

    assert (false_alarms(500, play) <= with_error(0.05, 500)).all()


def test_audit_of_pooled_runs_is_invalid_if_runs_share_their_coins():
    """The counter-example of docs/auditing.md: one lucky split is counted four times. `audit` refuses equal coins."""
    rng, bounds = np.random.default_rng(7), []
    for _ in range(200):
        difficulty = np.repeat(rng.normal(size=(1, 40)), 4, axis=0) + 0.1 * rng.normal(size=(4, 40))
        pooled = make_games(difficulty, np.tile(flip(rng, size=40), (4, 1))).pooled()
        (found,) = protocols.find(AUDITORS[0], "corrected", protocols.Options(delta=DELTA), pooled)
        bounds.append(found.parameter)
    assert np.mean(np.array(bounds) > 0) > 0.15
    with pytest.raises(ValueError, match="two runs have the same coins"):
        audit(difficulty, np.tile(flip(rng, size=40), (4, 1)), delta=DELTA)


def test_audit_refuses_coins_that_are_not_fair():
    rng = np.random.default_rng(8)
    coins = np.arange(1000) < 600
    with pytest.raises(ValueError, match=r"600 of 1000 canaries are in, .* probability 3e-10; expected a fair coin"):
        audit(rng.normal(size=1000), coins, delta=DELTA)
    audit(rng.normal(size=1000), np.arange(1000) < 570, delta=DELTA, auditors=["steinke"])  # probability 1e-5
    runs = np.stack([flip(rng, size=1000), coins])
    with pytest.raises(ValueError, match="600 of 1000"):
        audit(rng.normal(size=runs.shape), runs, delta=DELTA)
    pairs = np.repeat(np.arange(500), 2)  # of 500 pairs the first is in: half of all canaries
    audit(rng.normal(size=1000), np.arange(1000) % 2, delta=DELTA, pairs=pairs, auditors=["steinke"])


@pytest.mark.parametrize("size", [10, 100])
def test_audit_refuses_surrogates_that_are_audited(size):
    rng = np.random.default_rng(9)
    coins, others = flip(rng, size=size), np.stack([flip(rng, size=size) for _ in range(3)])
    scores, of_others = rng.normal(size=size), rng.normal(size=others.shape)
    audit(scores, coins, delta=DELTA, surrogates=(of_others, others), auditors=["steinke"])
    others[1], of_others[1] = coins, scores
    with pytest.raises(ValueError, match="surrogates: a run has the coins of an audited run"):
        audit(scores, coins, delta=DELTA, surrogates=(of_others, others))
    of_others[1] += 1.0  # other scores on the same coins: of few coins that happens
    if size >= 30:
        with pytest.raises(ValueError, match="surrogates: a run has the coins of an audited run"):
            audit(scores, coins, delta=DELTA, surrogates=(of_others, others))
    else:
        audit(scores, coins, delta=DELTA, surrogates=(of_others, others), auditors=["steinke"])


def test_audit_takes_surrogates_where_there_are_any():
    rng = np.random.default_rng(10)
    coins, others = flip(rng), np.stack([flip(rng) for _ in range(2)])
    scores, of_others = rng.normal(size=100), rng.normal(size=others.shape)
    assert set(audit(scores, coins, delta=DELTA)["protocol"]) == {"corrected"}
    assert set(audit(scores, coins, delta=DELTA, surrogates=(of_others, others))["protocol"]) == {"surrogate"}


def test_holdout_claims_independent_canaries_only():
    rng = np.random.default_rng(11)
    coins = flip(rng)
    for protocol, expected in (("corrected", "worst_case"), ("holdout", "product"), ("median", "product")):
        frame = audit(rng.normal(size=100), coins, delta=DELTA, protocol=protocol, auditors=["steinke"], num_splits=2)
        assert frame["assumption"].tolist() == [expected]


@pytest.mark.parametrize("protocol", ["fixed", "corrected"])
def test_audit_holds_its_level_under_randomised_response(protocol):
    """Each coin is told truthfully with probability e / (1 + e): epsilon is 1, delta 0, coins independent."""

    def play(rng):
        included = flip(rng)
        told = included ^ (rng.random(100) > 1 / (1 + math.exp(-1)))
        return {"scores": told + 0.01 * rng.normal(size=100), "included": included}

    names = ["steinke", "fdp_epsilon_delta", "order_statistic", "clopper_pearson"]
    assert (false_alarms(500, play, above=1.0, names=names, protocol=protocol) <= with_error(0.05, 500)).all()
    # A Gaussian trade-off curve is assumed where there is none.
    assert (false_alarms(500, play, above=1.0, names=["order_statistic_gaussian"], protocol=protocol) > 0.5).all()


@pytest.mark.parametrize("pairs", [None, PAIRS], ids=["independent", "paired"])
def test_audit_holds_its_level_under_gaussian_channels(pairs):
    """Unit noise on each coin: mu = 1; a swapped pair moves two scores: mu = sqrt 2 under replace_one."""
    true = accounting.gaussian_epsilon(1.0 if pairs is None else math.sqrt(2.0), DELTA)

    def play(rng):
        included = flip(rng, pairs)
        return {"scores": included + rng.normal(size=100), "included": included}

    assert (false_alarms(500, play, above=true, pairs=pairs) <= with_error(0.05, 500)).all()


def play_mixture(rng):
    """All coins are told with probability 0.162, else none: (0, 0.162)-DP."""
    included = flip(rng)
    return {"scores": rng.random(100) + 2 * included * (rng.random() < 0.162), "included": included}


def test_audit_of_a_mechanism_that_leaks_all_coins_at_once_breaks_products_only():
    rng = np.random.default_rng(7)
    games = [play_mixture(rng) for _ in range(600)]
    scores, included = (np.stack([game[key] for game in games]) for key in ("scores", "included"))
    options = {"delta": 0.162, "protocol": "fixed", "num_guesses": 50}
    frame = audit(scores, included, auditors=["steinke", "fdp_epsilon_delta", "order_statistic"], **options)
    alarms = (frame[frame["run"] != "pooled"].set_index("auditor")["epsilon_lower"] > 0).groupby(level=0).mean()
    assert alarms["steinke"] <= with_error(0.05, 600)
    assert alarms["fdp_epsilon_delta"] <= with_error(0.05, 600)
    assert abs(alarms["order_statistic"] - 0.162) <= with_error(0.162, 600) - 0.162


def test_audit_of_a_level_shared_by_all_coins_breaks_products_only():
    """Every coin by randomised response whose log-odds mu |x| are drawn once, x ~ N(mu/2, 1), and published.

    Seen from one coin, whatever the others are, that is N(+-mu/2, 1) observed: exactly mu-GDP.
    """
    mu = 1.0

    def play(rng):
        included = flip(rng)
        level = abs(rng.normal(mu / 2, 1))
        told = included ^ (rng.random(100) < 1 / (1 + math.exp(mu * level)))
        return {"scores": told + 0.01 * rng.normal(size=100), "included": included}

    names = ["fdp_gaussian", "order_statistic_gaussian"]
    true = accounting.gaussian_epsilon(mu, DELTA)
    rates = false_alarms(1000, play, above=true, names=names, protocol="fixed", num_guesses=100)
    assert rates["order_statistic_gaussian"] > 0.15
    assert rates["fdp_gaussian"] <= with_error(0.05, 1000)


def test_audit_is_sharper_on_more_canaries():
    """Channels with mu = 3 (epsilon 16.6) give bounds that grow with m, below truth and ceiling."""
    rng = np.random.default_rng(6)
    bounds = []
    for size in (50, 500, 5000):
        included = flip(rng, size=size)
        frame = audit(rng.normal(size=size) + 3 * included, included, delta=DELTA, auditors=WITH_LEVEL)
        bounds.append(frame["epsilon_lower"].to_numpy())
        assert (frame["epsilon_lower"] < accounting.gaussian_epsilon(3.0, DELTA)).all()
        assert (frame["epsilon_lower"] <= frame["ceiling"] + 1e-9).all()
    assert (np.diff(bounds, axis=0) > 0.2).all()


@pytest.mark.slow
def test_audit_is_fast():
    """All auditors under all protocols on 1,000 canaries: five times what two busy cores needed."""
    rng = np.random.default_rng(0)
    included = flip(rng, size=1000)
    scores = rng.normal(size=1000) + included

    def work():
        for protocol in PROTOCOLS:
            audit(scores, included, delta=DELTA, protocol=protocol, surrogates=surrogates_of(protocol, size=1000))

    assert timeit.timeit(work, number=1) < 5 * 1.0


def test_audit_has_no_auroc_if_all_coins_are_equal():
    frame = audit([0.1, 0.2], [1, 1], delta=DELTA)
    assert frame["auroc"].isna().all()
    assert (frame["epsilon_lower"] == 0).all()


def test_audit_takes_sides_and_names():
    rng = np.random.default_rng(8)
    included = flip(rng)
    scores = rng.normal(size=100) + included
    frame = audit(scores, included, delta=DELTA, protocol="fixed", num_guesses=(20, 5), auditors=["steinke"])
    assert frame[["auditor", "num_guesses", "num_guesses_in"]].to_numpy().tolist() == [["steinke", 25, 20]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scores": [0.0, 1.0]}, r"shapes \(2,\) and \(4,\)"),
        ({"included": [0, 1, 2, 0]}, "expected 0 and 1 only"),
        ({"pairs": [0, 0, 0, 1]}, "pair 0 has 3 members, expected 2"),
        ({"pairs": [0, 0, 1, 1], "protocol": "fixed", "num_guesses": 3}, "num_guesses is .*of 1 to 2 guesses"),
        ({"protocol": "fixed", "num_guesses": 5}, "num_guesses is .*of 1 to 4 guesses"),
        ({"protocol": "fixed", "num_guesses": 2.0}, "expected distinct integers, fractions"),
        ({"protocol": "fixed", "grid": [2]}, "grid is"),
        ({"num_guesses": 2}, "num_guesses is 2, expected None under protocol 'corrected'"),
        ({"grid": []}, "expected distinct integers, fractions"),
        ({"grid": [2, 2]}, "expected distinct integers, fractions"),
        ({"grid": [0, 2]}, "of 1 to 4 guesses"),
        ({"protocol": "best"}, "protocol is 'best'"),
        ({"protocol": "surrogate"}, "surrogates is None"),
        ({"protocol": "surrogate", "surrogates": ([0.0], [2])}, "expected 0 and 1 only"),
        ({"protocol": "median", "num_splits": 0}, "num_splits is 0"),
        ({"spending": "all"}, "spending is 'all'"),
        ({"auditors": ["bayes"]}, "auditors is"),
        ({"delta": 0.0}, "delta is 0.0"),
        ({"significance": 0.7}, "significance is 0.7"),
    ],
)
def test_audit_rejects_bad_input(options, message):
    arguments = {"scores": [0.0, 1.0, 2.0, 3.0], "included": [0, 1, 0, 1], "delta": DELTA}
    with pytest.raises(ValueError, match=message):
        audit(**(arguments | options))


def table_of_docs(first_header):
    """The numbers of the table of docs/auditing.md whose first header is this, [rows, columns]."""
    text = (Path(__file__).parent.parent / "docs" / "auditing.md").read_text(encoding="utf-8")
    _, _, rest = text.partition(f"| {first_header} |")
    rows = itertools.takewhile(lambda line: line.startswith("|"), rest.splitlines()[2:])
    return np.array([[float(cell) for cell in row.strip("|").split("|")] for row in rows])


def test_ceilings_of_the_docs():
    """To the printed digits."""
    table = table_of_docs("m (canaries or pairs)")
    assert len(table) == 5
    for m, *printed in table:
        counts, corrected = (int(m),) * 3, 0.05 / len(default_grid(int(m)))
        choices = itertools.product((steinke, fdp_gaussian), (0.05, corrected))
        ceilings = [bound(*counts, delta=1e-5, significance=level) for bound, level in choices]
        np.testing.assert_allclose(ceilings, printed, rtol=0, atol=0.005001)


def test_noise_multipliers_of_the_docs():
    """To the printed digits; 0.001 is for the rounding of the noise multiplier."""
    table = table_of_docs("noise multiplier")
    assert len(table) == 4
    for noise, *printed in table:
        mechanism = {"noise_multiplier": noise, "sampling_prob": 0.2, "num_steps": 200, "delta": 1e-5}
        choices = [{}, {"accountant": "rdp"}, {"adjacency": "replace_one"}]
        found = [accounting.epsilon(**mechanism, **choice) for choice in choices]
        found += [heuristics.last_iterate_epsilon(**mechanism, adjacency=a) for a in accounting.ADJACENCIES]
        np.testing.assert_allclose(found, printed, rtol=0, atol=0.006)
