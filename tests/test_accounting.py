"""Accounting: closed forms, other libraries, known tables, order of accountants, calibration."""

import json
import logging
import math
from pathlib import Path

import dp_accounting
import numpy as np
import pytest
from scipy import stats

from metacanary import accounting
from metacanary.accounting import cross_checked_epsilon, epsilon, gaussian_epsilon, gaussian_mu, noise_multiplier

DIGITS = {"sampling_prob": 0.2, "num_steps": 200, "delta": 1e-5}
CIFAR = {"sampling_prob": 4096 / 49_500, "delta": 1e-5}
VECTORS = Path(__file__).parents[2] / "shared" / "vectors" / "audit_vectors.json"

# sigma for batch 4096 of 49,500 and delta 1e-5, by dp-accounting 0.6.0. 2,500 updates: arXiv 2210.03403; 850: sigma
# 1.75 has epsilon 7.86 by RDP.
SIGMAS = {
    (2500, "pld"): {8: 2.600, 6: 3.260, 4: 4.555, 2: 8.309, 1: 15.48},
    (2500, "rdp"): {8: 2.757, 6: 3.470, 4: 4.873, 2: 8.955, 1: 16.79},
    (850, "pld"): {8: 1.636, 6: 2.009, 4: 2.747, 2: 4.912, 1: 9.080},
    (850, "rdp"): {8: 1.730, 6: 2.132, 4: 2.935, 2: 5.293, 1: 9.849},
}


def vectors(method):
    """Inputs of the shared vectors, or one skipped case where they are absent."""
    if not VECTORS.exists():
        return [pytest.param(None, marks=pytest.mark.skip(reason=f"{VECTORS} is absent"))]
    cases = json.loads(VECTORS.read_text())["vectors"]
    return [pytest.param(case, id=case["name"]) for case in cases if case["method"] == method]


def mechanism(inputs):
    return {
        "sampling_prob": inputs["batch_size"] / inputs["num_samples"],
        "num_steps": inputs["steps"],
        "delta": inputs["delta"],
    }


def check_sigma(num_steps, accountant, target):
    sigma = noise_multiplier(epsilon=target, num_steps=num_steps, accountant=accountant, **CIFAR)
    assert sigma == pytest.approx(SIGMAS[num_steps, accountant][target], rel=1e-3)


@pytest.mark.parametrize("case", vectors("gaussian_mechanism_eps"))
def test_gaussian_epsilon_matches_vectors(case):
    assert abs(gaussian_epsilon(**case["inputs"]) - case["expected"]) <= case["tolerance"], case["source"]


@pytest.mark.parametrize("case", vectors("dpsgd_poisson_pld_eps"))
def test_epsilon_matches_vectors(case):
    value = epsilon(noise_multiplier=case["inputs"]["noise_multiplier"], **mechanism(case["inputs"]))
    assert abs(value - case["expected"]) <= case["tolerance"], case["source"]


@pytest.mark.parametrize("case", vectors("dpsgd_poisson_pld_sigma"))
def test_noise_multiplier_matches_vectors(case):
    value = noise_multiplier(epsilon=case["inputs"]["target_epsilon"], **mechanism(case["inputs"]))
    assert abs(value - case["expected"]) <= case["tolerance"], case["source"]


@pytest.mark.parametrize("delta", [1e-9, 1e-5, 0.1])
@pytest.mark.parametrize("mu", [0.01, 0.5, 1.0, 3.0])
def test_gaussian_epsilon_solves_the_definition(mu, delta):
    """delta(eps) as printed; for mu = 0.01 both terms cancel to 1e-16 / delta."""
    value = gaussian_epsilon(mu, delta)
    phi = stats.norm.cdf
    spent = phi(-value / mu + mu / 2) - math.exp(value) * phi(-value / mu - mu / 2)
    assert spent == pytest.approx(delta, rel=1e-6) or (value == 0 and spent < delta)


@pytest.mark.parametrize("mu", [1e-3, 0.3, 5.0, 50.0, 1e4])
def test_gaussian_epsilon_equals_dp_accounting_however_large(mu):
    expected = dp_accounting.get_epsilon_gaussian(1 / mu, 1e-5)
    assert gaussian_epsilon(mu, 1e-5) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("value", [0.0, 1e-3, 1.0, 8.0, 500.0])
def test_gaussian_mu_inverts_gaussian_epsilon(value):
    assert gaussian_epsilon(gaussian_mu(value, 1e-5), 1e-5) == pytest.approx(value, rel=1e-8, abs=1e-9)


