"""How often each bound exceeds the true epsilon, and how close it comes: every auditor, protocol and ideal channel.

    python -m benchmarks.calibration                        # to results/calibration.csv
    python -m benchmarks.calibration --share 0.01 --output /tmp/calibration.csv

A case is a channel and a number of canaries; cases run in processes of their own, and the file has the rows of a case
as soon as it is done. `--resume` keeps the rows that are there. All protocols meet the same games.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from benchmarks.channels import BY_NAME, CHANNELS, SIGNIFICANCE, Channel
from benchmarks.measure import processor
from metacanary import protocols, store
from metacanary.auditors import AUDITORS, NAMES, Auditor, select
from metacanary.guesses import Games, make_games

RESULTS = Path(__file__).resolve().parent / "results" / "calibration.csv"
SEED = 0
NUM_GAMES = {100: 2000, 1000: 1000, 5000: 1000}
"""By the number of canaries, or of pairs."""
BATCH = 25  # games that share their surrogate runs
NUM_SURROGATES = 4
NUM_SPLITS = 15  # fewer than the default, for time; any number keeps the level
FEWER = {"holdout": 2, "median": 8, "paper": 8, "credible": 20}
"""What takes longest, or claims nothing, is played in so many times fewer games."""
AGAIN = 10
DOUBT = 1.5
"""A row that claims a level and is over the significance by so many standard errors is played again, in `AGAIN` times
as many fresh games, and that verdict stands. It sees what is 1% too much, and few of many rows fail by chance."""
KEY = ["channel", "num_canaries", "protocol", "auditor"]
COLUMNS = [
    *KEY,
    *("assumption", "holds", "delta", "significance", "true_epsilon"),
    *("games", "false_alarms", "rate", "standard_error", "limit", "keeps_level", "mean_bound", "mean_share"),
    *("played_again", "seed", "processor", "date"),
]
"""Of the CSV. assumption: the auditor's under the protocol. holds: whether the channel satisfies it. false_alarms:
games whose bound exceeds the true epsilon. limit: the significance and three standard errors. mean_share: of the true
epsilon."""
Play = tuple[str, Auditor]


def paper_grid(size: int) -> list[int]:
    """At most 100 numbers of guesses from 1 to m, evenly on a log scale; all would take hours and find a bit more."""
    return np.unique(np.geomspace(1, size, 100).round().astype(int)).tolist()


PROTOCOLS: dict[str, tuple[str, Callable[[int], dict[str, Any]]]] = {
    "fixed": ("fixed", lambda size: {}),
    "fixed_quarter": ("fixed", lambda size: {"num_guesses": size // 4}),
    "corrected": ("corrected", lambda size: {}),
    "corrected_geometric": ("corrected", lambda size: {"spending": "geometric"}),
    "holdout": ("holdout", lambda size: {}),
    "median": ("median", lambda size: {"num_splits": NUM_SPLITS}),
    "surrogate": ("surrogate", lambda size: {}),
    "paper": ("paper", lambda size: {"grid": paper_grid(size)}),
}
"""Name in the tables -> the protocol, and its options for so many canaries."""


def plays(auditor: Auditor, protocol: str) -> bool:
    """Whether an auditor plays under a protocol: one that has nothing to choose does under "fixed" only."""
    return auditor.statistic.chosen or protocol == "fixed"


@dataclass(frozen=True)
class Case:
    """What one process plays."""

    channel: str
    size: int
    share: float
    protocols: tuple[str, ...] = tuple(PROTOCOLS)
    auditors: tuple[str, ...] = NAMES

    def games(self, play: Play) -> int:
        """How many games an auditor plays at first under a protocol."""
        protocol, auditor = play
        fewer = FEWER.get(PROTOCOLS[protocol][0], 1) * FEWER.get(auditor.assumption, 1)
        return max(2, round(self.share * NUM_GAMES[self.size] / fewer))

    def rows(self) -> list[dict[str, Any]]:
        """A row per protocol and auditor."""
        chosen = [(p, auditor) for p in self.protocols for auditor in select(self.auditors) if plays(auditor, p)]
        first = self._played({play: self.games(play) for play in chosen}, SEED)
        doubted = [play for play in chosen if self._doubted(play, first[play])]
        second = self._played({play: AGAIN * self.games(play) for play in doubted}, SEED + 1)
        return [(first | second)[play] | {"played_again": play in second} for play in chosen]

    def _doubted(self, play: Play, found: dict[str, Any]) -> bool:
        """Whether a row is played again; also one that claims no level only because of the protocol's assumption."""
        protocol, auditor = play
        claims = protocol != "paper" and BY_NAME[self.channel].satisfies(auditor.assumption)
        return claims and found["rate"] > limit(found["games"], DOUBT)

    def _played(self, games: dict[Play, int], seed: int) -> dict[Play, dict[str, Any]]:
        """What was found in so many games."""
        channel = BY_NAME[self.channel]
        delta = channel.delta_at(self.size)
        found: dict[Play, list[float]] = {play: [] for play in games}
        most = max(games.values(), default=0)
        for played, (some, surrogates) in enumerate(batches(channel, self.size, most, seed)):
            for (protocol, auditor), number in games.items():
                if (left := number - played * BATCH) > 0:
                    own = _first(some, left)
                    found[protocol, auditor] += bounds(auditor, protocol, delta, own, surrogates).tolist()
        return {
            (protocol, auditor): row(np.array(b), channel, self.size, protocol, auditor) | {"seed": seed}
            for (protocol, auditor), b in found.items()
        }


