"""Auditors: what each looks at, against naive twins, and what holds for all of them."""

import numpy as np
import pytest
from test_guesses import PAIRS, flip

from metacanary import auditors, bounds, bounds_fdp, bounds_product, bounds_rates
from metacanary.auditors import AUDITORS, NAMES, select
from metacanary.guesses import make_games
from metacanary.scores import auroc

DELTA = 1e-5
BY_NAME = pytest.mark.parametrize("auditor", AUDITORS, ids=NAMES)


def epsilon(auditor, numbers, delta=DELTA, significance=0.05, floor=0.0):
    return auditor.to_epsilon(auditor.root(numbers, delta, significance, floor), delta)


def improving(auditor):
    """What games with fewer and fewer errors show, from chance on."""
    if auditor.statistic is auditors.GUESSES:
        return [(120, 60, v) for v in range(30, 61)]
    if auditor.statistic is auditors.RATES:
        return [(60 - k, k, k, 60 - k) for k in range(30, -1, -1)]
    return [(u, 60, 60) for u in range(3600, 7201, 100)]


def naive_rates(scores, included, guessed_in):
    """Members and non-members above the non-member of a rank, by Python lists, for scores without ties."""
    members = [s for s, coin in zip(scores, included, strict=True) if coin]
    others = sorted((s for s, coin in zip(scores, included, strict=True) if not coin), reverse=True)
    rank = max(1, round(guessed_in / len(scores) * len(others)))
    hits = sum(s > others[rank - 1] for s in members)
    return hits, len(members) - hits, rank - 1, len(others) - rank + 1


def test_auditors_are_the_documented_ones():
    assert {auditor.name: auditor.assumption for auditor in AUDITORS} == {
        "steinke": "worst_case",
        "fdp_epsilon_delta": "worst_case",
        "fdp_gaussian": "family",
        "order_statistic": "product",
        "order_statistic_gaussian": "family+product",
        "clopper_pearson": "product",
        "gaussian_rates": "family+product",
        "gaussian_auroc": "asymptotic",
        "credible_rates": "credible",
    }


@BY_NAME
def test_auditor_returns_its_bound(auditor):
    """The bounds as published, at one count each."""
    rates, options = (50, 10, 5, 55), {"delta": DELTA, "significance": 0.02}
    expected = {
        "steinke": lambda: bounds.steinke(120, 60, 50, **options),
        "fdp_epsilon_delta": lambda: bounds_fdp.fdp_epsilon_delta(120, 60, 50, **options),
        "fdp_gaussian": lambda: bounds_fdp.fdp_gaussian(120, 60, 50, **options),
        "order_statistic": lambda: bounds_product.order_statistic(120, 60, 50, **options),
        "order_statistic_gaussian": lambda: bounds_product.order_statistic_gaussian(120, 60, 50, **options),
        "clopper_pearson": lambda: bounds_rates.clopper_pearson(*rates, **options),
        "gaussian_rates": lambda: bounds_rates.gaussian_rates(*rates, **options),
        "credible_rates": lambda: bounds_rates.credible_rates(*rates, **options),
        "gaussian_auroc": lambda: auditor.to_epsilon(
            bounds_rates.gaussian_auroc_mu(0.8, 60, 60, significance=0.02), DELTA
        ),
    }[auditor.name]()
    numbers = {"GUESSES": (120, 60, 50), "RATES": rates, "AUROC": (5760, 60, 60)}
    (shown,) = (numbers[name] for name in numbers if getattr(auditors, name) is auditor.statistic)
    assert expected > 0
    assert epsilon(auditor, shown, significance=0.02) == expected


@BY_NAME
def test_bound_grows_with_fewer_errors(auditor):
    values = [epsilon(auditor, numbers) for numbers in improving(auditor)]
    assert (np.diff(values) >= -1e-9).all()
    assert values[0] == 0.0 < values[-1]


