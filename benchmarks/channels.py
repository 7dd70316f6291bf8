"""Ideal channels: games whose true epsilon is known, for measuring how often a bound exceeds it and how close it comes.

A channel turns fair coins into scores. `CHANNELS` lists them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy import special

from metacanary.accounting import gaussian_epsilon
from metacanary.guesses import default_grid

SIGNIFICANCE = 0.05
"""Of the bounds that are tried; two channels are made against it."""
DELTA = 1e-5
LEAK = 0.162
"""Probability that the channel `mixture` tells all coins, and the delta at which it is audited."""
LEAKED_QUARTER = 0.0124
"""Delta of the channel `quarter_leak`, which tells a quarter of the coins with 4 times this probability: nearly 5%."""
_TIES = 0.01  # width of the noise that breaks the ties of told bits; it must stay below their distance

Draw = Callable[[np.random.Generator, int, int], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True, kw_only=True)
class Channel:
    """A mechanism on m fair coins, and what is true of it.

    Attributes:
      name: As in the tables.
      epsilon: The smallest epsilon such that it is (epsilon, delta)-DP in each coin; replace-one if paired.
      delta: Where it is audited, or a function of m that says so.
      draw: (rng, R, m) -> scores and coins of R runs, [R, m]; if paired [R, 2m], members 2i and 2i + 1 are pair i.
      paired: Whether the game is paired.
      gaussian: Whether the trade-off curve of each coin, given the others, is Gaussian.
      product: Whether coins pass independently of each other.
    """

    name: str
    epsilon: float
    delta: float | Callable[[int], float]
    draw: Draw
    paired: bool = False
    gaussian: bool
    product: bool

    def satisfies(self, assumption: str) -> bool:
        """Whether an auditor's assumption holds for it; never for those that claim no level ("none", "credible")."""
        needed = {
            "worst_case": True,
            "family": self.gaussian,
            "product": self.product,
            "family+product": self.gaussian and self.product,
            "asymptotic": self.gaussian and self.product,
        }
        return needed.get(assumption, False)

    def delta_at(self, size: int) -> float:
        """Where it is audited with m = size."""
        return self.delta(size) if callable(self.delta) else self.delta

    def pairs(self, size: int) -> np.ndarray | None:
        """The pair numbers of 2m canaries; None for independent coins."""
        return np.repeat(np.arange(size), 2) if self.paired else None


def gaussian(rng: np.random.Generator, runs: int, size: int, *, mu: float) -> tuple[np.ndarray, np.ndarray]:
    """N(mu, 1) for members, N(0, 1) for others; mu = 0 ignores the coins."""
    coins = flip(rng, runs, size)
    return rng.normal(size=coins.shape) + mu * coins, coins


def paired_gaussian(rng: np.random.Generator, runs: int, size: int, *, mu: float) -> tuple[np.ndarray, np.ndarray]:
    """The same for pairs of which one is a member.

    Replacing one by the other moves two scores by mu each, in all by sqrt(2) mu: sqrt(2) mu-GDP.
    """
    coins = _members(flip(rng, runs, size))
    return rng.normal(size=coins.shape) + mu * coins, coins


def shared_level(rng: np.random.Generator, runs: int, size: int, *, mu: float) -> tuple[np.ndarray, np.ndarray]:
    """How sure the guesses are is drawn once per run: |x| of x ~ N(mu/2, 1), and each coin is told truly with
    probability 1 / (1 + e^(-mu |x|)).

    Level and told bit of one coin together are a Gaussian of its own, and the other bits depend on this coin through
    nothing: exactly mu-GDP, but no product.
    """
    coins = flip(rng, runs, size)
    level = np.abs(rng.normal(mu / 2, 1, size=(runs, 1)))
    return _told(rng, coins, special.expit(mu * level)), coins


def randomised_response(
    rng: np.random.Generator, runs: int, size: int, *, epsilon: float
) -> tuple[np.ndarray, np.ndarray]:
    """Each coin is told truly with probability e^eps / (1 + e^eps): (epsilon, 0)-DP."""
    coins = flip(rng, runs, size)
    return _told(rng, coins, float(special.expit(epsilon))), coins


