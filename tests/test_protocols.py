"""Protocols: how the number of guesses is chosen, against twins; the level by Monte Carlo."""

import itertools
import math

import numpy as np
import pytest

from metacanary import accounting, auditors
from metacanary.auditors import AUDITORS, NAMES, select
from metacanary.guesses import default_grid, make_games, two_sided_grid
from metacanary.protocols import PROTOCOLS, Options, _paper_grid, check, find

DELTA = 1e-5
VALID = [protocol for protocol in PROTOCOLS if protocol != "paper"]
BY_NAME = pytest.mark.parametrize("auditor", AUDITORS, ids=NAMES)
OF_GUESSES = [auditor for auditor in AUDITORS if auditor.statistic is auditors.GUESSES]


def play(seed, num_runs, mu, *, paired=False, size=100, decimals=15):
    """Games of Gaussian channels: a coin shifts its score by mu; rounded scores tie."""
    rng = np.random.default_rng(seed)
    if paired:
        first = rng.random((num_runs, size // 2)) < 0.5
        coins = np.stack([first, ~first], axis=2).reshape(num_runs, size)
    else:
        coins = rng.random((num_runs, size)) < 0.5
    scores = (rng.normal(size=(num_runs, size)) + mu * coins).round(decimals)
    return make_games(scores, coins, np.repeat(np.arange(size // 2), 2) if paired else None)


def options(protocol, games, **change):
    """Few splits; surrogates of the same channel as in `play`."""
    surrogates = play(99, 8, 1.0, paired=games.paired) if protocol == "surrogate" else None
    return Options(delta=DELTA, **({"num_splits": 3, "surrogates": surrogates} | change))


def false_alarms(auditor, protocol, games, true):
    found = find(auditor, protocol, options(protocol, games), games)
    return np.mean([auditor.to_epsilon(finding.parameter, DELTA) > true + 1e-9 for finding in found])


def with_error(rate, num_games, sigmas=3):
    return rate + sigmas * math.sqrt(rate * (1 - rate) / num_games)


@pytest.mark.parametrize("paired", [False, True], ids=["independent", "paired"])
@pytest.mark.parametrize("protocol", VALID)
def test_find_holds_its_level_on_scores_that_ignore_the_coins(protocol, paired):
    """400 null games with ties; every auditor but the credible one, which promises no level."""
    games = play(0, 400, 0.0, paired=paired, decimals=1)
    for auditor in AUDITORS[:-1]:
        assert false_alarms(auditor, protocol, games, 0.0) <= with_error(0.05, 400), auditor.name


@pytest.mark.parametrize("paired", [False, True], ids=["independent", "paired"])
@pytest.mark.parametrize("protocol", VALID)
def test_find_holds_its_level_under_gaussian_channels(protocol, paired):
    """mu = 1; a swapped pair moves two scores: mu = sqrt 2 under replace_one."""
    games = play(1, 400, 1.0, paired=paired)
    true = accounting.gaussian_epsilon(math.sqrt(2.0) if paired else 1.0, DELTA)
    for auditor in AUDITORS[:-1]:
        assert false_alarms(auditor, protocol, games, true) <= with_error(0.05, 400), auditor.name


@pytest.mark.slow
@pytest.mark.parametrize("protocol", VALID)
@pytest.mark.parametrize("mu", [0.0, 2.0])
def test_find_holds_its_level_in_many_games(protocol, mu):
    """2,000 games with 200 canaries."""
    games = play(2, 2000, mu, size=200)
    true = accounting.gaussian_epsilon(mu, DELTA)
    for auditor in AUDITORS[:-1]:
        assert false_alarms(auditor, protocol, games, true) <= with_error(0.05, 2000), auditor.name


@pytest.mark.parametrize("paired", [False, True], ids=["independent", "paired"])
def test_find_under_paper_does_not_hold_its_level(paired):
    """Trap 4: the number of guesses chosen on the same scores; false alarms of 15-20% instead of 5%."""
    games = play(0, 400, 0.0, paired=paired)
    for auditor in OF_GUESSES:
        assert false_alarms(auditor, "paper", games, 0.0) > 0.08, auditor.name


@pytest.mark.parametrize("paired", [False, True], ids=["independent", "paired"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_find_is_never_above_its_ceiling(protocol, paired):
    games = play(3, 5, 2.0, paired=paired)
    for auditor in AUDITORS:
        for finding in find(auditor, protocol, options(protocol, games), games):
            assert 0 <= finding.parameter <= finding.ceiling + 1e-9, auditor.name


@BY_NAME
@pytest.mark.parametrize("protocol", ["fixed", "corrected", "paper"])
def test_find_reaches_its_ceiling_on_perfect_scores(protocol, auditor):
    coins = np.arange(40) % 2 == 0
    games = make_games(coins + 1e-3 * np.arange(40), coins)
    (finding,) = find(auditor, protocol, options(protocol, games), games)
    assert finding.parameter == pytest.approx(finding.ceiling, abs=1e-9)
    assert finding.ceiling > 0.1


@BY_NAME
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_find_of_many_runs_is_that_of_each(protocol, auditor):
    games = play(4, 3, 2.0)
    found = find(auditor, protocol, options(protocol, games), games)
    for run, finding in enumerate(found):
        assert [finding] == find(auditor, protocol, options(protocol, games), games.run(run))


@BY_NAME
@pytest.mark.parametrize("num_guesses", [None, 30, 0.3, (20, 0), (0, 20)])
def test_fixed_is_the_bound_of_its_number(num_guesses, auditor):
    games = play(5, 2, 2.0)
    given = {None: (50, 50), 30: (15, 15), 0.3: (15, 15)}.get(num_guesses, num_guesses)
    for run, finding in enumerate(find(auditor, "fixed", options("fixed", games, num_guesses=num_guesses), games)):
        numbers = auditor.statistic.observe(games, given)[run]
        assert finding.numbers == numbers
        assert finding.parameter == pytest.approx(auditor.root(numbers, DELTA, 0.05, 0.0), abs=1e-9)
        assert finding.guesses == (given if auditor.statistic.chosen else (100, 0))
        assert finding.size == 100


@BY_NAME
@pytest.mark.parametrize(
    ("protocol", "grid", "spending"),
    [
        ("corrected", None, "bonferroni"),
        ("corrected", None, "geometric"),
        ("corrected", [(10, 0), 100, (0, 10), (20, 5)], "bonferroni"),
        ("corrected", [(10, 0), 100, (0, 10), (20, 5)], "geometric"),
        ("paper", [(10, 0), 100, (0, 10), (20, 5)], "bonferroni"),
        ("paper", None, "bonferroni"),
    ],
)
def test_the_best_of_a_grid_is_the_largest_of_all_its_bounds(protocol, grid, spending, auditor):
    """One by one. The levels add up to the significance under "corrected"; geometric ones halve in the grid's order."""
    games = play(6, 3, 1.5)
    default = default_grid(100) if protocol == "corrected" else range(1, 101)
    pairs = [(k // 2, k - k // 2) if isinstance(k, int) else k for k in grid or default]
    if protocol == "paper":
        levels = [0.05] * len(pairs)
    elif spending == "bonferroni":
        levels = [0.05 / len(pairs)] * len(pairs)
    else:
        levels = [0.05 / (2 - 0.5 ** (len(pairs) - 1)) * 0.5**index for index in range(len(pairs))]
    if not auditor.statistic.chosen:  # nothing to choose, nothing to pay for
        pairs, levels = [(50, 50)], [0.05]
    assert protocol == "paper" or sum(levels) == pytest.approx(0.05)
    given = options(protocol, games, grid=grid, spending=spending)
    for run, finding in enumerate(find(auditor, protocol, given, games)):
        observed = [auditor.statistic.observe(games, guesses)[run] for guesses in pairs]
        bounds = [auditor.root(n, DELTA, level, 0.0) for n, level in zip(observed, levels, strict=True)]
        perfect = [auditor.statistic.perfect(n, guesses) for n, guesses in zip(observed, pairs, strict=True)]
        ceilings = [auditor.root(n, DELTA, level, 0.0) for n, level in zip(perfect, levels, strict=True)]
        assert finding.parameter == pytest.approx(max(bounds), abs=2e-8)
        assert finding.ceiling == pytest.approx(max(ceilings), abs=2e-8)
        if auditor.statistic.chosen and max(bounds) > 0:
            assert bounds[pairs.index(finding.guesses)] == pytest.approx(max(bounds), abs=2e-8)


@BY_NAME
@pytest.mark.parametrize("paired", [False, True], ids=["independent", "paired"])
def test_holdout_tests_one_half_with_what_the_other_chose(paired, auditor):
    games = play(7, 1, 2.0, paired=paired)
    (finding,) = find(auditor, "holdout", options("holdout", games, seed=3), games)
    _, second = games.split(3)
    if auditor.statistic.chosen:
        assert finding.size == games.size - games.size // 2
        assert [finding.numbers] == auditor.statistic.observe(second, finding.guesses)
        assert finding.parameter == pytest.approx(auditor.root(finding.numbers, DELTA, 0.05, 0.0), abs=1e-9)
        grid = [(k, 0) if paired else (k // 2, k - k // 2) for k in default_grid(finding.size)]
        assert finding.guesses in grid
    else:
        assert finding.size == games.size


@pytest.mark.parametrize("name", [name for name in NAMES if name != "gaussian_auroc"])
def test_holdout_chooses_without_the_tested_half(name):
    """New coins and scores there change no choice; new ones in the other half do, at times."""
    (auditor,) = select([name])
    rng = np.random.default_rng(8)
    order = np.random.default_rng(0).permutation(100)
    choosing, tested = order[:50], order[50:]
    coins, scores = rng.random(100) < 0.5, rng.normal(size=100)
    scores += 1.5 * coins

    def choice(change):
        new_coins, new_scores = coins.copy(), scores.copy()
        new_coins[change] = rng.random(50) < 0.5
        new_scores[change] = rng.normal(size=50) + 1.5 * new_coins[change]
        games = make_games(new_scores, new_coins)
        return find(auditor, "holdout", options("holdout", games), games)[0].guesses

    (before,) = find(auditor, "holdout", options("holdout", make_games(scores, coins)), make_games(scores, coins))
    assert {choice(tested) for _ in range(15)} == {before.guesses}
    assert len({choice(choosing) for _ in range(15)}) > 1


@BY_NAME
@pytest.mark.parametrize("num_splits", [1, 4, 5])
def test_median_is_the_lower_median_of_holdouts_at_half_the_level(num_splits, auditor):
    games = play(9, 2, 2.0)
    found = find(auditor, "median", options("median", games, num_splits=num_splits, seed=2), games)
    seeds = range(2, 2 + num_splits)
    half = [find(auditor, "holdout", options("holdout", games, significance=0.025, seed=s), games) for s in seeds]
    for run, finding in enumerate(found):
        expected = sorted(split[run].parameter for split in half)[(num_splits - 1) // 2]
        if not auditor.statistic.chosen:  # all coins at the full level
            expected = auditor.root(finding.numbers, DELTA, 0.05, 0.0)
        assert finding.parameter == expected


@pytest.mark.parametrize("paired", [False, True], ids=["independent", "paired"])
def test_surrogate_chooses_without_the_audited_scores(paired):
    """The same guesses whatever is audited; others for other surrogates; one full test."""
    strong, weak = (play(10, 8, mu, paired=paired) for mu in (4.0, 0.7))
    audited = play(11, 6, 1.0, paired=paired)
    chosen = {}
    for auditor in AUDITORS:
        if not auditor.statistic.chosen:
            continue
        for name, surrogates in {"strong": strong, "weak": weak}.items():
            found = find(auditor, "surrogate", options("surrogate", audited, surrogates=surrogates), audited)
            (guesses,) = {finding.guesses for finding in found}
            assert guesses in two_sided_grid(audited.size, paired=paired)
            for run, finding in enumerate(found):
                assert finding.size == audited.size
                assert finding.numbers == auditor.statistic.observe(audited, guesses)[run]
                root = auditor.root(finding.numbers, DELTA, 0.05, 0.0)
                assert finding.parameter == pytest.approx(root, abs=1e-9)
            chosen[auditor.name, name] = guesses
    assert len(set(chosen.values())) > 1


def test_surrogate_takes_guesses_that_are_right_on_surrogates():
    """Only the lowest scores tell anything there: the guesses are OUT."""
    rng = np.random.default_rng(12)
    coins = rng.random((20, 100)) < 0.5
    scores = rng.normal(size=(20, 100))
    out = ~coins & (rng.random((20, 100)) < 0.3)
    surrogates = make_games(np.where(out, scores - 10, scores), coins)
    games = play(13, 1, 1.0)
    grid = [(12, 0), (0, 12), (6, 6)]
    for auditor in OF_GUESSES:
        given = options("surrogate", games, surrogates=surrogates, grid=grid)
        assert find(auditor, "surrogate", given, games)[0].guesses == (0, 12)


@pytest.mark.parametrize("size", [40, 400])
def test_surrogates_may_have_another_number_of_coins(size):
    """Independent ones: guesses are scaled."""
    games = play(14, 1, 2.0)
    surrogates = play(15, 4, 2.0, size=size)
    for auditor in AUDITORS:
        (finding,) = find(auditor, "surrogate", options("surrogate", games, surrogates=surrogates), games)
        assert finding.size == 100


@pytest.mark.parametrize(
    ("protocol", "change", "message"),
    [
        ("best", {}, r"protocol is 'best', expected one of \('fixed', "),
        ("fixed", {"grid": [2]}, "grid is .*, expected None under protocol 'fixed'"),
        ("corrected", {"num_guesses": 2}, "num_guesses is 2, expected None under protocol 'corrected'"),
        ("corrected", {"spending": "fibonacci"}, "spending is 'fibonacci', expected one of"),
        ("surrogate", {"surrogates": None}, "surrogates is None, expected runs"),
        ("fixed", {"surrogates": play(0, 1, 0.0)}, "surrogates is given, expected None under protocol 'fixed'"),
        ("surrogate", {"surrogates": play(0, 1, 0.0, paired=True)}, "surrogates are of another game"),
        ("median", {"num_splits": 0}, "num_splits is 0, expected an integer >= 1"),
    ],
)
def test_check_rejects_options_of_other_protocols(protocol, change, message):
    games = play(0, 1, 0.0)
    with pytest.raises(ValueError, match=message):
        check(protocol, options(protocol, games, **change), games)


@pytest.mark.parametrize("protocol", ["holdout", "median"])
def test_check_rejects_games_that_cannot_be_split(protocol):
    games = make_games([1.0], [1])
    with pytest.raises(ValueError, match=f"scores have 1 coin, expected at least 2 under protocol '{protocol}'"):
        check(protocol, options(protocol, games), games)
    check(protocol, options(protocol, games), make_games([1.0, 2.0], [1, 0]))


@pytest.mark.parametrize("protocol", [protocol for protocol in PROTOCOLS if protocol != "fixed"])
def test_find_rejects_an_empty_grid(protocol):
    """No silent return to the protocol's own."""
    games = play(0, 1, 0.0)
    with pytest.raises(ValueError, match=r"grid is \[\], expected distinct integers"):
        find(AUDITORS[0], protocol, options(protocol, games, grid=[]), games)


@pytest.mark.parametrize("protocol", ["surrogate", "holdout"])
def test_ceiling_is_over_all_guesses_to_choose_from(protocol):
    """Whatever was chosen: that of all coins, which none of these noisy scores chooses."""
    rng = np.random.default_rng(3)
    coins, others = rng.random((2, 200)) < 0.5, rng.random((2, 200)) < 0.5
    surrogates = make_games(rng.normal(size=(2, 200)) + 3 * others, others) if protocol == "surrogate" else None
    games = make_games(rng.normal(size=(2, 200)) + 3 * coins, coins)
    (steinke,) = auditors.select(["steinke"])
    size = 100 if protocol == "holdout" else 200
    for finding in find(steinke, protocol, Options(delta=DELTA, surrogates=surrogates), games):
        assert sum(finding.guesses) < size
        assert finding.ceiling == pytest.approx(steinke.root((size, size, size), DELTA, 0.05, 0.0), abs=1e-9)


def test_paper_grid_has_every_number_or_a_thousand():
    assert _paper_grid(1000) == list(range(1, 1001))
    grid = _paper_grid(20_000)
    assert grid[0] == 1
    assert grid[-1] == 20_000
    assert len(grid) <= 1000
    assert all(a < b for a, b in itertools.pairwise(grid))
