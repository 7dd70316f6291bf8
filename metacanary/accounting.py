"""Upper bounds on epsilon: what the accountant promises for DP-SGD, and exact Gaussian conversions."""

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterator
from numbers import Integral

import dp_accounting
from dp_accounting import pld, rdp
from scipy import optimize, special

ACCOUNTANTS = ("pld", "rdp")
ADJACENCIES = ("add_remove", "replace_one")

SLACK, MAX_RATIO, MAX_EXCESS = 1e-2, 1.2, 2.0
LARGE_EPSILON, MAX_RATIO_OF_LARGE = 20.0, 3.0
"""The known gap of the accountants: PLD's epsilon less `SLACK` is at most RDP's, and that is at most `MAX_RATIO` times
PLD's plus `MAX_EXCESS` / sigma^2 and `SLACK`; above `LARGE_EPSILON`, at most `MAX_RATIO_OF_LARGE` times PLD's. Of 1,332
mechanisms (sigma 0.5 to 20, q 1e-4 to 1, 1 to 10,000 steps, delta 1e-3 to 1e-7) the widest gaps were 4e-3 and
1.71 / sigma^2 up to epsilon 20, and ratios of 1.2 up to 50, 1.5 up to 100, 2.0 up to 300 and 2.9 above; beyond 1,000
PLD's numerics may end in inf, which is refused. Where DP-SGD is used, RDP's epsilon is a tenth larger."""

_FINE, _COARSE = 1e-4, 1e-3  # widths of PLD buckets: of reported values, and of a first guess 10 times faster

_RELATIONS = {
    "add_remove": dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
    "replace_one": dp_accounting.NeighboringRelation.REPLACE_ONE,
}


def epsilon(
    *,
    noise_multiplier: float,
    sampling_prob: float,
    num_steps: int,
    delta: float,
    accountant: str = "pld",
    adjacency: str = "add_remove",
) -> float:
    """Epsilon at delta of DP-SGD: the Poisson-subsampled Gaussian mechanism, composed num_steps times.

    Args:
      noise_multiplier: Standard deviation of the noise over the clip norm (sigma), >= 0; 0 means no privacy.
      sampling_prob: Probability that an example enters a batch (q), in (0, 1].
      num_steps: Updates (T), >= 1.
      delta: In (0, 1).
      accountant: "pld" (privacy loss distributions, tight) or "rdp" (Renyi, looser, as in older papers).
      adjacency: "add_remove" for the independent game; "replace_one" for the paired game, "pld" only.

    Returns:
      Epsilon; inf for noise_multiplier = 0.

    Raises:
      ValueError: If an argument is out of range, or the accountant does not know the adjacency.

    Guarantees:
      - An upper bound up to the accountant's own rounding: discretisation is pessimistic (interval 1e-4).
      - Holds for Poisson sampling only; not for shuffled batches or batches of a fixed size.

    References:
      Koskela, Jalko, Honkela 2020, arXiv 1906.03049 (PLD); Doroshenko et al. 2022, arXiv 2207.04380.
      Mironov, Talwar, Zhang 2019, arXiv 1908.10530 (RDP).
      Lebeda et al. 2024, arXiv 2405.20769 (add/remove against replace under subsampling).
    """
    _check_number("noise_multiplier", noise_multiplier, 0 <= noise_multiplier < math.inf, "a finite number >= 0")
    _check_mechanism(sampling_prob, num_steps, delta, accountant, adjacency)
    return _epsilon(
        float(noise_multiplier), float(sampling_prob), int(num_steps), float(delta), accountant, adjacency, _FINE
    )