def test_gaussian_epsilon_is_zero_where_delta_covers_it():
    total_variation = 2 * stats.norm.cdf(0.25) - 1
    assert gaussian_epsilon(0.5, total_variation * 1.001) == 0.0
    assert gaussian_epsilon(0.5, total_variation * 0.999) > 0.0
    assert gaussian_epsilon(0.0, 1e-5) == 0.0


@pytest.mark.parametrize(("adjacency", "sensitivity"), [("add_remove", 1), ("replace_one", 2)])
def test_epsilon_without_sampling_is_gaussian(adjacency, sensitivity):
    """q = 1: T steps are mu = sensitivity sqrt(T) / sigma; PLD rounds up, by less than 1e-4."""
    value = epsilon(noise_multiplier=5.0, sampling_prob=1, num_steps=16, delta=1e-5, adjacency=adjacency)
    exact = gaussian_epsilon(sensitivity * 4 / 5, 1e-5)
    assert exact <= value <= exact + 1e-4


def test_epsilon_by_rdp_exceeds_pld_by_the_known_gap():
    """De et al. 2022 (arXiv 2204.13650): batch 4096 of 50,000; (sigma, T) -> (RDP, PLD)."""
    table = {(10, 875): (0.99, 0.90), (5, 1593): (2.98, 2.75), (3, 2468): (7.05, 6.53)}
    for (sigma, steps), (by_rdp, by_pld) in table.items():
        options = {
            "noise_multiplier": sigma,
            "sampling_prob": 4096 / 50_000,
            "num_steps": steps,
            "delta": 1e-5,
        }
        assert epsilon(**options, accountant="rdp") == pytest.approx(by_rdp, abs=6e-3)
        assert epsilon(**options) == pytest.approx(by_pld, abs=6e-3)


def test_epsilon_under_replace_one_is_between_one_and_two_groups():
    """Replacing is removing and adding: more than add/remove, at most its group bound for two."""
    one = epsilon(noise_multiplier=4.0, **DIGITS)
    two = epsilon(noise_multiplier=4.0, adjacency="replace_one", **DIGITS)
    small_delta = DIGITS | {"delta": 1e-5 / (1 + math.exp(one * 1.2))}
    assert 1.5 * one < two < 2 * epsilon(noise_multiplier=4.0, **small_delta)
    assert two == pytest.approx(6.539, abs=1e-2)


def test_epsilon_is_monotone():
    def by(**change):
        return epsilon(**({"noise_multiplier": 3.0, **DIGITS} | change))

    assert by(noise_multiplier=2.8) > by() > by(noise_multiplier=4.0)
    assert by(sampling_prob=0.22) > by() > by(sampling_prob=0.1)
    assert by(num_steps=220) > by() > by(num_steps=100)
    assert by(delta=1e-7) > by() > by(delta=1e-3)


def test_epsilon_is_stable_where_it_is_large():
    values = [epsilon(noise_multiplier=sigma, **DIGITS) for sigma in (1.0, 0.6)]
    assert np.allclose(values, [21.541, 58.963], rtol=1e-4)  # dp-accounting 0.6.0
    assert epsilon(noise_multiplier=0.0, **DIGITS) == math.inf


def test_epsilon_leaves_logging_as_it_was(caplog):
    logger = logging.getLogger("absl")
    level = logger.level
    epsilon(noise_multiplier=1.01, accountant="rdp", **DIGITS)
    assert not caplog.records
    assert logger.level == level


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize("target", [0.1, 1.0, 8.0, 20.0])
def test_noise_multiplier_spends_the_target_and_no_more(accountant, target):
    sigma = noise_multiplier(epsilon=target, accountant=accountant, **DIGITS)
    spent = epsilon(noise_multiplier=sigma, accountant=accountant, **DIGITS)
    assert target - 1e-3 <= spent <= target


@pytest.mark.parametrize("sampling_prob", [1e-3, 1.0])
def test_noise_multiplier_spends_the_target_at_extreme_sampling(sampling_prob):
    options = {"sampling_prob": sampling_prob, "num_steps": 50, "delta": 1e-6}
    sigma = noise_multiplier(epsilon=2.0, **options)
    assert 2.0 - 1e-3 <= epsilon(noise_multiplier=sigma, **options) <= 2.0


