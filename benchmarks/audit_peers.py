"""Bounds on epsilon by other packages and by ours, on the same scores: level, mean bound, seconds.

    python -m benchmarks.audit_peers                        # to results/audit_peers.csv; needs requirements.txt
    python -m benchmarks.audit_peers --games 2 --output /tmp/peers.csv

1000 canaries on ideal Gaussian channels. Each method plays the first of the same games, the slow ones fewer. Compare
methods within an assumption: what assumes more may say more.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import importlib.util
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from benchmarks import calibration
from benchmarks.channels import BY_NAME, DELTA
from benchmarks.measure import processor
from metacanary import store
from metacanary.auditors import AUDITORS, Auditor
from metacanary.guesses import Games

RESULTS = Path(__file__).resolve().parent / "results" / "audit_peers.csv"
SIZE = 1000
CHANNELS = ("ignore", "gaussian_0.5", "gaussian_1", "gaussian_2")
OURS = "metacanary"
OUR_PROTOCOLS = ("fixed", "corrected", "holdout", "surrogate")
"""Of these "fixed" only for what has no number of guesses to choose, and the others for what has."""
GAMES, SLOW_GAMES = 1000, {"epsilon_one_run_fdp": 20, "gdp": 60, "joint-beta": 20, "MultiSplit": 20, "credible": 60}
"""How many each method plays; the slow ones, by method, protocol or assumption."""
NUM_SPLITS = 15
QUANTILES = np.linspace(0.01, 0.99, 49)
"""Of the scores that choose a threshold for privacy-estimates, which takes one."""
KEY = ["package", "method", "protocol", "channel"]
COLUMNS = [
    *KEY,
    *("assumption", "holds", "num_canaries", "delta", "significance", "true_epsilon"),
    *("games", "false_alarms", "rate", "standard_error", "limit", "keeps_level"),
    *("mean_bound", "mean_error", "mean_share", "seconds"),
    *("seed", "processor", "version", "date"),
]
"""Of the CSV. mean_error: standard error of mean_bound. seconds: mean of a bound, all cores busy with others."""

Bound = Callable[[np.ndarray, np.ndarray, int], float]


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A bound of another package.

    Attributes:
      package: Its distribution.
      module: What is imported of it.
      method: What it calls the bound.
      protocol: How it chooses the threshold.
      assumption: As of our auditors; where another half chooses the threshold, canaries must not influence each other.
      bound: (scores [m], included [m], seed) -> epsilon.
    """

    package: str
    module: str
    method: str
    protocol: str
    assumption: str
    bound: Bound

    def bounds(self, games: Games, surrogates: Games, first: int) -> np.ndarray:
        """Of each game; `first` is the number of the first of them."""
        pairs = zip(games.values, games.coins, strict=True)
        return np.array([self.bound(scores, coins, first + i) for i, (scores, coins) in enumerate(pairs)])


@dataclass(frozen=True)
class Own:
    """One of our auditors under a protocol."""

    auditor: Auditor
    protocol: str
    package: str = OURS
    module: str = OURS

    @property
    def method(self) -> str:
        """The auditor's name."""
        return self.auditor.name

    @property
    def assumption(self) -> str:
        """The auditor's under the protocol."""
        return self.auditor.assumes(self.protocol)

    def bounds(self, games: Games, surrogates: Games, first: int) -> np.ndarray:
        """Of each game."""
        return calibration.bounds(self.auditor, self.protocol, DELTA, games, surrogates)


def jax_privacy(scores: np.ndarray, included: np.ndarray, seed: int, *, method: str, strategy: str | None) -> float:
    """A bound of jax-privacy's CanaryScoreAuditor; a strategy is how it chooses a threshold."""
    from jax_privacy import auditing

    auditor = auditing.CanaryScoreAuditor(scores[included], scores[~included])
    bound = getattr(auditor, method)
    if strategy is None:
        return float(bound(calibration.SIGNIFICANCE, DELTA))
    strategies = {
        "Bonferroni": auditing.Bonferroni,
        "Split": partial(auditing.Split, seed=seed),
        "MultiSplit": partial(auditing.MultiSplit, num_samples=NUM_SPLITS, seed=seed),
    }
    return float(bound(calibration.SIGNIFICANCE, DELTA, threshold_strategy=strategies[strategy]()))


