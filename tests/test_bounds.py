"""Bounds from counts of right guesses: published numbers, naive twins, other libraries, level, monotonicity, traps."""

import json
import math
import timeit
from pathlib import Path

import numpy as np
import pytest
from scipy import optimize, stats

from metacanary import bounds, bounds_fdp
from metacanary.bounds import steinke, steinke_p_value
from metacanary.bounds_fdp import fdp_epsilon_delta, fdp_gaussian
from metacanary.bounds_product import order_statistic, order_statistic_gaussian
from metacanary.scores import auroc

REFERENCE = json.loads((Path(__file__).parent / "reference" / "bounds.json").read_text())
VECTORS = Path(__file__).resolve().parents[2] / "shared" / "vectors" / "audit_vectors.json"
BOUNDS = {
    "steinke": steinke,
    "fdp_epsilon_delta": fdp_epsilon_delta,
    "fdp_gaussian": fdp_gaussian,
    "order_statistic": order_statistic,
    "order_statistic_gaussian": order_statistic_gaussian,
}

# Which file tests each method of the vectors.
TESTED_IN = {
    "steinke_p_value": "test_bounds.py",
    "steinke_eps_lower": "test_bounds.py",
    "must_not_reproduce": "test_bounds.py",
    "canary_scores_bonferroni_steinke": "test_bounds.py",
    "canary_scores_bonferroni_fdp": "test_bounds.py",
    "attack_auroc_concave_hull": "test_bounds.py",
    "fdp_gaussian_eps_lower": "test_bounds_fdp.py",
    "fdp_gaussian_eps_lower_grid": "test_bounds_fdp.py",
    "clopper_pearson_eps_lower_two_sided": "test_bounds_rates.py",
    "clopper_pearson_gdp_eps_lower": "test_bounds_rates.py",
    "jeffreys_optimal_eps_lower": "test_bounds_rates.py",
    "gaussian_mechanism_eps": "test_accounting.py",
    "dpsgd_poisson_pld_eps": "test_accounting.py",
    "dpsgd_poisson_pld_sigma": "test_accounting.py",
}


def vectors(*methods):
    """Cases of the shared vectors, or one skipped case where they are absent."""
    if not VECTORS.exists():
        return [pytest.param(None, marks=pytest.mark.skip(reason=f"{VECTORS} is absent"))]
    cases = json.loads(VECTORS.read_text())["vectors"]
    return [pytest.param(case, id=case["name"]) for case in cases if case["method"] in methods]


def counts(case):
    return tuple(case["inputs"][key] for key in ("m", "n_guess", "n_correct"))


def levels(case):
    return {key: case["inputs"][key] for key in ("delta", "significance")}


def naive_steinke_p_value(m, r, v, epsilon, delta):
    """The formula term by term, by math.comb and plain sums."""
    q = 1 / (1 + math.exp(-epsilon))
    pmf = [math.comb(r, k) * q**k * (1 - q) ** (r - k) for k in range(r + 1)]
    excess = [math.fsum(pmf[v - i : v]) / i for i in range(1, v + 1)]
    return min(1.0, math.fsum(pmf[v:]) + 2 * m * delta * max(excess, default=0.0))


def smallest_rejection(bound, limit, r):
    """The fewest right guesses of r whose bound is above the limit; r + 1 if none is."""
    return next((v for v in range(r + 1) if bound(v) > limit), r + 1)


def test_every_vector_has_a_test():
    if not VECTORS.exists():
        pytest.skip(f"{VECTORS} is absent")
    assert {case["method"] for case in json.loads(VECTORS.read_text())["vectors"]} == set(TESTED_IN)
    for method, file in TESTED_IN.items():
        calls = (Path(__file__).parent / file).read_text().split("vectors(")[1:]
        assert any(f'"{method}"' in call.partition(")")[0] for call in calls), f"{file} lacks {method}"


@pytest.mark.parametrize("case", REFERENCE["steinke_p_value"])
def test_steinke_p_value_matches_published_numbers(case):
    value = steinke_p_value(*case["inputs"], epsilon=case["epsilon"], delta=case["delta"])
    assert abs(value - case["expected"]) <= case["tolerance"], case["origin"]


@pytest.mark.parametrize("name", ["steinke", "fdp_gaussian", "order_statistic_gaussian"])
def test_bounds_match_published_numbers_and_ceilings(name):
    for case in REFERENCE[name]:
        value = BOUNDS[name](*case["inputs"], delta=case["delta"])
        assert abs(value - case["expected"]) <= case["tolerance"], case["origin"]


