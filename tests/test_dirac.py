import math

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from metacanary import accounting, audits, dirac, heuristics, models, recipes, runs, scores, steps, summary

MECHANISM = {"noise_multiplier": 0.8, "sampling_prob": 0.3}
DELTA = 1e-5


def observed(seed=1, num_canaries=6, num_steps=7, num_others=11, included=None, **changes):
    coins = runs.coins(seed, num_canaries, "independent") if included is None else included
    settings = {"num_others": num_others, "num_steps": num_steps} | MECHANISM | changes
    return dirac.observations(seed, coins, **settings)


def tables(roles=("audited",), seeds=(1,), **changes):
    settings = {"num_canaries": 50, "num_others": 20, "num_steps": 5} | MECHANISM | changes
    return dirac.score_tables(range(len(roles)), roles, seeds, **settings)


def many(num_canaries, seed=0, **mechanism):
    """Coins and observations of more canaries than one run would have."""
    coins = runs.coins(seed, num_canaries, "independent")
    return coins, dirac.observations(seed, coins, num_others=0, **mechanism)


def test_observations_are_those_of_a_naive_loop():
    seed, m, r, num_steps = 3, 6, 11, 7
    coins = runs.coins(seed, m, "independent")
    sampling = runs.stream(seed, "sampling")
    noise = jax.random.fold_in(jax.random.key(seed), dirac.STREAM)
    expected = np.zeros((num_steps, m))
    for t in range(num_steps):
        drawn = jax.random.bernoulli(jax.random.fold_in(sampling, t), 0.3, (r + m,))
        normal = jax.random.normal(jax.random.fold_in(noise, t), (m,))
        for i in range(m):
            expected[t, i] = float(drawn[r + i] and coins[i]) + 0.8 * float(normal[i])
    np.testing.assert_allclose(observed(seed), expected, rtol=1e-12)


def test_canaries_are_in_the_batches_of_the_run_itself():
    seed, coins = 5, np.array([True, False, True, True])
    model = models.build("convnet", num_classes=2, widths=[4])
    recipe = recipes.DPSGD(num_steps=9, clip_norm=1.0, learning_rate=0.1, **MECHANISM)
    pool = runs.Pool(images=jnp.zeros((11, 8, 8, 1), jnp.uint8), labels=jnp.zeros(15, jnp.int32))
    samples = np.asarray(steps.dpsgd_state(recipe, model, pool, coins, seed=seed)["samples"])
    in_batch = np.array([[11 + i in batch for i in range(4)] for batch in samples])
    silent = observed(seed, included=np.zeros(4, bool), num_steps=9)
    np.testing.assert_allclose(observed(seed, included=coins, num_steps=9) - silent, in_batch, atol=1e-12)
    assert in_batch.any()
    assert not in_batch[:, 1].any()


def test_the_noise_is_that_of_no_other_stream():
    assert dirac.STREAM not in runs.STREAMS.values()


def test_a_canary_depends_on_its_own_coin_alone():
    coins = np.array([True, False, True, True, False, False])
    turned = coins ^ np.array([False, False, True, False, False, False])
    one, other = observed(included=coins), observed(included=turned)
    assert (np.delete(one, 2, axis=1) == np.delete(other, 2, axis=1)).all()
    assert (one[:, 2] != other[:, 2]).any()


def test_all_iterates_is_the_log_likelihood_ratio():
    x, sigma, q = observed(), 0.8, 0.3
    expected = np.zeros(x.shape[1])
    for i in range(x.shape[1]):
        for t in range(x.shape[0]):
            out = stats.norm.pdf(x[t, i], 0, sigma)
            inside = (1 - q) * out + q * stats.norm.pdf(x[t, i], 1, sigma)
            expected[i] += math.log(inside / out)
    np.testing.assert_allclose(dirac.all_iterates(x, **MECHANISM), expected, rtol=1e-10)


def test_all_iterates_without_sampling_orders_as_the_sum():
    x = observed(sampling_prob=1.0)
    found = dirac.all_iterates(x, noise_multiplier=0.8, sampling_prob=1.0)
    np.testing.assert_allclose(found, (2 * dirac.last_iterate(x) - len(x)) / (2 * 0.8**2), rtol=1e-10)


def test_all_iterates_do_not_overflow_under_little_noise():
    found = dirac.all_iterates(np.array([[1.0, 0.0]]), noise_multiplier=1e-3, sampling_prob=0.5)
    np.testing.assert_allclose(found, [5e5 + math.log(0.5), math.log(0.5)])


def test_mean_and_variance_are_those_of_the_mechanism():
    m, q, sigma, num_steps = 20_000, 0.3, 0.8, 4
    coins, x = many(m, noise_multiplier=sigma, sampling_prob=q, num_steps=num_steps)
    for group, mean, variance in ((x[:, coins], q, sigma**2 + q * (1 - q)), (x[:, ~coins], 0.0, sigma**2)):
        n = group.size
        assert abs(group.mean() - mean) < 4 * math.sqrt(variance / n)  # four standard errors
        assert abs(group.var() - variance) < 5 * variance * math.sqrt(2 / n)  # nearly normal: kurtosis about 3
    assert np.abs(np.corrcoef(x[:, :2000])[np.triu_indices(num_steps, 1)]).max() < 0.2


