"""Audits from scores and coins: guesses, protocols, level by Monte Carlo, validation."""

import itertools
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from metacanary import accounting
from metacanary.audits import COLUMNS, PROTOCOLS, audit, count_correct, default_grid, fdp_gaussian, steinke

DELTA = 1e-5
PAIRS = np.repeat(np.arange(50), 2)  # 100 canaries: 2i and 2i+1 are pair i


def flip(rng, pairs=None, size=100):
    """Fair coins: one per canary, or one per pair of neighbours."""
    if pairs is None:
        return rng.random(size) < 0.5
    first = rng.random(len(pairs) // 2) < 0.5
    return np.stack([first, ~first], axis=1).ravel()


def false_alarms(num_repetitions, play, *, above=0.0, **options):
    """Share of games whose bound exceeds `above`, per auditor."""
    rng = np.random.default_rng(7)
    alarms = [audit(**play(rng), delta=DELTA, **options)["epsilon_lower"] > above for _ in range(num_repetitions)]
    return np.mean(alarms, axis=0)


def with_error(rate, num_repetitions, sigmas=3):
    return rate + sigmas * math.sqrt(rate * (1 - rate) / num_repetitions)


def naive_correct(scores, included, num_guesses, pairs=None):
    """Right guesses by sorting Python tuples; for scores without ties."""
    if pairs is None:
        ranked = sorted(zip(scores, included, strict=True), reverse=True)
        top, bottom = num_guesses // 2, num_guesses - num_guesses // 2
        return sum(coin for _, coin in ranked[:top]) + sum(not coin for _, coin in ranked[len(ranked) - bottom :])
    gaps = []
    for number in set(pairs):
        a, b = (i for i, p in enumerate(pairs) if p == number)
        gaps.append((abs(scores[a] - scores[b]), included[a] == (scores[a] > scores[b])))
    return sum(right for _, right in sorted(gaps, reverse=True)[:num_guesses])


@pytest.mark.parametrize("pairs", [None, PAIRS], ids=["independent", "paired"])
def test_count_correct_equals_naive_sort(pairs):
    rng = np.random.default_rng(0)
    included = flip(rng, pairs)
    scores = rng.normal(size=100) + included
    for num_guesses in (1, 2, 3, 10, 49, 50):
        expected = naive_correct(scores.tolist(), included.tolist(), num_guesses, pairs)
        assert count_correct(scores, included, num_guesses, pairs=pairs) == expected


def test_count_correct_of_paired_game_ignores_order_and_pair_names():
    rng = np.random.default_rng(1)
    included = flip(rng, PAIRS)
    scores = rng.normal(size=100) + included
    order = rng.permutation(100)
    renamed = rng.permutation(1000)[PAIRS]
    for num_guesses in (7, 50):
        shuffled = count_correct(scores[order], included[order], num_guesses, pairs=renamed[order])
        assert shuffled == count_correct(scores, included, num_guesses, pairs=PAIRS)


@pytest.mark.parametrize("pairs", [None, PAIRS], ids=["independent", "paired"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_audit_reports_the_bounds_of_its_own_counts(pairs, protocol):
    rng = np.random.default_rng(2)
    included = flip(rng, pairs)
    scores = rng.normal(size=100) + 2 * included
    frame = audit(scores, included, delta=DELTA, pairs=pairs, protocol=protocol)
    assert tuple(frame.columns) == COLUMNS
    assert frame["auditor"].tolist() == ["steinke", "fdp_gaussian"]
    m = 100 if pairs is None else 50
    level = 0.05 / len(default_grid(m)) if protocol == "corrected" else 0.05
    for row, bound in zip(frame.itertuples(), (steinke, fdp_gaussian), strict=True):
        counts = (m, row.num_guesses, row.num_correct)
        assert count_correct(scores, included, row.num_guesses, pairs=pairs) == row.num_correct
        assert row.epsilon_lower == pytest.approx(bound(*counts, delta=DELTA, significance=level), abs=1e-9)
        assert row.ceiling == pytest.approx(bound(m, m, m, delta=DELTA, significance=level), abs=1e-9)
        assert 0 < row.epsilon_lower <= row.ceiling


@pytest.mark.parametrize("protocol", ["corrected", "paper"])
def test_audit_finds_the_best_number_of_guesses(protocol):
    """Against all bounds of the grid, one by one."""
    rng = np.random.default_rng(3)
    included = flip(rng)
    scores = rng.normal(size=100) + 1.5 * included
    grid = default_grid(100) if protocol == "corrected" else range(1, 101)
    level = 0.05 / len(grid) if protocol == "corrected" else 0.05
    frame = audit(scores, included, delta=DELTA, protocol=protocol)
    for value, bound in zip(frame["epsilon_lower"], (steinke, fdp_gaussian), strict=True):
        all_bounds = [bound(100, k, count_correct(scores, included, k), delta=DELTA, significance=level) for k in grid]
        assert value == pytest.approx(max(all_bounds), abs=1e-9)


def test_audit_names_assumption_and_adjacency():
    rng = np.random.default_rng(4)
    included = flip(rng, PAIRS)
    scores = rng.normal(size=100)
    corrected = audit(scores, included, delta=DELTA, pairs=PAIRS)
    assert corrected["assumption"].tolist() == ["worst_case", "family"]
    assert set(corrected["adjacency"]) == {"replace_one"}
    paper = audit(scores, included, delta=DELTA, protocol="paper")
    assert set(paper["assumption"]) == {"none"}
    assert set(paper["adjacency"]) == {"add_remove"}


def test_audit_depends_on_the_order_of_scores_only():
    rng = np.random.default_rng(5)
    included = flip(rng)
    scores = rng.normal(size=100) + included
    pd.testing.assert_frame_equal(
        audit(scores, included, delta=DELTA), audit(np.exp(3 * scores), included.astype(int), delta=DELTA)
    )


def test_default_grid_halves_and_ends_at_all_canaries():
    assert default_grid(1000) == (1000, 500, 250, 125, 63, 32, 16)
    assert default_grid(100) == (100, 50, 25, 13)
    assert default_grid(9) == (9,)
    for m in range(1, 300):
        grid = default_grid(m)
        assert grid[0] == m
        assert len(set(grid)) == len(grid)
        assert min(grid) >= min(m, 10)


@pytest.mark.parametrize("paired", [False, True], ids=["independent", "paired"])
def test_audit_of_identical_scores_reads_no_coin_off_the_order_of_the_table(paired):
    """Trap 11 (3.54 by a Gaussian fit on identical scores), with all members first: chance, on 300 tables."""
    bounds = []
    for size in range(20, 620, 2):
        included = np.arange(size) % 2 == 0 if paired else np.arange(size) < size // 2
        frame = audit(np.zeros(size), included, delta=DELTA, pairs=np.arange(size) // 2 if paired else None)
        assert (frame["auroc"] == 0.5).all()
        bounds.append(frame["epsilon_lower"])
    assert (np.mean(np.array(bounds) > 0, axis=0) <= with_error(0.05, 300)).all()
    assert np.max(bounds) < 1.0


def test_audit_of_chance_scores_is_zero():
    """Trap 5 through the whole audit: half of the guesses are right."""
    included = np.tile([True, True, False, False], 50)
    scores = np.tile([2.0, -2.0, 1.0, -1.0], 50) + np.linspace(0, 1e-3, 200)
    frame = audit(scores, included, delta=DELTA, protocol="fixed")
    assert frame["num_correct"].tolist() == [100, 100]
    assert (frame["epsilon_lower"] == 0).all()


@pytest.mark.parametrize("pairs", [None, PAIRS], ids=["independent", "paired"])
@pytest.mark.parametrize("protocol", ["fixed", "corrected"])
def test_audit_holds_its_level_on_scores_that_ignore_the_coins(pairs, protocol):
    """2,000 null games; scores are rounded, so that ties occur. Tolerance: 3 standard errors."""

    def play(rng):
        return {"scores": rng.normal(size=100).round(1), "included": flip(rng, pairs), "pairs": pairs}

    rates = false_alarms(2000, play, protocol=protocol)
    assert (rates <= with_error(0.05, 2000)).all()
    assert (rates >= 0.005).all()


@pytest.mark.parametrize("pairs", [None, PAIRS], ids=["independent", "paired"])
def test_audit_by_the_paper_protocol_does_not_hold_its_level(pairs):
    """Trap 4: the number of guesses chosen on the same scores; false alarms of 12-18% instead of 5%."""

    def play(rng):
        return {"scores": rng.normal(size=100), "included": flip(rng, pairs), "pairs": pairs}

    rates = false_alarms(500, play, protocol="paper")
    assert (rates > with_error(0.05, 500, sigmas=5)).all()


def test_audit_of_pooled_runs_holds_its_level_if_each_run_flips_its_own_coins():
    """The same canaries are easy in all runs: scores are dependent, coins are not."""

    def play(rng):
        difficulty = np.repeat(rng.normal(size=(1, 40)), 4, axis=0) + 0.1 * rng.normal(size=(4, 40))
        return {"scores": difficulty.ravel(), "included": flip(rng, size=160)}

    assert (false_alarms(500, play) <= with_error(0.05, 500)).all()


def test_audit_of_pooled_runs_is_invalid_if_runs_share_their_coins():
    """The counter-example of docs/auditing.md: one lucky split is counted four times."""

    def play(rng):
        difficulty = np.repeat(rng.normal(size=(1, 40)), 4, axis=0) + 0.1 * rng.normal(size=(4, 40))
        return {"scores": difficulty.ravel(), "included": np.tile(flip(rng, size=40), 4)}

    assert (false_alarms(200, play) > 0.15).all()


def test_audit_holds_its_level_under_randomised_response():
    """Each coin is told truthfully with probability e / (1 + e): epsilon is exactly 1, delta 0."""

    def play(rng):
        included = flip(rng)
        told = included ^ (rng.random(100) > 1 / (1 + math.exp(-1)))
        return {"scores": told + 0.01 * rng.normal(size=100), "included": included}

    for protocol in ("fixed", "corrected"):
        steinke_rate, _ = false_alarms(500, play, above=1.0, protocol=protocol)
        assert steinke_rate <= with_error(0.05, 500)


@pytest.mark.parametrize("pairs", [None, PAIRS], ids=["independent", "paired"])
def test_audit_holds_its_level_under_gaussian_channels(pairs):
    """Unit noise on each coin: mu = 1; a swapped pair moves two scores: mu = sqrt 2 under replace_one."""
    true = accounting.gaussian_epsilon(1.0 if pairs is None else math.sqrt(2.0), DELTA)

    def play(rng):
        included = flip(rng, pairs)
        return {"scores": included + rng.normal(size=100), "included": included, "pairs": pairs}

    assert (false_alarms(500, play, above=true) <= with_error(0.05, 500)).all()


def test_audit_is_sharper_on_more_canaries():
    """Channels with mu = 3 (epsilon 16.6) give bounds that grow with m, below truth and ceiling."""
    rng = np.random.default_rng(6)
    bounds = []
    for size in (50, 500, 5000):
        included = flip(rng, size=size)
        frame = audit(rng.normal(size=size) + 3 * included, included, delta=DELTA)
        bounds.append(frame["epsilon_lower"].to_numpy())
        assert (frame["epsilon_lower"] < accounting.gaussian_epsilon(3.0, DELTA)).all()
        assert (frame["epsilon_lower"] <= frame["ceiling"]).all()
    assert (np.diff(bounds, axis=0) > 0.5).all()


def test_audit_has_no_auroc_if_all_coins_are_equal():
    frame = audit([0.1, 0.2], [1, 1], delta=DELTA)
    assert frame["auroc"].isna().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scores": [0.0, 1.0]}, r"shapes \(2,\) and \(4,\)"),
        ({"scores": [[0.0, 1.0, 2.0, 3.0]]}, "expected the same"),
        ({"scores": [0.0, 1.0, np.nan, 2.0]}, "1 values that are not finite"),
        ({"scores": [0.0, np.inf, -np.inf, 2.0]}, "2 values that are not finite"),
        ({"included": [0, 1, 2, 0]}, "expected 0 and 1 only"),
        ({"pairs": [0, 0, 1]}, "expected integers"),
        ({"pairs": [0.0, 0.0, 1.0, 1.0]}, "expected integers"),
        ({"pairs": [0, 0, 0, 1]}, "pair 0 has 3 members, expected 2"),
        ({"pairs": [0, 1, 1, 0], "included": [1, 0, 1, 1]}, "pair 0 has 2 members in, expected 1"),
        ({"pairs": [0, 0, 1, 1], "protocol": "fixed", "num_guesses": 3}, "expected 1 <= num_guesses <= 2"),
        ({"protocol": "fixed", "num_guesses": 5}, "expected 1 <= num_guesses <= 4"),
        ({"protocol": "fixed", "num_guesses": 2.0}, "expected distinct integers"),
        ({"protocol": "fixed", "grid": [2]}, "grid is"),
        ({"num_guesses": 2}, "num_guesses is 2, expected None under protocol 'corrected'"),
        ({"grid": []}, "expected distinct integers"),
        ({"grid": [2, 2]}, "expected distinct integers"),
        ({"grid": [0, 2]}, "expected 1 <= num_guesses"),
        ({"protocol": "best"}, "protocol is 'best'"),
        ({"delta": 0.0}, "delta is 0.0"),
        ({"significance": 0.7}, "significance is 0.7"),
    ],
)
def test_audit_rejects_bad_input(options, message):
    arguments = {"scores": [0.0, 1.0, 2.0, 3.0], "included": [0, 1, 0, 1], "delta": DELTA}
    with pytest.raises(ValueError, match=message):
        audit(**(arguments | options))


def test_default_grid_rejects_no_canaries():
    with pytest.raises(ValueError, match="num_canaries is 0"):
        default_grid(0)


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
        np.testing.assert_allclose(found, printed, rtol=0, atol=0.006)