def cross_checked_epsilon(
    *, noise_multiplier: float, sampling_prob: float, num_steps: int, delta: float, adjacency: str = "add_remove"
) -> float:
    """`epsilon` by PLD, once RDP has said much the same.

    RDP's bound is looser, by a tenth where DP-SGD is used. So a PLD epsilon above RDP's, or far below it, is a mistake
    of one of the two accountants, or of their numerics.

    Args:
      noise_multiplier, sampling_prob, num_steps, delta, adjacency: As of `epsilon`. RDP is asked about add/remove
        neighbours in any case, and is compared with PLD there.

    Returns:
      Epsilon by PLD.

    Raises:
      ValueError: As `epsilon`.
      ArithmeticError: If the two accountants differ by more than their known gap.
    """
    of_mechanism = functools.partial(
        epsilon, noise_multiplier=noise_multiplier, sampling_prob=sampling_prob, num_steps=num_steps, delta=delta
    )
    by_pld, by_rdp = of_mechanism(accountant="pld"), of_mechanism(accountant="rdp")
    excess = MAX_EXCESS / noise_multiplier**2 + SLACK if noise_multiplier > 0 else math.inf
    ratio = MAX_RATIO if by_pld <= LARGE_EPSILON else MAX_RATIO_OF_LARGE
    if noise_multiplier > 0 and not by_pld - SLACK <= by_rdp <= ratio * by_pld + excess:
        raise ArithmeticError(
            f"accountants differ: epsilon is {by_pld:.6g} by PLD and {by_rdp:.6g} by RDP for noise_multiplier "
            f"{noise_multiplier:g}, sampling_prob {sampling_prob:g}, num_steps {num_steps}, delta {delta:g}, expected "
            f"RDP's to be the larger, by at most {ratio - 1:.0%} and {excess:.3g}"
        )
    return by_pld if adjacency == "add_remove" else of_mechanism(adjacency=adjacency)


def noise_multiplier(
    *,
    epsilon: float,
    sampling_prob: float,
    num_steps: int,
    delta: float,
    accountant: str = "pld",
    adjacency: str = "add_remove",
) -> float:
    """Noise that makes DP-SGD (epsilon, delta)-DP: the inverse of `epsilon`.

    Args:
      epsilon: The target, > 0; inf for training without noise.
      sampling_prob: Probability that an example enters a batch (q), in (0, 1].
      num_steps: Updates (T), >= 1.
      delta: In (0, 1).
      accountant: "pld" or "rdp".
      adjacency: "add_remove" or "replace_one" ("pld" only).

    Returns:
      Standard deviation of the noise over the clip norm (sigma); 0 for epsilon = inf.

    Raises:
      ValueError: If an argument is out of range, or the accountant does not know the adjacency.

    Guarantees:
      - `epsilon` of the result is at most the target.
      - It is at most 1e-3 below the target.
    """
    _check_number("epsilon", epsilon, epsilon > 0, "a number > 0, or inf for no noise")
    _check_mechanism(sampling_prob, num_steps, delta, accountant, adjacency)
    if epsilon == math.inf:
        return 0.0
    return _noise_multiplier(float(epsilon), float(sampling_prob), int(num_steps), float(delta), accountant, adjacency)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon at delta of mu-GDP.

    The root of delta = Phi(-eps/mu + mu/2) - e^eps Phi(-eps/mu - mu/2), found in the log domain.

    Args:
      mu: Sensitivity over the standard deviation of the noise, >= 0 and finite.
      delta: In (0, 1).

    Returns:
      Epsilon; 0 where mu-GDP implies (0, delta)-DP.

    Raises:
      ValueError: If mu or delta is out of range.

    References:
      Balle, Wang 2018, arXiv 1805.06530, Theorem 8; Dong, Roth, Su 2019, arXiv 1905.02383, Corollary 2.13.
    """
    _check_number("mu", mu, 0 <= mu < math.inf, "a finite number >= 0")
    _check_delta(delta)
    if mu == 0 or _gaussian_log_delta(0.0, mu) <= math.log(delta):
        return 0.0
    # delta <= Phi(mu/2 - eps/mu) and the Gaussian tail bound give an upper end in closed form.
    upper = mu**2 / 2 + mu * math.sqrt(-2.0 * math.log(delta))
    root = optimize.brentq(lambda e: _gaussian_log_delta(e, mu) - math.log(delta), 0.0, upper, xtol=1e-13)
    return float(root)


def gaussian_mu(epsilon: float, delta: float) -> float:
    """The mu whose `gaussian_epsilon` at delta is epsilon.

    Args:
      epsilon: Finite, >= 0.
      delta: In (0, 1).

    Returns:
      The largest mu such that mu-GDP implies (epsilon, delta)-DP.

    Raises:
      ValueError: If epsilon or delta is out of range.
    """
    _check_number("epsilon", epsilon, 0 <= epsilon < math.inf, "a finite number >= 0")
    _check_delta(delta)
    return 1.0 / float(dp_accounting.get_sigma_gaussian(epsilon, delta))


def _gaussian_log_delta(epsilon: float, mu: float) -> float:
    """log(Phi(-eps/mu + mu/2) - e^eps Phi(-eps/mu - mu/2))."""
    first = float(special.log_ndtr(mu / 2 - epsilon / mu))
    second = epsilon + float(special.log_ndtr(-mu / 2 - epsilon / mu))
    return first + math.log(-math.expm1(second - first)) if second < first else -math.inf


@functools.lru_cache(maxsize=1024)
def _epsilon(
    noise_multiplier: float,
    sampling_prob: float,
    num_steps: int,
    delta: float,
    accountant: str,
    adjacency: str,
    interval: float,
) -> float:
    """`epsilon` without checks; `interval` is the width of the PLD's buckets."""
    if noise_multiplier == 0:
        return math.inf
    step = dp_accounting.PoissonSampledDpEvent(sampling_prob, dp_accounting.GaussianDpEvent(noise_multiplier))
    relation = _RELATIONS[adjacency]
    account: dp_accounting.PrivacyAccountant
    if accountant == "pld":
        account = pld.PLDAccountant(relation, value_discretization_interval=interval)
    else:
        account = rdp.RdpAccountant(neighboring_relation=relation)
    with _quiet_accountant():
        account.compose(dp_accounting.SelfComposedDpEvent(step, num_steps))
        return float(account.get_epsilon(delta))