@pytest.mark.parametrize("q", [1.0, 0.3])
def test_auroc_of_the_last_iterate_is_the_theorys(q):
    m, sigma, num_steps = 20_000, 2.0, 4
    coins, x = many(m, noise_multiplier=sigma, sampling_prob=q, num_steps=num_steps)
    counts = np.arange(num_steps + 1)
    weights = stats.binom.pmf(counts, num_steps, q)
    expected = (weights * stats.norm.cdf(counts / (sigma * math.sqrt(2 * num_steps)))).sum()
    found = scores.auroc(dirac.last_iterate(x), coins)
    assert abs(found - expected) < 4 * math.sqrt(1 / (12 * m / 4))  # standard error of an AUROC of 0.5, the largest


def test_all_iterates_tell_members_better_than_the_last():
    coins, x = many(20_000, noise_multiplier=0.5, sampling_prob=0.1, num_steps=20)
    every = scores.auroc(dirac.all_iterates(x, noise_multiplier=0.5, sampling_prob=0.1), coins)
    assert every > scores.auroc(dirac.last_iterate(x), coins) + 0.02


@pytest.mark.parametrize(
    ("auditor", "num_guesses", "recovered"), [("fdp_gaussian", 0.1, 0.6), ("order_statistic_gaussian", 0.4, 0.88)]
)
def test_bounds_come_near_the_gaussians_epsilon_and_above_it_no_more_often_than_their_level(
    auditor, num_guesses, recovered
):
    sigma, m, num_games = 1.0, 5000, 40
    true = accounting.epsilon(noise_multiplier=sigma, sampling_prob=1.0, num_steps=1, delta=DELTA)
    assert true == pytest.approx(accounting.gaussian_epsilon(1 / sigma, DELTA), abs=1e-3)
    bounds = []
    for seed in range(num_games):
        coins, x = many(m, seed=seed, noise_multiplier=sigma, sampling_prob=1.0, num_steps=1)
        score = dirac.all_iterates(x, noise_multiplier=sigma, sampling_prob=1.0)
        options = {"protocol": "fixed", "num_guesses": num_guesses, "auditors": [auditor]}
        found = audits.audit(score, coins, delta=DELTA, **options)
        bounds.append(found["epsilon_lower"].item())
    assert np.mean(bounds) > recovered * true
    assert sum(bound > true for bound in bounds) <= stats.binom.ppf(0.999, num_games, 0.05)


def test_the_heuristic_is_the_epsilon_of_the_last_iterate():
    """The share of members and of others above the best threshold have the hockey-stick divergence of delta."""
    mechanism = {"noise_multiplier": 1.0, "sampling_prob": 0.5, "num_steps": 4}
    epsilon = heuristics.last_iterate_epsilon(**mechanism, delta=0.05)
    coins, x = many(200_000, **mechanism)
    sums = np.sort(dirac.last_iterate(x)[coins]), np.sort(dirac.last_iterate(x)[~coins])
    thresholds = np.linspace(-3, 6, 200)
    above = [1 - np.searchsorted(values, thresholds) / len(values) for values in sums]
    below = [1 - share for share in above]
    weight = math.exp(epsilon)
    found = max((above[0] - weight * above[1]).max(), (below[1] - weight * below[0]).max())
    assert found == pytest.approx(0.05, abs=0.005)  # four standard errors of a share of 1e5, weighted


def test_score_tables_are_deterministic_in_the_seed_and_have_the_coins_of_the_runs():
    one, listed = tables(("audited", "surrogate", "reference"), (1, 2, 3))
    pd.testing.assert_frame_equal(one, tables(("audited", "surrogate", "reference"), (1, 2, 3))[0])
    for run, seed in ((0, 1), (1, 2)):
        rows = one[(one["run"] == run) & (one["score"] == dirac.ALL_ITERATES)]
        assert rows["included"].tolist() == runs.coins(seed, 50, "independent").astype(int).tolist()
    assert not one.loc[one["run"] == 2, "included"].any()
    assert listed["role"].tolist() == ["audited", "surrogate", "reference"]
    assert set(listed["step"]) == {5}
    assert set(listed["noise_multiplier"]) == {0.8}
    other = tables(("audited",), (4,))[0]
    assert not np.isclose(one.loc[one["run"] == 0, "value"], other["value"]).any()


def test_score_tables_are_what_epsilon_table_audits():
    found, listed = tables(("audited", "audited", "surrogate"), (1, 2, 3), num_canaries=60, noise_multiplier=0.5)
    settings = summary.Settings(
        scores=dirac.SCORES,
        game="independent",
        delta=DELTA,
        auditors=["fdp_gaussian"],
        protocols=["surrogate"],
        sampling_prob=0.3,
    )
    cell = {"dataset": "digits", "canary": "dirac", "training": "dpsgd", "epsilon": "8"}
    table = summary.epsilon_table(found, listed, settings, cell=cell)
    assert set(table["score"]) == set(dirac.SCORES)
    assert set(table["run"]) == {"0", "1", "pooled"}
    claimed = accounting.epsilon(noise_multiplier=0.5, sampling_prob=0.3, num_steps=5, delta=DELTA)
    assert table["epsilon_accounted"].unique().tolist() == [claimed]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"noise_multiplier": 0.0}, "noise_multiplier: got 0.0, expected a finite number > 0"),
        ({"sampling_prob": 1.5}, "sampling_prob: got 1.5, expected a number in"),
        ({"num_steps": 0}, "num_steps: got 0, expected an integer >= 1"),
        ({"num_others": -1}, "num_others: got -1, expected an integer >= 0"),
    ],
)
def test_observations_name_what_is_out_of_range(change, expected):
    with pytest.raises(ValueError, match=expected):
        observed(**change)
