"""Membership guesses: which are made, which are right, grids, halves, validation."""

import numpy as np
import pytest

from metacanary.guesses import check_guesses, count_correct, default_grid, make_games, two_sided_grid

PAIRS = np.repeat(np.arange(50), 2)  # 100 canaries: 2i and 2i+1 are pair i


def flip(rng, pairs=None, size=100):
    """Fair coins: one per canary, or one per pair of neighbours."""
    if pairs is None:
        return rng.random(size) < 0.5
    first = rng.random(len(pairs) // 2) < 0.5
    return np.stack([first, ~first], axis=1).ravel()


def naive_correct(scores, included, guessed_in, guessed_out, pairs=None):
    """Right guesses by sorting Python tuples; for scores without ties."""
    if pairs is None:
        ranked = sorted(zip(scores, included, strict=True), reverse=True)
        bottom = ranked[len(ranked) - guessed_out :]
        return sum(coin for _, coin in ranked[:guessed_in]) + sum(not coin for _, coin in bottom)
    gaps = []
    for number in set(pairs):
        a, b = (i for i, p in enumerate(pairs) if p == number)
        gaps.append((abs(scores[a] - scores[b]), included[a] == (scores[a] > scores[b])))
    return sum(right for _, right in sorted(gaps, reverse=True)[:guessed_in])


@pytest.mark.parametrize(
    ("num_guesses", "guessed_in", "guessed_out"),
    [
        (1, 0, 1),
        (2, 1, 1),
        (3, 1, 2),
        (49, 24, 25),
        (100, 50, 50),
        ((0, 7), 0, 7),
        ((30, 0), 30, 0),
        ((60, 40), 60, 40),
    ],
)
def test_count_correct_equals_naive_sort(num_guesses, guessed_in, guessed_out):
    rng = np.random.default_rng(0)
    included = flip(rng)
    scores = rng.normal(size=100) + included
    expected = naive_correct(scores.tolist(), included.tolist(), guessed_in, guessed_out)
    assert count_correct(scores, included, num_guesses) == expected


@pytest.mark.parametrize("num_guesses", [1, 2, 10, 49, 50])
def test_count_correct_of_pairs_equals_naive_sort(num_guesses):
    rng = np.random.default_rng(0)
    included = flip(rng, PAIRS)
    scores = rng.normal(size=100) + included
    expected = naive_correct(scores.tolist(), included.tolist(), num_guesses, 0, PAIRS)
    assert count_correct(scores, included, num_guesses, pairs=PAIRS) == expected
    assert count_correct(scores, included, (num_guesses, 0), pairs=PAIRS) == expected


def test_count_correct_of_paired_game_ignores_order_and_pair_names():
    rng = np.random.default_rng(1)
    included = flip(rng, PAIRS)
    scores = rng.normal(size=100) + included
    order = rng.permutation(100)
    renamed = rng.permutation(1000)[PAIRS]
    for num_guesses in (7, 50):
        shuffled = count_correct(scores[order], included[order], num_guesses, pairs=renamed[order])
        assert shuffled == count_correct(scores, included, num_guesses, pairs=PAIRS)


@pytest.mark.parametrize("num_guesses", [10, 250, 1000])
def test_count_correct_of_identical_scores_is_at_chance(num_guesses):
    """Whatever the order of the table: all members first, last, or alternating. 4 standard errors."""
    for included in (np.arange(1000) < 500, np.arange(1000) >= 500, np.arange(1000) % 2 == 0):
        right = count_correct(np.zeros(1000), included, num_guesses)
        assert abs(right - num_guesses / 2) <= 4 * np.sqrt(num_guesses) / 2


def test_games_count_right_guesses_of_each_run():
    """Three canaries, by hand: in the order of scores OUT, IN, OUT and IN, IN, OUT."""
    games = make_games([[0.3, 0.1, 0.2], [1.0, 3.0, 2.0]], [[0, 0, 1], [1, 0, 1]])
    right_in, right_out = games.right
    np.testing.assert_array_equal(games.ascending, [[False, True, False], [True, True, False]])
    np.testing.assert_array_equal(right_in, [[0, 0, 1, 1], [0, 0, 1, 2]])
    np.testing.assert_array_equal(right_out, [[0, 1, 1, 2], [0, 0, 0, 1]])


def test_games_of_pairs_are_gaps():
    """Coins of pairs, whichever member comes first; a gap of 0 is a guess like any other."""
    games = make_games([5.0, 1.0, 2.0, 2.0], [1, 0, 0, 1], [7, 7, 3, 3])
    assert games.paired
    assert games.size == 2
    np.testing.assert_array_equal(np.abs(games.values), [[0.0, 4.0]])  # by pair number
    assert (games.values[0, 1] > 0) == games.coins[0, 1]
    assert games.right[0][0, 1] == 1
    assert games.right[1].max() == 0


def test_games_run_and_pooled_hold_the_same_coins():
    rng = np.random.default_rng(2)
    coins, scores = rng.random((4, 9)) < 0.5, rng.normal(size=(4, 9))
    games = make_games(scores, coins)
    np.testing.assert_array_equal(games.run(2).values, scores[[2]])
    np.testing.assert_array_equal(games.run(2).coins, coins[[2]])
    assert games.pooled().size == 36
    np.testing.assert_array_equal(games.pooled().coins, coins.reshape(1, -1))
    for mine, concatenated in zip(games.pooled().right, make_games(scores.ravel(), coins.ravel()).right, strict=True):
        np.testing.assert_array_equal(mine, concatenated)


@pytest.mark.parametrize("size", [2, 9, 100])
def test_games_split_into_disjoint_halves(size):
    values = np.arange(size, dtype=float)
    games = make_games([values, -values], np.stack([values % 2, values % 2]))
    first, second = games.split(3)
    assert (first.size, second.size) == (size // 2, size - size // 2)
    np.testing.assert_array_equal(np.sort(np.append(first.values[0], second.values[0])), values)
    for half in (first, second):
        np.testing.assert_array_equal(half.values[1], -half.values[0])  # the runs are split alike
        np.testing.assert_array_equal(half.coins[0], half.values[0] % 2 == 1)
    if size == 100:
        assert set(games.split(4)[0].values[0]) != set(first.values[0])
        np.testing.assert_array_equal(games.split(3)[0].values, first.values)


def test_games_split_does_not_look_at_scores_or_coins():
    rng = np.random.default_rng(5)
    splits = [make_games(rng.normal(size=40), rng.random(40) < 0.5).split(0)[0].ties for _ in range(3)]
    for ties in splits:
        np.testing.assert_array_equal(ties, splits[0])


def test_default_grid_halves_and_ends_at_all_canaries():
    assert default_grid(1000) == (1000, 500, 250, 125, 63, 32, 16)
    assert default_grid(100) == (100, 50, 25, 13)
    assert default_grid(9) == (9,)
    for m in range(1, 300):
        grid = default_grid(m)
        assert grid[0] == m
        assert len(set(grid)) == len(grid)
        assert min(grid) >= min(m, 10)


def test_default_grid_rejects_no_canaries():
    with pytest.raises(ValueError, match="num_canaries is 0"):
        default_grid(0)


def test_two_sided_grid_combines_sides():
    assert two_sided_grid(20, paired=False) == ((10, 10), (10, 5), (5, 10), (10, 0), (5, 5), (0, 10), (5, 0), (0, 5))
    assert two_sided_grid(100, paired=True) == ((100, 0), (50, 0), (25, 0), (13, 0))


@pytest.mark.parametrize("m", [1, 2, 9, 19, 21, 101, 1000])
def test_two_sided_grid_is_a_valid_grid(m):
    games = make_games(np.arange(m), np.zeros(m))
    grid = two_sided_grid(m, paired=False)
    assert check_guesses("grid", grid, games) == list(grid)
    assert sum(grid[0]) == m
    assert (np.diff([sum(guesses) for guesses in grid]) <= 0).all()
    assert set(check_guesses("grid", [m], games)) <= set(grid)


@pytest.mark.parametrize(
    ("guesses", "expected"),
    [([5], [(2, 3)]), ([4, (4, 0), (0, 1)], [(2, 2), (4, 0), (0, 1)]), ([np.int64(3)], [(1, 2)])],
)
def test_check_guesses_takes_sums_and_sides(guesses, expected):
    assert check_guesses("grid", guesses, make_games(np.arange(6), np.zeros(6))) == expected


@pytest.mark.parametrize(
    "guesses",
    [
        [],
        [2, 2],
        [2, (1, 1)],
        [0],
        [7],
        [(4, 3)],
        [(-1, 3)],
        [2.0],
        [0.0],
        [0.5, 0.5],
        [np.nan],
        [True],
        [(1.0, 2)],
        [(1, 2, 3)],
        ["2"],
    ],
)
def test_check_guesses_rejects_impossible_numbers(guesses):
    message = r"grid is \[.*\], expected distinct integers, fractions or pairs \(IN, OUT\) of 1 to 6 guesses"
    with pytest.raises(ValueError, match=message):
        check_guesses("grid", guesses, make_games(np.arange(6), np.zeros(6)))


def test_check_guesses_takes_fractions_of_the_coins():
    """At least one guess each; those that come to the same number count once."""
    games = make_games(np.arange(10), np.zeros(10))
    assert check_guesses("grid", [1.0, 0.5, 0.04, 0.01], games) == [(5, 5), (2, 3), (0, 1)]
    assert check_guesses("grid", [1, 1.0], games) == [(0, 1), (5, 5)]  # one guess, and all
    assert check_guesses("grid", [np.float64(0.3), 3], games) == [(1, 2)]
    pairs = make_games(np.arange(20), np.arange(20) % 2, np.arange(20) // 2)
    assert check_guesses("grid", [1.0, 0.5], pairs) == [(10, 0), (5, 0)]


@pytest.mark.parametrize("guesses", [[(1, 1)], [3], [(0, 1)]])
def test_check_guesses_of_pairs_has_one_side(guesses):
    games = make_games(np.arange(4), [0, 1, 0, 1], [0, 0, 1, 1])
    assert check_guesses("grid", [2, (1, 0)], games) == [(2, 0), (1, 0)]
    with pytest.raises(ValueError, match="of 1 to 2 guesses"):
        check_guesses("grid", guesses, games)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": [0.0, 1.0]}, r"shapes \(2,\) and \(4,\)"),
        ({"scores": [[0.0, 1.0, 2.0, 3.0]]}, "expected the same"),
        ({"scores": [], "included": []}, r"shapes \(0,\) and \(0,\), expected the same \[m\] or \[R, m\], m >= 1"),
        ({"scores": [0.0, 1.0, np.nan, 2.0]}, "1 values that are not finite"),
        ({"scores": [0.0, np.inf, -np.inf, 2.0]}, "2 values that are not finite"),
        ({"included": [0, 1, 2, 0]}, "expected 0 and 1 only"),
        ({"pairs": [0, 0, 1]}, "expected integers"),
        ({"pairs": [0.0, 0.0, 1.0, 1.0]}, "expected integers"),
        ({"pairs": [0, 0, 0, 1]}, "pair 0 has 3 members, expected 2"),
        ({"pairs": [0, 1, 1, 0], "included": [1, 0, 1, 1]}, "pair 0 has 2 members in, expected 1"),
        (
            {"scores": np.zeros((2, 4)), "included": [[0, 1, 0, 1], [0, 0, 1, 1]], "pairs": [0, 0, 1, 1]},
            "pair 0 has 0 members in, expected 1",
        ),
    ],
)
def test_make_games_rejects_bad_input(change, message):
    arguments = {"scores": [0.0, 1.0, 2.0, 3.0], "included": [0, 1, 0, 1], "pairs": None}
    with pytest.raises(ValueError, match=message):
        make_games(**(arguments | change))