@BY_NAME
def test_bound_falls_with_delta_and_with_confidence(auditor):
    rng = np.random.default_rng(0)
    cases = improving(auditor)
    for index in rng.choice(np.arange(len(cases) // 2, len(cases)), size=5, replace=False):
        by_delta = [epsilon(auditor, cases[index], delta=delta) for delta in (0.1, 1e-2, 1e-4, 1e-8)]
        by_level = [epsilon(auditor, cases[index], significance=s) for s in (1e-4, 0.01, 0.05, 0.2, 0.4)]
        assert (np.diff(by_delta) >= -1e-9).all()
        assert (np.diff(by_level) >= -1e-9).all()
        assert by_level[-1] > by_level[0]


@BY_NAME
def test_root_is_never_below_its_floor(auditor):
    """And the same as without one where the bound is larger."""
    numbers = improving(auditor)[-8]
    root = auditor.root(numbers, DELTA, 0.05, 0.0)
    assert root > 0
    assert auditor.root(numbers, DELTA, 0.05, 0.5 * root) == pytest.approx(root, abs=1e-9)
    assert auditor.root(numbers, DELTA, 0.05, 1.5 * root) == 1.5 * root


@BY_NAME
def test_bound_of_perfect_guesses_is_the_largest(auditor):
    statistic = auditor.statistic
    for numbers in improving(auditor):
        perfect = statistic.perfect(numbers, (30, 30))
        assert statistic.perfect(perfect, (30, 30)) == perfect
        assert epsilon(auditor, perfect) >= epsilon(auditor, numbers) - 1e-9


@BY_NAME
def test_observation_ignores_row_order_and_monotone_transformations(auditor):
    """Distinct scores; 20 seeded games with random numbers of guesses."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        included, scores = flip(rng), rng.normal(size=100)
        scores += rng.choice([0, 1, 3]) * included
        guesses = tuple(int(k) for k in rng.integers(1, 51, size=2))
        order = rng.permutation(100)
        observed = auditor.statistic.observe(make_games(scores, included), guesses)
        for values, coins in [
            (np.exp(scores), included),
            (scores**3 + scores, included),
            (scores[order], included[order]),
        ]:
            assert auditor.statistic.observe(make_games(values, coins), guesses) == observed


@BY_NAME
def test_observation_of_pairs_ignores_names_and_affine_transformations(auditor):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        included, scores = flip(rng, PAIRS), rng.normal(size=100)
        scores += rng.choice([0, 1, 3]) * included
        guesses = (int(rng.integers(1, 51)), 0)
        observed = auditor.statistic.observe(make_games(scores, included, PAIRS), guesses)
        renamed = rng.permutation(1000)[PAIRS]
        assert auditor.statistic.observe(make_games(3 * scores - 1, included, renamed), guesses) == observed
        if auditor.statistic is auditors.GUESSES:  # others ask which member comes first, a fixed draw by position
            order = rng.permutation(100)
            shuffled = make_games(scores[order], included[order], renamed[order])
            assert auditor.statistic.observe(shuffled, guesses) == observed


@pytest.mark.parametrize("guesses", [(1, 1), (7, 0), (20, 33), (50, 50), (100, 0)])
def test_rates_equal_naive_counts(guesses):
    for seed in range(10):
        rng = np.random.default_rng(seed)
        included = flip(rng)
        scores = rng.normal(size=100) + included
        (observed,) = auditors.RATES.observe(make_games(scores, included), guesses)
        assert observed == naive_rates(scores.tolist(), included.tolist(), guesses[0])


@pytest.mark.parametrize("guessed_out", [1, 7, 50, 100])
def test_rates_of_guesses_out_are_those_of_the_mirrored_game(guessed_out):
    """Members and non-members, IN and OUT, high and low exchanged."""
    rng = np.random.default_rng(0)
    included = flip(rng)
    scores = rng.normal(size=100) + included
    (observed,) = auditors.RATES.observe(make_games(scores, included), (0, guessed_out))
    mirrored = naive_rates((-scores).tolist(), (~included).tolist(), guessed_out)
    assert observed == mirrored[::-1]


def test_rates_of_pairs_take_half_of_the_guesses_from_one_side():
    """Gaps above a threshold say that the first member is in: half of the guesses, if gaps are symmetric."""
    rng = np.random.default_rng(0)
    included = flip(rng, PAIRS)
    games = make_games(rng.normal(size=100) + included, included, PAIRS)
    (observed,) = auditors.RATES.observe(games, (30, 0))
    assert observed == naive_rates(games.values[0].tolist(), games.coins[0].tolist(), 15)


def test_rates_of_equal_coins_are_none():
    assert auditors.RATES.observe(make_games([[1.0, 2.0]] * 2, [[1, 1], [0, 0]]), (1, 1)) == [(0, 0, 0, 0)] * 2
    for name in ("clopper_pearson", "gaussian_rates", "credible_rates"):
        (auditor,) = select([name])
        assert epsilon(auditor, (0, 0, 0, 0)) == 0.0


def test_auroc_equals_scores_auroc_with_ties():
    for seed in range(10):
        rng = np.random.default_rng(seed)
        included = flip(rng)
        scores = (rng.normal(size=100) + included).round(1)
        ((twice, num_in, num_out),) = auditors.AUROC.observe(make_games(scores, included), (50, 50))
        assert (num_in, num_out) == (included.sum(), 100 - included.sum())
        assert twice / (2 * num_in * num_out) == pytest.approx(auroc(scores, included), abs=1e-12)


@BY_NAME
def test_counts_say_how_many_guesses_were_made(auditor):
    """(made, IN, right) of 4 guesses IN of which 3 are right and 4 OUT of which 2 are right."""
    if auditor.statistic is auditors.GUESSES:
        assert auditor.statistic.counts((20, 8, 5), (4, 4)) == (8, 4, 5)
    elif auditor.statistic is auditors.RATES:
        assert auditor.statistic.counts((3, 2, 1, 2), (4, 4)) == (8, 4, 5)
    else:
        assert auditor.statistic.counts((5, 4, 4), (4, 4)) == (0, 0, 0)


@pytest.mark.parametrize(("size", "guesses", "scaled"), [(100, (25, 25), (25, 25)), (200, (50, 50), (25, 25))])
def test_expected_guesses_have_the_surrogates_accuracy(size, guesses, scaled):
    """With half a right guess of one more, as under a flat prior, rounded down."""
    rng = np.random.default_rng(1)
    included = rng.random((6, 100)) < 0.5
    games = make_games(rng.normal(size=(6, 100)) + included, included)
    right = sum(v for _, _, v in auditors.GUESSES.observe(games, scaled))
    accuracy = (right + 0.5) / (6 * 50 + 1)
    assert auditors.GUESSES.expect(games, guesses, size) == (size, sum(guesses), int(sum(guesses) * accuracy))


def test_expected_rates_have_the_surrogates_rates():
    """In 40 members and 40 non-members, of surrogates with 4 of 20 missed, rank 3 of 20; and a flat prior."""
    coins = np.arange(40) % 2 == 0
    scores = np.where(coins, 10.0, 0.0) + 1e-3 * np.arange(40)
    scores[[0, 2, 4, 6]] = -1.0
    games = make_games(scores, coins)
    assert auditors.RATES.observe(games, (6, 0)) == [(16, 4, 2, 18)]
    missed, false = round(40 * 4.5 / 21), round(40 * 2.5 / 21)
    assert auditors.RATES.expect(games, (12, 0), 80) == (40 - missed, missed, false, 40 - false)


@pytest.mark.parametrize("statistic", [auditors.GUESSES, auditors.RATES])
def test_nothing_is_expected_of_surrogates_with_too_few_coins(statistic):
    games = make_games(np.arange(10), np.arange(10) % 2)
    assert statistic.expect(games, (2, 2), 1000) is None
    assert statistic.expect(games, (200, 0), 1000) is not None


@pytest.mark.parametrize("name", NAMES)
def test_multi_run_makes_independence_a_fact(name):
    (auditor,) = select([name])
    assert auditor.assumes("corrected") == auditor.assumption
    facts = {"product": "worst_case", "family+product": "family"}
    for protocol in ("corrected", "holdout"):
        assert auditor.assumes(protocol, multi_run=True) == facts.get(auditor.assumption, auditor.assumption)


@pytest.mark.parametrize("protocol", ["holdout", "median"])
def test_guesses_chosen_on_the_same_output_need_independent_canaries(protocol):
    found = {auditor.name: auditor.assumes(protocol) for auditor in select(None)}
    product = {"steinke", "fdp_epsilon_delta", "order_statistic", "clopper_pearson"}
    family = {"fdp_gaussian", "order_statistic_gaussian", "gaussian_rates"}
    expected = dict.fromkeys(product, "product") | dict.fromkeys(family, "family+product")
    assert found == expected | {"gaussian_auroc": "asymptotic", "credible_rates": "credible"}


def test_paper_protocol_claims_nothing():
    assert {auditor.assumes("paper", multi_run=m) for auditor in select(None) for m in (False, True)} == {"none"}


def test_select_keeps_the_order_of_the_table():
    assert [auditor.name for auditor in select(None)] == list(NAMES)
    assert [auditor.name for auditor in select(["credible_rates", "steinke"])] == ["steinke", "credible_rates"]
    for names in (["bayes"], []):
        with pytest.raises(ValueError, match=r"auditors is \[.*\], expected some of steinke, "):
            select(names)