@pytest.mark.parametrize("case", vectors("steinke_p_value"))
def test_steinke_p_value_matches_vectors(case):
    value = steinke_p_value(*counts(case), epsilon=case["inputs"]["eps"], delta=case["inputs"]["delta"])
    assert abs(value - case["expected"]) <= case["tolerance"], case["source"]


@pytest.mark.parametrize("case", vectors("steinke_eps_lower"))
def test_steinke_matches_vectors(case):
    assert abs(steinke(*counts(case), **levels(case)) - case["expected"]) <= case["tolerance"], case["source"]


@pytest.mark.parametrize("case", vectors("must_not_reproduce"))
def test_bounds_do_not_reproduce_known_errors(case):
    bound = steinke if "steinke" in case["name"] else fdp_gaussian
    assert abs(bound(*counts(case), **levels(case)) - case["expected"]) > case["tolerance"], case["source"]


def frontier(out_below, in_below):
    """The corners of the least concave majorant of (in_below, out_below), from left to right, by a stack."""
    hull = []
    for x, y in zip(in_below.tolist(), out_below.tolist(), strict=True):
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (y1 - y0) * (x - x1) > (y - y1) * (x1 - x0):
                break
            hull.pop()
        hull.append((x, y))
    return hull


def corners_of(in_scores, out_scores):
    """The frontier over all thresholds: (members, non-members) below it."""
    thresholds = np.append(np.union1d(in_scores, out_scores), np.inf)
    below = [np.searchsorted(np.sort(scores), thresholds) for scores in (out_scores, in_scores)]
    return frontier(*below)


def best_over_frontier(bound, in_scores, out_scores, delta, significance):
    """The protocol of jax-privacy: guess IN from a threshold on; the best of those on the frontier, at its share."""
    corners = corners_of(in_scores, out_scores)
    right = len(in_scores) - np.array([x for x, _ in corners])
    wrong = len(out_scores) - np.array([y for _, y in corners])
    level, total = significance / len(corners), len(in_scores) + len(out_scores)
    useful = [(int(v + w), int(v)) for v, w in zip(right, wrong, strict=True) if v > w]
    return max((bound(total, r, v, delta=delta, significance=level) for r, v in useful), default=0.0)


@pytest.mark.parametrize("case", vectors("canary_scores_bonferroni_steinke", "canary_scores_bonferroni_fdp"))
def test_bounds_over_a_frontier_match_vectors(case):
    """The bounds agree; the protocol is not offered, since it does not keep its level.

    It divides the level by the size of a frontier that depends on the scores: false alarms 6.5% at m = 1000.
    """
    bound = steinke if case["method"].endswith("steinke") else fdp_gaussian
    inputs = case["inputs"]
    out_scores = stats.norm.ppf(np.linspace(0, 1, inputs["n"], endpoint=False) + 1 / (2 * inputs["n"]))
    in_scores = out_scores + float(inputs["in_scores"].rpartition("+")[2])
    value = best_over_frontier(bound, in_scores, out_scores, inputs["delta"], inputs["significance"])
    assert abs(value - case["expected"]) <= case["tolerance"], case["source"]


@pytest.mark.parametrize("case", vectors("attack_auroc_concave_hull"))
def test_auroc_is_mann_whitney_and_not_the_area_under_the_hull(case):
    """The hull is chosen with the coins known: its area exceeds 1/2 on scores that say nothing."""
    inside, outside = (np.array(case["inputs"][key]) for key in ("in_scores", "out_scores"))
    members_below, others_below = np.array(corners_of(inside, outside)).T / len(inside)
    hull = np.trapezoid(others_below, members_below)
    assert hull == pytest.approx(case["expected"], abs=case["tolerance"]), case["source"]
    value = auroc(np.append(inside, outside), np.arange(8) < 4)
    assert value == 11 / 16, case["source"]


@pytest.mark.parametrize("delta", [0.0, 1e-5, 1e-2, 0.3])
@pytest.mark.parametrize(("m", "r", "v"), [(1, 1, 1), (7, 5, 5), (40, 30, 21), (100, 60, 0), (100, 60, 58)])
def test_steinke_p_value_equals_naive_sum(m, r, v, delta):
    for epsilon in (0.0, 0.3, 1.0, 4.0):
        value = steinke_p_value(m, r, v, epsilon=epsilon, delta=delta)
        assert value == pytest.approx(naive_steinke_p_value(m, r, v, epsilon, delta), rel=1e-11, abs=1e-14)