def privacy_estimates(scores: np.ndarray, included: np.ndarray, seed: int, *, method: str) -> float:
    """A bound of privacy-estimates at the threshold whose bound "beta" is best on a held-out half."""
    from privacy_estimates import AttackResults, compute_eps_lo

    def bound(half: np.ndarray, threshold: float, kind: str) -> float:
        says_in, is_in = scores[half] >= threshold, included[half]
        count = AttackResults(
            FN=int((~says_in & is_in).sum()),
            FP=int((says_in & ~is_in).sum()),
            TN=int((~says_in & ~is_in).sum()),
            TP=int((says_in & is_in).sum()),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of integrals that converge slowly
            return float(compute_eps_lo(count, DELTA, calibration.SIGNIFICANCE, kind))

    first, second = halves(len(scores), seed)
    threshold = max(np.quantile(scores[first], QUANTILES), key=lambda value: bound(first, value, "beta"))
    return bound(second, threshold, method)


def opake(scores: np.ndarray, included: np.ndarray, seed: int, *, method: str, held_out: bool) -> float:
    """A bound of opake-auditing; its own threshold is the best on the same scores, the other one on a held-out half."""
    from opake import auditing
    from opake.auditing.types import CoinFlip

    threshold, tested = None, np.arange(len(scores))
    if held_out:
        first, tested = halves(len(scores), seed)
        threshold = best_threshold(scores[first], included[first])
    coins = CoinFlip(
        num_canaries=len(tested),
        canary_indices=tested,
        _in_mask=included[tested],
        in_indices=tested[included[tested]],
        out_indices=tested[~included[tested]],
    )
    estimate = auditing.one_run(auditing.canary_scores(scores[tested], canary_indices=tested), coin_flip=coins)
    guesses, errors = estimate._best_r_u(threshold)
    return opake_bound(Decided(guesses, errors, method, estimate, threshold))


@dataclass(frozen=True)
class Decided:
    """What decides a bound of opake-auditing (guesses, errors, method), and what it is computed from."""

    guesses: int
    errors: int
    method: str
    estimate: Any = field(compare=False)
    threshold: float | None = field(compare=False)


@functools.cache
def opake_bound(decided: Decided) -> float:
    """The bound, once for each number of errors: by `gdp` it takes seconds."""
    bound = getattr(decided.estimate, decided.method)()
    significance = calibration.SIGNIFICANCE
    return float(bound.epsilon_at(delta=DELTA, significance=significance, threshold=decided.threshold))


def halves(size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two halves of the canaries, drawn without looking at them."""
    order = np.random.default_rng([calibration.SEED, seed]).permutation(size)
    return order[: size // 2], order[size // 2 :]


def best_threshold(scores: np.ndarray, included: np.ndarray) -> float:
    """The score from which on IN is said, such that most are right."""
    order = np.argsort(scores)
    right = included.sum() + np.cumsum(np.where(included[order], -1, 1))  # with all up to this one said OUT
    best = int(np.argmax(right))
    return float(scores[order][best : best + 2].mean())


def _of_jax_privacy() -> Iterable[Peer]:
    """Its bounds with each way of choosing a threshold."""
    create = partial(Peer, package="jax-privacy", module="jax_privacy")
    for method, assumption, split in (
        ("epsilon_one_run", "worst_case", "product"),
        ("epsilon_one_run_fdp", "family", "family+product"),
        ("epsilon_clopper_pearson", "product", "product"),
    ):
        for strategy in ("Bonferroni", "Split", "MultiSplit"):
            bound = partial(jax_privacy, method=method, strategy=strategy)
            assumed = assumption if strategy == "Bonferroni" else split
            yield create(method=method, protocol=strategy, assumption=assumed, bound=bound)
    bound = partial(jax_privacy, method="epsilon_from_gdp", strategy=None)
    yield create(method="epsilon_from_gdp", protocol="its own", assumption="family+product", bound=bound)


def _of_others() -> Iterable[Peer]:
    """The bounds of privacy-estimates and opake-auditing."""
    create = partial(Peer, package="privacy-estimates", module="privacy_estimates", protocol="held-out half")
    for method, assumption in (("beta", "product"), ("joint-beta", "credible")):
        yield create(method=method, assumption=assumption, bound=partial(privacy_estimates, method=method))
    create = partial(Peer, package="opake-auditing", module="opake")
    for method, assumption in (("eps_delta", "product"), ("gdp", "family+product")):
        for protocol in ("its own", "held-out half"):
            bound = partial(opake, method=method, held_out=protocol != "its own")
            yield create(method=method, protocol=protocol, assumption=assumption, bound=bound)


PEERS = (*_of_jax_privacy(), *_of_others())
METHODS: tuple[Peer | Own, ...] = (
    *(Own(a, protocol) for a in AUDITORS for protocol in OUR_PROTOCOLS if a.statistic.chosen != (protocol == "fixed")),
    *PEERS,
)


def num_games(method: Peer | Own) -> int:
    """How many games a method plays."""
    return min(SLOW_GAMES.get(name, GAMES) for name in (method.method, method.protocol, method.assumption))


def available() -> list[Peer | Own]:
    """The methods whose package is installed."""
    return [method for method in METHODS if importlib.util.find_spec(method.module)]


def measured(task: tuple[int, str, int]) -> dict[str, Any]:
    """The row of a method, by its place in `METHODS`, on a channel in at most so many games."""
    index, name, most = task
    method, channel = METHODS[index], BY_NAME[name]
    found: list[float] = []
    seconds = 0.0
    opake_bound.cache_clear()
    for games, surrogates in calibration.batches(channel, SIZE, min(most, num_games(method))):
        began = time.perf_counter()
        found += method.bounds(games, surrogates, len(found)).tolist()
        seconds += time.perf_counter() - began
    values, computed = np.array(found), opake_bound.cache_info().misses or len(found)
    return (
        {"package": method.package, "method": method.method, "protocol": method.protocol, "channel": name}
        | {"assumption": method.assumption, "holds": channel.satisfies(method.assumption)}
        | {"num_canaries": SIZE, "delta": DELTA, "significance": calibration.SIGNIFICANCE}
        | calibration.summary(values, channel.epsilon)
        | {"mean_error": values.std(ddof=1) / len(values) ** 0.5, "seconds": seconds / computed}
        | {"seed": calibration.SEED, "processor": processor(), "version": version(method.package)}
        | {"date": date.today()}
    )


def version(package: str) -> str:
    """Of an installed package; ours is that of the repository."""
    return "" if package == OURS else importlib.metadata.version(package)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", nargs="+", help="all that are installed if not given")
    parser.add_argument("--games", type=int, default=GAMES, help="at most, of each method on each channel")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    chosen = [METHODS.index(m) for m in available() if args.packages is None or m.package in args.packages]
    # The slow ones first, so that no process is left alone with one.
    costly = sorted(chosen, key=lambda index: num_games(METHODS[index]))
    tasks = [(index, channel, args.games) for index in costly for channel in CHANNELS]
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        rows = list(tqdm(pool.imap_unordered(measured, tasks), total=len(tasks), unit="row"))
    place = {(m.package, m.method, m.protocol): index for index, m in enumerate(METHODS)}
    rows.sort(key=lambda row: (place[tuple(row[key] for key in KEY[:3])], CHANNELS.index(row["channel"])))
    store.write_text(args.output, pd.DataFrame(rows, columns=COLUMNS).to_csv(index=False))


if __name__ == "__main__":
    main()