@functools.lru_cache(maxsize=1024)
def _noise_multiplier(
    target: float, sampling_prob: float, num_steps: int, delta: float, accountant: str, adjacency: str
) -> float:
    """`noise_multiplier` without checks: a root in log sigma just below the target, coarse, then fine."""
    mechanism = (sampling_prob, num_steps, delta, accountant, adjacency)
    aim = target - min(5e-4, 0.05 * target)
    # |d epsilon / d log sigma| is below 3 epsilon where measured: this leaves less than 3e-4 of epsilon.
    tolerance = min(1e-4, 1e-2 * target) / max(1.0, target)
    log_sigma = math.log(_guess_sigma(target, sampling_prob, num_steps, delta, adjacency))
    for interval, step in ((_COARSE, 0.1), (_FINE, 10 * tolerance)):

        def excess(x: float, interval: float = interval) -> float:
            return _epsilon(math.exp(x), *mechanism, interval) - aim

        log_sigma = _root_from(log_sigma, excess, step, tolerance)
    while _epsilon(math.exp(log_sigma), *mechanism, _FINE) > target:
        log_sigma += tolerance
    return math.exp(log_sigma)


def _root_from(start: float, excess: Callable[[float], float], step: float, tolerance: float) -> float:
    """Root of a falling function, bracketed from a guess by steps that double."""
    low = high = start
    while excess(low) <= 0:
        low, step = low - step, 2 * step
    while excess(high) > 0:
        high, step = high + step, 2 * step
    return float(optimize.brentq(excess, low, high, xtol=tolerance)) if low < high else start


def _guess_sigma(target: float, sampling_prob: float, num_steps: int, delta: float, adjacency: str) -> float:
    """Sigma by the central limit: mu = q sqrt(T (e^(1/sigma^2) - 1)) (Bu et al. 2020, arXiv 1911.11607)."""
    mu = gaussian_mu(target, delta) / (2.0 if adjacency == "replace_one" else 1.0)
    return 1.0 / math.sqrt(math.log1p(mu**2 / (sampling_prob**2 * num_steps)))


@contextlib.contextmanager
def _quiet_accountant() -> Iterator[None]:
    """Hides dp-accounting's notes on Renyi orders it leaves out: without them the bound still holds."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _check_mechanism(sampling_prob: float, num_steps: int, delta: float, accountant: str, adjacency: str) -> None:
    """ValueError with name, value and expectation for the first argument out of range."""
    _check_number("sampling_prob", sampling_prob, 0 < sampling_prob <= 1, "a number in (0, 1]")
    _check_number("num_steps", num_steps, isinstance(num_steps, Integral) and num_steps >= 1, "an integer >= 1")
    _check_delta(delta)
    _check_number("accountant", accountant, accountant in ACCOUNTANTS, f"one of {ACCOUNTANTS}")
    _check_number("adjacency", adjacency, adjacency in ADJACENCIES, f"one of {ADJACENCIES}")
    if adjacency == "replace_one" and accountant != "pld":
        raise ValueError(
            f"accountant is {accountant!r}, expected 'pld': only it knows Poisson sampling under replace_one"
        )


def _check_delta(delta: float) -> None:
    """ValueError unless delta is in (0, 1)."""
    _check_number("delta", delta, 0 < delta < 1, "a number in (0, 1)")


def _check_number(name: str, value: object, valid: bool, expected: str) -> None:
    """ValueError naming argument, value and expectation unless valid."""
    if not valid:
        raise ValueError(f"{name} is {value!r}, expected {expected}")