@pytest.mark.parametrize(("m", "r", "v"), [(1, 1, 1), (7, 5, 5), (40, 30, 25), (100, 60, 58), (60, 60, 59)])
@pytest.mark.parametrize("delta", [0.0, 1e-4, 1e-2, 0.1])
def test_steinke_is_first_crossing_also_where_the_delta_term_falls(m, r, v, delta):
    bound = steinke(m, r, v, delta=delta)
    p_values = np.array([naive_steinke_p_value(m, r, v, e, delta) for e in np.linspace(0, 12, 300)])
    below = np.linspace(0, 12, 300) < bound
    assert (p_values[below] < 0.05).all()
    assert (p_values[~below] >= 0.05 - 1e-9).all()


def test_steinke_is_an_exact_root():
    """Against bisection on the naive definition."""
    root = optimize.bisect(lambda e: naive_steinke_p_value(90, 60, 50, e, 1e-3) - 0.05, 0, 5, xtol=1e-11)
    assert steinke(90, 60, 50, delta=1e-3) == pytest.approx(root, abs=1e-9)


@pytest.mark.parametrize("bound", [steinke, order_statistic])
def test_bounds_without_delta_are_clopper_pearson(bound):
    for r, v in [(1, 1), (100, 75), (1000, 999), (100_000, 100_000)]:
        q = stats.beta.ppf(0.05, v, r - v + 1)
        assert bound(r, r, v, delta=0.0) == pytest.approx(max(0.0, math.log(q / (1 - q))), rel=1e-9)