def test_noise_multiplier_under_replace_one_is_larger():
    sigma = noise_multiplier(epsilon=8.0, adjacency="replace_one", **DIGITS)
    assert sigma > 1.5 * noise_multiplier(epsilon=8.0, **DIGITS)
    spent = epsilon(noise_multiplier=sigma, adjacency="replace_one", **DIGITS)
    assert 8.0 - 1e-3 <= spent <= 8.0


def test_noise_multiplier_of_infinite_epsilon_is_zero():
    assert noise_multiplier(epsilon=math.inf, **DIGITS) == 0.0


@pytest.mark.parametrize(
    ("num_steps", "accountant", "target"),
    [(2500, "pld", 8), (2500, "rdp", 1), (850, "pld", 2), (850, "rdp", 8)],
)
def test_noise_multiplier_matches_known_sigmas(num_steps, accountant, target):
    check_sigma(num_steps, accountant, target)


@pytest.mark.slow
@pytest.mark.parametrize(("num_steps", "accountant"), SIGMAS)
def test_noise_multiplier_matches_all_known_sigmas(num_steps, accountant):
    for target in SIGMAS[num_steps, accountant]:
        check_sigma(num_steps, accountant, target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampling_prob": 0.0}, r"sampling_prob is 0.0, expected a number in \(0, 1\]"),
        ({"sampling_prob": 1.1}, r"sampling_prob is 1\.1"),
        ({"num_steps": 0}, "num_steps is 0, expected an integer >= 1"),
        ({"num_steps": 2.5}, r"num_steps is 2\.5, expected an integer >= 1"),
        ({"delta": 0.0}, r"delta is 0.0, expected a number in \(0, 1\)"),
        ({"delta": 1.0}, r"delta is 1\.0"),
        ({"accountant": "prv"}, "accountant is 'prv', expected one of"),
        ({"adjacency": "swap"}, "adjacency is 'swap', expected one of"),
        ({"adjacency": "replace_one", "accountant": "rdp"}, "accountant is 'rdp', expected 'pld'"),
    ],
)
def test_accounting_rejects_bad_mechanisms(change, message):
    with pytest.raises(ValueError, match=message):
        epsilon(**({"noise_multiplier": 1.0, **DIGITS} | change))
    with pytest.raises(ValueError, match=message):
        noise_multiplier(**({"epsilon": 1.0, **DIGITS} | change))


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_noise_multiplier_rejects_bad_targets(value):
    with pytest.raises(ValueError, match="epsilon is"):
        noise_multiplier(epsilon=value, **DIGITS)


@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_epsilon_rejects_bad_noise(value):
    with pytest.raises(ValueError, match="noise_multiplier is"):
        epsilon(noise_multiplier=value, **DIGITS)
    with pytest.raises(ValueError, match="mu is"):
        gaussian_epsilon(value, 1e-5)
    with pytest.raises(ValueError, match="epsilon is"):
        gaussian_mu(value, 1e-5)


# De et al. 2022 (arXiv 2204.13650): batch 4096 of 50,000; (sigma, T) -> epsilon at 1e-5 by RDP and by PLD.
DE_ET_AL = {
    (10, 875): (0.99, 0.90),
    (6, 1125): (2.00, 1.84),
    (5, 1593): (2.98, 2.75),
    (4, 1687): (4.00, 3.69),
    (3, 2468): (7.05, 6.53),
}


@pytest.mark.parametrize(("sigma", "num_steps"), DE_ET_AL)
def test_cross_checked_epsilon_is_that_of_pld(sigma, num_steps):
    """Both accountants give the values of the table, to its last digit; PLD's is returned."""
    options = {"sampling_prob": 4096 / 50_000, "num_steps": num_steps, "delta": 1e-5, "noise_multiplier": sigma}
    by_rdp, by_pld = DE_ET_AL[sigma, num_steps]
    assert epsilon(**options, accountant="rdp") == pytest.approx(by_rdp, abs=6e-3)
    assert cross_checked_epsilon(**options) == epsilon(**options) == pytest.approx(by_pld, abs=6e-3)


@pytest.mark.parametrize("target", [8, 6, 4, 2, 1])
@pytest.mark.parametrize("num_steps", [2500, 850])
def test_cross_checked_epsilon_of_known_sigmas_is_their_target(num_steps, target):
    """PLD's sigma spends the target; RDP's is larger and spends less. The table has four digits."""
    options = {"num_steps": num_steps, **CIFAR}
    spent = cross_checked_epsilon(noise_multiplier=SIGMAS[num_steps, "pld"][target], **options)
    assert spent == pytest.approx(target, rel=2e-3)
    by_rdp = SIGMAS[num_steps, "rdp"][target]
    assert epsilon(noise_multiplier=by_rdp, accountant="rdp", **options) == pytest.approx(target, rel=2e-3)
    assert cross_checked_epsilon(noise_multiplier=by_rdp, **options) < spent