def batches(channel: Channel, size: int, num_games: int, seed: int = SEED) -> Iterator[tuple[Games, Games]]:
    """Games of a channel in batches of `BATCH`, each with the surrogate runs it is audited with."""
    for batch in range(math.ceil(num_games / BATCH)):
        seeds = [seed, CHANNELS.index(channel), size, batch]
        played, others = (np.random.default_rng([*seeds, stream]) for stream in (0, 1))
        pairs, runs = channel.pairs(size), min(BATCH, num_games - batch * BATCH)
        yield (
            make_games(*channel.draw(played, runs, size), pairs),
            make_games(*channel.draw(others, NUM_SURROGATES, size), pairs),
        )


def bounds(auditor: Auditor, protocol: str, delta: float, games: Games, surrogates: Games) -> np.ndarray:
    """The bounds of one auditor on each of R games, [R]."""
    kind, more = PROTOCOLS[protocol]
    options = protocols.Options(
        delta=delta,
        significance=SIGNIFICANCE,
        surrogates=surrogates if kind == "surrogate" else None,
        **more(games.size),
    )
    protocols.check(kind, options, games)
    findings = protocols.find(auditor, kind, options, games)
    return np.array([auditor.to_epsilon(finding.parameter, delta) for finding in findings])


def row(found: np.ndarray, channel: Channel, size: int, protocol: str, auditor: Auditor) -> dict[str, Any]:
    """What bounds on many games say."""
    assumed = auditor.assumes(PROTOCOLS[protocol][0])
    return {
        "channel": channel.name,
        "num_canaries": size,
        "protocol": protocol,
        "auditor": auditor.name,
        "assumption": assumed,
        "holds": channel.satisfies(assumed),
        "delta": channel.delta_at(size),
        "significance": SIGNIFICANCE,
        "processor": processor(),
        "date": date.today(),
    } | summary(found, channel.epsilon)


def summary(found: np.ndarray, epsilon: float) -> dict[str, Any]:
    """Rate of false alarms with its standard error and limit, mean bound, and its share of the true epsilon."""
    games, alarms = len(found), int((found > epsilon).sum())
    rate = alarms / games
    return {
        "true_epsilon": epsilon,
        "games": games,
        "false_alarms": alarms,
        "rate": rate,
        "standard_error": math.sqrt(rate * (1 - rate) / games),
        "limit": limit(games),
        "keeps_level": rate <= limit(games),
        "mean_bound": found.mean(),
        "mean_share": found.mean() / epsilon if epsilon > 0 else math.nan,
    }


def limit(games: int, errors: float = 3.0) -> float:
    """The largest rate that so many games do not hold against a bound: the significance and so many standard errors."""
    return SIGNIFICANCE + errors * math.sqrt(SIGNIFICANCE * (1 - SIGNIFICANCE) / games)


def _first(games: Games, number: int) -> Games:
    """At most so many of the games."""
    if number >= len(games.values):
        return games
    return Games(values=games.values[:number], coins=games.coins[:number], ties=games.ties, paired=games.paired)


def in_order(table: pd.DataFrame) -> pd.DataFrame:
    """The rows in the order of channels, numbers of canaries, protocols and auditors."""
    orders: list[list[Any]] = [list(BY_NAME), list(NUM_GAMES), list(PROTOCOLS), [auditor.name for auditor in AUDITORS]]
    ranks = pd.DataFrame({key: table[key].map(order.index) for key, order in zip(KEY, orders, strict=True)})
    return table.loc[ranks.sort_values(KEY).index].reset_index(drop=True)


def play(cases: Sequence[Case], jobs: int, output: Path, rows: list[Any]) -> None:
    """Play the cases, the longest first, and write the file after each."""
    costly = sorted(cases, key=lambda case: case.size, reverse=True)
    # Fresh processes: BLAS reads its number of threads when it is loaded.
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        for found in tqdm(pool.imap_unordered(Case.rows, costly), total=len(costly), unit="case"):
            rows += found
            store.write_text(output, in_order(pd.DataFrame(rows, columns=COLUMNS)).to_csv(index=False))


def main(arguments: Sequence[str] | None = None) -> None:
    """Play what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", nargs="+", choices=list(BY_NAME), default=list(BY_NAME))
    parser.add_argument("--num-canaries", type=int, nargs="+", choices=list(NUM_GAMES), default=list(NUM_GAMES))
    parser.add_argument("--protocols", nargs="+", choices=list(PROTOCOLS), default=list(PROTOCOLS))
    parser.add_argument("--share", type=float, default=1.0, help="of the games")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--resume", action="store_true", help="keep the rows of the output file")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    kept = pd.read_csv(args.output) if args.resume and args.output.exists() else pd.DataFrame(columns=COLUMNS)
    done = set(kept[KEY[:3]].itertuples(index=False, name=None))
    cases = []
    for channel, size in itertools.product(args.channels, args.num_canaries):
        left = tuple(protocol for protocol in args.protocols if (channel, size, protocol) not in done)
        cases += [Case(channel, size, args.share, left)] if left else []
    play(cases, args.jobs, args.output, kept.to_dict("records"))


if __name__ == "__main__":
    main()