@pytest.mark.parametrize(("m", "r", "v"), [(1000, 500, 300), (400, 200, 190), (1000, 50, 50), (300, 300, 160)])
def test_bounds_equal_jax_privacy_at_an_explicit_threshold(m, r, v):
    auditing = pytest.importorskip("jax_privacy.auditing", reason="jax-privacy is a development extra")
    # Half of the canaries are IN; v of them and r - v others score above the threshold.
    inside, outside = np.arange(m // 2) < v, np.arange(m // 2) < r - v
    auditor = auditing.CanaryScoreAuditor(inside.astype(float), outside.astype(float))
    threshold = auditing.Explicit(0.5)
    assert steinke(m, r, v, delta=1e-5) == pytest.approx(
        auditor.epsilon_one_run(0.05, 1e-5, threshold_strategy=threshold), abs=2e-6
    )
    assert fdp_gaussian(m, r, v, delta=1e-5) == pytest.approx(
        auditor.epsilon_one_run_fdp(0.05, 1e-5, threshold_strategy=threshold), abs=2e-6
    )


@pytest.mark.parametrize("bound", BOUNDS.values(), ids=BOUNDS)
def test_bounds_are_monotone(bound):
    by_correct = [bound(300, 100, v, delta=1e-5) for v in range(101)]
    by_significance = [bound(300, 100, 80, delta=1e-5, significance=s) for s in (0.001, 0.01, 0.05, 0.2)]
    by_delta = [bound(300, 100, 80, delta=delta) for delta in (0.1, 1e-2, 1e-4, 1e-6, 1e-9)]
    for values in (by_correct, by_significance, by_delta):
        assert (np.diff(values) >= -1e-9).all()
        assert values[-1] > values[0]


@pytest.mark.parametrize("bound", BOUNDS.values(), ids=BOUNDS)
def test_bounds_of_perfect_guesses_grow_with_their_number(bound):
    """What makes the ceiling of a grid that of its largest entry."""
    for m, delta in [(60, 1e-5), (60, 1e-2), (1000, 1e-5)]:
        ceilings = [bound(m, r, r, delta=delta) for r in range(1, m + 1, max(1, m // 60))]
        assert (np.diff(ceilings) >= -1e-9).all()


@pytest.mark.parametrize("bound", [steinke, order_statistic])
def test_bounds_fall_with_canaries_not_guessed(bound):
    values = [bound(m, 100, 80, delta=1e-4) for m in (100, 300, 1000, 10_000)]
    assert (np.diff(values) < 0).all()


@pytest.mark.parametrize("bound", BOUNDS.values(), ids=BOUNDS)
@pytest.mark.parametrize("r", [1, 2, 9, 100, 500])
def test_bounds_are_zero_at_chance(bound, r):
    """Trap 5: a grid of noise levels that ends at 10 reports 0.34 for 250 of 500."""
    assert bound(500, r, r // 2, delta=1e-5) == 0.0
    assert bound(500, r, 0, delta=1e-5) == 0.0


def test_steinke_is_a_lower_limit():
    """Trap 2: the wrong binomial tail gives 0.552."""
    assert steinke(1000, 500, 300, delta=1e-5) == pytest.approx(0.2512, abs=1e-4)


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0])
@pytest.mark.parametrize(("m", "r"), [(50, 50), (200, 60)])
def test_steinke_holds_its_level_under_randomised_response(m, r, epsilon):
    """Exact probability of a bound above the true epsilon: at most 5%, and tight without delta."""
    q = 1 / (1 + math.exp(-epsilon))
    for delta in (0.0, 1e-4):
        v = smallest_rejection(lambda v, delta=delta: steinke(m, r, v, delta=delta), epsilon, r)
        assert stats.binom.sf(v - 1, r, q) <= 0.05
        if delta == 0.0:
            assert stats.binom.sf(v - 2, r, q) > 0.05


@pytest.mark.parametrize("m", [100, 400])
@pytest.mark.parametrize("delta", [0.162, 0.1])
def test_bounds_for_any_mechanism_survive_one_that_leaks_all_coins_at_once(m, delta):
    """With probability delta it tells every coin, else nothing: (0, delta)-DP, but no product of channels.

    The count is m with probability delta, else Binomial(m, 1/2): exact probabilities of a bound above 0.
    """

    def false_alarms(bound):
        v = smallest_rejection(lambda v: bound(m, m, v, delta=delta), 0.0, m)
        return delta * (v <= m) + (1 - delta) * stats.binom.sf(v - 1, m, 0.5)

    assert false_alarms(steinke) <= 0.05
    assert false_alarms(fdp_epsilon_delta) <= 0.05
    assert delta <= false_alarms(order_statistic) <= delta + 0.01


@pytest.mark.slow
def test_bounds_are_fast():
    """Five times what two busy cores needed; without the cache of roots."""

    def seconds(work):
        return min(timeit.repeat(work, number=1, repeat=3))

    assert seconds(lambda: bounds_fdp.fdp_gaussian_root.__wrapped__(1000, 1000, 800, 0.05)) < 5 * 3e-3
    assert seconds(lambda: bounds_fdp.fdp_epsilon_delta_root.__wrapped__(1000, 1000, 800, 1e-5, 0.05)) < 5 * 3e-3
    assert seconds(lambda: bounds.steinke_root.__wrapped__(100_000, 100_000, 70_000, 1e-5, 0.05)) < 5 * 50e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 11, 5), "num_guesses is 11, expected 1 <= num_guesses <= num_canaries = 10"),
        ((10, 0, 0), "num_guesses is 0"),
        ((10, 5, 6), "num_correct is 6, expected 0 <= num_correct <= num_guesses = 5"),
        ((10, 5, -1), "num_correct is -1"),
        ((10, 5.0, 3), "counts must be integers"),
    ],
)
@pytest.mark.parametrize("bound", BOUNDS.values(), ids=BOUNDS)
def test_bounds_reject_impossible_counts(bound, arguments, message):
    with pytest.raises(ValueError, match=message):
        bound(*arguments, delta=1e-5)


@pytest.mark.parametrize(("name", "bound"), BOUNDS.items(), ids=BOUNDS)
def test_bounds_reject_levels_out_of_range(name, bound):
    with pytest.raises(ValueError, match=r"delta is 1\.5"):
        bound(10, 5, 3, delta=1.5)
    if name.endswith("gaussian"):
        with pytest.raises(ValueError, match=r"delta is 0, expected \(0, 1\)"):
            bound(10, 5, 3, delta=0)
    else:
        assert bound(10, 5, 5, delta=0) > 0
    for significance in (0.0, 0.5, math.nan):
        with pytest.raises(ValueError, match="significance"):
            bound(10, 5, 3, delta=1e-5, significance=significance)


@pytest.mark.parametrize("epsilon", [-1, math.inf, math.nan])
def test_steinke_p_value_rejects_epsilon_out_of_range(epsilon):
    with pytest.raises(ValueError, match=f"epsilon is {epsilon}, expected a finite number >= 0"):
        steinke_p_value(10, 5, 3, epsilon=epsilon, delta=0.0)