def mixture(rng: np.random.Generator, runs: int, size: int, *, leak: float) -> tuple[np.ndarray, np.ndarray]:
    """All coins of a run are told with probability `leak`, and none otherwise: (0, leak)-DP, no product."""
    coins = flip(rng, runs, size)
    told = rng.random((runs, 1)) < leak
    return _told(rng, coins, np.where(told, 1.0, 0.5)), coins


def partial_leak(
    rng: np.random.Generator, runs: int, size: int, *, epsilon: float, told: int, delta: float
) -> tuple[np.ndarray, np.ndarray]:
    """Randomised response on pairs; with probability delta m / told, that many coins drawn at random are told truly,
    and said to be: (epsilon, delta)-DP, replace-one; no product.

    A coin, whatever the others, is told with probability delta, and else passes randomised response.
    """
    coins = flip(rng, runs, size)
    leaks = rng.random((runs, 1)) < delta * size / told
    chosen = leaks & (rng.random((runs, size)).argsort(axis=1) < told)
    response = coins ^ (rng.random(coins.shape) >= special.expit(epsilon))
    sure = np.where(chosen, 2.0, 1.0) + _TIES * rng.random(coins.shape)
    return _gaps(np.where(chosen, coins, response), sure), _members(coins)


def announced_leak(rng: np.random.Generator, runs: int, size: int, *, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    """Pairs that let protocol "holdout" know when few guesses pay: (epsilon, delta)-DP, replace-one, where delta is
    `announced_delta`; no product.

    The halves of the coins are those that "holdout" draws: its seed is public. With probability p, r coins of each
    half, drawn at random, are told truly by large gaps. The rest of the first half is then randomised response with
    its answers turned, so that r guesses do best there, and the rest of the second half is noise. Otherwise all coins
    pass randomised response, but a quarter of the first half is noise with large gaps, so that as many guesses as
    possible do best. So "holdout" tests two numbers of guesses on the second half, each at the full level and in the
    runs in which it is too large.

    With p = delta (m / 2) / r any coin, whatever the others, is told with probability p r / (m / 2) = delta. Else it
    passes randomised response, turned or not, or noise, and which of them does not depend on the coins. So its
    hockey-stick divergence at x >= 0 is delta + w max(0, q - e^x (1 - q)), where q = e^epsilon / (1 + e^epsilon), and w
    is the probability of randomised response, > 0 but in the quarter: delta if and only if x >= epsilon.
    """
    coins, few = flip(rng, runs, size), announced_guesses(size)
    order = np.random.default_rng(0).permutation(size)  # as `Games.split` with the default seed
    first, second = order[: size // 2], order[size // 2 :]
    leaks = rng.random((runs, 1)) < announced_delta(size) * len(first) / few
    response = coins ^ (rng.random(coins.shape) >= special.expit(epsilon))
    told, turned, noise = (np.zeros((runs, size), bool) for _ in range(3))
    for half in (first, second):
        told[:, half] = leaks & (rng.random((runs, len(half))).argsort(axis=1) < few)
    turned[:, first] = noise[:, second] = leaks
    noise[:, first[: len(first) // 4]] |= ~leaks
    said = np.where(told, coins, np.where(noise, flip(rng, runs, size), response ^ turned))
    sure = np.where(told, 3.0, np.where(noise & ~leaks, 2.0, 1.0)) + _TIES * rng.random(coins.shape)
    return _gaps(said, sure), _members(coins)


def announced_guesses(size: int) -> int:
    """How many coins of each half `announced_leak` tells (r): the least number of the half's grid from 13 on."""
    return min(number for number in default_grid(size - size // 2) if number >= 13)


def announced_delta(size: int) -> float:
    """Where `announced_leak` at epsilon 1 is audited.

    r right guesses of r reject epsilon 1 as long as the coins are told with probability below the significance less
    q^r, which is what randomised response alone makes of them. 8% below that, r - 1 of r give a bound above 0, so that
    "holdout", which looks at the first half with some doubt, chooses r.
    """
    few = announced_guesses(size)
    return 0.92 * (SIGNIFICANCE - float(special.expit(1.0)) ** few) * few / (size // 2)


def partial_delta(size: int) -> float:
    """Where the channel `partial_leak` is audited: 1e-3 at m = 1000, where its bounds are closest to their level."""
    return 0.03 / math.sqrt(size)


def flip(rng: np.random.Generator, runs: int, size: int) -> np.ndarray:
    """Fair coins, bool [R, m]."""
    return rng.random((runs, size)) < 0.5


def randomised_response_epsilon(epsilon: float, delta: float) -> float:
    """Epsilon at delta of `randomised_response`: the root of q - e^x (1 - q) = delta, q = e^eps / (1 + e^eps)."""
    return max(0.0, math.log(math.exp(epsilon) - delta * (1 + math.exp(epsilon))))


def _members(coins: np.ndarray) -> np.ndarray:
    """Coins of pairs, [R, m], as those of their members, [R, 2m]."""
    return np.stack([coins, ~coins], axis=2).reshape(len(coins), -1)


def _gaps(said: np.ndarray, sure: np.ndarray) -> np.ndarray:
    """Scores of members, [R, 2m], such that the first of a pair is said to be in or not, by a gap of this size."""
    return np.stack([np.where(said, sure, 0.0), np.where(said, 0.0, sure)], axis=2).reshape(len(said), -1)


def _told(rng: np.random.Generator, coins: np.ndarray, truly: np.ndarray | float) -> np.ndarray:
    """The coins, each right with this probability, and noise that breaks ties."""
    told = coins ^ (rng.random(coins.shape) >= truly)
    return told + _TIES * rng.random(coins.shape)


CHANNELS = (
    Channel(name="ignore", epsilon=0.0, delta=DELTA, draw=partial(gaussian, mu=0.0), gaussian=True, product=True),
    *(
        Channel(
            name=f"gaussian_{mu:g}",
            epsilon=gaussian_epsilon(mu, DELTA),
            delta=DELTA,
            draw=partial(gaussian, mu=mu),
            gaussian=True,
            product=True,
        )
        for mu in (0.2, 0.5, 1.0, 2.0)
    ),
    Channel(
        name="paired_gaussian_1",
        epsilon=gaussian_epsilon(math.sqrt(2.0), DELTA),
        delta=DELTA,
        draw=partial(paired_gaussian, mu=1.0),
        paired=True,
        gaussian=True,
        product=True,
    ),
    *(
        Channel(
            name=f"randomised_response_{epsilon:g}",
            epsilon=randomised_response_epsilon(epsilon, DELTA),
            delta=DELTA,
            draw=partial(randomised_response, epsilon=epsilon),
            gaussian=False,
            product=True,
        )
        for epsilon in (1.0, 4.0)
    ),
    Channel(
        name="shared_level_1",
        epsilon=gaussian_epsilon(1.0, DELTA),
        delta=DELTA,
        draw=partial(shared_level, mu=1.0),
        gaussian=True,
        product=False,
    ),
    Channel(name="mixture", epsilon=0.0, delta=LEAK, draw=partial(mixture, leak=LEAK), gaussian=False, product=False),
    Channel(
        name="partial_leak",
        epsilon=1.0,
        delta=partial_delta,
        draw=lambda rng, runs, size: partial_leak(
            rng, runs, size, epsilon=1.0, told=size // 8, delta=partial_delta(size)
        ),
        paired=True,
        gaussian=False,
        product=False,
    ),
    Channel(
        name="quarter_leak",
        epsilon=1.0,
        delta=LEAKED_QUARTER,
        draw=lambda rng, runs, size: partial_leak(rng, runs, size, epsilon=1.0, told=size // 4, delta=LEAKED_QUARTER),
        paired=True,
        gaussian=False,
        product=False,
    ),
    Channel(
        name="announced_leak",
        epsilon=1.0,
        delta=announced_delta,
        draw=partial(announced_leak, epsilon=1.0),
        paired=True,
        gaussian=False,
        product=False,
    ),
)
BY_NAME = {channel.name: channel for channel in CHANNELS}