def test_cross_checked_epsilon_under_replace_one_is_larger():
    """RDP does not know it: checked under add/remove, returned under replace-one."""
    found = cross_checked_epsilon(noise_multiplier=4.0, adjacency="replace_one", **DIGITS)
    assert found == epsilon(noise_multiplier=4.0, adjacency="replace_one", **DIGITS)
    assert found > 1.5 * cross_checked_epsilon(noise_multiplier=4.0, **DIGITS)


@pytest.mark.parametrize(
    ("sigma", "sampling_prob", "num_steps"),
    [
        (0.64, 0.08192, 2500),
        (0.6, 0.1, 1000),
        (1.0, 0.5, 1000),
        (2.0, 0.5, 10_000),
        (0.5, 0.2, 200),
        (0.5, 0.01, 10_000),
    ],
)
def test_cross_checked_epsilon_lets_large_epsilons_pass(sigma, sampling_prob, num_steps):
    """Audits of hardly private runs: RDP is up to 1.6 times PLD here, and both are right."""
    options = {"noise_multiplier": sigma, "sampling_prob": sampling_prob, "num_steps": num_steps, "delta": 1e-5}
    assert cross_checked_epsilon(**options) == epsilon(**options) > accounting.LARGE_EPSILON


@pytest.mark.slow
def test_cross_checked_epsilon_lets_mechanisms_drawn_at_random_pass():
    """Up to epsilon 1,000, beyond which PLD's numerics may end in inf."""
    rng, found = np.random.default_rng(1), []
    while len(found) < 60:
        options = {"noise_multiplier": math.exp(rng.uniform(math.log(0.5), math.log(20)))}
        options["sampling_prob"] = math.exp(rng.uniform(math.log(1e-3), 0))
        options |= {"num_steps": int(math.exp(rng.uniform(0, math.log(10_000)))), "delta": 10 ** rng.uniform(-7, -3)}
        if epsilon(**options, accountant="rdp") < 1000:
            found.append(cross_checked_epsilon(**options))
    assert min(found) < 1
    assert max(found) > 50


def test_cross_checked_epsilon_without_noise_is_infinite():
    assert cross_checked_epsilon(noise_multiplier=0.0, **DIGITS) == math.inf


@pytest.mark.parametrize(
    ("accountant", "wrong"),
    [
        ("pld", lambda value: 0.25 * value),  # too optimistic: RDP says far more
        ("pld", lambda value: 1.2 * value),  # above RDP, which is looser
        ("rdp", lambda value: 0.9 * value - 0.2),
        ("rdp", lambda value: 2 * value + 3),
        ("pld", lambda value: math.nan),
        ("rdp", lambda value: math.inf),
    ],
)
@pytest.mark.parametrize("adjacency", ["add_remove", "replace_one"])
def test_cross_checked_epsilon_raises_when_one_accountant_is_wrong(accountant, wrong, adjacency, monkeypatch):
    """Whichever it is; the message has both values."""
    options = {"noise_multiplier": 3.0, **DIGITS}
    right = {name: epsilon(**options, accountant=name) for name in accounting.ACCOUNTANTS}
    honest = accounting._epsilon

    def broken(*args):
        return wrong(honest(*args)) if accountant in args else honest(*args)

    monkeypatch.setattr(accounting, "_epsilon", broken)
    both = right | {accountant: wrong(right[accountant])}
    with pytest.raises(ArithmeticError) as error:
        cross_checked_epsilon(**options, adjacency=adjacency)
    assert f"epsilon is {both['pld']:.6g} by PLD and {both['rdp']:.6g} by RDP" in str(error.value)
    assert "noise_multiplier 3, sampling_prob 0.2, num_steps 200, delta 1e-05" in str(error.value)


def test_cross_checked_epsilon_rejects_bad_mechanisms():
    with pytest.raises(ValueError, match=r"delta is 1\.0, expected a number in"):
        cross_checked_epsilon(noise_multiplier=1.0, **DIGITS | {"delta": 1.0})
    with pytest.raises(ValueError, match="adjacency is 'swap', expected one of"):
        cross_checked_epsilon(noise_multiplier=1.0, adjacency="swap", **DIGITS)
